"""Quality test: a layer that cannot beat chance clearly after a short training is not worth a longer one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from nas.training.data import Dataset
from nas.training.loop import STOP, Metrics, TrainResult, late_loss, train
from nas.training.recipe import Recipe
from search_spaces.common.errors import UserError

TIMES_CHANCE = 2.0  # 20 % on CIFAR-10


@dataclass(frozen=True)
class Quality:
    """reason: None if the layer is kept, `low_accuracy`, or `non_finite` where the training broke down.

    limit: the accuracy that was asked for, in percent.
    """

    reason: str | None
    limit: float
    training: TrainResult


class Doomed:
    """A callback that stops a training which has not begun to learn.

    It ends the run when the mean training loss of steps `first` to `last` exceeds `share` of ln(classes), the loss of
    guessing. The defaults are 2.29 with 10 classes over steps 21 to 30, measured on the anchor `resnet`; other anchors
    begin more slowly.
    """

    reason = "the training loss is still that of guessing"

    def __init__(self, classes: int, *, first: int = 21, last: int = 30, share: float = 2.29 / math.log(10)):
        if classes < 2 or not 1 <= first <= last or share <= 0:
            raise UserError((first, last), "two classes or more, and 1 <= first <= last")
        self.first, self.last, self.limit = first, last, share * math.log(classes)
        self._losses: list[float] = []

    def __call__(self, step: int, metrics: Metrics) -> str | None:
        if self.first <= step <= self.last:
            self._losses.append(metrics["train_loss"])
            if step == self.last and sum(self._losses) / len(self._losses) > self.limit:
                return STOP
        return None


class Behind:
    """A callback that stops a training which is far behind another layer's at the same step.

    It ends the run at `step` when the mean training loss of the last half of the steps so far exceeds `limit`: the
    other layer's loss there and a margin (a rung of a ladder of fidelities, judged without waiting for rivals).
    """

    reason = "the training loss is far behind the reference layer's"

    def __init__(self, step: int, limit: float):
        if step < 2 or not math.isfinite(limit):
            raise UserError((step, limit), "a step from 2 and a finite limit")
        self.step, self.limit = step, limit
        self._losses: list[float] = []

    def __call__(self, step: int, metrics: Metrics) -> str | None:
        if step <= self.step:
            self._losses.append(metrics["train_loss"])
        if step == self.step and late_loss(self._losses) > self.limit:
            return STOP
        return None


def quality(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe | None = None,
    *,
    seed: int,
    times_chance: float = TIMES_CHANCE,
    doomed: Doomed | None = None,
) -> Quality:
    """Train for the recipe's steps (default 100) and reject below `times_chance` times the accuracy of guessing.

    doomed: stop early what does not begin to learn. The model is trained in place. Source: Liu et al. 2020
    (arXiv 2004.02967): 100 steps and 20 % of validation accuracy on CIFAR-10.
    Errors: UserError for a limit that no accuracy or every accuracy meets.
    """
    limit = 100 * times_chance / data.num_classes
    if not 0 < limit < 100:
        raise UserError(times_chance, f"a multiple of chance between 0 and {data.num_classes}")
    trained = train(model, data, recipe or Recipe(), seed=seed, callbacks=[doomed] if doomed else [])
    return Quality(verdict(trained, limit), limit, trained)


def verdict(trained: TrainResult, limit: float) -> str | None:
    """The reason to reject a training, or None."""
    if trained.failed or not math.isfinite(trained.metrics["val_loss"]):
        return "non_finite"
    return "low_accuracy" if trained.stopped or trained.metrics["val_acc"] < limit else None
