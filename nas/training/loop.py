"""The training loop: small functions that every training of the toolkit is made of.

`start` makes a LoopState, `advance` trains it to a step, `evaluate` measures; `train` does the three. A state can be
saved and loaded at any step (`nas.training.checkpoints`), and a later `advance` may follow another recipe (more steps,
a decay at the end).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import kernels
from nas.training.batches import Batch, Batches, evaluation_batches, make_batches
from nas.training.data import Dataset, Split
from nas.training.distributed import ALONE, Processes
from nas.training.drop_path import DropPath
from nas.training.optimizers import make_optimizer
from nas.training.recalibrate import evaluating
from nas.training.recipe import Recipe
from search_spaces.common.errors import RunError, UserError

LOWEST_SCALE = 2.0**-14  # of a float16 loss: thirty steps in a row that overflowed
STOP = "stop"  # what a callback returns to end the training
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Metrics = Mapping[str, float]
Callback = Callable[[int, Metrics], str | None]


@dataclass
class LoopState:
    """A training at a step: everything that the next step depends on.

    forward: what is called in training; `model` wrapped for several processes, compiled, with its auxiliary head.
    losses: the training loss of every step so far. hits, seen: right answers and images since the epoch began.
    random: torch's generator states (dropout draws from them). average: the moving average of the model, if any.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches
    forward: nn.Module
    scaler: torch.amp.GradScaler
    step: int = 0
    losses: list[float] = field(default_factory=list)
    hits: int = 0
    seen: int = 0
    random: dict[str, Tensor] = field(default_factory=dict)
    average: AveragedModel | None = None
    drop_path: DropPath | None = None
    processes: Processes = ALONE
    stopped: str | None = None
    failed: bool = False
    seconds: float = 0.0

    @property
    def evaluated(self) -> nn.Module:
        """The model whose accuracy counts: the moving average where there is one."""
        return self.model if self.average is None else self.average.module

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return self.step // self.batches.steps_per_epoch


@dataclass(frozen=True)
class TrainResult:
    """What a training gave. losses: training loss by step. metrics: `val_acc` (percent), `val_loss`, `val_count`.

    stopped: why it ended before its last step, or None. failed: whether that was a loss or gradient that is not
    finite; then there are no metrics.
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


class _WithAuxiliary(nn.Module):
    """Calls the network's `forward_with_auxiliary`, so that wrappers see one forward."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.forward_with_auxiliary(images)  # type: ignore[operator]


