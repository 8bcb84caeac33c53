"""The training loop: small functions that every training of the toolkit is made of.

`start` makes a LoopState, `advance` trains it to a step, `evaluate` measures; `train` does the three. A state can be
saved and loaded at any step, and a later `advance` may follow another recipe (more steps, a decay at the end).
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from nas.training.augment import Batches, evaluation_batches
from nas.training.data import Dataset, Split
from nas.training.recalibrate import evaluating
from nas.training.recipe import OPTIMIZERS, Recipe, parameter_groups
from search_spaces.common.errors import UserError
from search_spaces.common.files import atomic_write

FORMAT = 1
STOP = "stop"  # what a callback returns to end the training
Metrics = Mapping[str, float]
Callback = Callable[[int, Metrics], str | None]


@dataclass
class LoopState:
    """A training at a step: everything that the next step depends on.

    losses: the training loss of every step so far. random: torch's generator states (dropout draws from them).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches
    step: int = 0
    losses: list[float] = field(default_factory=list)
    random: dict[str, Tensor] = field(default_factory=dict)
    stopped: str | None = None
    failed: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class TrainResult:
    """What a training gave. losses: training loss by step. metrics: `val_acc` (percent), `val_loss`, `val_count`.

    stopped: why it ended before its last step, or None. failed: whether that was a loss that is not finite; then
    there are no metrics.
    """

    steps: int
    losses: tuple[float, ...]
    metrics: Metrics
    stopped: str | None
    failed: bool
    seconds: float

    @property
    def late_loss(self) -> float:
        """Mean training loss over the last half of the steps: the best free score of a short training."""
        return late_loss(self.losses)


def late_loss(losses: Sequence[float]) -> float:
    """The mean of the last half of `losses`; NaN for none."""
    half = losses[len(losses) // 2 :]
    return sum(half) / len(half) if half else math.nan


# -- pieces ------------------------------------------------------------------------------------------------------


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, recipe: Recipe
) -> float:
    """Forward, backward, clipping and one step of the optimiser; the loss. One that is not finite changes nothing."""
    optimizer.zero_grad(set_to_none=True)
    outputs = model(images)
    loss = nn.functional.cross_entropy(outputs, labels, label_smoothing=recipe.label_smoothing)
    value = loss.item()
    if math.isfinite(value):
        loss.backward()
        if recipe.clip_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
        optimizer.step()
    return value


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, batch_statistics: bool = False
) -> dict[str, float]:
    """`acc` in percent, mean cross-entropy `loss` and `count` over (images, labels); the model is left as it was.

    batch_statistics: normalise by each batch's own statistics. Errors: UserError if there is no image.
    """
    right = total = 0
    loss = 0.0
    device = device_of(model)
    with evaluating(model, batch_statistics=batch_statistics):
        for images, labels in batches:
            outputs, labels = model(images.to(device)).float(), labels.to(device)
            loss += nn.functional.cross_entropy(outputs, labels, reduction="sum").item()
            right += int((outputs.argmax(1) == labels).sum())
            total += len(labels)
    if total == 0:
        raise UserError("0 images", "at least one image to evaluate on")
    return {"acc": 100 * right / total, "loss": loss / total, "count": float(total)}


def evaluate_split(model: nn.Module, data: Dataset, split: Split, recipe: Recipe) -> dict[str, float]:
    """`evaluate` over a part of a data set, as the recipe says."""
    found = evaluation_batches(split.images, split.labels, recipe.eval_batch_size, normalize=data.normalize)
    return evaluate(model, found, batch_statistics=recipe.batch_statistics)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def random_states(state: dict[str, Tensor], device: torch.device) -> Iterator[None]:
    """torch's own generators (dropout has no other) set to `state` inside the block and written back to it at the end;
    outside they are as before."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.set_rng_state(state["cpu"])
        if cuda and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)
        try:
            yield
        finally:
            state["cpu"] = torch.get_rng_state()
            if cuda:
                state["cuda"] = torch.cuda.get_rng_state(device)


# -- the loop ----------------------------------------------------------------------------------------------------


def start(model: nn.Module, data: Dataset, recipe: Recipe, *, seed: int) -> LoopState:
    """The state before the first step. seed: of the order of images, augmentation and dropout; not of the weights.

    Errors: UserError if the data do not fit the recipe.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = Batches(
        data.train.images,
        data.train.labels,
        recipe.batch_size,
        generator=generator,
        augment=recipe.augmentation(),
        normalize=data.normalize,
    )
    optimizer = OPTIMIZERS[recipe.optimizer](parameter_groups(model, recipe.weight_decay), recipe)
    random = {"cpu": torch.Generator().manual_seed(seed + 1).get_state()}
    device = device_of(model)
    if device.type == "cuda":
        random["cuda"] = torch.Generator(device).manual_seed(seed + 1).get_state()
    return LoopState(model, optimizer, batches, random=random)


