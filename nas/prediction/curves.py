"""Learning curves as predictors: what the first epochs of a training say about its end, where a table has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.table import Table
from nas.evaluators import default_metric
from nas.objectives import parse_objectives
from nas.prediction.tables import labels_and_targets
from predictors.evaluation import Split, rank_quality
from search_spaces.common.errors import UserError

TRAIN_LOSS = "train_loss"


@dataclass(frozen=True)
class CurveResult:
    """How a partial training ranks: method, epochs of it, and {statistic: value} over `rows` architectures."""

    method: str
    epochs: int
    rows: int
    statistics: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"predictor": self.method, "epochs": self.epochs, "rows": self.rows, **self.statistics}


def evaluate_curves(
    table: Table, *, window: int = 1, target: str | None = None
) -> tuple[list[CurveResult], str, tuple[str, ...]]:
    """(results by method and epochs, kind of the target, notes) for every training length but the longest.

    early-stop: the validation value at that length. sotl-e: minus the sum of the training losses over the last `window`
    epochs, which must all be there (Ru et al., Speedy Performance Estimation for Neural Architecture Search, NeurIPS
    2021, section 3; a column holds an epoch's mean loss, which is their sum over batches up to a factor).
    Errors: UserError for a table without curves, or a window below 1.
    """
    if isinstance(window, bool) or window < 1:
        raise UserError(window, "a window of at least 1 epoch")
    known = labels_and_targets(table, None, target)
    scores = [*_early_stop(table), *_sum_of_losses(table, window)]
    if not scores:
        raise UserError(table.id, f"a table with learning curves: validation values at two lengths, or {TRAIN_LOSS}")
    found = []
    for method, epochs, values in scores:
        seen = values[known.rows]
        there = np.flatnonzero(np.isfinite(seen))
        if len(there) > 1:
            nothing = Split(0, 0, np.array([], np.int64), np.arange(len(there)))
            quality = rank_quality(seen[there], known.targets[there], nothing)
            found.append(CurveResult(method, epochs, len(there), quality))
    return found, known.target_kind, known.notes


def _early_stop(table: Table) -> list[tuple[str, int, np.ndarray]]:
    if not any(metric.startswith("val_") for metric in table.metrics):
        return []
    metric = default_metric(table)
    sign = 1.0 if parse_objectives(metric)[0].maximize else -1.0
    return [("early-stop", n, sign * table.column(metric, epochs=n)) for n in table.epochs(metric)[:-1]]


def _sum_of_losses(table: Table, window: int) -> list[tuple[str, int, np.ndarray]]:
    if TRAIN_LOSS not in table.metrics:
        return []
    lengths = table.epochs(TRAIN_LOSS)
    found = []
    for last in lengths[:-1]:
        summed = range(last - window + 1, last + 1)
        if set(summed) <= set(lengths):
            losses = [table.column(TRAIN_LOSS, epochs=n) for n in summed]
            found.append(("sotl-e", last, -np.sum(losses, axis=0)))
    return found
