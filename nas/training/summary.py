"""What a training run came to, over its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nas.run import Run, TrialRecord
from nas.training.trained import best_record, weights_path

PARTS = ("val", "test")


@dataclass(frozen=True)
class Spread:
    """Mean over seeds and half the width of its 95 % interval by Student's t; None for a single seed."""

    mean: float
    half_width: float | None
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        """The spread of `values`; None if there are none."""
        if not values:
            return None
        from scipy import stats

        half = None
        if len(values) > 1:
            half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
        return Spread(float(np.mean(values)), half, len(values))

    def text(self, digits: int = 2) -> str:
        """`91.24 ± 0.31`."""
        spread = "" if self.half_width is None else f" ± {self.half_width:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class TrainingSummary:
    """val_acc, test_acc: percent, over the finished seeds; None where there were no such images. best: the seed with
    the highest validation accuracy; None if no seed has finished. failed: the trials that broke down."""

    val_acc: Spread | None
    test_acc: Spread | None
    best: TrialRecord | None
    finished: tuple[TrialRecord, ...]
    failed: tuple[TrialRecord, ...]
    checkpoint: str | None

    def as_json(self) -> dict[str, Any]:
        """What `nas train --json` prints; val_acc and test_acc are means over the seeds."""
        spreads: dict[str, Any] = {}
        for name, spread in (("val_acc", self.val_acc), ("test_acc", self.test_acc)):
            spreads[name] = None if spread is None else spread.mean
            spreads[f"{name}_half_width"] = None if spread is None else spread.half_width
        epochs = None if self.best is None or not self.best.metrics else int(self.best.metrics["epochs"])
        seeds = [{"seed": r.seed, "status": r.status, **(r.metrics or {})} for r in (*self.finished, *self.failed)]
        return {**spreads, "epochs": epochs, "checkpoint": self.checkpoint, "seeds": seeds}


def summarise(run: Run) -> TrainingSummary:
    """The summary of a training run as it stands."""
    records = run.trials()
    finished = tuple(r for r in records if r.status == "done")
    spreads = {}
    for part in PARTS:
        values = [r.metrics[f"{part}_acc"] for r in finished if r.metrics and f"{part}_acc" in r.metrics]
        spreads[part] = Spread.of(values)
    best = best_record(run) if finished else None
    path = None if best is None or best.seed is None else str(weights_path(run, best.seed))
    failed = tuple(r for r in records if r.status == "failed")
    return TrainingSummary(spreads["val"], spreads["test"], best, finished, failed, path)
