"""compare: several strategies, many seeds, one table; nothing is written, so that hundreds of seeds take seconds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np

from nas.analysis import expected_best, feasible_rows, table_values
from nas.evaluators import TableEvaluator, default_metric
from nas.executors import checked
from nas.objectives import Objective, parse_objectives, primary_score, violation
from nas.strategies import make_strategy, strategy_class, strategy_settings
from search_spaces.common.errors import UserError
from search_spaces.common.names import canonical

Progress = Callable[[int, int | None], None]
MILESTONES = (10, 20, 50, 100, 150, 200, 300, 500, 1000, 2000, 5000, 10000)


@dataclass(frozen=True)
class StrategyCurves:
    """Best-so-far values of one strategy: `curves` [seeds, queries], NaN before the first full evaluation."""

    name: str
    curves: np.ndarray
    optimum: float
    maximize: bool

    def mean_best(self, queries: Sequence[int]) -> dict[str, float]:
        """The mean over seeds of the best value after so many queries."""
        return {str(q): float(self.curves[:, q - 1].mean()) for q in queries}

    def standard_error(self, queries: Sequence[int]) -> dict[str, float]:
        """The standard error of `mean_best`; NaN for one seed."""
        seeds = len(self.curves)
        if seeds < 2:
            return {str(q): float("nan") for q in queries}
        return {str(q): float(self.curves[:, q - 1].std(ddof=1) / seeds**0.5) for q in queries}

    def queries_to_optimum(self) -> np.ndarray:
        """[seeds] the query that found the table's optimum, inf where none did."""
        reached = self.curves >= self.optimum if self.maximize else self.curves <= self.optimum
        first = np.argmax(reached, axis=1) + 1.0
        return np.where(reached.any(axis=1), first, np.inf)

    def optimum_share(self) -> float:
        """The share of seeds that found the optimum."""
        return float(np.isfinite(self.queries_to_optimum()).mean())

    def median_queries_to_optimum(self) -> float | None:
        """The median over seeds, None when half of them did not find it."""
        median = float(np.median(self.queries_to_optimum()))
        return median if np.isfinite(median) else None


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured. expectation: the exact mean of uniform random draws after each query, from the table."""

    benchmark: str
    metric: str
    label: str
    objectives: str
    queries: int
    seeds: int
    seed: int
    optimum: float
    expectation: np.ndarray
    strategies: tuple[StrategyCurves, ...]

    def milestones(self) -> list[int]:
        """The numbers of queries that tables show."""
        return sorted({*(q for q in MILESTONES if q < self.queries), self.queries})

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the curves."""
        at = self.milestones()
        return {
            "benchmark": self.benchmark,
            "metric": self.metric,
            "label": self.label,
            "objectives": self.objectives,
            "queries": self.queries,
            "seeds": self.seeds,
            "optimum": self.optimum,
            "expectation": {str(q): float(self.expectation[q - 1]) for q in at},
            "strategies": {
                s.name: {
                    "mean_best": s.mean_best(at),
                    "standard_error": s.standard_error(at),
                    "optimum_share": s.optimum_share(),
                    "median_queries_to_optimum": s.median_queries_to_optimum(),
                }
                for s in self.strategies
            },
        }


