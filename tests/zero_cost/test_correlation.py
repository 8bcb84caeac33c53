"""Rank statistics against scipy, and against counting by hand where scipy has none."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from zero_cost import correlation
from zero_cost.errors import UserError


def samples(kind: str, n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=n)
    scores = truth + rng.normal(size=n)
    if kind == "ties":
        scores, truth = scores.round(), truth.round(1)
    if kind == "many ties":
        scores, truth = (scores > 0) * 1.0, (truth > 0.5) * 1.0
    if kind == "inverted":
        scores = -scores
    return scores, truth


@pytest.mark.parametrize("kind", ["plain", "ties", "many ties", "inverted"])
def test_kendall_and_spearman_equal_scipy(kind):
    scores, truth = samples(kind)
    assert correlation.kendall_tau(scores, truth) == pytest.approx(stats.kendalltau(scores, truth).statistic, abs=1e-12)
    assert correlation.spearman(scores, truth) == pytest.approx(stats.spearmanr(scores, truth).statistic, abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_kendall_equals_scipy_on_every_small_case(n):
    for values in itertools.product(range(3), repeat=n):
        expected = stats.kendalltau(values, range(n)).statistic
        assert correlation.kendall_tau(values, range(n)) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_a_score_without_a_value_ranks_worst():
    scores, truth = samples("plain")
    missing, lowest = scores.copy(), scores.copy()
    missing[:10], missing[10:20], missing[20:30] = np.nan, -np.inf, np.inf
    lowest[:30] = scores.min() - 1
    for name in ("kendall_tau", "spearman", "top_tau", "precision_at", "regret"):
        assert getattr(correlation, name)(missing, truth) == getattr(correlation, name)(lowest, truth)
    found = correlation.rank_statistics(missing, truth)
    assert (found["n"], found["non_finite"]) == (300, 30)


def test_tau_inside_the_top():
    scores, truth = samples("plain")
    best = np.argsort(-truth)[:30]
    expected = stats.kendalltau(scores[best], truth[best]).statistic
    assert correlation.top_tau(scores, truth, 0.1) == pytest.approx(expected, abs=1e-12)
    assert correlation.top_tau(truth, truth) == 1


def test_precision_counts_the_common_items():
    scores, truth = samples("plain")
    common = set(np.argsort(-scores)[:15].tolist()) & set(np.argsort(-truth)[:15].tolist())
    assert correlation.precision_at(scores, truth, 0.05) == len(common) / 15
    assert correlation.precision_at(truth, truth, 0.05) == 1


def test_precision_with_ties_is_the_expectation_over_their_orders():
    scores, truth = [2.0, 1.0, 1.0, 1.0, 0.0, 0.0], [5.0, 3.0, 4.0, 4.0, 4.0, 0.0]
    found = []
    rng = np.random.default_rng(0)
    for _ in range(20_000):
        a, b = (np.lexsort((rng.random(6), -np.array(v)))[:3] for v in (scores, truth))
        found.append(len({*a} & {*b}) / 3)
    assert correlation.precision_at(scores, truth, 0.5) == pytest.approx(np.mean(found), abs=0.01)


def test_what_is_chosen():
    truth = [10.0, 40.0, 30.0, 20.0]
    assert correlation.regret([0, 1, 2, 3], truth) == 20
    assert correlation.regret([0, 3, 2, 3], truth) == 10  # the mean of 40 and 20
    assert correlation.chosen_truth([0, math.nan, 2, 1], truth) == 30
    assert correlation.best_rank_at([0, 1, 2, 3], truth, 1) == 3
    assert correlation.best_rank_at([0, 1, 2, 3], truth, 2) == 2
    assert correlation.best_rank_at([0, 1, 2, 3], truth, 3) == 1


def test_aggregation_over_a_population():
    a, b = [3.0, 1.0, 2.0, math.nan], [1.0, 1.0, 5.0, 4.0]
    expected = np.log([4 / 4, 2 / 4, 3 / 4, 1 / 4]) + np.log([1.5 / 4, 1.5 / 4, 4 / 4, 3 / 4])
    np.testing.assert_allclose(correlation.log_rank_sum([a, b]), expected)
    np.testing.assert_allclose(correlation.share_of_best_sum([a, b]), [1.2, 1 / 3 + 0.2, 2 / 3 + 1, -np.inf])


def test_all_tied_has_no_correlation():
    assert math.isnan(correlation.kendall_tau([1, 1, 1], [1, 2, 3]))
    assert math.isnan(correlation.spearman([1, 1, 1], [1, 2, 3]))


@pytest.mark.parametrize(
    ("scores", "truth"), [([1, 2], [1, 2, 3]), ([1], [1]), ([1, 2], [1, math.nan]), ([[1, 2]], [[1, 2]])]
)
def test_bad_input_is_named(scores, truth):
    with pytest.raises(UserError):
        correlation.kendall_tau(scores, truth)


@pytest.mark.parametrize("share", [0, -0.1, 1.5])
def test_a_share_is_a_share(share):
    with pytest.raises(UserError, match="share"):
        correlation.precision_at([1, 2, 3], [1, 2, 3], share)
