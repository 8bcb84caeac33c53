"""The report of a run: one self-contained HTML file, and its figures as files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nas import page, plots
from nas.analysis import (
    Found,
    Summary,
    best_so_far,
    expected_best,
    feasible_trials,
    in_order_told,
    simulated_seconds,
    summarise,
    table_front,
    table_values,
)
from nas.metrics import (
    format_count,
    format_distance,
    format_metric,
    format_seconds,
    metric_label,
    metric_words,
)
from nas.objectives import Objective, non_dominated, optimised
from search_spaces.common.drawing import draw_graph
from search_spaces.common.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benchmarks.table import Table
    from nas.result import SearchResult
    from nas.run import TrialRecord

COSTED = 5000  # trials whose parameters are counted for a plot when no metric tells them


def write_report(result: SearchResult, out: str | os.PathLike[str]) -> Path:
    """Write a run's report to `out`. Errors: UserError, RunError if the file cannot be written."""
    return page.write(out, run_report(result))


def write_run_plot(result: SearchResult, out: str | os.PathLike[str]) -> Path:
    """Write a run's curve, and its front with several objectives, to an .svg or .png file. Errors: UserError."""
    view = _View(result)
    several = len(optimised(view.summary.objectives)) > 1
    axes = plots.panels(2 if several else 1)
    view.curve(axes[0])
    if several:
        first, second = optimised(view.summary.objectives)[:2]
        view.scatter(first, second, axes[1])
    plots.save(plots.figure_of(axes[0]), out)
    return Path(out)


def run_report(result: SearchResult) -> str:
    """A run's report as HTML."""
    view = _View(result)
    settings, summary = result.settings, view.summary
    kind = f"nasforge search \u00b7 {settings['strategy']} \u00b7 {_subject(settings)} \u00b7 seed {settings['seed']}"
    warnings = []
    if summary.label == "test":
        text = "Searched on test labels (--label test). The values below, the best one above all, are no estimate of "
        warnings.append(page.paragraph(text + "how well the architecture generalises.", style="warning"))
    body = [
        *warnings,
        page.paragraph(_headline(settings, summary), style="lead"),
        page.tiles(_figures(result, summary)),
        *_best_section(result, summary),
        page.section("The search", page.plots(view.figures())),
        *_top_section(result, summary),
        *_funnel_section(result),
        _failures_section(result.records),
        _settings_section(result),
    ]
    return page.page(_title(summary), kind, body, f"nasforge {settings.get('version', '')}".strip())


# -- words --------------------------------------------------------------------------------------------------------


def _subject(settings: Mapping[str, Any]) -> str:
    evaluator = str(settings["evaluator"])
    return evaluator.removeprefix("table:") if evaluator.startswith("table:") else f"{settings['space']}, {evaluator}"


def _title(summary: Summary) -> str:
    if summary.best is None:
        return "No architecture was found"
    primary = summary.objectives[0].name
    value = format_metric(primary, summary.best.metrics[primary])
    return f"{value} {metric_words(primary)} after {summary.queries:,} queries"


def _headline(settings: Mapping[str, Any], summary: Summary) -> str:
    if summary.best is None:
        reason = "kept the bounds" if summary.failed < summary.queries else "succeeded"
        return f"None of the {summary.queries:,} trials {reason}."
    primary, table = summary.objectives[0], summary.table
    value = format_metric(primary.name, summary.best.metrics[primary.name])
    found = f"{settings['strategy']} found an architecture with {value} {metric_words(primary.name)}."
    if table is None or table.optimum is None or summary.regret is None:
        return f"{found} How far that is from the best is unknown: there is no table of the whole space."
    among = f"{table.feasible:,} architectures of the table"
    if table.feasible < table.rows:
        among += " that keep the bounds"
    if table.rank == 1:
        text = f"{found} No better one is among the {among}: the optimum is reached."
    else:
        optimum = format_metric(primary.name, table.optimum)
        distance = format_distance(primary.name, summary.regret)
        text = f"{found} The best in the table has {optimum}, so the search ended {distance} from the optimum"
        text += f", at rank {table.rank:,} of the {among}."
    if table.hypervolume_regret is not None and table.front is not None:
        text += (
            f" Its front has {len(summary.front)} points, the exact one {len(table.front)};"
            f" {table.hypervolume_regret:.4g} of the scaled hypervolume is missing."
        )
    if settings.get("seed_policy") not in (None, "mean"):
        text += " Trials saw single trainings; distance and rank compare the table's means over seeds."
    if summary.best_test is not None and table.test_metric is not None and summary.label != "test":
        test = format_metric(table.test_metric, summary.best_test)
        text += f" Its {metric_words(table.test_metric)}, looked up after the search, is {test}."
    return text


