"""An epoch of a differentiable search."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import torch

from nas.supernet.alpha_steps import alpha_step
from nas.supernet.recipe import Recipe
from nas.supernet.relaxed import relaxed_iteration
from nas.supernet.state import SearchState
from nas.supernet.weight_steps import Totals, weight_step
from nas.training.batches import Batch
from nas.training.loop import random_states, training_errors
from search_spaces.common.errors import RunError

Progress = Callable[[int], None]


def run_epoch(
    state: SearchState, recipe: Recipe, progress: Progress | None = None, stop: int | None = None
) -> dict[str, float]:
    """One pass over the images of the weights; the means of `train_loss`, `train_acc` and, from the alphas' batches,
    `alpha_loss`. A loss, gradient or parameter that is not finite ends it: the state is then `failed`.

    progress: called with the number of steps done after each. stop: leave the epoch before this step. Errors:
    UserError for a batch that cannot be normalised, RunError for too little memory.
    """
    per_epoch, epoch = state.batches.steps_per_epoch, state.epoch
    training = recipe.training.resolved(per_epoch)
    supernet = state.supernet
    supernet.progress = epoch / max(recipe.epochs - 1, 1)
    totals, alpha_losses = Totals(), []
    by_steps = state.alpha_optimizer is not None and recipe.solver != "shapley"
    warm = by_steps and epoch >= recipe.alpha_warmup_epochs
    begin = time.perf_counter()
    supernet.train()
    for part in state.parts.values():
        part.begin_epoch(state, recipe)
    with random_states(state.random, state.device), training_errors(recipe.training.batch_size):
        while state.epoch == epoch and state.step != stop:
            for group in state.optimizer.param_groups:
                group["lr"] = training.rate(state.step, per_epoch)
            batch = state.training_batch()
            moving = warm and (state.step + 1) % recipe.alpha_every == 0
            alpha_losses += _iteration(state, recipe, batch, epoch, totals, moving)
            if state.failed:
                break
            state.step += 1
            if progress is not None:
                progress(state.step)
    if not state.failed and state.epoch > epoch:
        _agree(state)
        for part in state.parts.values():
            part.end_epoch(state, recipe)
    state.seconds += time.perf_counter() - begin
    means = totals.over(state.processes).means()
    return means | ({"alpha_loss": sum(alpha_losses) / len(alpha_losses)} if alpha_losses else {})


def _agree(state: SearchState) -> None:
    """Running statistics become those of the leading process; all else must be the same in all processes already.

    Errors: RunError where it is not.
    """
    if state.processes.world == 1:
        return
    state.processes.copy_first(state.supernet.network.buffers())
    parameters = torch.cat([p.detach().flatten().double() for p in state.supernet.parameters()])
    found = state.processes.gather(hashlib.sha256(parameters.cpu().numpy().tobytes()).hexdigest())
    if len(set(found)) > 1:
        raise RunError(f"the processes' alphas and weights differ after epoch {state.epoch}; the search cannot go on")


def _iteration(
    state: SearchState, recipe: Recipe, batch: Batch, epoch: int, totals: Totals, moving: bool
) -> list[float]:
    """A step of the weights, and of the alphas if they are `moving`; the loss of a step that only these took."""
    if recipe.solver == "relaxed":
        return [relaxed_iteration(state, recipe, batch, epoch, totals)]
    if recipe.solver == "single-level" or not moving:
        weight_step(state, recipe, batch, epoch, totals, both=moving)
        return []
    if recipe.alpha_first:
        loss = alpha_step(state, recipe, batch, epoch)
        if not state.failed:
            weight_step(state, recipe, batch, epoch, totals, both=False)
        return [loss]
    weight_step(state, recipe, batch, epoch, totals, both=False)
    return [] if state.failed else [alpha_step(state, recipe, batch, epoch)]
