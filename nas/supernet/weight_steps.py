"""A step of the weights that the candidates share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nas.supernet.alpha_steps import clipped_norm, descend_alphas
from nas.supernet.losses import alphas_loss, cross_entropy
from nas.supernet.network import Draw
from nas.supernet.paths import fair_draws
from nas.supernet.perturbation import adversarial_perturbation, radius_at, random_perturbation
from nas.supernet.recipe import Recipe
from nas.supernet.relaxation import Weights
from nas.supernet.state import SearchState
from nas.training.batches import Batch
from nas.training.distributed import Processes


def weight_step(state: SearchState, recipe: Recipe, batch: Batch, epoch: int, totals: Totals, *, both: bool) -> None:
    """One step of the weights; `both`: of the alphas too, by the same loss."""
    supernet = state.supernet
    draws = fair_draws(supernet) if recipe.strict_fairness else [supernet.draw()]
    passes: list[tuple[float, Tensor]] = []
    state.optimizer.zero_grad(set_to_none=True)
    for draw in draws:
        if not both:
            draw = _detached(draw, leaves=recipe.perturbation is not None)
        with _perturbed(state, recipe, batch, epoch, draw):
            outputs = supernet(batch.images, draw=draw)
            loss = state.share(batch) * cross_entropy(outputs, batch, recipe)
            value = state.mean(loss.detach())
            if not math.isfinite(value):
                state.fail(f"the training loss became {value}")
                return
            (alphas_loss(loss, state, recipe, epoch) if both else loss).backward()
        passes.append((value, outputs.detach()))
        for part in state.parts.values():
            part.after_outputs(state, recipe, draw, outputs.detach(), batch)
    limit = math.inf if recipe.training.clip_norm is None else recipe.training.clip_norm
    moved = [*supernet.weight_parameters(), *(supernet.architecture_parameters() if both else ())]
    state.processes.average([p.grad for p in moved if p.grad is not None])
    norm = clipped_norm(supernet.weight_parameters(), limit)
    if not math.isfinite(norm):
        state.fail(f"the norm of the weights' gradient became {norm}")
        return
    for part in state.parts.values():
        part.before_weights(state, recipe, batch)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if both:
        descend_alphas(state, recipe, passes[-1][0])
    for value, outputs in passes:
        totals.add(value / state.share(batch), outputs, batch.labels)


@contextlib.contextmanager
def _perturbed(state: SearchState, recipe: Recipe, batch: Batch, epoch: int, draw: Draw) -> Iterator[None]:
    """The mixing weights of `draw` as the recipe disturbs them inside the block."""
    supernet = state.supernet
    if recipe.perturbation is None:
        yield
        return
    values = [weights.values for weights in draw.weights.values()]
    radius = radius_at(epoch, recipe.epochs, *recipe.perturbation_radius)
    if recipe.perturbation == "random":
        with random_perturbation(values, radius, supernet.generator):
            yield
        return

    def loss() -> Tensor:  # in evaluation mode, as the authors'
        supernet.eval()
        try:
            return cross_entropy(supernet(batch.images, draw=draw), batch, recipe)
        finally:
            supernet.train()

    with adversarial_perturbation(loss, values, radius, supernet.generator):
        yield


def _detached(draw: Draw, *, leaves: bool) -> Draw:
    """The same mixing weights without a path to the alphas; leaves: to be perturbed, so they take gradients."""
    weights = {
        label: Weights(w.values.detach().clone().requires_grad_(leaves), w.active) for label, w in draw.weights.items()
    }
    return Draw(weights, {label: scale.detach() for label, scale in draw.scales.items()})


@dataclass
class Totals:
    """Sums over the images of an epoch."""

    loss: float = 0.0
    hits: int = 0
    count: int = 0

    def add(self, loss: float, outputs: Tensor, labels: Tensor) -> None:
        self.loss += loss * len(labels)
        self.hits += int((outputs.argmax(1) == labels).sum())
        self.count += len(labels)

    def over(self, processes: Processes) -> Totals:
        """The sums over the images of all processes."""
        sums = torch.tensor([self.loss, self.hits, self.count], dtype=torch.float64)
        loss, hits, count = processes.total(sums).tolist()
        return Totals(loss, int(hits), int(count))

    def means(self) -> dict[str, float]:
        if not self.count:
            return {}
        return {"train_loss": self.loss / self.count, "train_acc": 100 * self.hits / self.count}
