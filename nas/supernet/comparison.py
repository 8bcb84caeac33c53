"""Differentiable searches side by side: what each found by a table, and how it got there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.table import Table
from nas.evaluators import reference_metric
from nas.run import Run
from nas.supernet.search import KIND, SearchTask, read_log
from search_spaces.common.errors import UserError
from search_spaces.common.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Epoch:
    """An epoch of one search. acc: the table's, of the architecture that would be read off now."""

    epoch: int
    arch: str
    acc: float
    skip_share: float
    val_acc: float
    eigenvalue: float | None = None


@dataclass(frozen=True)
class Outcome:
    """One search. acc, rank: of what it returned, by the table, 1 is best; seconds: of the search alone.

    mixture_val_acc: percent of the alphas' images that the whole supernet gets right at the end.
    """

    recipe: str
    seed: int
    arch: str
    acc: float
    rank: int
    skip_share: float
    mixture_val_acc: float
    seconds: float
    epochs: tuple[Epoch, ...]


@dataclass(frozen=True)
class Comparison:
    """Searches on one table. metric: its column; mean, best: over all its architectures, so what chance gives."""

    benchmark: str
    metric: str
    size: int
    mean: float
    deviation: float
    best: float
    outcomes: tuple[Outcome, ...]

    def recipes(self) -> dict[str, list[Outcome]]:
        """Outcomes by recipe, in the order given."""
        found: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            found.setdefault(outcome.recipe, []).append(outcome)
        return found


def compare(paths: Sequence[str | Path], table: Table) -> Comparison:
    """The finished searches in the folders `paths`, looked up in `table`: test accuracy where it has one.

    Errors: UserError for a run that is no search in a supernet, is in another space, or has no finished seed; for two
    runs of one recipe whose settings differ, or with the same seed.
    """
    metric = reference_metric(table)
    values = np.asarray(table.test_values(None, metric, purpose="comparison of differentiable searches"), float)
    tasks: dict[str, SearchTask] = {}
    outcomes: list[Outcome] = []
    for path in paths:
        run = Run.open(path)
        if run.settings.get("kind") != KIND:
            raise UserError(str(path), f"a search in a supernet; this run is a {run.settings.get('kind')}")
        task = SearchTask.from_json(run.settings["search"])
        if task.space != table.space.name:
            raise UserError(task.space, f"searches in the space of {table.id}", table.space.name)
        name = task.recipe.name
        differences = task.differences(tasks.setdefault(name, task))
        if differences:
            raise UserError(str(path), f"the settings of the other runs of {name}; {'; '.join(differences)}")
        found = _outcomes(run, name, table, values)
        twice = {(o.recipe, o.seed) for o in found} & {(o.recipe, o.seed) for o in outcomes}
        if twice:
            raise UserError(sorted(twice)[0][1], f"a seed of {name} once")
        outcomes += found
    finite = values[np.isfinite(values)]
    about = {"size": len(finite), "mean": finite.mean(), "deviation": finite.std(), "best": finite.max()}
    return Comparison(
        table.id, metric, outcomes=tuple(outcomes), **{k: v.item() if k != "size" else v for k, v in about.items()}
    )


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each recipe: means over its seeds; spreads are standard deviations between seeds, None for one."""
    found = []
    for name, outcomes in comparison.recipes().items():
        last = [o.epochs[-1].eigenvalue for o in outcomes if o.epochs and o.epochs[-1].eigenvalue is not None]
        accs = [o.acc for o in outcomes]
        found.append(
            {
                "recipe": name,
                "seeds": len(outcomes),
                "acc": float(np.mean(accs)),
                "acc_deviation": float(np.std(accs, ddof=1)) if len(accs) > 1 else None,
                "ranks": [o.rank for o in outcomes],
                "skip_share": float(np.mean([o.skip_share for o in outcomes])),
                "eigenvalue": float(np.mean(last)) if last else None,
                "mixture_val_acc": float(np.mean([o.mixture_val_acc for o in outcomes])),
                "seconds": float(np.mean([o.seconds for o in outcomes])),
            }
        )
    return found


def write_records(comparison: Comparison, path: str | Path) -> None:
    """A line of JSON for each epoch of each search, and one for each search's end."""
    with atomic_write(Path(path)) as file:
        for outcome in comparison.outcomes:
            whole = asdict(outcome)
            who = {"recipe": whole["recipe"], "seed": whole["seed"]}
            for epoch in whole.pop("epochs"):
                file.write(json.dumps(who | {k: _short(v) for k, v in epoch.items() if v is not None}) + "\n")
            file.write(json.dumps({"found": True, **{k: _short(v) for k, v in whole.items()}}) + "\n")