def _loss(outputs: Any, targets: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(loss, logits). With an auxiliary head its loss is added, weighted."""
    logits, auxiliary = outputs if isinstance(outputs, tuple) else (outputs, None)
    loss = nn.functional.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)
    if auxiliary is not None:
        extra = nn.functional.cross_entropy(auxiliary.float(), targets, label_smoothing=recipe.label_smoothing)
        loss = loss + recipe.auxiliary_weight * extra
    return loss, logits


def train_step(state: LoopState, batch: Batch, recipe: Recipe) -> float:
    """Forward, backward, clipping and one step of the optimiser; the loss over all processes.

    A loss or gradient that is not finite leaves parameters and optimiser as they were, and the state as failed;
    running statistics have seen the batch by then.
    """
    device = device_of(state.model)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    images = batch.images.to(device, memory_format=layout)
    labels, targets = batch.labels.to(device), batch.targets.to(device)
    state.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device.type, DTYPES[recipe.precision], enabled=recipe.precision != "float32"):
        outputs = state.forward(images)
    loss, logits = _loss(outputs, targets, recipe)
    size = len(labels)
    sums = torch.stack([loss.detach() * size, (logits.argmax(1) == labels).sum(), loss.new_tensor(size)])
    total, hits, count = state.processes.total(sums).tolist()
    value = total / count
    if not math.isfinite(value):
        return _fail(state, f"the training loss became {value}", value)
    # Gradients are averaged over processes, whose shares of a last batch may differ by an image.
    share = size * state.processes.world / count
    state.scaler.scale(loss if share == 1 else loss * share).backward()
    norm = _gradient_norm(state, recipe)
    if not math.isfinite(norm):
        return _fail(state, f"the norm of the gradient became {norm}", value)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.average is not None:
        state.average.update_parameters(state.model)
    state.hits, state.seen = state.hits + int(hits), state.seen + int(count)
    return value


def _gradient_norm(state: LoopState, recipe: Recipe) -> float:
    """Clips the gradient if the recipe says so; its norm before.

    In float16 a gradient that overflows is usual: the scaler leaves the step out and takes a lower scale, so that
    only a gradient that overflows at every scale has no finite norm.
    """
    if state.scaler.is_enabled():
        if recipe.clip_norm is not None:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip_norm)
        return 0.0 if state.scaler.get_scale() > LOWEST_SCALE else math.inf
    if recipe.clip_norm is not None:
        return nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip_norm).item()
    return nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None]).item()


def _fail(state: LoopState, reason: str, loss: float) -> float:
    state.stopped, state.failed = f"{reason} at step {state.step + 1}", True
    return loss


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    batch_statistics: bool = False,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """`acc` in percent, mean cross-entropy `loss` and `count` over (images, labels); the model is left as it was.

    batch_statistics: normalise by each batch's own statistics. processes: each has its share of every batch, and
    running statistics become those of the leader. Errors: UserError if there is no image.
    """
    processes.copy_first(model.buffers())
    right = total = 0
    loss = 0.0
    device = device_of(model)
    with evaluating(model, batch_statistics=batch_statistics):
        for images, labels in batches:
            outputs, labels = model(images.to(device)).float(), labels.to(device)
            loss += nn.functional.cross_entropy(outputs, labels, reduction="sum").item()
            right += int((outputs.argmax(1) == labels).sum())
            total += len(labels)
    if processes.world > 1:
        sums = processes.total(torch.tensor([loss, right, total], dtype=torch.float64, device=device)).tolist()
        loss, right, total = sums[0], int(sums[1]), int(sums[2])
    if total == 0:
        raise UserError("0 images", "at least one image to evaluate on")
    return {"acc": 100 * right / total, "loss": loss / total, "count": float(total)}


def evaluate_split(
    model: nn.Module, data: Dataset, split: Split, recipe: Recipe, processes: Processes = ALONE
) -> dict[str, float]:
    """`evaluate` over a part of a data set, as the recipe says."""
    parts = {"rank": processes.rank, "world": processes.world}
    found = evaluation_batches(split.images, split.labels, recipe.eval_batch_size, normalize=data.normalize, **parts)
    with training_errors(recipe.eval_batch_size, "eval_batch_size"):
        return evaluate(model, found, batch_statistics=recipe.batch_statistics, processes=processes)


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


@contextlib.contextmanager
def training_errors(batch_size: int, setting: str = "batch_size") -> Iterator[None]:
    """Says what to change where torch says what failed: UserError for a batch of one image that is normalised over
    the batch and for labels that the model has no output for, RunError for too little memory."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            expected = "two images or more in every batch: the model normalises over the batch"
            remedy = "drop_last leaves a last image out" if setting == "batch_size" else f"another {setting}"
            raise UserError("a batch of one image", f"{expected} ({remedy})") from None
        raise
    except IndexError as error:
        if "is out of bounds" in str(error) and str(error).startswith("Target"):
            raise UserError(f"label {str(error).split()[1]}", "labels below the model's number of outputs") from None
        raise
    except RuntimeError as error:  # out of memory is one
        if out_of_memory(error):
            hint = f"lower {setting}, channels or layers, or use precision=bfloat16"
            raise RunError(f"out of memory with batches of {batch_size} images; {hint}") from error
        raise


def out_of_memory(error: Exception) -> bool:
    """Whether torch ran out of memory, on any device."""
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


# -- the loop ----------------------------------------------------------------------------------------------------


def check_model(model: nn.Module, data: Dataset) -> None:
    """Send two images through. Errors: UserError if the model does not take them or has another number of classes."""
    images = data.normalize(data.train.images[:2]).to(device_of(model))
    shape = "x".join(map(str, data.shape))
    try:
        with torch.no_grad(), evaluating(model):
            outputs = model(images)
    except (RuntimeError, ValueError) as error:
        if out_of_memory(error):
            raise RunError("out of memory with two images; lower channels or layers") from error
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"images of {shape}", f"images that the model takes ({reason})") from None
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(images):
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UserError(str(found), f"one row of logits for each image, [{len(images)}, {data.num_classes}]")
    if outputs.shape[1] != data.num_classes:
        expected = f"as many as {data.name} has, {data.num_classes} (num_classes={data.num_classes})"
        raise UserError(f"{outputs.shape[1]} outputs", expected)


def _fuses(recipe: Recipe, model: nn.Module) -> bool:
    """Whether the training replaces the model's layers by fused ones; not if its owner did."""
    wanted = recipe.kernels == "triton" or (recipe.kernels == "auto" and device_of(model).type == "cuda")
    return wanted and not kernels.is_fused(model)


