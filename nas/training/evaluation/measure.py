"""Measuring a trained network: accuracy, calibration, confusions, robustness, and what it costs to run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nas.training.data import Dataset, Split
from nas.training.evaluation.attack import Attack, perturb, pixels
from nas.training.evaluation.calibration import Bin, expected_calibration_error, reliability_bins, wilson_interval
from nas.training.evaluation.confusion import ConfusedPair, class_accuracies, confused_pairs, confusion_matrix
from nas.training.evaluation.cost import (
    Timing,
    count_macs,
    count_params,
    peak_activation_bytes,
    time_model,
    training_activation_bytes,
)
from nas.training.recalibrate import evaluating
from search_spaces.common.errors import RunError, UserError
from search_spaces.common.names import match, nearest

PARTS = ("val", "test")
TOP = 5
Progress = Callable[[int, int | None], None]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Robustness:
    """Accuracies in percent on the attacked images, with 95 % intervals, clean and under attack.

    An image counts as right under attack only if it is right unchanged too: no change is within epsilon.
    """

    attack: Attack
    count: int
    clean_accuracy: float
    clean_interval: Interval
    accuracy: float
    interval: Interval


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one network on one part of its data.

    accuracy, top5_accuracy, class_accuracy, calibration_error: percent; `*_interval`: 95 %, Wilson. top5 is None
    with five classes or fewer, the accuracy of a class without images is None. loss: mean cross-entropy in nats.
    brier: mean squared distance of the probabilities from the true class, 0 to 2. confusion: images, [true][predicted].
    macs, peak_activation_bytes: of one image; training_activation_bytes: kept for the backward pass, per image of a
    batch. threads: of a CPU, while timed.
    """

    data: str
    on: str
    count: int
    accuracy: float
    accuracy_interval: Interval
    top5_accuracy: float | None
    top5_interval: Interval | None
    loss: float
    calibration_error: float
    bins: tuple[Bin, ...]
    brier: float
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    class_accuracy: tuple[float | None, ...]
    confused_pairs: tuple[ConfusedPair, ...]
    input_shape: tuple[int, int, int]
    params: int
    macs: int
    peak_activation_bytes: int
    training_activation_bytes: int
    device: str
    threads: int
    timings: tuple[Timing, ...]
    robustness: Robustness | None

    def as_json(self) -> dict[str, Any]:
        """Plain values under the names of the fields."""
        return _plain(asdict(self))


