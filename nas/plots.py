"""Figures of runs and comparisons. matplotlib is imported when one is drawn, without pyplot and without a display."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from nas.metrics import is_count, metric_label, metric_unit, metric_words
from nas.objectives import Objective
from search_spaces.common.errors import UserError
from search_spaces.common.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette for all kinds of colour vision, without its yellow and black.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a52c7", "#6b7280")
INK, GREY, GRID = "#1f2933", "#6b7280", "#e5e8ec"
EXPECTATION, OPTIMUM = "random draws (exact mean)", "optimum"
FORMATS = (".svg", ".png")
MOST_DOTS = 2000
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "svg.fonttype": "path",
    "text.parse_math": False,  # names may hold dollar signs
}
_LEGEND: dict[str, Any] = {
    "fontsize": 8.5,
    "framealpha": 0.9,
    "edgecolor": "none",
    "handlelength": 1.8,
    "borderpad": 0.3,
}


def curves(
    strategies: Mapping[str, np.ndarray],
    *,
    metric: str,
    maximize: bool = True,
    optimum: float | None = None,
    expectation: np.ndarray | None = None,
    regret: bool = False,
    log_queries: bool = False,
) -> Figure:
    """Best-so-far values of several strategies: median over seeds and the band between the quartiles.

    strategies: {name: [seeds, queries]}, NaN before the first value, which counts as worst. optimum: a line.
    expectation: [queries] exact mean of random draws, dashed. regret: draw the distance from `optimum`, on a
    logarithmic axis. log_queries: a logarithmic x axis.
    """
    axes = panels(1)[0]
    worst = -np.inf if maximize else np.inf
    sign = -1.0 if maximize else 1.0
    if regret and optimum is None:
        raise UserError("regret", "an optimum to measure the regret from")

    def shown(values: np.ndarray) -> np.ndarray:
        values = np.where(np.isfinite(values), values, np.nan)
        return sign * (values - float(optimum or 0.0)) if regret else values

    quartiles = {}
    for name, values in strategies.items():
        filled = np.where(np.isnan(values), worst, np.asarray(values, float))
        with np.errstate(invalid="ignore"):
            quartiles[name] = np.quantile(filled, (0.25, 0.5, 0.75), axis=0)
    order = sorted(quartiles, key=lambda name: sign * quartiles[name][1, -1])
    for place, name in enumerate(quartiles):
        low, middle, high = (shown(q) for q in quartiles[name])
        queries = np.arange(1, len(middle) + 1)
        color, above = COLORS[place % len(COLORS)], 3 + len(order) - order.index(name)
        axes.fill_between(queries, low, high, color=color, alpha=0.16, linewidth=0, zorder=2)
        axes.plot(queries, middle, color=color, linewidth=1.9, label=name, zorder=above)
    if expectation is not None:
        queries = np.arange(1, len(expectation) + 1)
        axes.plot(queries, shown(np.asarray(expectation)), color=INK, linewidth=1.1, dashes=(4, 2.5), label=EXPECTATION)
    if optimum is not None and not regret:
        axes.axhline(optimum, color=GREY, linewidth=1.0, zorder=1, label=OPTIMUM)
    _query_axis(axes, log_queries)
    axes.set_ylabel(_distance_label(metric) if regret else _best_label(metric))
    everything = [*(q for three in quartiles.values() for q in three), *([] if expectation is None else [expectation])]
    if regret:
        _regret_axis(axes, everything, shown)
    else:
        _zoom(axes, everything, optimum, maximize)
        _metric_ticks(axes.yaxis, metric)
    ranked = [*order, EXPECTATION, OPTIMUM]
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        pairs = sorted(zip(handles, labels, strict=True), key=lambda pair: ranked.index(pair[1]))
        corner: Any = "upper right" if regret or not maximize else "lower right"
        axes.legend([h for h, _ in pairs], [name for _, name in pairs], loc=corner, **_LEGEND)
    return figure_of(axes)


def run_curve(
    best: np.ndarray,
    *,
    metric: str,
    maximize: bool = True,
    values: np.ndarray | None = None,
    optimum: float | None = None,
    expectation: np.ndarray | None = None,
    seconds: np.ndarray | None = None,
    axes: Axes | None = None,
) -> Figure:
    """One run: the best value so far as steps over the queries, or over the simulated clock `seconds` [queries].

    best: [queries], NaN before the first. values: [queries] each trial's own value as a dot (NaN: none).
    optimum, expectation: as in `curves`; the expectation is drawn over queries only. axes: where to draw, default a
    figure of its own.
    """
    axes = axes if axes is not None else panels(1)[0]
    scale, unit = _clock(seconds) if seconds is not None else (1.0, "")
    x = np.arange(1, len(best) + 1) if seconds is None else np.asarray(seconds) / scale
    if values is not None:
        _dots(axes, x, values, s=9, color=COLORS[0], alpha=0.35, label="each trial")
    axes.step(x, best, where="post", color=COLORS[0], linewidth=1.9, zorder=4, label="best so far")
    shown = [best]
    if expectation is not None and seconds is None:
        axes.plot(x, expectation[: len(x)], color=INK, linewidth=1.1, dashes=(4, 2.5), zorder=3, label=EXPECTATION)
        shown.append(expectation[: len(x)])
    if optimum is not None:
        axes.axhline(optimum, color=GREY, linewidth=1.0, zorder=1, label=OPTIMUM)
    if seconds is None:
        _query_axis(axes, False)
    else:
        axes.set_xlabel(f"simulated time ({unit})")
        axes.set_xlim(left=0)
    axes.set_ylabel(metric_label(metric))
    _zoom(axes, shown, optimum, maximize)
    _metric_ticks(axes.yaxis, metric)
    _legend_above(axes)
    return figure_of(axes)


def scatter(
    points: np.ndarray,
    objectives: tuple[Objective, Objective],
    *,
    front: np.ndarray | None = None,
    exact_front: np.ndarray | None = None,
    best: np.ndarray | None = None,
    axes: Axes | None = None,
) -> Figure:
    """Two metrics of a run's trials: `points` [N, 2], its `front` [F, 2], the table's `exact_front` [E, 2] as steps,
    and the best trial `best` [2]. The first objective stands on the y axis, the second on the x axis.
    axes: where to draw, default a figure of its own.
    """
    axes = axes if axes is not None else panels(1)[0]
    points = np.asarray(points, float).reshape(-1, 2)
    _dots(axes, points[:, 1], points[:, 0], s=12, color=GREY, alpha=0.4, label="trials")
    if exact_front is not None and len(exact_front):
        x, y = _staircase(np.asarray(exact_front, float), objectives, axes, points)
        axes.plot(x, y, color=COLORS[1], linewidth=1.4, zorder=3, label="exact front of the table")
        axes.scatter(exact_front[:, 1], exact_front[:, 0], s=14, facecolor="white", edgecolor=COLORS[1], zorder=4)
    if front is not None and len(front):
        style: dict[str, Any] = {"s": 26, "color": COLORS[0], "edgecolor": "white", "linewidth": 0.7, "zorder": 5}
        axes.scatter(front[:, 1], front[:, 0], label="front of the run", **style)
    if best is not None:
        axes.scatter(
            best[1], best[0], s=130, marker="*", color=COLORS[5], edgecolor=INK, linewidth=0.7, zorder=6, label="best"
        )
    first, second = objectives
    axes.set_ylabel(metric_label(first.name))
    axes.set_xlabel(metric_label(second.name))
    _scatter_limits(axes, points, exact_front, objectives)
    _metric_ticks(axes.yaxis, first.name)
    _metric_ticks(axes.xaxis, second.name)
    _legend_above(axes)
    return figure_of(axes)


# -- files --------------------------------------------------------------------------------------------------------


def svg(figure: Figure, name: str = "plot") -> str:
    """The figure as one SVG element for HTML: no XML header, no metadata; equal figures give equal text.

    name: begins every id, so that several figures fit in one page.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*<!--.*?-->", "", text, flags=re.DOTALL)
    used = set(re.findall(r"#([\w.:-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"(href=\"#|url\(#)", rf"\g<1>{name}-", text)
    return text.replace("<svg ", '<svg role="img" ', 1)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the figure; the ending decides between .svg and .png. Errors: UserError for another ending."""
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise UserError(str(path), f"a file that ends in {' or '.join(FORMATS)}", str(path.with_suffix(".svg")))
    if ending == ".svg":
        with atomic_write(path) as file:
            file.write('<?xml version="1.0" encoding="utf-8"?>\n' + svg(figure))
    else:
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format="png", dpi=200, metadata={"Software": None})


# -- axes ---------------------------------------------------------------------------------------------------------


def panels(count: int) -> list[Axes]:
    """Axes side by side in a new figure, for `run_curve` and `scatter`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.8 * count, 3.7), layout="constrained")
        FigureCanvasAgg(figure)
        found = [figure.add_subplot(1, count, k + 1) for k in range(count)]
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=3)
    return found