def compare(
    benchmark: str,
    strategies: Sequence[str],
    *,
    queries: int = 150,
    seeds: int = 200,
    seed: int = 0,
    objectives: str | Sequence[Objective] | None = None,
    label: str = "val",
    strategy_settings: Mapping[str, Mapping[str, Any]] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run every strategy with seeds `seed` to `seed + seeds - 1` on a table.

    queries: evaluations per seed. objectives: the first is compared, bounds are kept; default the validation
    accuracy. strategy_settings: {strategy: {setting: value}}. workers: processes, default one per core.
    The random-search expectation is of independent uniform draws, n-th order statistic of the table's values;
    `random-search` itself also skips isomorphic duplicates, which can only help it (by < .06 on NAS-Bench-201).
    Errors: UserError for bad input.
    """
    for name, value in (("queries", queries), ("seeds", seeds)):
        if isinstance(value, bool) or int(value) != value or value < 1:
            raise UserError(value, f"a whole number of {name} above 0")
    if not strategies:
        raise UserError("--strategies", "at least one strategy")
    names = [strategy_class(name).name for name in strategies]
    evaluator = TableEvaluator(benchmark, label=label)
    table = evaluator.table
    if isinstance(objectives, str):
        objectives = parse_objectives(objectives)
    objectives = tuple(objectives or (Objective(default_metric(table, label), maximize=True),))
    evaluator = dataclasses.replace(evaluator, metrics=tuple(dict.fromkeys(o.name for o in objectives)))
    queries = min(queries, len(table))
    values, optimum = _table_values(evaluator, objectives)
    given = {canonical(k): dict(v) for k, v in (strategy_settings or {}).items()}
    tasks = [
        _Task(evaluator, objectives, name, fill_settings(name, given.get(name, {}), evaluator), queries, tuple(part))
        for name in names
        for part in np.array_split(np.arange(seed, seed + seeds), max(1, min(seeds, (os.cpu_count() or 1) * 4)))
    ]
    curves: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for done, (task, result) in enumerate(zip(tasks, _run_all(tasks, workers), strict=True), 1):
        curves[task.strategy].append(result)
        if progress is not None:
            progress(done, len(tasks))
    maximize = objectives[0].maximize
    expectation = expected_best(values if maximize else -values, queries) * (1 if maximize else -1)
    return Comparison(
        table.id,
        objectives[0].name,
        label,
        ",".join(map(str, objectives)),
        queries,
        seeds,
        seed,
        optimum,
        expectation,
        tuple(StrategyCurves(n, np.concatenate(curves[n]), optimum, maximize) for n in dict.fromkeys(names)),
    )


def fill_settings(strategy: str, given: Mapping[str, Any], evaluator: object) -> dict[str, Any]:
    """`given` and, for a strategy over fidelities, those of the evaluator's table unless they are given.

    Errors: UserError if the table has a single training length.
    """
    settings = dict(given)
    if "fidelities" in strategy_settings(strategy) and "fidelities" not in settings:
        lengths = evaluator.fidelities() if hasattr(evaluator, "fidelities") else []
        if len(lengths) < 2:
            raise UserError(strategy, f"an evaluator with several training lengths, found {list(lengths) or 'none'}")
        settings["fidelities"] = tuple(lengths)
    return settings


def _table_values(evaluator: TableEvaluator, objectives: Sequence[Objective]) -> tuple[np.ndarray, float]:
    """The primary metric of every row that keeps the bounds, and its best value."""
    columns = table_values(evaluator.table, objectives, evaluator.label)
    values = columns[objectives[0].name][feasible_rows(objectives, columns)]
    if len(values) == 0:
        raise UserError(",".join(map(str, objectives)), "bounds that some architecture of the table keeps")
    return values, float(values.max() if objectives[0].maximize else values.min())


@dataclass(frozen=True)
class _Task:
    evaluator: TableEvaluator
    objectives: tuple[Objective, ...]
    strategy: str
    settings: Mapping[str, Any]
    queries: int
    seeds: tuple[int, ...]


def _run_all(tasks: Sequence[_Task], workers: int | None):
    workers = workers or os.cpu_count() or 1
    work = sum(t.queries * len(t.seeds) for t in tasks)
    if workers == 1 or work < 10_000:  # starting processes would take longer
        yield from map(_run_task, tasks)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(_run_task, tasks)


def _run_task(task: _Task) -> np.ndarray:
    table = task.evaluator.table
    space = table.space
    full = max(task.evaluator.fidelities(), default=None)
    known: dict[tuple[Any, int | None], Mapping[str, float] | None] = {}

    def look_up(arch: Any, fidelity: int | None) -> Mapping[str, float] | None:
        if (arch, fidelity) not in known:
            try:
                known[arch, fidelity] = checked(task.evaluator.evaluate(arch, fidelity, seed=0))
            except ValueError:  # a missing measurement is a failed trial, as in a search
                known[arch, fidelity] = None
        return known[arch, fidelity]

    return np.stack([_one_seed(task, space, look_up, full, int(seed)) for seed in task.seeds])


def _one_seed(task: _Task, space: Any, look_up: Callable, full: int | None, seed: int) -> np.ndarray:
    strategy = make_strategy(task.strategy, space, task.objectives, np.random.default_rng(seed), **task.settings)
    first = task.objectives[0]
    best = (-np.inf, -np.inf)
    curve = np.full(task.queries, np.nan)
    for query in range(task.queries):
        try:
            trial = strategy.ask()
        except StopIteration:
            curve[query:] = curve[query - 1]
            break
        assert trial is not None  # nothing is ever in flight here
        metrics = look_up(trial.arch, trial.fidelity)
        strategy.tell(trial.id, metrics)
        if metrics is not None and trial.fidelity in (None, full):
            score = primary_score(task.objectives, metrics)
            if score > best and violation(task.objectives, metrics) == 0:
                best = score
        if np.isfinite(best[1]):
            curve[query] = best[1] if first.maximize else -best[1]
    return curve
