"""How well scores rank: rank correlations, agreement at the top, and what choosing by the scores would cost.

Every function takes (scores, truth), two equally long sequences where higher is better. A score that is not finite
(NaN, -inf and inf alike) is the worst, tied with its like; a truth must be finite. Undefined statistics (all tied) are
NaN. Errors: UserError for lengths that differ, fewer than two items, a truth that is not finite, or a share outside
(0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zero_cost.errors import UserError

Numbers = Sequence[float] | NDArray


def kendall_tau(scores: Numbers, truth: Numbers) -> float:
    """Kendall's tau-b, in O(n log^2 n). Kendall, Biometrika 33, 1945."""
    x, y = (_dense(values) for values in _checked(scores, truth))
    n = len(x)
    pairs = n * (n - 1) // 2
    tied_x, tied_y = _tied_pairs(x), _tied_pairs(y)
    tied_both = _tied_pairs(_dense(x * (int(y.max()) + 1) + y))
    discordant = _inversions(y[np.lexsort((y, x))])
    if tied_x == pairs or tied_y == pairs:
        return math.nan
    difference = pairs - tied_x - tied_y + tied_both - 2 * discordant  # concordant - discordant
    return difference / math.sqrt(pairs - tied_x) / math.sqrt(pairs - tied_y)


def spearman(scores: Numbers, truth: Numbers) -> float:
    """Spearman's rho: Pearson's correlation of the ranks, ties at their mean rank."""
    x, y = (average_ranks(values) for values in _checked(scores, truth))
    x, y = x - x.mean(), y - y.mean()
    length = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / length if length else math.nan


def top_tau(scores: Numbers, truth: Numbers, share: float = 0.1) -> float:
    """Kendall's tau-b among the best `share` by truth (rounded up, at least two; ties at the border all belong)."""
    x, y = _checked(scores, truth)
    border = np.sort(y)[-max(2, _count(share, len(y)))]
    return kendall_tau(x[y >= border], y[y >= border])


def precision_at(scores: Numbers, truth: Numbers, share: float = 0.05) -> float:
    """The part of the best `share` by score (rounded up) that is among the best `share` by truth; P@T%.

    Where ties straddle a border it is the expectation over random orders of the tied.
    """
    x, y = _checked(scores, truth)
    count = _count(share, len(x))
    return float(_membership(x, count) @ _membership(y, count)) / count


def best_rank_at(scores: Numbers, truth: Numbers, count: int = 10) -> int:
    """N@K: the best rank by truth (1 = best) among the K = `count` best by score; ties in the order given.

    Ning et al., A Generic Graph-Based Neural Architecture Encoding Scheme (GATES), ECCV 2020, section 4.
    """
    x, y = _checked(scores, truth)
    if count < 1:
        raise UserError(count, "at least one item to choose")
    chosen = np.argsort(-x, kind="stable")[:count]
    return int((y > y[chosen].max()).sum()) + 1


def chosen_truth(scores: Numbers, truth: Numbers) -> float:
    """The truth of the item with the highest score; the mean over those that tie for it."""
    x, y = _checked(scores, truth)
    return float(y[x == x.max()].mean())


def regret(scores: Numbers, truth: Numbers) -> float:
    """The best truth minus that of the item with the highest score."""
    return float(_checked(scores, truth)[1].max()) - chosen_truth(scores, truth)


def rank_statistics(scores: Numbers, truth: Numbers) -> dict[str, float]:
    """All of them: spearman, kendall_tau, top_10_tau, precision_at_5, best_rank_at_10, chosen, regret; and n and
    non_finite, how many scores had no value."""
    found = np.asarray(scores, np.float64)
    return {
        "n": len(found),
        "non_finite": int((~np.isfinite(found)).sum()),
        "spearman": spearman(scores, truth),
        "kendall_tau": kendall_tau(scores, truth),
        "top_10_tau": top_tau(scores, truth),
        "precision_at_5": precision_at(scores, truth),
        "best_rank_at_10": best_rank_at(scores, truth),
        "chosen": chosen_truth(scores, truth),
        "regret": regret(scores, truth),
    }