def figure(comparison: Comparison) -> Figure:
    """Three panels over epochs: the table's accuracy of what would be read off, skip share, eigenvalue.

    A thin line is a seed, a thick one the mean of a recipe's seeds over the epochs that all of them have.
    """
    from nas.plots import COLORS, GREY, figure_of, panels

    watched = any(e.eigenvalue is not None for o in comparison.outcomes for e in o.epochs)
    axes = panels(3 if watched else 2)
    titles = [f"{comparison.metric} of the architecture read off (%)", "share of skip connections"]
    titles += ["largest eigenvalue of the Hessian"] if watched else []
    for place, (own, title, name) in enumerate(zip(axes, titles, ("acc", "skip_share", "eigenvalue"))):
        for color, (recipe, outcomes) in zip(COLORS * len(comparison.outcomes), comparison.recipes().items()):
            lines = [[getattr(e, name) for e in o.epochs] for o in outcomes]
            lines = [[np.nan if v is None else v for v in line] for line in lines]
            for line in lines:
                own.plot(range(1, len(line) + 1), line, color=color, linewidth=0.6, alpha=0.35)
            common = min(map(len, lines))
            mean = np.mean([line[:common] for line in lines], axis=0)
            own.plot(range(1, common + 1), mean, color=color, linewidth=1.8, label=recipe)
        own.set_xlabel("epoch")
        own.set_title(title, fontsize=9.5, loc="left")
        if name == "acc":
            for value, style, what in ((comparison.best, ":", "best"), (comparison.mean, "--", "random")):
                own.axhline(value, color=GREY, linestyle=style, linewidth=1)
                right = own.get_yaxis_transform()
                own.annotate(what, (0.01, value), xycoords=right, color=GREY, fontsize=8, va="bottom")
        if name == "skip_share":
            own.set_ylim(-0.03, 1.03)
        if place == len(titles) - 1:
            own.legend(fontsize=8.5, framealpha=0.9, edgecolor="none")
    return figure_of(axes[0])


def _outcomes(run: Run, name: str, table: Table, values: np.ndarray) -> list[Outcome]:
    log = read_log(run)
    found = []
    for trial in run.trials():
        if trial.status != "done" or trial.seed is None:
            continue
        own = [row for row in log if row["seed"] == trial.seed and "arch" in row]
        accs = _accuracies([row["arch"] for row in own], table, values)
        epochs = [
            Epoch(row["epoch"], row["arch"], float(acc), row["skip_share"], row["val_acc"], row.get("eigenvalue"))
            for row, acc in zip(own, accs, strict=True)
        ]
        acc = float(_accuracies([trial.arch], table, values)[0])
        metrics = trial.metrics or {}
        rank = 1 + int((values > acc).sum())
        shares = {k: metrics[k] for k in ("skip_share", "mixture_val_acc")}
        seconds = metrics["search_seconds"]
        found.append(Outcome(name, trial.seed, trial.arch, acc, rank, **shares, seconds=seconds, epochs=tuple(epochs)))
    if not found:
        raise UserError(str(run.path), "a search of which at least one seed is done")
    return found


def _accuracies(archs: Sequence[str], table: Table, values: np.ndarray) -> np.ndarray:
    return values[table.rows_of([table.space.decode(text) for text in archs])] if archs else np.empty(0)


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
