"""The steps of a differentiable search: alphas and weights, one epoch after another, in a state that can be saved."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nas.supernet import regularizers
from nas.supernet.bilevel import first_order, kept, second_order, set_gradients
from nas.supernet.hessian import extreme_eigenvalues
from nas.supernet.network import Draw, Supernet
from nas.supernet.perturbation import adversarial_perturbation, radius_at, random_perturbation
from nas.supernet.recipe import Recipe
from nas.supernet.relaxation import Weights
from nas.training.batches import Batch, Batches, make_batches
from nas.training.data import Dataset
from nas.training.loop import random_states, training_errors
from nas.training.optimizers import make_optimizer

ALPHA_SEED = 1_000_003  # added to the seed of the weights' batches
Progress = Callable[[int], None]


@dataclass
class SearchState:
    """A search at a step: everything that the next step depends on. rows: the log, a row for each epoch that is over.

    alpha_optimizer: None where alphas are not used. random: torch's generator states. stopped: why the search ended
    before its last epoch, or None; failed: whether that was a number that is not finite.
    """

    supernet: Supernet
    optimizer: torch.optim.Optimizer
    alpha_optimizer: torch.optim.Optimizer | None
    batches: Batches
    alpha_batches: Batches
    device: torch.device
    random: dict[str, Tensor]
    step: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None
    failed: bool = False
    seconds: float = 0.0

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return self.step // self.batches.steps_per_epoch


def start(supernet: Supernet, data: Dataset, recipe: Recipe, *, seed: int) -> SearchState:
    """The state before the first step. data: `train` for the weights, `val` for the alphas.

    Errors: UserError where the images do not fill a batch.
    """
    device = next(supernet.parameters()).device
    batches = make_batches(data, recipe.training, seed=seed)
    alpha_batches, optimizer = batches, None
    if recipe.solver != "weights-only":
        if recipe.solver != "single-level":
            alpha_batches = make_batches(replace(data, train=data.val), recipe.training, seed=seed + ALPHA_SEED)
        alphas = supernet.architecture_parameters()
        optimizer = torch.optim.Adam(
            alphas, lr=recipe.alpha_rate, betas=recipe.alpha_betas, weight_decay=recipe.alpha_decay
        )
    random = {"cpu": torch.Generator().manual_seed(seed + 1).get_state()}
    if device.type == "cuda":
        random["cuda"] = torch.Generator(device).manual_seed(seed + 1).get_state()
    weights = make_optimizer(supernet.network, recipe.training)
    return SearchState(supernet, weights, optimizer, batches, alpha_batches, device, random)


def state_dict(state: SearchState) -> dict[str, Any]:
    """Everything that the next step depends on, as tensors and plain values."""
    supernet = state.supernet
    return {
        "supernet": supernet.state_dict(),
        "selected": {label: supernet._mixed[label][0].selected for label in sorted(supernet.fixed)},
        "progress": supernet.progress,
        "generator": supernet.generator.get_state(),
        "optimizer": state.optimizer.state_dict(),
        "alpha_optimizer": None if state.alpha_optimizer is None else state.alpha_optimizer.state_dict(),
        "random": dict(state.random),
        "images": [len(state.batches.images), len(state.alpha_batches.images)],
        "step": state.step,
        "rows": state.rows,
        "stopped": state.stopped,
        "failed": state.failed,
        "seconds": state.seconds,
    }


def load_state_dict(state: SearchState, content: Mapping[str, Any]) -> None:
    """Put a state back to where `state_dict` was taken. Errors: RuntimeError, ValueError, KeyError if it differs."""
    found = [len(state.batches.images), len(state.alpha_batches.images)]
    if list(content["images"]) != found:
        raise ValueError(f"{content['images']} images for weights and alphas instead of {found}")
    state.supernet.load_state_dict(content["supernet"])
    state.supernet.release()
    state.supernet.select(content["selected"])
    state.supernet.progress = content["progress"]
    state.supernet.generator.set_state(content["generator"])
    state.optimizer.load_state_dict(deepcopy(content["optimizer"]))
    if state.alpha_optimizer is not None:
        state.alpha_optimizer.load_state_dict(deepcopy(content["alpha_optimizer"]))
    state.random = dict(content["random"])
    state.step, state.rows = content["step"], [dict(row) for row in content["rows"]]
    state.stopped, state.failed, state.seconds = content["stopped"], content["failed"], content["seconds"]


def run_epoch(state: SearchState, recipe: Recipe, progress: Progress | None = None) -> dict[str, float]:
    """One pass over the images of the weights; the means of `train_loss`, `train_acc` and, from the alphas' batches,
    `alpha_loss`. A loss, gradient or parameter that is not finite ends it: the state is then `failed`.

    progress: called with the number of steps done after each. Errors: UserError for a batch that cannot be normalised,
    RunError for too little memory.
    """
    per_epoch, epoch = state.batches.steps_per_epoch, state.epoch
    training = recipe.training.resolved(per_epoch)
    supernet = state.supernet
    supernet.progress = epoch / max(recipe.epochs - 1, 1)
    totals, alpha_losses = _Totals(), []
    moving = state.alpha_optimizer is not None and epoch >= recipe.alpha_warmup_epochs
    begin = time.perf_counter()
    supernet.train()
    with random_states(state.random, state.device), training_errors(recipe.training.batch_size):
        while state.epoch == epoch:
            for group in state.optimizer.param_groups:
                group["lr"] = training.rate(state.step, per_epoch)
            batch = _to(state.batches.batch(state.step), state.device)
            single = recipe.solver == "single-level"
            if moving and not single and recipe.alpha_first:
                alpha_losses.append(_alpha_step(state, recipe, batch, epoch))
            if not state.failed:
                _weight_step(state, recipe, batch, epoch, totals, both=single and moving)
            if moving and not single and not recipe.alpha_first and not state.failed:
                alpha_losses.append(_alpha_step(state, recipe, batch, epoch))
            if state.failed:
                break
            state.step += 1
            if progress is not None:
                progress(state.step)
    state.seconds += time.perf_counter() - begin
    means = totals.means()
    return means | ({"alpha_loss": sum(alpha_losses) / len(alpha_losses)} if alpha_losses else {})


# -- steps -------------------------------------------------------------------------------------------------------


def _alpha_step(state: SearchState, recipe: Recipe, batch: Batch, epoch: int) -> float:
    """One step of the alphas; the cross-entropy they saw."""
    supernet, optimizer = state.supernet, state.alpha_optimizer
    assert optimizer is not None
    alphas = supernet.architecture_parameters()
    held_out = _to(state.alpha_batches.batch(state.step), state.device)
    seen: list[Tensor] = []

    def val_loss() -> Tensor:
        loss = cross_entropy(supernet(held_out.images), held_out, recipe)
        seen.append(loss.detach())
        term = regularization(supernet, recipe, epoch)
        return loss if term is None else loss + term

    if recipe.solver == "second-order":
        rewound = _rewinding(supernet, state.random)

        def train_loss() -> Tensor:
            rewound()
            return cross_entropy(supernet(batch.images), batch, recipe)

        def val_after() -> Tensor:
            rewound()
            return val_loss()

        buffers = list(supernet.network.buffers())
        _, slopes = second_order(train_loss, val_after, alphas, state.optimizer, buffers=buffers)  # type: ignore[arg-type]
    else:
        _, slopes = first_order(val_loss, alphas)
    set_gradients(alphas, slopes)
    _descend_alphas(state, recipe, float(seen[-1]))
    return float(seen[-1])


def _descend_alphas(state: SearchState, recipe: Recipe, loss: float) -> None:
    """The step of the alphas by the gradients they have, unless something is not finite."""
    alphas = state.supernet.architecture_parameters()
    assert state.alpha_optimizer is not None
    limit = math.inf if recipe.alpha_clip is None else recipe.alpha_clip
    norm = _clipped(alphas, limit)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        what = "loss" if not math.isfinite(loss) else "gradient"
        _fail(state, f"the {what} of the alphas became {loss if what == 'loss' else norm}")
        return
    state.alpha_optimizer.step()
    state.alpha_optimizer.zero_grad(set_to_none=True)


def _weight_step(state: SearchState, recipe: Recipe, batch: Batch, epoch: int, totals: _Totals, *, both: bool) -> None:
    """One step of the weights; `both`: of the alphas too, by the same loss."""
    supernet = state.supernet
    draw = supernet.draw()
    if not both:
        draw = _detached(draw, leaves=recipe.perturbation is not None)
    with _perturbed(state, recipe, batch, epoch, draw):
        outputs = supernet(batch.images, draw=draw)
        loss = cross_entropy(outputs, batch, recipe)
        value = float(loss.detach())
        if not math.isfinite(value):
            _fail(state, f"the training loss became {value}")
            return
        term = regularization(supernet, recipe, epoch) if both else None
        state.optimizer.zero_grad(set_to_none=True)
        (loss if term is None else loss + term).backward()
    limit = math.inf if recipe.training.clip_norm is None else recipe.training.clip_norm
    norm = _clipped(supernet.weight_parameters(), limit)
    if not math.isfinite(norm):
        _fail(state, f"the norm of the weights' gradient became {norm}")
        return
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if both:
        _descend_alphas(state, recipe, value)
    totals.add(value, outputs.detach(), batch.labels)


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


def regularization(supernet: Supernet, recipe: Recipe, epoch: int) -> Tensor | None:
    """The weighted term of the alphas' loss in an epoch, from 0; None for recipes without one."""
    if recipe.regularizer is None:
        return None
    weight = recipe.regularizer_weight
    if recipe.regularizer_ramp:
        weight = regularizers.linear(0.0, weight, epoch, recipe.epochs)
    terms = {"beta-decay": regularizers.beta_decay, "zero-one": regularizers.zero_one, "entropy": regularizers.entropy}
    return weight * terms[recipe.regularizer](list(supernet.alphas.values()))


