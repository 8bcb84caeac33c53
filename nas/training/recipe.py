"""Recipe: the settings of a training as plain values, with their source; learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nas.training.optimizers import DECAYS, OPTIMIZERS
from search_spaces.common.errors import UserError
from search_spaces.common.names import match

PRECISIONS = ("float32", "bfloat16", "float16")
KERNELS = ("auto", "triton", "eager", "compile")


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are the short proxy training of layers; `nas.training.presets` has the papers'.

    steps: optimiser steps in all; epochs: passes over the training images instead, from which `resolved` computes
    the steps. learning_rate: its highest value; `schedule` (a name in SCHEDULES) scales it after a linear warm-up of
    `warmup_steps` and `warmup_epochs`. decay_share: the last share of the steps, over which `linear` falls to zero.
    milestones, gamma: shares of the training after which `step` multiplies by gamma. final_rate: where `cosine` ends.
    rate_per_epoch: the rate changes between epochs only. optimizer: a name in OPTIMIZERS; betas are AdamW's.
    decay: which parameters `weight_decay` is for: `weights` (matrices and kernels), or `all` with biases and
    normalisation. clip_norm: largest gradient norm, None for no clipping.
    padding, flip: of random crops and mirror images; 0 and False for none. cutout: side of the square that is
    blanked out, 0 for none. mixup, cutmix: alpha of the mixing, 0 for none. policy: a library's augmentation policy.
    drop_path: probability of dropping an edge at the end of the training, growing by epochs from zero (networks
    that name their edges in `drop_path_modules`). auxiliary_weight: of the auxiliary head's loss, 0 without head.
    ema_decay: evaluate an exponential moving average of the weights, None for none.
    drop_last: leave incomplete batches out. batch_statistics: evaluate with the statistics of the evaluated batches
    instead of running ones, which lag behind in short trainings. patience: stop after so many epochs without a
    better validation accuracy and keep the best weights, None to train to the end.
    precision: of the forward pass (autocast). kernels: `triton` (`kernels.fuse`), `eager`, `compile` (torch.compile);
    `auto` is triton on CUDA and eager elsewhere.
    Errors: UserError for values out of range and unknown names.
    """

    steps: int = 100
    epochs: int | None = None
    batch_size: int = 64
    learning_rate: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 5e-4
    decay: str = "weights"
    schedule: str = "linear"
    warmup_steps: int = 10
    warmup_epochs: float = 0.0
    decay_share: float = 0.2
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    final_rate: float = 0.0
    rate_per_epoch: bool = False
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    padding: int = 0
    flip: bool = False
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    policy: str | None = None
    drop_path: float = 0.0
    auxiliary_weight: float = 0.0
    ema_decay: float | None = None
    drop_last: bool = True
    batch_statistics: bool = True
    eval_batch_size: int = 500
    patience: int | None = None
    precision: str = "float32"
    channels_last: bool = False
    kernels: str = "auto"
    source: str = "EvoNorm's proxy (Liu et al. 2020, arXiv 2004.02967) shortened to minutes on a CPU"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_batch_size", "epochs", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(value, f"a positive number for {name.replace('_', ' ')}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(self.learning_rate, "a positive learning rate")
        for name in ("weight_decay", "warmup_steps", "warmup_epochs", "padding", "cutout", "mixup", "cutmix"):
            self._within(name, 0, math.inf)
        for name in ("momentum", "label_smoothing", "drop_path"):
            self._within(name, 0, 1, open_end=True)
        for name in ("decay_share", "gamma"):
            self._within(name, 0, 1)
        self._within("auxiliary_weight", 0, math.inf)
        self._within("final_rate", 0, self.learning_rate)
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(self.clip_norm, "a positive gradient norm, or None")
        if self.nesterov and not self.momentum:
            raise UserError("nesterov", "a momentum above 0 with it")
        if self.ema_decay is not None:
            self._within("ema_decay", 0, 1, open_end=True)
        object.__setattr__(self, "betas", tuple(self.betas))  # from JSON they come as lists
        object.__setattr__(self, "milestones", tuple(self.milestones))
        object.__setattr__(self, "optimizer", match(self.optimizer, OPTIMIZERS, "an optimiser"))
        object.__setattr__(self, "schedule", match(self.schedule, SCHEDULES, "a schedule"))
        object.__setattr__(self, "decay", match(self.decay, DECAYS, "what decays"))
        object.__setattr__(self, "precision", match(self.precision, PRECISIONS, "a precision"))
        object.__setattr__(self, "kernels", match(self.kernels, KERNELS, "a kind of kernels"))

    def _within(self, name: str, low: float, high: float, open_end: bool = False) -> None:
        value = getattr(self, name)
        if not (low <= value < high if open_end else low <= value <= high):
            limit = f"below {high}" if open_end else f"at most {high:g}"
            expected = f"{name.replace('_', ' ')} of at least {low:g}" + (f", {limit}" if high < math.inf else "")
            raise UserError(value, expected)

    def resolved(self, steps_per_epoch: int) -> Recipe:
        """The recipe in steps alone; one that counts in steps is unchanged."""
        if self.epochs is None and not self.warmup_epochs:
            return self
        steps = self.steps if self.epochs is None else self.epochs * steps_per_epoch
        warmup = self.warmup_steps + round(self.warmup_epochs * steps_per_epoch)
        return replace(self, steps=steps, warmup_steps=warmup, epochs=None, warmup_epochs=0.0)

    def rate(self, step: int, steps_per_epoch: int = 1) -> float:
        """The learning rate of step `step`, from 0, of a recipe that counts in steps."""
        warm = min((step + 1) / (self.warmup_steps + 1), 1.0)
        place = step // steps_per_epoch * steps_per_epoch if self.rate_per_epoch else step
        return self.learning_rate * warm * SCHEDULES[self.schedule](self, place)

    def drop_path_at(self, step: int, steps_per_epoch: int) -> float:
        """The drop-path probability of step `step`: its final value times the share of epochs that are over."""
        epochs = max(1, math.ceil(self.steps / steps_per_epoch))
        return self.drop_path * (step // steps_per_epoch) / epochs

    def differences(self, other: dict[str, Any]) -> list[str]:
        """`name: ours instead of theirs` for settings that differ from those of a checkpoint."""
        return [f"{k}: {v!r} instead of {other.get(k)!r}" for k, v in asdict(self).items() if _plain(other.get(k)) != v]

    def replaced(self, changes: dict[str, Any]) -> Recipe:
        """A copy with other settings, by name; `steps` alone take the place of epochs.

        Errors: UserError for a name that is no setting, with the nearest.
        """
        known = {field.name: field for field in fields(self)}
        found = {match(name.replace("-", "_"), known, "a setting of a training"): v for name, v in changes.items()}
        if "steps" in found:
            found.setdefault("epochs", None)
        for name, value in found.items():
            default = getattr(self, name)
            if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
                found[name] = float(value)
            elif default is not None and value is not None and type(default) is not type(value):
                raise UserError(value, f"{name} as {type(default).__name__}, such as {default!r}")
        return replace(self, **found)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# -- schedules: (recipe, step) -> factor -------------------------------------------------------------------------


def constant(recipe: Recipe, step: int) -> float:
    """Always 1."""
    return 1.0


def linear(recipe: Recipe, step: int) -> float:
    """1, then down to 0 in a line over the last `decay_share` of the steps."""
    decay = recipe.decay_share * recipe.steps
    return min(max(recipe.steps - step, 0) / decay, 1.0) if decay else 1.0


def cosine(recipe: Recipe, step: int) -> float:
    """Half a cosine from 1 to the final rate (Loshchilov and Hutter 2017, arXiv 1608.03983, eq. 5, no restarts)."""
    last = recipe.final_rate / recipe.learning_rate
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(step / recipe.steps, 1.0)))


def step(recipe: Recipe, step: int) -> float:
    """Times `gamma` after each milestone, which are shares of the training."""
    return recipe.gamma ** sum(step >= share * recipe.steps for share in recipe.milestones)


SCHEDULES: dict[str, Callable[[Recipe, int], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "step": step,
}
