"""Drawings of functions that act point by point, with their derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nas.plots import COLORS, GREY, GRID, INK, figure_of, panels
from search_spaces.common.errors import UserError
from search_spaces.primitives.primitive import Primitive

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FUNCTION, DERIVATIVE = COLORS[0], COLORS[1]
SPAN, LOW, HIGH = 4.0, -2.0, 4.0
POINTS = 400  # even, so that no point falls on the corner of a function at 0
FEW_POINTS = 160  # of each small panel
COLUMNS = 6


def curve(found: Primitive, span: float = SPAN, points: int = POINTS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, function, derivative) at `points` places from -span to span, with initial parameters, in float64.

    Errors: UserError for a primitive that does not act point by point.
    """
    if found.function is None:
        raise UserError(found.name, "a function of single numbers to draw; this one looks at several at once")
    x = torch.linspace(-span, span, points, dtype=torch.float64, requires_grad=True)
    y = found.function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return x.detach().numpy(), y.detach().numpy(), slope.numpy()


def draw(found: Primitive) -> Figure:
    """One function and its derivative. Errors: as in `curve`."""
    values = curve(found)
    axes = panels(1)[0]
    low = max(min(v.min() for v in values[1:]), 2 * LOW)
    high = min(max(v.max() for v in values[1:]), 2 * HIGH)
    margin = 0.06 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    _lines(axes, values, 1.9)
    axes.set_xlabel("x")
    axes.set_title(found.name, fontsize=11, loc="left")
    axes.legend(fontsize=8.5, framealpha=0.9, edgecolor="none", loc="upper left")
    return figure_of(axes)


def draw_all(listed: Sequence[Primitive], low: float = LOW, high: float = HIGH) -> Figure:
    """A panel for each of `listed` that acts point by point, all with the same axes, values from `low` to `high`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [each for each in listed if each.function is not None]
    rows = math.ceil(len(shown) / COLUMNS)
    figure = Figure(figsize=(1.9 * COLUMNS, 1.75 * rows + 0.45), layout="constrained")
    FigureCanvasAgg(figure)
    found = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, each in zip(found, shown, strict=False):
        _lines(axes, curve(each, points=FEW_POINTS), 1.5)
        axes.set_title(each.name, fontsize=9, loc="left", color=INK, pad=3)
        axes.set_xlim(-SPAN, SPAN)
        axes.set_ylim(low, high)
        axes.set_xticks([-4, 0, 4])
        axes.set_yticks(np.arange(low, high + 1, 2 if high - low > 4 else 1))
        axes.tick_params(left=False, bottom=False, labelsize=7.5, colors=GREY)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GRID)
    for axes in found[len(shown) :]:
        axes.set_visible(False)
    last = found[len(shown) - COLUMNS : len(shown)] if len(shown) > COLUMNS else found[: len(shown)]
    for axes in last:  # above an empty place the ticks of a shared axis would be missing
        axes.tick_params(labelbottom=True)
    handles, labels = found[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, fontsize=9, frameon=False)
    return figure


def _lines(axes: Axes, values: tuple[np.ndarray, np.ndarray, np.ndarray], width: float) -> None:
    x, y, slope = values
    zero: dict[str, Any] = {"color": GRID, "linewidth": 0.9, "zorder": 0}
    axes.axhline(0, **zero)
    axes.axvline(0, **zero)
    axes.plot(x, y, color=FUNCTION, linewidth=width, label="function", zorder=3)
    axes.plot(x, slope, color=DERIVATIVE, linewidth=0.75 * width, label="derivative", dashes=(4, 1.6), zorder=2)