def start(model: nn.Module, data: Dataset, recipe: Recipe, *, seed: int, processes: Processes = ALONE) -> LoopState:
    """The state before the first step. seed: of the order of images, augmentation and dropout; not of the weights.

    The layers are fused in place as the recipe says (`kernels.unfuse` undoes it). Errors: UserError if the data do not
    fit the recipe, and for kernels=triton where no kernel can run.
    """
    batches = make_batches(data, recipe, seed=seed, processes=processes)
    device = device_of(model)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if _fuses(recipe, model):
        kernels.fuse(model, inplace=True, backend=recipe.kernels)
    optimizer = make_optimizer(model, recipe)
    own_seed = seed + 1 + 1_000_003 * processes.rank  # dropout differs between processes
    random = {"cpu": torch.Generator().manual_seed(own_seed).get_state()}
    if device.type == "cuda":
        random["cuda"] = torch.Generator(device).manual_seed(own_seed).get_state()
    average = None
    if recipe.ema_decay is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay), use_buffers=True)
    drop_path = DropPath(model) if recipe.drop_path else None
    forward: Any = model
    if recipe.auxiliary_weight:
        if getattr(model, "auxiliary_head", None) is None:
            raise UserError(recipe.auxiliary_weight, "an auxiliary weight of 0 for a network without auxiliary head")
        forward = _WithAuxiliary(model)
    if processes.world > 1:
        # Dead edges of a cell have parameters without gradient, for which the processes would wait for ever.
        devices = [device] if device.type == "cuda" else None
        forward = nn.parallel.DistributedDataParallel(forward, device_ids=devices, find_unused_parameters=True)
    if recipe.kernels == "compile":
        forward = torch.compile(forward)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
    return LoopState(
        model,
        optimizer,
        batches,
        forward,
        scaler,
        random=random,
        average=average,
        drop_path=drop_path,
        processes=processes,
    )


def advance(
    state: LoopState, recipe: Recipe, *, steps: int | None = None, callbacks: Sequence[Callback] = ()
) -> LoopState:
    """Train until `steps` steps are done in all (default: the recipe's); the same state, changed.

    A callback gets (steps done, {train_loss, learning_rate}) after every step and may return STOP. A loss or gradient
    that is not finite ends the training before it reaches the weights. A state that stopped does not go on. Errors:
    UserError for a batch that cannot be normalised; RunError when memory runs out.
    """
    per_epoch = state.batches.steps_per_epoch
    recipe = recipe.resolved(per_epoch)
    last = recipe.steps if steps is None else steps
    begin = time.perf_counter()
    state.forward.train()
    state.model.train()
    with random_states(state.random, device_of(state.model)), training_errors(recipe.batch_size):
        while state.step < last and state.stopped is None:
            rate = recipe.rate(state.step, per_epoch)
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            if state.drop_path is not None:
                state.drop_path.set(recipe.drop_path_at(state.step, per_epoch))
            loss = train_step(state, state.batches.batch(state.step), recipe)
            state.step += 1
            state.losses.append(loss)
            if state.failed:
                break
            metrics = {"train_loss": loss, "learning_rate": rate}
            for callback in callbacks:
                if callback(state.step, metrics) == STOP:
                    reason = getattr(callback, "reason", None) or "stopped by a callback"
                    state.stopped = f"{reason} at step {state.step}"
    state.seconds += time.perf_counter() - begin
    return state


def result(state: LoopState, data: Dataset, recipe: Recipe) -> TrainResult:
    """The state's curve, and its validation metrics unless it failed."""
    metrics = {}
    if not state.failed:
        found = evaluate_split(state.evaluated, data, data.val, recipe, state.processes)
        metrics = {f"val_{k}": v for k, v in found.items()}
    return TrainResult(state.step, tuple(state.losses), metrics, state.stopped, state.failed, state.seconds)


def train(
    model: nn.Module, data: Dataset, recipe: Recipe, *, seed: int, callbacks: Sequence[Callback] = ()
) -> TrainResult:
    """Train a model in place and measure it on the validation images.

    Deterministic on a CPU for one seed and one number of threads. Errors: UserError if the data do not fit.
    """
    fuses = _fuses(recipe, model)
    try:
        return result(advance(start(model, data, recipe, seed=seed), recipe, callbacks=callbacks), data, recipe)
    finally:
        if fuses:
            kernels.unfuse(model)