def _figures(result: SearchResult, summary: Summary) -> dict[str, str]:
    primary = summary.objectives[0].name
    shown: dict[str, str] = {}
    if summary.best is not None:
        shown[f"best {metric_words(primary)}"] = format_metric(primary, summary.best.metrics[primary])
    table = summary.table
    if table is not None and table.optimum is not None:
        shown["optimum of the table"] = format_metric(primary, table.optimum)
        if table.rank is not None:
            shown[f"rank among {table.feasible:,}"] = f"{table.rank:,}"
        if table.test_metric is not None and summary.best_test is not None and summary.label != "test":
            shown[f"its {metric_words(table.test_metric)}"] = format_metric(table.test_metric, summary.best_test)
        if table.hypervolume_regret is not None:
            shown["hypervolume regret"] = f"{table.hypervolume_regret:.3g}"
    shown["queries"] = f"{summary.queries:,}"
    clock = simulated_seconds(result.records)
    if clock.any():
        if _counts_steps(result):
            shown["training steps"] = format_count(float(clock[-1]))
        else:
            shown["simulated time"] = format_seconds(float(clock[-1]))
    times = [t for r in result.records for t in (r.asked_at, r.told_at) if t]
    if times:
        shown["wall time"] = format_seconds(max(times) - min(times))
    return shown


# -- sections -----------------------------------------------------------------------------------------------------


def _best_section(result: SearchResult, summary: Summary) -> list[page.Markup]:
    best = summary.best
    if best is None:
        return []
    shown = _readable(result, best.arch)
    facts: dict[str, object] = {"architecture": page.code(shown)}
    if best.key != best.arch and shown == best.arch:
        facts["key"] = page.code(best.key)
    facts["trial"] = best.id if best.fidelity is None else f"{best.id}, {best.fidelity} epochs"
    facts |= {metric_words(name): format_metric(name, value) for name, value in _shown_metrics(result, best).items()}
    drawing: list[object] = []
    try:
        arch = result.space.decode(best.arch)
        drawing = [page.figure(draw_graph(result.space.graph(arch)))]
        scale = (result.settings.get("training") or {}).get("network", {})
        network = result.space.cost(arch, **scale)
        named = {"params": "parameters", "macs": "multiply-adds", "live_macs": "live multiply-adds"}
        counts = [f"{named.get(k, k)} {format_count(v)}" for k, v in network.items()]
        facts["network as trained" if scale else "network as built by default"] = ", ".join(counts)
    except UserError:
        pass  # a space need not state costs
    return [page.section("The best architecture", *drawing, page.pairs(facts))]


def _readable(result: SearchResult, text: str) -> str:
    return result.space.readable(result.space.decode(text))


def _counts_steps(result: SearchResult) -> bool:
    """Whether the run's clock counts training steps instead of seconds."""
    return result.settings.get("kind") == "layers"


def _shown_metrics(result: SearchResult, found: Found) -> dict[str, float]:
    if _counts_steps(result):
        return {k: v for k, v in found.metrics.items() if k != "cost_seconds"}
    return {k: v for k, v in found.metrics.items() if k != "cost_seconds"} | {
        k: v for k, v in found.metrics.items() if k == "cost_seconds"
    }


