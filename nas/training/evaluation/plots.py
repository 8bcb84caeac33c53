"""Figures of an evaluation: which classes are confused, and whether confidence matches accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nas.plots import COLORS, GREY, INK, figure_of, panels
from nas.training.evaluation.measure import Evaluation
from search_spaces.common.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NUMBERED = 20  # classes up to which every cell shows its number
RIGHT, WRONG = COLORS[0], COLORS[1]
WIDEST_LABEL = 18


def confusion_figure(evaluation: Evaluation, classes: Sequence[str] | None = None) -> Figure:
    """The confusion matrix, each row as shares of its class: right answers blue, mistakes orange.

    classes: names of the rows and columns, default the evaluation's. Up to 20 classes every cell shows its number of
    images; with more only the colours speak, those of mistakes on a scale of their own, so that rare ones are seen.
    Errors: UserError for another number of names than classes.
    """
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    counts = np.array(evaluation.confusion)
    names = tuple(evaluation.classes if classes is None else classes)
    if len(names) != len(counts):
        raise UserError(f"{len(names)} class names", f"{len(counts)}, one for each class of the evaluation")
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    diagonal = np.eye(len(counts), dtype=bool)
    axes = panels(1)[0]
    figure = figure_of(axes)
    side = float(np.clip(0.45 * len(counts), 3.4, 5.2)) if len(counts) <= MOST_NUMBERED else 10.0
    figure.set_layout_engine("compressed")  # leaves no room beside axes of a fixed shape
    figure.set_size_inches(side + 2.4, side + 0.9)
    highest = max(float(shares[~diagonal].max(initial=0)), 1e-9)
    for hidden, color, top, label in (
        (~diagonal, RIGHT, 100.0, "right (% of the class)"),
        (diagonal | (counts == 0), WRONG, highest, "taken for another (% of the class)"),
    ):
        colors = LinearSegmentedColormap.from_list("share", ["#ffffff", color])
        # The square root lifts small shares off the white of none.
        norm = PowerNorm(0.5, vmin=0, vmax=top) if color == WRONG else PowerNorm(1, vmin=0, vmax=top)
        image = axes.imshow(np.ma.masked_array(shares, hidden), cmap=colors, norm=norm, interpolation="nearest")
        if color == RIGHT or highest > 1e-9:
            bar = figure.colorbar(image, ax=axes, fraction=0.035, pad=0.02)
            bar.set_label(label, color=INK, size=9)
            bar.outline.set_visible(False)  # type: ignore[operator]
            bar.ax.tick_params(length=2, labelsize=8, labelcolor=GREY, color=GREY)
    _class_axes(axes, names)
    if len(counts) <= MOST_NUMBERED:
        _numbers(axes, counts, shares, highest)
    return figure


def _class_axes(axes: Axes, names: Sequence[str]) -> None:
    shown = [name if len(name) <= WIDEST_LABEL else name[: WIDEST_LABEL - 1] + "\u2026" for name in names]
    size = 9.0 if len(names) <= MOST_NUMBERED else float(np.clip(560 / len(names), 1.5, 8.0))
    upright = max(map(len, shown)) <= 2 and len(names) <= 40
    axes.set_xticks(range(len(names)), shown, rotation=0 if upright else 90, fontsize=size)
    axes.set_yticks(range(len(names)), shown, fontsize=size)
    axes.tick_params(length=0, pad=3)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.grid(False)
    # Hairlines between cells lead the eye from a mistake to its names.
    edges = np.arange(len(names) + 1) - 0.5
    style: dict[str, Any] = {"color": "#e5e8ec", "linewidth": 0.6 if len(names) <= MOST_NUMBERED else 0.25}
    axes.vlines(edges, -0.5, len(names) - 0.5, **style)
    axes.hlines(edges, -0.5, len(names) - 0.5, **style)
    axes.spines[["left", "bottom"]].set_visible(False)


def _numbers(axes: Axes, counts: np.ndarray, shares: np.ndarray, highest: float) -> None:
    size = 9.0 if len(counts) <= 10 else 7.0
    for i, j in zip(*np.nonzero(counts), strict=True):
        depth = shares[i, j] / 100 if i == j else np.sqrt(shares[i, j] / highest)
        color = "white" if depth > 0.6 else INK
        axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", color=color, fontsize=size)


def reliability_figure(evaluation: Evaluation) -> Figure:
    """Accuracy against confidence by bins (Guo et al. 2017, figure 1), beside how many images each bin holds.

    A bar below the diagonal is overconfident. The hatched gaps, weighted by images, make the calibration error.
    """
    accuracy, amounts = panels(2)
    filled = [b for b in evaluation.bins if b.accuracy is not None and b.confidence is not None]
    left = np.array([b.low for b in filled])
    width = np.array([b.high - b.low for b in filled])
    right = np.array([b.accuracy for b in filled], float)
    sure = np.array([b.confidence for b in filled], float)
    bar: dict[str, Any] = {"align": "edge", "edgecolor": "white", "linewidth": 0.8, "zorder": 2}
    accuracy.bar(left, right, width, color=COLORS[0], label="accuracy", **bar)
    name = f"gap to confidence (mean {evaluation.calibration_error:.2f} %)"
    gap: dict[str, Any] = {"align": "edge", "facecolor": "none", "edgecolor": WRONG, "hatch": "////", "linewidth": 0.8}
    accuracy.bar(left, np.abs(sure - right), width, np.minimum(sure, right), label=name, zorder=3, **gap)
    accuracy.plot([0, 100], [0, 100], color=INK, linewidth=1.1, dashes=(4, 2.5), zorder=4, label="calibrated")
    accuracy.set_xlim(0, 100)
    accuracy.set_ylim(0, 104)  # a full bar does not touch the edge
    accuracy.set_yticks(range(0, 101, 20))
    accuracy.set_xlabel("confidence (%)")
    accuracy.set_ylabel("accuracy (%)")
    amounts.bar(left, [100 * b.count / evaluation.count for b in filled], width, color=GREY, **bar)
    mean = sum(b.count * c for b, c in zip(filled, sure, strict=True)) / evaluation.count
    lines = ((evaluation.accuracy, COLORS[0], "accuracy"), (mean, WRONG, "mean confidence"))
    for value, color, name in lines:
        amounts.axvline(value, color=color, linewidth=1.6, zorder=4, label=f"{name} {value:.1f} %")
    amounts.set_xlim(0, 100)
    amounts.set_ylim(bottom=0)
    amounts.set_xlabel("confidence (%)")
    amounts.set_ylabel("images (%)")
    for axes in (accuracy, amounts):
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 3, "columnspacing": 1.2}
        axes.legend(fontsize=8.5, framealpha=0.9, edgecolor="none", **place)
    return figure_of(accuracy)