def cross_entropy(outputs: Tensor, batch: Batch, recipe: Recipe) -> Tensor:
    """The mean loss of a batch, smoothed as the recipe says."""
    return nn.functional.cross_entropy(outputs.float(), batch.targets, label_smoothing=recipe.training.label_smoothing)


def curvature(state: SearchState, recipe: Recipe) -> float:
    """The largest eigenvalue of the Hessian of the validation loss in the alphas, on the next batch of the alphas.

    The search goes on as if it had not been measured: draws, buffers and generators are put back.
    """
    supernet = state.supernet
    held_out = _to(state.alpha_batches.batch(state.step), state.device)
    random = {name: value.clone() for name, value in state.random.items()}
    before = supernet.generator.get_state()
    supernet.train()
    try:
        with (
            kept(list(supernet.network.buffers())),
            random_states(random, state.device),
            training_errors(recipe.training.batch_size),
        ):
            _, largest = extreme_eigenvalues(
                lambda: cross_entropy(supernet(held_out.images), held_out, recipe),
                list(supernet.alphas.values()),
                torch.Generator().manual_seed(state.step),
                tolerance=0.01,  # of the residual; an eigenvalue's error is of its square
            )
    finally:
        supernet.generator.set_state(before)
    return largest


# -- pieces ------------------------------------------------------------------------------------------------------


