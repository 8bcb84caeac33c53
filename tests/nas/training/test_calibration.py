"""Intervals and calibration against their defining equations and against counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import confusion_matrix as sklearn_confusion

from nas.training.evaluation.calibration import expected_calibration_error, reliability_bins, wilson_interval
from nas.training.evaluation.confusion import class_accuracies, confused_pairs, confusion_matrix
from search_spaces.common.errors import UserError


@pytest.mark.parametrize(("right", "total"), [(0, 10), (7, 10), (10, 10), (143, 150), (9471, 10000)])
def test_wilson_bounds_solve_the_score_equation(right, total):
    """Both bounds p satisfy (share - p)^2 = z^2 p (1 - p) / n, and hold the share between them."""
    share, z = right / total, norm.ppf(0.975)
    low, high = wilson_interval(right, total)
    assert low <= 100 * share <= high
    for bound in (low / 100, high / 100):
        assert math.isclose((share - bound) ** 2, z**2 * bound * (1 - bound) / total, rel_tol=1e-6, abs_tol=1e-12)


def test_wilson_covers_at_about_its_level(rng):
    """A statistical check: of 2000 samples of 200 answers about 95 % of the intervals hold the true share."""
    draws = rng.binomial(200, 0.9, 2000)
    bounds = {int(k): wilson_interval(int(k), 200) for k in np.unique(draws)}
    covered = np.mean([bounds[int(k)][0] <= 90 <= bounds[int(k)][1] for k in draws])
    assert 0.93 < covered < 0.97


def test_shares_that_are_none():
    for right, total in ((3, 2), (-1, 5), (0, 0)):
        with pytest.raises(UserError, match="count of right answers"):
            wilson_interval(right, total)


def test_calibration_by_hand():
    """Two bins: (0, 0.5] holds 0.4 and 0.5 with one right, (0.5, 1] holds 0.8 and 1.0, both right."""
    bins = reliability_bins(np.array([0.4, 0.5, 0.8, 1.0]), np.array([True, False, True, True]), bins=2)
    assert [b.count for b in bins] == [2, 2]
    assert np.allclose([b.confidence for b in bins], [45, 90])
    assert np.allclose([b.accuracy for b in bins], [50, 100])
    assert math.isclose(expected_calibration_error(bins), (2 * 5 + 2 * 10) / 4)


def test_calibration_by_counting(rng):
    confidence = rng.uniform(0.1, 1, 500)
    right = rng.random(500) < confidence**2
    error = 0.0
    for m in range(1, 16):
        members = [k for k in range(500) if (m - 1) / 15 < confidence[k] <= m / 15]
        if members:
            gap = sum(int(right[k]) for k in members) / len(members) - sum(confidence[k] for k in members) / len(
                members
            )
            error += len(members) / 500 * abs(gap)
    bins = reliability_bins(confidence, right)
    assert len(bins) == 15
    assert sum(b.count for b in bins) == 500
    assert math.isclose(expected_calibration_error(bins), 100 * error)
    assert bins[0].accuracy is None or bins[0].count


def test_a_classifier_that_means_what_it_says_is_calibrated(rng):
    confidence = rng.uniform(0.2, 1, 200_000)
    bins = reliability_bins(confidence, rng.random(200_000) < confidence)
    assert expected_calibration_error(bins) < 0.6
    with pytest.raises(UserError, match="at least one image"):
        expected_calibration_error(reliability_bins(np.zeros(0), np.zeros(0, bool)))


def test_confusions_against_scikit_learn(rng):
    true, predicted = rng.integers(7, size=300), rng.integers(7, size=300)
    true[true == 3] = 4  # a class without images
    found = confusion_matrix(true, predicted, 7)
    assert np.array_equal(found, sklearn_confusion(true, predicted, labels=range(7)))
    accuracies = class_accuracies(found)
    assert accuracies[3] is None
    for k in (0, 1, 2, 4, 5, 6):
        assert math.isclose(accuracies[k], 100 * (predicted[true == k] == k).mean())


def test_confused_pairs_by_hand():
    matrix = np.array([[8, 2, 0], [0, 5, 5], [1, 0, 0]])
    pairs = confused_pairs(matrix, ("cat", "dog", "eel"))
    assert [(p.true, p.predicted, p.count, p.share) for p in pairs] == [
        ("dog", "eel", 5, 50.0),
        ("cat", "dog", 2, 20.0),
        ("eel", "cat", 1, 100.0),
    ]
    assert [p.true for p in confused_pairs(matrix, ("cat", "dog", "eel"), most=1)] == ["dog"]
    assert matrix[0, 0] == 8  # the caller's matrix is as it was