def _top_section(result: SearchResult, summary: Summary) -> list[page.Markup]:
    if not summary.top:
        return []
    names = list(_shown_metrics(result, summary.top[0]))
    test = summary.table.test_metric if summary.table is not None else None
    headings = ["trial", "architecture", *map(metric_label, names)]
    rows: list[list[object]] = []
    for found in summary.top:
        values = [format_metric(n, found.metrics.get(n), unit=False) for n in names]
        rows.append([found.id, page.code(_readable(result, found.arch)), *values])
        if test is not None and test not in names:
            rows[-1].append(format_metric(test, found.test, unit=False))
    if test is not None and test not in names:
        headings.append(metric_label(test))
        note = "Test values were looked up after the search and had no part in it."
    elif test is not None:
        note = ""
    elif summary.table is not None:
        command = f"nas bench add {summary.table.id} --space {result.settings['space']} --table FILE --merge"
        note = page.join(
            "This table has no test values. With a file of them, they appear here after", page.code(command)
        )
    else:
        note = "The evaluator is no table, so there are no test values to look up."
    below = [page.paragraph(note, style="soft")] if note else []
    title = f"The best {len(rows)} architectures" if len(rows) > 1 else "The only architecture in question"
    return [
        page.section(title, page.table(headings, rows, numbers=range(2, len(headings)), widest=1, marked=0), *below)
    ]


def _failures_section(records: Sequence[TrialRecord]) -> page.Markup:
    failed = [r for r in records if r.status == "failed"]
    waiting = sum(r.status == "asked" for r in records)
    more = page.paragraph(f"{waiting:,} trials were asked and not finished.", style="soft") if waiting else ""
    if not failed:
        return page.section("Failures", page.paragraph("No trial failed."), more)
    reasons: dict[str, list[int]] = {}
    for record in failed:
        reasons.setdefault(record.error or "no message", []).append(record.id)
    ordered = sorted(reasons.items(), key=lambda item: (-len(item[1]), item[1]))
    rows = [[len(ids), page.code(message), ids[0]] for message, ids in ordered[:20]]
    text = f"{len(failed):,} of {len(records):,} trials failed"
    text += f", for {len(reasons):,} reasons; the 20 most frequent:" if len(reasons) > 20 else ":"
    return page.section(
        "Failures",
        page.paragraph(text),
        page.table(["trials", "message", "first trial"], rows, numbers=(2,), widest=1),
        more,
    )


def _funnel_section(result: SearchResult) -> list[page.Markup]:
    if result.settings.get("kind") != "layers":
        return []
    from nas.layers.report import funnel_section

    return [funnel_section(result)]


def _settings_section(result: SearchResult) -> page.Markup:
    settings = dict(result.settings)
    command, environment = settings.pop("command", None), settings.pop("environment", None) or {}
    content: list[object] = []
    if command:
        content += [page.paragraph("The same search again:"), page.block(command)]
    if result.run is not None:
        content += [page.paragraph("To go on with this run, or to look at its best:")]
        content += [page.block(f"nas resume {result.run.path}\nnas show {result.run.path}:best")]
    content.append(page.pairs({name.replace("_", " "): _plain(value) for name, value in settings.items()}))
    return page.join(page.section("How to repeat it", *content), environment_section(environment))


def environment_section(environment: Mapping[str, Any]) -> page.Markup:
    """Where something was made; nothing if that is not known."""
    return page.section("Environment", page.pairs(dict(environment))) if environment else page.Markup("")


def _plain(value: Any) -> object:
    if value is None:
        return "\u2013"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items()) or "\u2013"
    return value if isinstance(value, str | int | float) else json.dumps(value)


# -- figures ------------------------------------------------------------------------------------------------------


