"""Strategies side by side by real training: each search is a run, and runs are compared at equal cost."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nas.analysis import best_so_far, simulated_seconds
from nas.budget import Budget
from nas.comparison import MILESTONES, fill_settings
from nas.loop import search
from nas.objectives import parse_objectives
from nas.result import SearchResult
from nas.run import Run
from nas.strategies import strategy_class
from nas.training.evaluator import TrainEvaluator
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class TrainedComparison:
    """Finished searches by strategy, one for each seed. epochs: of a whole training, which alone can be the best."""

    objectives: str
    epochs: int
    results: Mapping[str, Sequence[SearchResult]]

    def curves(self, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each seed: (best so far, clock in seconds) after every trial."""
        return [(self._best(r), simulated_seconds(r.records)) for r in self.results[name]]

    def _best(self, result: SearchResult) -> np.ndarray:
        best = best_so_far(parse_objectives(self.objectives), result.records)
        whole = any(r.status == "done" and r.fidelity in (None, self.epochs) for r in result.records)
        return best if whole else np.full_like(best, np.nan)  # short trainings compete among themselves only

    def after_queries(self, name: str, queries: int) -> np.ndarray:
        """[seeds] the best value after so many trials, NaN before the first full training; a search that ended
        earlier keeps its last."""
        return np.array([best[min(queries, len(best)) - 1] for best, _ in self.curves(name)])

    def within_seconds(self, name: str, seconds: float) -> np.ndarray:
        """[seeds] the best value that was found for at most `seconds` of training."""
        found = []
        for best, clock in self.curves(name):
            done = int(np.searchsorted(clock, seconds, side="right"))
            found.append(best[done - 1] if done else np.nan)
        return np.array(found)

    def queries(self) -> list[int]:
        """The numbers of trials that tables show, up to those of the longest search."""
        most = max(len(r.records) for results in self.results.values() for r in results)
        return sorted({*(q for q in (5, *MILESTONES) if q < most), most})

    def common_seconds(self) -> float:
        """The cost that every search has paid: that of the cheapest."""
        return min(float(clock[-1]) for name in self.results for _, clock in self.curves(name))

    def as_json(self) -> dict[str, Any]:
        """Means and standard errors over seeds, after numbers of trials and at the common cost."""
        at, seconds = self.queries(), self.common_seconds()
        strategies = {}
        for name, results in self.results.items():
            after = {q: mean_and_error(self.after_queries(name, q)) for q in at}
            mean, error = mean_and_error(self.within_seconds(name, seconds))
            strategies[name] = {
                "mean_best": {str(q): found[0] for q, found in after.items()},
                "standard_error": {str(q): found[1] for q, found in after.items()},
                "optimum_share": None,
                "median_queries_to_optimum": None,
                "mean_best_at_common_seconds": mean,
                "standard_error_at_common_seconds": error,
                "train_seconds": [float(clock[-1]) for _, clock in self.curves(name)],
                "runs": [str(r.run.path) for r in results if r.run is not None],
            }
        return {"objectives": self.objectives, "common_seconds": seconds, "strategies": strategies}


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard error; the error of a single value is NaN."""
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
    return float(values.mean()), error


def compare_by_training(
    evaluator: TrainEvaluator,
    strategies: Sequence[str],
    out: str | Path,
    *,
    budget: Budget,
    seeds: int = 3,
    seed: int = 0,
    objectives: str = "val_acc",
    workers: int = 1,
    strategy_settings: Mapping[str, Mapping[str, Any]] | None = None,
    describe: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> TrainedComparison:
    """Search with every strategy and with seeds `seed` to `seed + seeds - 1`, each in a run below `out`.

    strategy_settings: {strategy: {setting: value}}. What is finished there is not done again. Strategies share
    trainings through the evaluator's cache, and each run pays for what it uses as if it were alone, so the
    comparison takes less time than its runs' clocks say. Errors: UserError.
    """
    if seeds < 1:
        raise UserError(seeds, "at least one seed")
    if not strategies:
        raise UserError("--strategies", "at least one strategy")
    names = list(dict.fromkeys(strategy_class(name).name for name in strategies))
    given = {strategy_class(name).name: dict(values) for name, values in (strategy_settings or {}).items()}
    settings = {name: fill_settings(name, given.get(name, {}), evaluator) for name in names}
    evaluator.check()
    found: dict[str, list[SearchResult]] = {name: [] for name in names}
    total = len(names) * seeds
    for own_seed in range(seed, seed + seeds):  # all strategies with one seed, then with the next
        for name in names:
            folder = Path(out) / f"{name}-seed{own_seed}"
            paying = replace(evaluator, account=account_of(folder))
            about = {"evaluator": "train", "space": evaluator.space, "training": paying.as_json(), **(describe or {})}
            result = search(
                load_space(evaluator.space),
                paying,
                name,
                budget=budget,
                objectives=objectives,
                seed=own_seed,
                workers=workers,
                out=folder,
                strategy_settings=settings[name],
                describe=about,
            )
            found[name].append(result)
            if progress is not None:
                progress(sum(map(len, found.values())), total)
    return TrainedComparison(objectives, evaluator.fidelities()[-1], found)


def account_of(folder: Path) -> str:
    """The name under which a run pays: the one it has, or a new one that no run before had."""
    known = Run.open(folder).settings.get("training") if Run.exists(folder) else None
    return known["account"] if known else secrets.token_hex(8)
