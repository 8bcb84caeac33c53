"""The page of an evaluation of predictors: the table, and the rank correlation over the number of labels."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nas import page, plots
from nas.prediction.evaluation import Evaluation, Result
from predictors.evaluation import HELD_OUT, PROTOCOLS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from predictors.evaluation import Summary

COLUMNS = {
    "kendall_tau": "Kendall tau-b",
    "held_out_kendall_tau": "tau, held out",
    "spearman": "Spearman",
    "precision_at_0.5": "P@0.5 %",
    "precision_at_1": "P@1 %",
    "precision_at_5": "P@5 %",
    "best_rank_at_10": "N@10",
    "regret": "regret of the first",
    "fit_seconds": "fit, s",
    "predict_seconds": "predict, s",
}


def write_evaluation_report(
    found: Evaluation, out: str | os.PathLike[str], command: str = "", environment: Mapping[str, str] | None = None
) -> Path:
    """Write the page to `out`. Errors: UserError, RunError if it cannot be written."""
    names = list(dict.fromkeys(r.predictor for r in found.results))
    body = [page.paragraph(_lead(found), style="lead")]
    body += [page.paragraph(note, style="warning") for note in found.notes]
    figures = [page.figure(plots.svg(tau_figure(found, "kendall_tau"), "tau"), _caption(found))]
    if any(HELD_OUT + "kendall_tau" in r.statistics for r in found.results):
        held = tau_figure(found, HELD_OUT + "kendall_tau")
        figures.append(page.figure(plots.svg(held, "held-out"), "The same without the labelled architectures."))
    body += [
        page.section("Rank correlation over the number of labels", page.plots(figures)),
        *(page.section(name, _table(found, name)) for name in names),
        page.section("Protocol", page.pairs(_facts(found)), page.paragraph(_how())),
    ]
    if found.failures:
        lines = [f"{name} on {size:,} labels: {text}" for (name, size), text in found.failures.items()]
        body.append(page.section("What failed", *(page.paragraph(line) for line in lines)))
    if command:
        body.append(page.section("How this was made", page.block(command), page.pairs(environment or {})))
    return page.write(out, page.page(f"Predictors on {found.benchmark}", "evaluation of predictors", body))


def tau_figure(found: Evaluation, statistic: str) -> Figure:
    """Mean of a statistic over the number of labels, a line for each predictor, bars for the 95 % intervals."""
    axes = plots.panels(1)[0]
    names = list(dict.fromkeys(r.predictor for r in found.results))
    sizes = sorted({r.train_size for r in found.results})
    for place, name in enumerate(names):
        drawn = [r for r in found.of(name) if statistic in r.statistics]
        values = [r.statistics[statistic] for r in drawn]
        half = [(s.interval[1] - s.interval[0]) / 2 if s.n > 1 else 0.0 for s in values]
        axes.errorbar(
            [r.train_size for r in drawn], [s.mean for s in values], yerr=half, label=name, marker="o", markersize=4,
            color=plots.COLORS[place % len(plots.COLORS)], linewidth=1.6, capsize=3, elinewidth=1.0,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("labelled architectures")
    axes.set_ylabel(COLUMNS.get(statistic, statistic))
    axes.legend(loc="lower right", fontsize=8.5, framealpha=0.9, edgecolor="none")
    return plots.figure_of(axes)


def shown(summary: Summary | None, digits: int = 3) -> str:
    """`0.713 ± 0.012`: the mean and its standard deviation."""
    if summary is None or math.isnan(summary.mean):
        return "-"
    text = f"{summary.mean:.{digits}f}"
    return text if math.isnan(summary.std) else f"{text} ± {summary.std:.{digits}f}"


def best_at(found: Evaluation, size: int) -> Result:
    """The result with the highest mean tau at a size."""
    return max(
        (r for r in found.results if r.train_size == size), key=lambda r: r.statistics["kendall_tau"].mean
    )  # fmt: skip


def _table(found: Evaluation, name: str) -> page.Markup:
    results = found.of(name)
    columns = [key for key in COLUMNS if any(key in r.statistics for r in results)]
    rows = []
    for r in results:
        low, high = r.statistics["kendall_tau"].interval
        interval = "-" if math.isnan(low) else f"{low:.3f} to {high:.3f}"
        cells = [shown(r.statistics.get(key), _digits(key)) for key in columns]
        rows.append([f"{r.train_size:,}", cells[0], interval, *cells[1:], r.statistics["kendall_tau"].n])
    headings = ["labels", COLUMNS[columns[0]], "95 % interval", *(COLUMNS[key] for key in columns[1:]), "splits"]
    return page.table(headings, rows, numbers=range(len(headings)))


def _digits(statistic: str) -> int:
    return 1 if statistic == "best_rank_at_10" else 3


def _lead(found: Evaluation) -> str:
    sizes = sorted({r.train_size for r in found.results})
    best = best_at(found, sizes[-1])
    text = f"With {sizes[-1]:,} labels {best.predictor} ranks best: tau {shown(best.statistics['kendall_tau'])}"
    if len(sizes) > 1:
        first = best_at(found, sizes[0])
        text += f"; with {sizes[0]:,} it is {first.predictor} ({shown(first.statistics['kendall_tau'])})"
    return text + "."


def _caption(found: Evaluation) -> str:
    what = "95 % intervals of the mean over splits" if found.seeds > 1 else "one split per size: no intervals"
    return f"Kendall tau-b against {found.target} over the ranked rows; {what}."


def _facts(found: Evaluation) -> dict[str, object]:
    return {
        "benchmark": found.benchmark,
        "protocol": f"{found.protocol}: {PROTOCOLS[found.protocol]}",
        "labels": found.labels,
        "target": f"{found.target} ({found.metric})",
        "rows": f"{found.rows:,}",
        "seeds": found.seeds,
    }


def _how() -> str:
    return (
        "± is the standard deviation over splits. P@T %: the part of the predicted best T % that is among the true "
        "best T %. N@10: the best true rank among the ten best by prediction. Regret of the first: the best target "
        "minus that of the highest prediction. Test values serve this evaluation alone; no predictor sees them unless "
        "the labels say so."
    )