class _View:
    """A result with its table, its summary and the arrays that the figures need."""

    def __init__(self, result: SearchResult):
        self.result = result
        self.table = _table(result)
        self.summary = summarise(result.settings, result.records, self.table)
        self.told = in_order_told(result.records)
        self.best = best_so_far(self.summary.objectives, self.told)

    def figures(self) -> list[page.Markup]:
        """The curve over queries and over the simulated clock, and a scatter for every pair with the primary."""
        primary = metric_words(self.summary.objectives[0].name)
        shown = [page.figure(plots.svg(self.curve(), "curve"), f"Best {primary} against the number of queries.")]
        if simulated_seconds(self.told).any() and not _counts_steps(self.result):
            svg = plots.svg(self.curve(clock=True), "clock")
            shown.append(page.figure(svg, "The same against the simulated time that the trials would have taken."))
        for place, (first, second) in enumerate(self._pairs()):
            figure = self.scatter(first, second)
            if figure is not None:
                caption = f"{metric_words(first.name).capitalize()} against {metric_words(second.name)}."
                shown.append(page.figure(plots.svg(figure, f"scatter{place}"), caption))
        return shown

    def curve(self, axes: Axes | None = None, *, clock: bool = False) -> Any:
        """Best so far over queries or over the simulated clock."""
        objectives, table = self.summary.objectives, self.table
        first = objectives[0]
        competing = {f.id: f.metrics[first.name] for f in feasible_trials(objectives, self.told)}
        expectation = None
        if table is not None and not any(o.bound is not None for o in objectives) and len(self.told):
            values = self._table_values((first,))[first.name]
            values = values[np.isfinite(values)] * (1 if first.maximize else -1)
            expectation = expected_best(values, len(self.told)) * (1 if first.maximize else -1)
        return plots.run_curve(
            self.best,
            metric=first.name,
            maximize=first.maximize,
            values=np.array([competing.get(r.id, math.nan) for r in self.told]),
            optimum=self.summary.table.optimum if self.summary.table is not None else None,
            expectation=expectation,
            seconds=simulated_seconds(self.told) if clock else None,
            axes=axes,
        )

    def scatter(self, first: Objective, second: Objective, axes: Axes | None = None) -> Any:
        """Trials, the run's front and the exact front of two metrics; None if the second is not known."""
        bounds = [o for o in self.summary.objectives if o.bound is not None]
        found = feasible_trials(self.summary.objectives, self.told)
        values = self._second_values(found, second.name)
        if values is None or not found:
            return None
        points = np.column_stack([[f.metrics[first.name] for f in found], values])
        signs = np.array([-1.0 if o.maximize else 1.0 for o in (first, second)])
        known = np.flatnonzero(np.isfinite(points).all(axis=1))
        front = points[known[non_dominated(points[known] * signs)]]
        exact = None
        if self.table is not None and self.table.has(second.name):
            chosen = (first, second, *bounds)
            columns = self._table_values(chosen)
            rows = table_front(chosen, columns)
            exact = np.column_stack([columns[first.name][rows], columns[second.name][rows]])
        best = points[[f.id for f in found].index(self.summary.best.id)] if self.summary.best is not None else None
        return plots.scatter(points, (first, second), front=front, exact_front=exact, best=best, axes=axes)

    def _pairs(self) -> list[tuple[Objective, Objective]]:
        first, *others = optimised(self.summary.objectives)
        if not others and first.name != "params":
            others = [Objective("params", maximize=False)]
        return [(first, other) for other in others]

    def _table_values(self, objectives: Sequence[Objective]) -> dict[str, np.ndarray]:
        assert self.table is not None
        epochs = self.summary.best.fidelity if self.summary.best is not None else None
        return table_values(self.table, objectives, self.summary.label, epochs)

    def _second_values(self, found: Sequence[Found], name: str) -> np.ndarray | None:
        """A metric of each trial: measured, from the table, or (parameters) counted by the space."""
        if found and all(name in f.metrics for f in found):
            return np.array([f.metrics[name] for f in found], float)
        space = self.result.space
        try:
            if self.table is not None and self.table.has(name):
                return self.table.values([space.decode(f.arch) for f in found], name)
            if name == "params" and len(found) <= COSTED:
                scale = (self.result.settings.get("training") or {}).get("network", {})
                return np.array([space.cost(space.decode(f.arch), **scale)["params"] for f in found], float)
        except UserError:
            pass
        return None


def _table(result: SearchResult) -> Table | None:
    from nas.evaluators import TableEvaluator

    return result.evaluator.table if isinstance(result.evaluator, TableEvaluator) else None
