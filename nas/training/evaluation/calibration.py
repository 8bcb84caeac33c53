"""How sure a classifier may be: intervals of an accuracy, and how well confidences match accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search_spaces.common.errors import UserError

BINS = 15


@dataclass(frozen=True)
class Bin:
    """Images whose confidence lies above `low` and at most at `high`; everything in percent, None without images."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


def wilson_interval(right: int, total: int, *, level: float = 0.95) -> tuple[float, float]:
    """The score interval in percent of a share `right / total` (Wilson 1927, JASA 22).

    It stays within 0 and 100 and keeps its coverage for few images and for accuracies near the ends. Errors:
    UserError for counts that are no share.
    """
    from scipy.stats import binomtest

    if not 0 <= right <= total or total < 1:
        raise UserError(f"{right} of {total}", "a count of right answers from 0 to a positive total")
    low, high = binomtest(right, total).proportion_ci(level, method="wilson")
    return 100 * float(low), 100 * float(high)


def reliability_bins(confidence: np.ndarray, right: np.ndarray, *, bins: int = BINS) -> tuple[Bin, ...]:
    """Mean confidence and accuracy of the images in each of `bins` equal intervals of confidence.

    confidence: [N] probability of the predicted class, 0 to 1; right: bool [N]. Guo et al. 2017, On Calibration of
    Modern Neural Networks, section 2 (reliability diagrams): interval m is ((m - 1) / M, m / M].
    """
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    sums = np.bincount(place, weights=confidence, minlength=bins)
    hits = np.bincount(place, weights=right, minlength=bins)
    return tuple(
        Bin(
            100 * float(edges[k]),
            100 * float(edges[k + 1]),
            int(counts[k]),
            100 * float(sums[k] / counts[k]) if counts[k] else None,
            100 * float(hits[k] / counts[k]) if counts[k] else None,
        )
        for k in range(bins)
    )


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance between accuracy and confidence over the bins, weighted by images, in percent.

    Guo et al. 2017, equation 3. Errors: UserError if no bin holds an image.
    """
    filled = [(b.count, b.accuracy - b.confidence) for b in bins if b.accuracy is not None and b.confidence is not None]
    total = sum(count for count, _ in filled)
    if not total:
        raise UserError("0 images", "at least one image in the bins")
    return sum(count * abs(gap) for count, gap in filled) / total
