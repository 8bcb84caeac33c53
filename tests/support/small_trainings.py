"""Trainings of a second: images of three classes, networks, and what compares two trainings."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nas.training.data import Dataset, Split
from nas.training.recipe import Recipe
from nas.training.task import Task
from search_spaces.layers.catalog import layer
from search_spaces.layers.module import GraphLayer

DEAD_EDGE = "|nor_conv_3x3~0|+|nor_conv_3x3~0|none~1|+|skip_connect~0|none~1|skip_connect~2|"  # edge 0_1 leads nowhere


@functools.cache
def patterns(train: int = 150) -> Dataset:
    """Three classes of 8x8 noise around three patterns; 45 images each to validate and to test."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 2, 8, 8, generator=generator)
    labels = torch.arange(train + 90) % 3
    images = means[labels] + torch.randn(train + 90, 2, 8, 8, generator=generator)
    rows = (slice(train), slice(train, train + 45), slice(train + 45, train + 90))
    parts = [Split(images[part], labels[part]) for part in rows]
    return Dataset("patterns", *parts, ("a", "b", "c"), (0.0, 0.0), (1.0, 1.0))


def pictures() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The same as a user's own data: `small_trainings:pictures`."""
    found = patterns()
    return {p: (getattr(found, p).images.numpy(), getattr(found, p).labels.numpy()) for p in ("train", "val", "test")}


def network(dropout: float = 0.2, seed: int = 0) -> nn.Module:
    """Two convolutions with BatchNorm, dropout and EvoNorm-B0 between them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(6, 8, 3),
            GraphLayer(layer("evonorm-b0"), 8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        )


def own_model(in_channels: int = 2, num_classes: int = 3, dropout: float = 0.2) -> nn.Module:
    """A factory for tasks, `small_trainings:own_model`: weights from torch's generator, no statistics of batches."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


def own_task(recipe: Recipe, **changes) -> Task:
    """A task of `own_model` on `pictures`."""
    return Task(recipe, **{"factory": "small_trainings:own_model", "data": "small_trainings:pictures", **changes})


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [v.detach().clone() for v in model.state_dict().values()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def equal(left: object, right: object) -> bool:
    """Whether nested containers of tensors and plain values are the same, bit by bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, Mapping):
        return isinstance(right, Mapping) and list(left) == list(right) and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
    return left == right


def outcome(folder: Path) -> dict[str, object]:
    """What a training left behind, without times: weights as a digest, curves, metrics."""
    from nas.run import Run
    from nas.training.curves import read_curves

    run = Run.open(folder)
    timed = ("seconds", "train_seconds")
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((folder / "weights").iterdir())}
    rows = [{k: v for k, v in row.items() if k not in timed} for row in read_curves(folder / "curves.parquet")]
    metrics = [{k: v for k, v in (r.metrics or {}).items() if k not in timed} for r in run.trials()]
    states = [(r.id, r.seed, r.status, r.error) for r in run.trials()]
    return {"weights": digests, "curves": rows, "metrics": metrics, "trials": states, "events": run.events()}
