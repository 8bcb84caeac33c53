"""Metrics in words: `val_acc` is the validation accuracy in percent, `1072426` params are 1.072 M."""

from __future__ import annotations

import itertools
import math

from benchmarks.columns import parse_column
from search_spaces.common.errors import UserError

_SPLITS = {"val": "validation", "test": "test", "train": "training"}
_NAMES = {
    "acc": "accuracy",
    "rocauc": "ROC-AUC",
    "params": "parameters",
    "macs": "multiply-adds",
    "live_macs": "live multiply-adds",
}
_UNITS = {"acc": "%", "ms": "ms", "mj": "mJ", "seconds": "s", "bytes": "bytes"}
_COUNTS = ("params", "macs", "bytes")


def metric_words(name: str) -> str:
    """`val_acc_12` -> `validation accuracy after 12 epochs`, `latency_ms` -> `latency`."""
    try:
        column = parse_column(name)
    except UserError:
        return name
    if column.metric == "cost_seconds":
        return "simulated cost"
    words = column.metric.split("_")
    if words[-1] in _UNITS and words[-1] != "acc" and len(words) > 1:
        words = words[:-1]
    if words[0] in _SPLITS and len(words) > 1:
        words[0] = _SPLITS[words[0]]
    text = _NAMES.get("_".join(words)) or " ".join(_NAMES.get(word, word) for word in words)
    text += f" after {column.epochs} epochs" if column.epochs is not None else ""
    return text + (f" (seed {column.seed})" if column.seed is not None else "")


def metric_unit(name: str) -> str:
    """`%`, `ms`, `mJ`, `s`, `bytes`, or nothing."""
    try:
        return _UNITS.get(parse_column(name).metric.rpartition("_")[2], "")
    except UserError:
        return ""


def metric_label(name: str) -> str:
    """`validation accuracy (%)`, for axes and table headings."""
    unit = metric_unit(name)
    return metric_words(name) + (f" ({unit})" if unit else "")


def is_count(name: str) -> bool:
    """Whether a metric is a number of parameters, multiply-adds or bytes."""
    return name.rpartition("_")[2] in _COUNTS


def format_metric(name: str, value: float | None, *, unit: bool = True) -> str:
    """A value with the digits that matter, and its unit: `91.57 %`, `1.072 M`, `14.2 ms`; a dash for None and NaN.

    The spaces do not break a line.
    """
    if value is None or math.isnan(value):
        return "\u2013"
    suffix = f"\u00a0{metric_unit(name)}" if unit and metric_unit(name) else ""
    if is_count(name):
        return format_count(value) + ("\u00a0bytes" if unit and name.endswith("bytes") else "")
    if metric_unit(name) == "%" or name.endswith("rocauc"):
        return f"{value:.2f}{suffix}"
    if metric_unit(name) == "s" and unit:
        return format_seconds(value)
    return f"{value:.4g}{suffix}"


def format_count(value: float) -> str:
    """Four significant digits with k, M, G or T: `1.072 M`; small whole numbers as they are."""
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.4g}\u00a0{letter}"
    return f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """`0.31 s`, `4 min 10 s`, `3 h 20 min`, `12 d 4 h`."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    for (size, name), (smaller, lower) in itertools.pairwise(units):
        if seconds >= size:
            whole, rest = divmod(round(seconds / smaller), size // smaller)
            return f"{whole} {name} {rest} {lower}" if rest else f"{whole} {name}"
    raise AssertionError("unreachable")


def format_distance(metric: str, distance: float) -> str:
    """A difference of two values in words: that of two accuracies is in percentage points."""
    if metric_unit(metric) == "%":
        return f"{distance:.3f}".rstrip("0").rstrip(".") + " percentage points"
    return format_metric(metric, distance)