def advance(
    state: LoopState, recipe: Recipe, *, steps: int | None = None, callbacks: Sequence[Callback] = ()
) -> LoopState:
    """Train until `steps` steps are done in all (default: the recipe's); the same state, changed.

    A callback gets (steps done, {train_loss, learning_rate}) after every step and may return STOP. A loss that is not
    finite ends the training before it reaches the weights. A state that stopped does not go on.
    """
    device = device_of(state.model)
    last = recipe.steps if steps is None else steps
    begin = time.perf_counter()
    state.model.train()
    with random_states(state.random, device):
        while state.step < last and state.stopped is None:
            rate = recipe.rate(state.step)
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            images, labels = next(state.batches)
            loss = train_step(state.model, state.optimizer, images.to(device), labels.to(device), recipe)
            state.step += 1
            state.losses.append(loss)
            if not math.isfinite(loss):
                state.stopped, state.failed = f"the training loss became {loss} at step {state.step}", True
                break
            metrics = {"train_loss": loss, "learning_rate": rate}
            for callback in callbacks:
                if callback(state.step, metrics) == STOP:
                    reason = getattr(callback, "reason", None) or "stopped by a callback"
                    state.stopped = f"{reason} at step {state.step}"
    state.seconds += time.perf_counter() - begin
    return state


def result(state: LoopState, data: Dataset, recipe: Recipe) -> TrainResult:
    """The state's curve, and its validation metrics unless its loss was not finite."""
    metrics = {}
    if not state.failed:
        metrics = {f"val_{k}": v for k, v in evaluate_split(state.model, data, data.val, recipe).items()}
    return TrainResult(state.step, tuple(state.losses), metrics, state.stopped, state.failed, state.seconds)


def train(
    model: nn.Module, data: Dataset, recipe: Recipe, *, seed: int, callbacks: Sequence[Callback] = ()
) -> TrainResult:
    """Train a model in place and measure it on the validation images.

    Deterministic on a CPU for one seed and one number of threads. Errors: UserError if the data do not fit.
    """
    return result(advance(start(model, data, recipe, seed=seed), recipe, callbacks=callbacks), data, recipe)


# -- checkpoints -------------------------------------------------------------------------------------------------


def save_state(path: str | os.PathLike[str], state: LoopState, recipe: Recipe) -> None:
    """Write a checkpoint; the old file survives a crash or a full disk (RunError)."""
    content = {
        "format": FORMAT,
        "recipe": asdict(recipe),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "batches": state.batches.state_dict(),
        "random": state.random,
        "step": state.step,
        "losses": torch.tensor(state.losses, dtype=torch.float64),
        "stopped": state.stopped,
        "failed": state.failed,
        "seconds": state.seconds,
    }
    with atomic_write(path, "wb") as file:
        torch.save(content, file)


def load_state(path: str | os.PathLike[str], model: nn.Module, data: Dataset, recipe: Recipe) -> LoopState:
    """The state of a checkpoint, in a model of the same architecture; going on is bit-identical on a CPU.

    The recipe may have other steps or another schedule; other settings of data and optimiser are refused with the
    differences. Errors: UserError for a damaged file, a newer format, another model or recipe.
    """
    name = str(Path(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content["format"]
    except FileNotFoundError:
        raise UserError(name, "a checkpoint that exists") from None
    except Exception as error:  # a damaged archive can raise nearly anything
        raise UserError(name, f"a complete checkpoint ({str(error).splitlines()[0][:80]})") from None
    if version > FORMAT:
        raise UserError(name, f"a checkpoint of format {FORMAT} or older, found {version}; update nasforge")
    free = ("steps", "schedule", "decay_share", "warmup_steps", "learning_rate", "source", "eval_batch_size")
    differences = [d for d in recipe.differences(content["recipe"]) if d.split(":")[0] not in free]
    if differences:
        raise UserError(name, f"a checkpoint of the same recipe; {'; '.join(differences)}")
    state = start(model, data, recipe, seed=0)
    try:
        model.load_state_dict(content["model"])
        state.optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise UserError(name, f"a checkpoint of this model ({' '.join(str(error).split())[:120]})") from None
    state.batches.load_state_dict(content["batches"])
    state.random = dict(content["random"])
    state.step, state.losses = content["step"], content["losses"].tolist()
    state.stopped, state.failed, state.seconds = content["stopped"], content["failed"], content["seconds"]
    return state
