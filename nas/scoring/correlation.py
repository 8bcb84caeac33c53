"""How well proxies rank the architectures of a table, with intervals, beside the baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.table import Table
from nas.scoring.many import ScoreTable
from nas.scoring.task import COUNTED
from search_spaces.common.errors import UserError
from search_spaces.space import SearchSpace
from zero_cost.correlation import rank_statistics

BASELINES = ("params", "macs", "live-macs", "random")
STATISTICS = ("spearman", "kendall_tau", "top_10_tau", "precision_at_5", "best_rank_at_10", "chosen", "regret")
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class ProxyCorrelation:
    """How one proxy ranks. statistics: {name: mean over the seeds}. interval: {name: (low, high)}, 95 % over
    resampled architectures. over_seeds: {name: standard deviation over seeds}, NaN for one seed. non_finite: the
    mean number of architectures without a value, which rank worst."""

    name: str
    statistics: Mapping[str, float]
    interval: Mapping[str, tuple[float, float]]
    over_seeds: Mapping[str, float]
    n: int
    non_finite: float

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **self.statistics,
            "n": self.n,
            "non_finite": self.non_finite,
            "interval": {k: list(v) for k, v in self.interval.items()},
            "seed_std": dict(self.over_seeds),
        }


def correlate(
    table: ScoreTable,
    truth: np.ndarray,
    rng: np.random.Generator,
    *,
    resamples: int = 200,
    progress: Progress | None = None,
) -> dict[str, ProxyCorrelation]:
    """{proxy: how it ranks `truth` [N]}, every statistic for each seed by itself and then averaged.

    resamples: bootstrap samples of architectures for the intervals (percentiles; Efron 1979); all proxies and seeds
    see the same ones. Errors: UserError for fewer than two architectures.
    """
    n = len(truth)
    samples = [rng.integers(n, size=n) for _ in range(resamples)]
    found = {}
    for done, name in enumerate(table.proxies, 1):
        columns = np.unique(table.column(name), axis=1).T if _same(table.column(name)) else table.column(name).T
        each = [rank_statistics(column, truth) for column in columns]
        values = {s: [e[s] for e in each] for s in STATISTICS}
        drawn = {s: np.empty(resamples) for s in STATISTICS}
        for r, rows in enumerate(samples):
            again = [rank_statistics(column[rows], truth[rows]) for column in columns]
            for s in STATISTICS:
                drawn[s][r] = np.mean([a[s] for a in again])
        found[name] = ProxyCorrelation(
            name,
            {s: float(np.mean(v)) for s, v in values.items()},
            {s: _percentiles(d) for s, d in drawn.items()},
            {s: _deviation(v, len(table.seeds)) for s, v in values.items()},
            n,
            float(np.mean([e["non_finite"] for e in each])),
        )
        if progress is not None:
            progress(done, len(table.proxies))
    return found


def _same(columns: np.ndarray) -> bool:
    """Whether a proxy is the same for all seeds, as counts are."""
    return bool(np.all(columns == columns[:, :1]))


def _deviation(values: Sequence[float], seeds: int) -> float:
    if seeds < 2:
        return float("nan")
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return (float("nan"), float("nan"))
    low, high = np.quantile(values, (0.025, 0.975))
    return (float(low), float(high))


def with_random(table: ScoreTable, rng: np.random.Generator) -> ScoreTable:
    """The table and a proxy `random`, uniform numbers."""
    drawn = rng.random((len(table.archs), 1, len(table.seeds)))
    values = np.concatenate([table.values, drawn], 1)
    return replace(table, proxies=(*table.proxies, "random"), values=values)


def with_counts(table: ScoreTable, space: SearchSpace) -> ScoreTable:
    """The table and those of params, macs and live-macs that it lacks, of the space's default network."""
    missing = [name for name in COUNTED if name not in table.proxies]
    if not missing:
        return table
    costs = [space.cost(space.decode(text)) for text in table.archs]
    counted = np.array([[float(cost[COUNTED[name]]) for name in missing] for cost in costs])
    values = np.concatenate([table.values, np.repeat(counted[:, :, None], len(table.seeds), 2)], 1)
    return replace(table, proxies=(*table.proxies, *missing), values=values)


def sample_rows(table: Table, count: int | None, rng: np.random.Generator) -> np.ndarray:
    """Rows of a benchmark, `count` of them drawn uniformly without replacement (None: all), ascending.

    Of the same rng, a smaller sample is a part of a larger one: scores that are kept serve again.
    """
    if count is None:
        return np.arange(len(table))
    if not 2 <= count <= len(table):
        raise UserError(count, f"a number of architectures from 2 to {len(table):,}, the rows of {table.id}")
    return np.sort(rng.permutation(len(table))[:count])


def accuracies(table: Table, rows: np.ndarray, label: str | None = None) -> tuple[np.ndarray, str]:
    """(values [rows], metric) to correlate with: the accuracy after the longest training.

    label: `val`, `test`, or None for test values where the table has them. They are read through the one door to test
    values: an evaluation of proxies is no search. Errors: UserError.
    """
    from nas.evaluators import default_metric

    if label not in (None, "val", "test"):
        raise UserError(label, "a label: val or test")
    has_test = any(m.startswith("test_") for m in table.metrics)
    split = label or ("test" if has_test else "val")
    metric = default_metric(table, split)
    if split == "test":
        values = table.test_values(None, metric, purpose="correlation of proxies")[rows]
    else:
        values = table.column(metric)[rows]
    if not np.isfinite(values).all():
        raise UserError(metric, f"a metric of {table.id} that every architecture has")
    return np.asarray(values, float), metric
