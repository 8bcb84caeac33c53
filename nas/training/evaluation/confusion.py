"""Which classes a classifier takes for which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_PAIRS = 10


@dataclass(frozen=True)
class ConfusedPair:
    """Images of class `true` taken for `predicted`. share: of the images of `true`, in percent."""

    true: str
    predicted: str
    count: int
    share: float


def confusion_matrix(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """int64 [classes, classes]: how many images of a true class (row) were taken for each class (column)."""
    return np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)


def class_accuracies(confusion: np.ndarray) -> tuple[float | None, ...]:
    """The share of each class's images that is right, in percent; None for a class without images."""
    totals = confusion.sum(1).tolist()
    return tuple(100 * right / n if n else None for right, n in zip(confusion.diagonal().tolist(), totals, strict=True))


def confused_pairs(
    confusion: np.ndarray, classes: Sequence[str], *, most: int = MOST_PAIRS
) -> tuple[ConfusedPair, ...]:
    """The most frequent mistakes of a confusion matrix [true][predicted], the most frequent first."""
    wrong = np.array(confusion)
    totals = wrong.sum(1)
    np.fill_diagonal(wrong, 0)
    places = [divmod(int(k), len(classes)) for k in np.argsort(-wrong, axis=None, kind="stable")[:most]]
    return tuple(
        ConfusedPair(classes[i], classes[j], int(wrong[i, j]), 100 * int(wrong[i, j]) / int(totals[i]))
        for i, j in places
        if wrong[i, j]
    )