def _detached(draw: Draw, *, leaves: bool) -> Draw:
    """The same mixing weights without a path to the alphas; leaves: to be perturbed, so they take gradients."""
    weights = {
        label: Weights(w.values.detach().clone().requires_grad_(leaves), w.active) for label, w in draw.weights.items()
    }
    return Draw(weights, {label: scale.detach() for label, scale in draw.scales.items()})


def _rewinding(supernet: Supernet, random: dict[str, Tensor]) -> Callable[[], None]:
    """A function that puts all generators back to where they are now, so that a loss called again is the same."""
    mixing, own = supernet.generator.get_state(), torch.get_rng_state()

    def rewind() -> None:
        supernet.generator.set_state(mixing)
        torch.set_rng_state(own)

    if "cuda" not in random:
        return rewind
    device = next(supernet.parameters()).device
    there = torch.cuda.get_rng_state(device)

    def rewind_all() -> None:
        rewind()
        torch.cuda.set_rng_state(there, device)

    return rewind_all


def _clipped(parameters: list[nn.Parameter], limit: float) -> float:
    """The norm of the gradients before they are clipped to `limit`."""
    if limit < math.inf:
        return nn.utils.clip_grad_norm_(parameters, limit).item()
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()


def _fail(state: SearchState, reason: str) -> None:
    place = f"step {state.step + 1}, in epoch {state.epoch + 1}"
    state.stopped, state.failed = f"{reason} at {place}", True


def _to(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(tensor.to(device) for tensor in batch))


@dataclass
class _Totals:
    loss: float = 0.0
    hits: int = 0
    count: int = 0

    def add(self, loss: float, outputs: Tensor, labels: Tensor) -> None:
        self.loss += loss * len(labels)
        self.hits += int((outputs.argmax(1) == labels).sum())
        self.count += len(labels)

    def means(self) -> dict[str, float]:
        if not self.count:
            return {}
        return {"train_loss": self.loss / self.count, "train_acc": 100 * self.hits / self.count}