def average_ranks(values: Numbers) -> NDArray[np.float64]:
    """Ranks from 1 (lowest), ties at their mean; what is not finite is lowest."""
    array = _worst(np.asarray(values, np.float64))
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def log_rank_sum(columns: Sequence[Numbers]) -> NDArray[np.float64]:
    """AZ-NAS's aggregation over one population: sum over the proxies of log(rank / n), best = rank n.

    Lee and Ham, AZ-NAS, CVPR 2024, equation 8. columns: one sequence of scores per proxy; scores of different
    populations cannot be compared.
    """
    ranks = [average_ranks(column) for column in columns]
    if len({len(r) for r in ranks}) != 1:
        raise UserError([len(r) for r in ranks], "as many scores of every proxy")
    return np.sum([np.log(r / len(r)) for r in ranks], axis=0)


def share_of_best_sum(columns: Sequence[Numbers]) -> NDArray[np.float64]:
    """FreeREA's aggregation over one population: sum of the columns, each divided by its maximum.

    Cavagnero et al., FreeREA, WACV 2023, equation 4, for logsynflow, nwot and the count of skip connections. An item
    with a score that is not finite has -inf.
    """
    arrays = [np.asarray(column, np.float64) for column in columns]
    if len({len(a) for a in arrays}) != 1:
        raise UserError([len(a) for a in arrays], "as many scores of every proxy")
    total = np.zeros(len(arrays[0]))
    for array in arrays:
        finite = np.isfinite(array)
        highest = array[finite].max(initial=-np.inf)
        total += np.where(finite, array / highest if highest > 0 else array, -np.inf)
    return total


def majority_vote(columns: Sequence[Numbers]) -> NDArray[np.float64]:
    """The vote of several proxies over one population: the share of the others that most proxies rank below an item,
    those on which as many proxies disagree counting half.

    Abdelfattah et al., Zero-Cost Proxies for Lightweight NAS, ICLR 2021, section 4.2 (pairwise, as Copeland's method
    makes an order of it). A score that is not finite is the worst.
    """
    ranks = [average_ranks(column) for column in columns]
    if len({len(r) for r in ranks}) != 1:
        raise UserError([len(r) for r in ranks], "as many scores of every proxy")
    found = np.empty(len(ranks[0]))
    for k in range(len(found)):  # a row at a time: pairs of all 15,625 would not fit
        votes = np.sum([np.sign(r[k] - r) for r in ranks], axis=0)
        found[k] = (np.sign(votes).sum() / max(len(found) - 1, 1) + 1) / 2
    return found


def _checked(scores: Numbers, truth: Numbers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(scores, np.float64), np.asarray(truth, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise UserError(x.shape, f"one score for each of the {y.shape} true values")
    if len(x) < 2:
        raise UserError(len(x), "at least two items to rank")
    if not np.isfinite(y).all():
        raise UserError(float(y[~np.isfinite(y)][0]), "finite true values")
    return _worst(x), y


def _worst(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isfinite(scores), scores, -np.inf)


def _count(share: float, n: int) -> int:
    if not 0 < share <= 1:
        raise UserError(share, "a share above 0 and at most 1")
    return max(1, math.ceil(round(share * n, 9)))


def _dense(values: NDArray) -> NDArray[np.int64]:
    """Ranks 0, 1, ... of the distinct values."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def _tied_pairs(ranks: NDArray[np.int64]) -> int:
    counts = np.bincount(ranks)
    return int((counts * (counts - 1) // 2).sum())


def _inversions(values: NDArray[np.int64]) -> int:
    """Pairs i < j with values[i] > values[j], for whole numbers from 0: such a pair agrees in the bits above some bit,
    and there a 1 comes before a 0."""
    total = 0
    for bit in range(int(values.max()).bit_length()):
        prefix = values >> (bit + 1)
        order = np.argsort(prefix, kind="stable")
        prefix, ones = prefix[order], (values[order] >> bit) & 1
        before = np.cumsum(ones) - ones
        before -= before[np.searchsorted(prefix, prefix)]  # of the same prefix only
        total += int(before[ones == 0].sum())
    return total


def _membership(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """The probability of each item to be among the `count` highest when ties are broken at random."""
    border = np.sort(values)[-count]
    above, tied = values > border, values == border
    return above + tied * ((count - above.sum()) / tied.sum())