def figure_of(axes: Axes) -> Figure:
    """The figure that the axes of `panels` belong to."""
    return cast("Figure", axes.figure)


def _dots(axes: Axes, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    # Thousands of dots become a picture within the drawing, or a page would take megabytes.
    axes.scatter(x, y, linewidths=0, zorder=2, rasterized=len(x) > MOST_DOTS, **style)


def _legend_above(axes: Axes) -> None:
    legend = axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, columnspacing=1.2, **_LEGEND)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)  # what is faint among many must be seen alone


def _query_axis(axes: Axes, log: bool) -> None:
    from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

    axes.set_xlabel("queries")
    if log:
        axes.set_xscale("log")
        axes.set_xlim(left=1)
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _metric_ticks(axis: Any, metric: str) -> None:
    if is_count(metric):
        from matplotlib.ticker import EngFormatter

        axis.set_major_formatter(EngFormatter(sep="\u2009"))
    elif axis.get_scale() != "log":
        axis.get_major_formatter().set_useOffset(False)


def _best_label(metric: str) -> str:
    unit = metric_unit(metric)
    return f"best {metric_words(metric)} so far" + (f" ({unit})" if unit else "")


def _distance_label(metric: str) -> str:
    unit = metric_unit(metric)
    return "distance from the optimum" + (f" ({'percentage points' if unit == '%' else unit})" if unit else "")


