"""Recipe: the settings of a training as plain values, with their source; optimisers and schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from nas.training.augment import CropFlip
from search_spaces.common.errors import UserError
from search_spaces.common.names import match

Group = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are the short proxy training of layers.

    steps: optimiser steps in all. learning_rate: its highest value; `schedule` (a name in SCHEDULES) scales it after
    a linear warm-up of `warmup_steps`. decay_share: the last share of the steps, over which `linear` falls to zero.
    weight_decay: on the weights of convolutions and linear layers only. clip_norm: largest gradient norm, None for
    no clipping. padding, flip: of the augmentation CropFlip; 0 and False for none. batch_statistics: evaluate with
    the statistics of the evaluated batches instead of running ones, which lag behind in short trainings.
    optimizer: a name in OPTIMIZERS. Errors: UserError for values out of range and unknown names.
    """

    steps: int = 100
    batch_size: int = 64
    learning_rate: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "linear"
    warmup_steps: int = 10
    decay_share: float = 0.2
    clip_norm: float | None = None
    padding: int = 0
    flip: bool = False
    label_smoothing: float = 0.0
    batch_statistics: bool = True
    eval_batch_size: int = 500
    source: str = "EvoNorm's proxy (Liu et al. 2020, arXiv 2004.02967) shortened to minutes on a CPU"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(getattr(self, name), f"a positive number of {name.replace('_', ' ')}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(self.learning_rate, "a positive learning rate")
        if not 0 <= self.momentum < 1 or self.weight_decay < 0 or self.warmup_steps < 0 or self.padding < 0:
            raise UserError("recipe", "a momentum below 1; weight decay, warm-up and padding of at least 0")
        if not 0 <= self.decay_share <= 1 or not 0 <= self.label_smoothing < 1:
            raise UserError("recipe", "a decay share from 0 to 1 and a label smoothing below 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(self.clip_norm, "a positive gradient norm, or None")
        object.__setattr__(self, "optimizer", match(self.optimizer, OPTIMIZERS, "an optimiser"))
        object.__setattr__(self, "schedule", match(self.schedule, SCHEDULES, "a schedule"))

    def augmentation(self) -> CropFlip | None:
        """Crop and flip as the recipe has them."""
        return CropFlip(self.padding, self.flip) if self.padding or self.flip else None

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        warm = min((step + 1) / (self.warmup_steps + 1), 1.0)
        return self.learning_rate * warm * SCHEDULES[self.schedule](self, step)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """`name: ours instead of theirs` for settings that differ from those of a checkpoint."""
        return [f"{k}: {v!r} instead of {other.get(k)!r}" for k, v in asdict(self).items() if other.get(k) != v]


# -- schedules: (recipe, step) -> factor -------------------------------------------------------------------------


def constant(recipe: Recipe, step: int) -> float:
    """Always 1."""
    return 1.0


def linear(recipe: Recipe, step: int) -> float:
    """1, then down to 0 in a line over the last `decay_share` of the steps."""
    decay = recipe.decay_share * recipe.steps
    return min((recipe.steps - step) / decay, 1.0) if decay else 1.0


def cosine(recipe: Recipe, step: int) -> float:
    """Half a cosine from 1 to 0 (Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * min(step / recipe.steps, 1.0)))


SCHEDULES: dict[str, Callable[[Recipe, int], float]] = {"constant": constant, "linear": linear, "cosine": cosine}


# -- optimisers: (parameter groups, recipe) -> optimiser ---------------------------------------------------------


def sgd(groups: Sequence[Group], recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(list(groups), lr=recipe.learning_rate, momentum=recipe.momentum)


OPTIMIZERS: dict[str, Callable[[Sequence[Group], Recipe], torch.optim.Optimizer]] = {"sgd": sgd}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[Group]:
    """Two groups: the weights of convolutions and linear layers, which decay, and everything else, which does not.

    Biases and the parameters of normalisation layers are exempt, as in the authors' release of EvoNorm.
    """
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, kinds)}
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UserError(type(model).__name__, "a model with parameters to train")
    groups = [
        {"params": [p for p in trained if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
