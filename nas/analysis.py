"""What a finished run means: the best trial, the front, and how far both are from what the whole table holds.

Test values are read here only, after the search, through `Table.test_values`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.columns import parse_column
from nas.objectives import (
    Objective,
    losses,
    non_dominated,
    optimised,
    parse_objectives,
    primary_score,
    scaled_hypervolume,
    violation,
)

if TYPE_CHECKING:
    from benchmarks.table import Table
    from nas.run import TrialRecord

LISTED = 10  # trials in `Summary.top`


@dataclass(frozen=True)
class Found:
    """A finished trial. `test` is its architecture's test value, None where the table has none or it was not read."""

    id: int
    arch: str
    key: str
    metrics: Mapping[str, float]
    fidelity: int | None = None
    test: float | None = None

    def as_json(self) -> dict[str, Any]:
        """`id`, `arch`, `metrics` and `fidelity`."""
        return {"id": self.id, "arch": self.arch, "metrics": dict(self.metrics), "fidelity": self.fidelity}


@dataclass(frozen=True)
class TableFacts:
    """What the whole table says about a run's objectives, at the run's training length, means over seeds.

    optimum: best primary value under the bounds. feasible: how many rows keep them. value: the table's value of the
    run's best, of which `rank` - 1 feasible rows are strictly better. front: [F, m] values of the exact Pareto front
    of the optimised objectives, one row per distinct point, sorted by the first objective's quality, best first.
    """

    id: str
    rows: int
    feasible: int
    optimum: float | None
    value: float | None = None
    rank: int | None = None
    front: np.ndarray | None = None
    hypervolume_regret: float | None = None
    test_metric: str | None = None


@dataclass(frozen=True)
class Summary:
    """A run in figures. `best` is None if no trial succeeded under the bounds; `front` is empty for one objective.

    queries: trials told, failed ones included. top: the best trials, distinct by key, best first.
    """

    objectives: tuple[Objective, ...]
    label: str
    queries: int
    failed: int
    best: Found | None
    top: tuple[Found, ...]
    front: tuple[Found, ...]
    table: TableFacts | None = None

    @property
    def regret(self) -> float | None:
        """The distance of the best's table value from the table's optimum, in the primary's unit."""
        if self.table is None or self.table.optimum is None or self.table.value is None:
            return None
        return abs(self.table.optimum - self.table.value)

    @property
    def best_test(self) -> float | None:
        """The test value of `best`, which was chosen by the primary objective; None without a test column."""
        return self.best.test if self.best is not None else None

    def as_json(self) -> dict[str, Any]:
        """The result fields of `nas search --json`."""
        return {
            "best": self.best.as_json() if self.best is not None else None,
            "best_test": self.best_test,
            "optimum": self.table.optimum if self.table is not None else None,
            "regret": self.regret,
            "front": [found.as_json() for found in self.front],
            "hypervolume_regret": self.table.hypervolume_regret if self.table is not None else None,
            "queries": self.queries,
        }


def summarise(settings: Mapping[str, Any], records: Iterable[TrialRecord], table: Table | None = None) -> Summary:
    """The Summary of a run's settings and trials, against `table` if its evaluator read one.

    Trials at less than the highest fidelity told do not compete. With a table, regrets compare table values: where
    the evaluator draws a random seed, a lucky measurement does not count as quality.
    """
    objectives = parse_objectives(settings["objectives"])
    records = list(records)
    told = [r for r in records if r.status != "asked"]
    ranked = feasible_trials(objectives, told)
    front = _front(objectives, ranked) if len(optimised(objectives)) > 1 else []
    summary = Summary(
        objectives,
        settings.get("label") or "val",
        queries=len(told),
        failed=sum(r.status == "failed" for r in told),
        best=ranked[0] if ranked else None,
        top=tuple(_distinct(ranked)[:LISTED]),
        front=tuple(front),
    )
    return summary if table is None else _against(table, summary, _top_fidelity(told))


def feasible_trials(objectives: Sequence[Objective], records: Iterable[TrialRecord]) -> list[Found]:
    """Finished trials of the highest fidelity told that keep the bounds; best primary first, then the earlier."""
    done = [r for r in records if r.status == "done" and _is_complete(objectives, r.metrics)]
    top = _top_fidelity(done)
    kept = [r for r in done if _level(r) == (math.inf if top is None else top) and not _bounds_broken(objectives, r)]
    kept.sort(key=lambda r: (-primary_score(objectives, r.metrics)[1], r.id))
    return [Found(r.id, r.arch, r.key, dict(r.metrics or {}), r.fidelity) for r in kept]


def best_so_far(objectives: Sequence[Objective], records: Iterable[TrialRecord]) -> np.ndarray:
    """[told] the best feasible primary value after each trial, in the order told; NaN before the first.

    Trials below the highest fidelity take their place and bring nothing.
    """
    told = in_order_told(records)
    competing = {found.id: found.metrics[objectives[0].name] for found in feasible_trials(objectives, told)}
    values = np.array([competing.get(r.id, math.nan) for r in told], float)
    return (np.fmax if objectives[0].maximize else np.fmin).accumulate(values) if len(values) else values


def simulated_seconds(records: Iterable[TrialRecord]) -> np.ndarray:
    """[told] the simulated clock after each trial, in the order told: the sum of `cost_seconds`."""
    costs = [(r.metrics or {}).get("cost_seconds", 0.0) for r in in_order_told(records)]
    return np.cumsum(np.array(costs, float))