def _zoom(axes: Axes, lines: list[np.ndarray], optimum: float | None, maximize: bool) -> None:
    """Limits that show how the lines approach the best, not how bad the first draws were."""
    finite = [line[np.isfinite(line)] for line in lines]
    finite = [line for line in finite if len(line)]
    if not finite:
        return
    ends = [line[-1] for line in finite] + ([optimum] if optimum is not None else [])
    late = [line[min(len(line) - 1, max(2, len(line) // 25))] for line in finite]
    if not maximize:
        ends, late = [-v for v in ends], [-v for v in late]
    top, bottom = max(ends), min(late)
    room = (top - bottom) or abs(top) * 0.01 or 1.0
    low, high = bottom - 0.15 * room, top + 0.08 * room
    axes.set_ylim((low, high) if maximize else (-high, -low))


def _regret_axis(axes: Axes, lines: list[np.ndarray], shown: Any) -> None:
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    values = np.concatenate([shown(np.asarray(line)) for line in lines])
    values = values[np.isfinite(values) & (values > 1e-9)]
    if len(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(max(values.min() * 0.8, values.max() * 1e-4), values.max() * 1.2)


def _clock(seconds: np.ndarray) -> tuple[float, str]:
    last = float(seconds[-1]) if len(seconds) else 0.0
    return next(
        ((s, u) for s, u in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")) if last >= 2 * s),
        (1.0, "seconds"),
    )


def _staircase(
    front: np.ndarray, objectives: tuple[Objective, Objective], axes: Axes, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The boundary of what the front dominates, from left to right."""
    ordered = front[np.argsort(front[:, 1])]
    # Going away from the better end of x, the level of a point holds until the next point.
    where = "post" if not objectives[1].maximize else "pre"
    x, y = ordered[:, 1], ordered[:, 0]
    far = np.concatenate([points[:, 1], x])
    far = far[np.isfinite(far)]
    if where == "post":
        x, y = np.append(x, max(far.max(), x[-1])), np.append(y, y[-1])
        return np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]
    x, y = np.insert(x, 0, min(far.min(), x[0])), np.insert(y, 0, y[0])
    return np.repeat(x, 2)[:-1], np.repeat(y, 2)[1:]


def _scatter_limits(
    axes: Axes, points: np.ndarray, exact_front: np.ndarray | None, objectives: tuple[Objective, Objective]
) -> None:
    """Outliers on the bad side of the first objective (untrained networks, say) do not squeeze the rest."""
    good = points[np.isfinite(points).all(axis=1)]
    if len(good) < 5:
        return
    y = good[:, 0] if objectives[0].maximize else -good[:, 0]
    lower = np.quantile(y, 0.1)
    best = y.max()
    if exact_front is not None and len(exact_front):
        exact = exact_front[:, 0] if objectives[0].maximize else -exact_front[:, 0]
        best, lower = max(best, exact.max()), min(lower, np.quantile(exact, 0.35))
    floor = max(y.min(), lower - 0.5 * (best - lower))
    room = 0.06 * (best - floor) or 1.0
    low, high = floor - room, best + room
    axes.set_ylim((low, high) if objectives[0].maximize else (-high, -low))
