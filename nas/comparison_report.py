"""The report of a comparison of strategies: one self-contained HTML file, and its curves as a file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas import page, plots
from nas.metrics import format_distance, format_metric, metric_words
from nas.report import environment_section

if TYPE_CHECKING:
    from nas.comparison import Comparison


def write_comparison_plot(comparison: Comparison, out: str | os.PathLike[str]) -> Path:
    """Write the curves of a comparison to an .svg or .png file. Errors: UserError for another ending."""
    plots.save(_curves(comparison), out)
    return Path(out)


def write_comparison_report(
    comparison: Comparison,
    out: str | os.PathLike[str],
    *,
    command: str | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report of a comparison to `out`. Errors: UserError, RunError if the file cannot be written."""
    return page.write(out, comparison_report(comparison, command=command, environment=environment))


def comparison_report(
    comparison: Comparison, *, command: str | None = None, environment: Mapping[str, Any] | None = None
) -> str:
    """A comparison of strategies as HTML: a table of means, the curves, how to repeat it."""
    metric = comparison.metric
    kind = (
        f"nasforge compare \u00b7 {comparison.benchmark} \u00b7 {comparison.seeds} seeds \u00b7 {comparison.objectives}"
    )
    warning = "Compared on test labels (--label test)."
    note = (
        "Means over seeds of the best value after so many queries, \u00b1 standard error. Random draws: the exact "
        "expectation of the best of so many independent uniform draws, from the table's values."
    )
    curves = plots.svg(_curves(comparison), "curves")
    distances = plots.svg(_curves(comparison, regret=True, log_queries=True), "distances")
    repeat: list[object] = [page.block(command)] if command else []
    facts = {name: getattr(comparison, name) for name in ("benchmark", "objectives", "label", "queries", "seeds")}
    first, last = comparison.seed, comparison.seed + comparison.seeds - 1
    facts["seeds"] = f"{first} to {last}" if last > first else str(first)
    body = [
        *([page.paragraph(warning, style="warning")] if comparison.label == "test" else []),
        page.paragraph(_verdict(comparison), style="lead"),
        page.section("Means", _means(comparison), page.paragraph(note, style="soft")),
        page.section(
            "Curves",
            page.plots(
                [
                    page.figure(
                        curves, f"Best {metric_words(metric)}: median over seeds, band from quartile to quartile."
                    ),
                    page.figure(distances, "The same as distance from the optimum, both axes logarithmic."),
                ]
            ),
        ),
        page.section("How to repeat it", *repeat, page.pairs(facts)),
        environment_section(environment or {}),
    ]
    title = f"{len(comparison.strategies)} strategies after {comparison.queries:,} queries"
    return page.page(title, kind, body, f"nasforge {(environment or {}).get('nasforge', '')}".strip())


def _curves(comparison: Comparison, **style: Any) -> Any:
    return plots.curves(
        {s.name: s.curves for s in comparison.strategies},
        metric=comparison.metric,
        maximize=comparison.strategies[0].maximize,
        optimum=comparison.optimum,
        expectation=comparison.expectation,
        **style,
    )


def _verdict(comparison: Comparison) -> str:
    """Who is ahead at the end, and whether the seeds suffice to say so."""
    last, at = str(comparison.queries), [comparison.queries]
    sign = 1 if comparison.strategies[0].maximize else -1
    ranked = sorted(comparison.strategies, key=lambda s: -sign * s.mean_best(at)[last])
    first = ranked[0]
    metric, best = comparison.metric, first.mean_best(at)[last]
    distance = format_distance(metric, abs(comparison.optimum - best))
    text = (
        f"{first.name} comes closest: on average {format_metric(metric, best)} {metric_words(metric)} after "
        f"{comparison.queries:,} queries, {distance} from the optimum, which "
        f"{100 * first.optimum_share():.0f} % of its seeds found."
    )
    if len(ranked) > 1:
        second = ranked[1]
        gap = abs(best - second.mean_best(at)[last])
        error = math.hypot(first.standard_error(at)[last], second.standard_error(at)[last])
        text += f" {second.name} follows {format_distance(metric, gap)} behind"
        text += ", which is within two standard errors: no clear order." if not gap > 2 * error else "."
    return text


def _means(comparison: Comparison) -> page.Markup:
    at = comparison.milestones()
    sign = 1 if comparison.strategies[0].maximize else -1
    ranked = sorted(comparison.strategies, key=lambda s: -sign * s.mean_best(at[-1:])[str(at[-1])])
    rows: list[list[object]] = []
    for s in ranked:
        means, errors = s.mean_best(at), s.standard_error(at)
        cells = [_mean_and_error(means[str(q)], errors[str(q)]) for q in at]
        median = s.median_queries_to_optimum()
        rows.append(
            [s.name, *cells, f"{100 * s.optimum_share():.0f} %", "\u2013" if median is None else f"{median:,g}"]
        )
    rows.append([page.unbroken(plots.EXPECTATION), *(f"{comparison.expectation[q - 1]:.3f}" for q in at), "", ""])
    rows.append([plots.OPTIMUM, *(f"{comparison.optimum:.3f}" for _ in at), "", ""])
    headings = ["strategy", *(f"{q:,} queries" for q in at), "seeds at the optimum", "median queries to it"]
    return page.table(headings, rows, numbers=range(1, len(headings)), marked=0)


def _mean_and_error(mean: float, error: float) -> page.Markup:
    spread = "" if math.isnan(error) else page.small(f"\u00b1\u2009{error:.3f}")
    return page.Markup(f"{mean:.3f} {spread}")