def in_order_told(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """The told trials in the order in which they were told."""
    return sorted((r for r in records if r.status != "asked"), key=lambda r: (r.told_at or 0.0, r.id))


def expected_best(values: np.ndarray, queries: int) -> np.ndarray:
    """[queries] the exact expectation of the maximum of 1, 2, ... independent uniform draws from `values`.

    With v_(1) <= ... <= v_(n), E[max of q] = sum_i v_(i) ((i/n)^q - ((i-1)/n)^q). Draws are with replacement.
    """
    ordered = np.sort(np.asarray(values, float))
    steps, below = np.diff(ordered), np.arange(1, len(ordered)) / len(ordered)
    power = np.ones_like(below)
    expected = np.empty(queries)
    for query in range(queries):
        power *= below
        expected[query] = ordered[-1] - steps @ power  # summation by parts: no cancellation in the powers
    return expected


def table_values(
    table: Table, objectives: Sequence[Objective], label: str = "val", epochs: int | None = None
) -> dict[str, np.ndarray]:
    """{name: [rows]} of every objective and bound; `epochs` where the metric has training lengths.

    Test columns are read only for runs on test labels. Errors: UserError, TestSplitError.
    """
    values = {}
    for name in dict.fromkeys(o.name for o in objectives):
        at = epochs if epochs is not None and epochs in table.epochs(name) else None
        if label == "test" and parse_column(name).split == "test":
            values[name] = table.test_values(None, name, purpose="optimum of a run on test labels", epochs=at)
        else:
            values[name] = table.column(name, epochs=at)
    return values


def table_front(objectives: Sequence[Objective], values: Mapping[str, np.ndarray]) -> np.ndarray:
    """int64 [F]: the rows on the exact Pareto front of the optimised objectives under the bounds, one per point."""
    rows = np.flatnonzero(feasible_rows(objectives, values))
    return rows[non_dominated(_row_losses(objectives, values, rows))]


def feasible_rows(objectives: Sequence[Objective], values: Mapping[str, np.ndarray]) -> np.ndarray:
    """bool [rows]: everything measured and every bound kept."""
    feasible = np.ones(len(values[objectives[0].name]), bool)
    for o in objectives:
        feasible &= np.isfinite(values[o.name])
        if o.bound is not None:
            feasible &= values[o.name] >= o.bound if o.maximize else values[o.name] <= o.bound
    return feasible


def _row_losses(objectives: Sequence[Objective], values: Mapping[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    return np.stack([-values[o.name][rows] if o.maximize else values[o.name][rows] for o in optimised(objectives)], 1)


def _against(table: Table, summary: Summary, epochs: int | None) -> Summary:
    objectives, primary = summary.objectives, summary.objectives[0]
    values = table_values(table, objectives, summary.label, epochs)
    feasible = feasible_rows(objectives, values)
    qualities = values[primary.name][feasible] * (1 if primary.maximize else -1)
    optimum = (float(qualities.max()) if primary.maximize else float(-qualities.max())) if len(qualities) else None
    value = rank = None
    if summary.best is not None:
        value = float(values[primary.name][_rows(table, [summary.best])[0]])
        rank = 1 + int((qualities > (value if primary.maximize else -value)).sum())
    front = regret = None
    if len(optimised(objectives)) > 1 and feasible.any():
        exact = table_front(objectives, values)
        exact_losses = _row_losses(objectives, values, exact)
        front = np.stack([values[o.name][exact] for o in optimised(objectives)], 1)
        found = _row_losses(objectives, values, _rows(table, summary.front))
        regret = scaled_hypervolume(exact_losses, exact_losses) - scaled_hypervolume(found, exact_losses)
    metric = _test_metric(table, primary)
    tests = _tests(table, summary.top, metric)
    top = tuple(replace(found, test=test) for found, test in zip(summary.top, tests, strict=True))
    facts = TableFacts(
        table.id, len(table), int(feasible.sum()), optimum, value, rank, front, regret, test_metric=metric
    )
    return replace(summary, best=top[0] if top else None, top=top, table=facts)


def _rows(table: Table, found: Sequence[Found]) -> np.ndarray:
    return table.rows_of([table.space.decode(f.arch) for f in found])


def _test_metric(table: Table, primary: Objective) -> str | None:
    """`val_acc` -> `test_acc`; where the primary is no quality of a split, the table's test accuracy."""
    metric = parse_column(primary.name).metric
    split, _, rest = metric.partition("_")
    wanted = metric if split == "test" else f"test_{rest}" if split in ("val", "train") else "test_acc"
    return wanted if table.has(wanted) else None


def _tests(table: Table, found: Sequence[Found], metric: str | None) -> list[float | None]:
    if metric is None or not found:
        return [None] * len(found)
    values = table.test_values([table.space.decode(f.arch) for f in found], metric, purpose="report")
    return [float(v) if np.isfinite(v) else None for v in values]


def _front(objectives: Sequence[Objective], ranked: Sequence[Found]) -> list[Found]:
    if not ranked:
        return []
    points = np.array([losses(objectives, f.metrics) for f in ranked]).reshape(len(ranked), -1)
    return [ranked[i] for i in non_dominated(points)]


def _distinct(ranked: Iterable[Found]) -> list[Found]:
    first: dict[str, Found] = {}
    for found in ranked:
        first.setdefault(found.key, found)
    return list(first.values())


def _is_complete(objectives: Sequence[Objective], metrics: Mapping[str, float] | None) -> bool:
    return metrics is not None and all(math.isfinite(metrics.get(o.name, math.nan)) for o in objectives)


def _bounds_broken(objectives: Sequence[Objective], record: TrialRecord) -> bool:
    return violation(objectives, record.metrics or {}) > 0


def _level(record: TrialRecord) -> float:
    return math.inf if record.fidelity is None else record.fidelity


def _top_fidelity(records: Iterable[TrialRecord]) -> int | None:
    """The highest fidelity among finished trials; None is the full one."""
    top = max((_level(r) for r in records if r.status == "done"), default=math.inf)
    return None if math.isinf(top) else int(top)
