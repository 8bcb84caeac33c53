"""The page of a correlation: a table of all statistics and a scatter plot for every proxy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nas import page, plots
from nas.metrics import format_metric, metric_label, metric_words
from nas.scoring.aggregates import find_aggregate
from nas.scoring.correlation import BASELINES, ProxyCorrelation
from nas.scoring.many import ScoreTable
from zero_cost.correlation import average_ranks
from zero_cost.proxies import PROXIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADINGS = (
    "proxy", "Spearman", "95 % interval", "Kendall tau-b", "95 % interval", "tau among the best 10 %",
    "precision at 5 %", "best rank among its 10 best", "its first choice", "regret", "no value",
)  # fmt: skip


def write_report(
    out: str | os.PathLike[str],
    benchmark: str,
    metric: str,
    table: ScoreTable,
    truth: np.ndarray,
    found: Mapping[str, ProxyCorrelation],
    command: str,
    reasons: Sequence[str] = (),
) -> Path:
    """Write the page to `out`. Errors: UserError, RunError if it cannot be written."""
    order = sorted(found.values(), key=lambda c: -_sortable(c.statistics["spearman"]))
    seeds = len(table.seeds)
    body = [
        page.paragraph(_lead(order, metric, len(truth)), style="lead"),
        page.section(
            "How well each proxy ranks",
            page.table(HEADINGS, [_row(c, metric, seeds) for c in order], numbers=range(1, len(HEADINGS))),
            page.paragraph(_how(seeds)),
        ),
        page.section("Proxy and accuracy", page.plots([_plot(table, truth, c, metric) for c in order])),
        page.section("What the proxies are", page.pairs({c.name: _formula(c.name) for c in order})),
    ]
    if reasons:
        body.append(page.section("Without a value", *(page.paragraph(text) for text in reasons)))
    body.append(page.section("How this was made", page.block(command)))
    return page.write(out, page.page(f"Training-free proxies on {benchmark}", "correlation of proxies", body))


def rank_figure(scores: np.ndarray, truth: np.ndarray, metric: str, name: str, baseline: bool = False) -> Figure:
    """Accuracy over the rank by a proxy [N], 1 = worst; ties at their mean rank, no value lowest."""
    axes = plots.panels(1)[0]
    color = plots.GREY if baseline else plots.COLORS[0]
    axes.scatter(
        average_ranks(scores), truth, s=9, color=color, alpha=0.45, linewidths=0,
        rasterized=len(truth) > plots.MOST_DOTS, zorder=2,
    )  # fmt: skip
    axes.set_xlabel(f"rank by {name} (1 = worst of {len(truth):,})")
    axes.set_ylabel(metric_label(metric))
    if len(truth) >= 20:  # untrained networks would squeeze the rest
        low, high = np.quantile(truth, 0.05), truth.max()
        axes.set_ylim(max(truth.min(), low - 0.5 * (high - low)) - 0.05 * (high - low), high + 0.05 * (high - low))
    return plots.figure_of(axes)


def _plot(table: ScoreTable, truth: np.ndarray, found: ProxyCorrelation, metric: str) -> page.Markup:
    figure = rank_figure(table.column(found.name)[:, 0], truth, metric, found.name, found.name in BASELINES)
    caption = f"{found.name}: Spearman {found.statistics['spearman']:.3f}, tau {found.statistics['kendall_tau']:.3f}"
    if len(table.seeds) > 1:
        caption += f"; drawn: seed {table.seeds[0]}"
    identifier = "scatter-" + "".join(c if c.isalnum() else "-" for c in found.name)
    return page.figure(plots.svg(figure, identifier), caption)


def _lead(order: Sequence[ProxyCorrelation], metric: str, n: int) -> str:
    proxies = [c for c in order if c.name not in BASELINES]
    baselines = [c for c in order if c.name in BASELINES]
    text = ""
    if proxies:
        first = proxies[0]
        text = f"{first.name} ranks best (Spearman {first.statistics['spearman']:.3f}"
        text += f" with the {metric_words(metric)} of {n:,} architectures)"
    if baselines:
        best = baselines[0]
        joint = "; the best baseline is " if text else "The best baseline is "
        text += f"{joint}{best.name} ({best.statistics['spearman']:.3f})"
    return text + "."


def _how(seeds: int) -> str:
    text = (
        "Intervals are percentiles over architectures drawn anew (bootstrap). An architecture without a value ranks "
        "worst. Params, macs, live-macs and random are the baselines: a proxy below them is not worth its cost."
    )
    if seeds > 1:
        text += f" Every figure is the mean over {seeds} seeds of weights and images, ± the standard deviation."
    return text


def _row(c: ProxyCorrelation, metric: str, seeds: int) -> list[Any]:
    def number(name: str, digits: int = 3) -> str:
        spread = f" ± {c.over_seeds[name]:.{digits}f}" if seeds > 1 else ""
        return f"{c.statistics[name]:.{digits}f}{spread}"

    def interval(name: str) -> str:
        low, high = c.interval[name]
        return f"{low:.3f} to {high:.3f}"

    name = page.small(f"{c.name} (baseline)") if c.name in BASELINES else page.unbroken(c.name)
    chosen, regret = c.statistics["chosen"], c.statistics["regret"]
    return [
        name, number("spearman"), interval("spearman"), number("kendall_tau"), interval("kendall_tau"),
        number("top_10_tau"), number("precision_at_5"), f"{c.statistics['best_rank_at_10']:g}",
        format_metric(metric, chosen), f"{regret:.2f}", f"{c.non_finite:g}",
    ]  # fmt: skip


def _formula(name: str) -> str:
    aggregate = find_aggregate(name)
    if aggregate is not None:
        return f"{aggregate.formula} ({', '.join(aggregate.parts)}). {aggregate.source}"
    if name == "random":
        return "uniform random numbers"
    return f"{PROXIES[name].formula}. {PROXIES[name].source}" if name in PROXIES else "of the file of scores"


def _sortable(value: float) -> float:
    return value if np.isfinite(value) else -np.inf
