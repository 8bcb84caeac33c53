"""Labels: checked, averaged over duplicates, and brought to the scale that a method learns best."""

from __future__ import annotations

import logging
from typing import Literal, get_args

import numpy as np

from predictors.graphs import GraphTable
from search_spaces.common.errors import UserError
from search_spaces.common.names import match
from zero_cost.correlation import average_ranks

LEAST_LABELS = 3
Target = Literal["z-score", "normal-score"]
log = logging.getLogger("nasforge.predictors")


def checked_labels(y: np.ndarray, count: int) -> np.ndarray:
    """float64 [count]. Errors: UserError for another length, fewer than three, all the same, NaN or infinite values
    (with their positions)."""
    labels = np.asarray(y, np.float64)
    if labels.shape != (count,):
        raise UserError(labels.shape, f"one label for each of the {count} graphs")
    bad = np.flatnonzero(~np.isfinite(labels))
    if len(bad):
        listed = ", ".join(str(i) for i in bad[:10]) + (f" and {len(bad) - 10} more" if len(bad) > 10 else "")
        raise UserError(float(labels[bad[0]]), f"finite labels; those at {listed} are not")
    if count < LEAST_LABELS:
        raise UserError(count, f"at least {LEAST_LABELS} labelled graphs")
    if labels.min() == labels.max():
        raise UserError(float(labels[0]), f"labels that differ; all {count} are the same")
    return labels


def without_duplicates(
    table: GraphTable, y: np.ndarray, extra: np.ndarray
) -> tuple[GraphTable, np.ndarray, np.ndarray]:
    """Each distinct graph once, in order of first appearance, with the mean of its labels and of its extra columns
    [N, E]; says in the log how many were merged. Errors: UserError when fewer than three graphs are left."""
    identity = table.identities()
    _, first, group, counts = np.unique(identity, return_index=True, return_inverse=True, return_counts=True)
    if len(first) == len(table):
        return table, y, extra
    log.warning(
        "%d of %d labelled graphs repeat others; their labels are averaged", len(table) - len(first), len(table)
    )
    order = np.argsort(first)
    mean = np.bincount(group, y) / counts
    means = np.stack([np.bincount(group, column) / counts for column in extra.T], 1) if extra.shape[1] else extra[first]
    if len(first) < LEAST_LABELS:
        raise UserError(len(first), f"at least {LEAST_LABELS} different labelled graphs")
    return table.take(first[order]), checked_labels(mean[order], len(first)), means[order]


def scaled(y: np.ndarray, target: Target) -> np.ndarray:
    """Labels as targets: `z-score`, or `normal-score`, the normal quantile of (rank - 1/2) / n (ties share a rank).

    Accuracies are heavy-tailed (networks that did not train), and normal scores keep these from deciding a fit.
    Blom, Statistical Estimates and Transformed Beta-Variables, 1958, with the offset of Hazen.
    Errors: UserError for another target.
    """
    if match(target, get_args(Target), "a scale of targets") == "z-score":
        return (y - y.mean()) / max(y.std(), 1e-12)
    from scipy.special import ndtri

    return ndtri((average_ranks(y) - 0.5) / len(y))