def evaluate_model(
    model: nn.Module,
    data: Dataset,
    *,
    on: str = "val",
    attack: Attack | None = None,
    latency: bool = True,
    compiled: bool = True,
    batch_size: int = 500,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model that maps normalised images [B, C, H, W] to logits [B, classes] on `val` or `test`.

    attack: also the accuracy under this attack. latency: time forward passes; compiled: with torch.compile too.
    seed: of the attack's random starts. progress: told the images that are done. The model is left as it was: mode,
    gradients, buffers, device, and torch's random numbers. Errors: UserError if the model does not fit the data,
    RunError naming the first image whose output is not finite.
    """
    part = match(on, PARTS, "a part of the data")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}", "at least 1")
    split: Split = getattr(data, part)
    if len(split) == 0:
        raise UserError(f"0 {part} images", "at least one image to evaluate on")
    attacked = 0 if attack is None else min(attack.count or len(split), len(split))
    where = _device(device)
    task = _Task(model, data, split, part, batch_size, where, _steps(progress, len(split) + attacked))
    with _on_device(model, where):
        _check_fit(task)
        answers = _answers(task)
        robustness = None
        if attack is not None:
            robust = _withstood(task, attack, attacked, torch.Generator().manual_seed(seed))
            robustness = _robustness(attack, answers["rank"][:attacked] == 0, robust)
        images = data.normalize(split.images[:64].to(where))
        macs = count_macs(model, images[:1])
        peak = peak_activation_bytes(model, images[:1])
        timings = time_model(model, images, compiled=compiled) if latency else ()
        with torch.enable_grad():
            kept = training_activation_bytes(model, images[:3])
    return Evaluation(
        data=data.name,
        on=part,
        **_quality(answers, data.classes),
        input_shape=data.shape,
        params=count_params(model),
        macs=macs,
        peak_activation_bytes=peak,
        training_activation_bytes=kept,
        device=str(where),
        threads=torch.get_num_threads(),
        timings=timings,
        robustness=robustness,
    )


# -- answers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Task:
    """What is measured where; `step` is told how many images are done."""

    model: nn.Module
    data: Dataset
    split: Split
    part: str
    batch_size: int
    device: torch.device
    step: Callable[[int], None]

    def batches(self, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(place of the first, images as they are, labels) of the first `count` images, on the device."""
        for start in range(0, count, self.batch_size):
            rows = slice(start, min(start + self.batch_size, count))
            yield start, self.split.images[rows].to(self.device), self.split.labels[rows].to(self.device)
            self.step(rows.stop - start)

    def logits(self, pixels: Tensor, start: int, what: str = "") -> Tensor:
        """Finite logits of images that are not normalised yet. Errors: RunError naming the first bad image."""
        found = self.model(self.data.normalize(pixels))
        bad = torch.nonzero(~torch.isfinite(found).all(1)).flatten()
        if len(bad):
            raise RunError(f"the model's output for {what}{self.part} image {start + int(bad[0])} is not finite")
        return found


@torch.no_grad()
def _answers(task: _Task) -> dict[str, np.ndarray]:
    """Per image: its class, the predicted one, the rank of the true class (0: right), confidence, loss, Brier score."""
    found: dict[str, list[Tensor]] = {name: [] for name in ("true", "predicted", "rank", "confidence", "loss", "brier")}
    for start, images, labels in task.batches(len(task.split)):
        logits, labels = task.logits(images, start).cpu().double(), labels.cpu()
        true = logits.gather(1, labels[:, None])
        # Of equal logits the first class wins, as with argmax.
        before = (logits == true) & (torch.arange(logits.shape[1]) < labels[:, None])
        probabilities = logits.softmax(1)
        found["true"].append(labels)
        found["rank"].append(((logits > true) | before).sum(1))
        found["predicted"].append(logits.argmax(1))
        found["confidence"].append(probabilities.amax(1))
        found["loss"].append(nn.functional.cross_entropy(logits, labels, reduction="none"))
        found["brier"].append((probabilities - nn.functional.one_hot(labels, logits.shape[1])).square().sum(1))
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def _withstood(task: _Task, attack: Attack, count: int, generator: torch.Generator) -> np.ndarray:
    """bool [count]: whether each of the first images is classified rightly after the attack."""
    right = []
    for start, images, labels in task.batches(count):
        changed = perturb(
            lambda p: task.model(task.data.normalize(p)), pixels(images), labels, attack, generator=generator
        )
        with torch.no_grad():
            right.append((task.logits(changed, start, "attacked ").argmax(1) == labels).cpu())
    return torch.cat(right).numpy()


def _robustness(attack: Attack, clean: np.ndarray, attacked: np.ndarray) -> Robustness:
    count, right, robust = len(clean), int(clean.sum()), int((clean & attacked).sum())
    return Robustness(
        attack,
        count,
        100 * right / count,
        wilson_interval(right, count),
        100 * robust / count,
        wilson_interval(robust, count),
    )


def _quality(answers: dict[str, np.ndarray], classes: Sequence[str]) -> dict[str, Any]:
    """The fields of an Evaluation that follow from the answers."""
    count, many = len(answers["true"]), len(classes)
    right, within = int((answers["rank"] == 0).sum()), int((answers["rank"] < TOP).sum())
    bins = reliability_bins(answers["confidence"], answers["rank"] == 0)
    confusion = confusion_matrix(answers["true"], answers["predicted"], many)
    return {
        "count": count,
        "accuracy": 100 * right / count,
        "accuracy_interval": wilson_interval(right, count),
        "top5_accuracy": 100 * within / count if many > TOP else None,
        "top5_interval": wilson_interval(within, count) if many > TOP else None,
        "loss": float(answers["loss"].mean()),
        "calibration_error": expected_calibration_error(bins),
        "bins": bins,
        "brier": float(answers["brier"].mean()),
        "classes": tuple(classes),
        "confusion": tuple(map(tuple, confusion.tolist())),
        "class_accuracy": class_accuracies(confusion),
        "confused_pairs": confused_pairs(confusion, classes),
    }


# -- surroundings ------------------------------------------------------------------------------------------------


def _device(name: torch.device | str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(str(name), "a device such as cpu or cuda:0", nearest(str(name), ("cpu", "cuda")))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(str(device), "a device of this machine, which has no CUDA", "cpu")
    return device


@contextlib.contextmanager
def _on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model in evaluation mode on a device; afterwards it, and torch's random numbers, are as before."""
    homes = {t.device for t in (*model.parameters(), *model.buffers())} or {device}
    if len(homes) > 1:
        raise UserError(", ".join(sorted(map(str, homes))), "a model that lies on one device")
    home = homes.pop()
    saved = [b.clone() for b in model.buffers()]  # a forward in training mode changes running statistics
    with evaluating(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.to(device)
            yield
        finally:
            model.to(home)
            with torch.no_grad():
                for buffer, value in zip(model.buffers(), saved, strict=True):
                    buffer.copy_(value)


@torch.no_grad()
def _check_fit(task: _Task) -> None:
    data = task.data
    image = data.normalize(task.split.images[:1].to(task.device))
    shape = " x ".join(map(str, data.shape))
    try:
        output = task.model(image)
    except (UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{data.name} images of {shape}", f"images that this model takes ({line})") from error
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 1:
        found = f"outputs of shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise UserError(found, "a model that gives logits [batch, classes]")
    if output.shape[1] != data.num_classes:
        raise UserError(
            f"a model of {output.shape[1]} classes", f"one of the {data.num_classes} classes of {data.name}"
        )


def _steps(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return step


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
