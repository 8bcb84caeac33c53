"""The funnel of a layer search as a section of the report: how many candidates were left after each test."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from nas import page, plots
from nas.layers.search import funnel_counts
from nas.result import SearchResult

# The tests in order, with the reasons that each gives.
STAGES: dict[str, tuple[str, ...]] = {
    "output depends on x and varies like it": ("ignores_input", "family", "not_full_shape"),
    "not seen before": ("duplicate",),
    "finite, with a gradient, not affine": ("non_finite", "zero_gradient", "trivial"),
    "carries signal and gradient": ("no_signal",),
    "stable under gradient ascent": ("unstable",),
    "learns": ("low_accuracy",),
}


def survivors(counts: dict) -> list[tuple[str, int]]:
    """(test, candidates that passed it and all before) from `funnel_counts`; other failures are the last test's."""
    left = counts["drawn"]
    rows = [("drawn", left)]
    known = {reason for reasons in STAGES.values() for reason in reasons}
    for test, reasons in STAGES.items():
        left -= sum(counts["rejected"].get(r, 0) for r in reasons)
        if test == "learns":
            left -= sum(n for r, n in counts["rejected"].items() if r not in known)
        rows.append((test, left))
    return rows


def funnel_figure(counts: dict) -> Figure:
    """Horizontal bars on a logarithmic scale, one per test."""
    rows = survivors(counts)
    figure = Figure(figsize=(6.4, 0.42 * len(rows) + 0.7), layout="constrained")
    axes = figure.subplots()
    positions = range(len(rows))
    axes.barh(list(positions), [max(n, 0.5) for _, n in rows], color="#2f6f9f", height=0.66)
    axes.set_xscale("log")
    axes.set_xlim(0.5, max(n for _, n in rows) * 3)
    axes.set_yticks(list(positions), [test for test, _ in rows])
    axes.invert_yaxis()
    for position, (_, n) in zip(positions, rows, strict=True):
        axes.text(max(n, 0.5) * 1.12, position, f"{n:,}", va="center", fontsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("candidates left")
    return figure


def funnel_section(result: SearchResult) -> page.Markup:
    """The picture, and a table of the reasons."""
    counts = funnel_counts(result)
    rows: list[list[object]] = [[page.code(reason), f"{n:,}"] for reason, n in counts["rejected"].items()]
    caption = f"{counts['drawn']:,} graphs were drawn, {counts['trained']:,} were trained in every anchor."
    return page.section(
        "The funnel",
        page.figure(plots.svg(funnel_figure(counts), "funnel"), caption),
        page.table(["refused because", "candidates"], rows, numbers=(1,)),
    )
