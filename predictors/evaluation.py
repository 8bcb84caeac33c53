"""How well predictors rank: splits of three protocols, statistics, and the mean over splits with its interval."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from predictors.graphs import GraphTable
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import match
from zero_cost.correlation import best_rank_at, kendall_tau, precision_at, regret, spearman

PROTOCOLS = {
    "nasforge": "one random order of the rows per seed, the first n are labelled; ranked: all rows, and those held out",
    "pinat": "one split per size, drawn in turn by RandomState(0); ranked: all rows, the labelled ones included",
    "gates": "half of the rows is a pool of which n are labelled; ranked: the other half alone",
}
PINAT_SIZES = {"nas-bench-101": (100, 172, 424, 4236), "nas-bench-201": (78, 156, 469, 781, 1563)}
LEAST = 3
SHARES = {"precision_at_0.5": 0.005, "precision_at_1": 0.01, "precision_at_5": 0.05}
STATISTICS = ("kendall_tau", "spearman", *SHARES, "best_rank_at_10", "regret")
HELD_OUT = "held_out_"
SECONDS = ("fit_seconds", "predict_seconds")


@dataclass(frozen=True, eq=False)
class Split:
    """Rows `train` whose labels are seen, rows `test` that are ranked (they may hold the others too)."""

    size: int
    seed: int
    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True, eq=False)
class Task:
    """What predictors are judged on: graphs [N], labels [N] to learn from and targets [N] to rank by, higher is
    better in both; extra columns {name: [N]}."""

    graphs: GraphTable
    labels: np.ndarray
    targets: np.ndarray
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in (("labels", self.labels), ("targets", self.targets), *self.extra.items()):
            if np.shape(values) != (len(self.graphs),):
                raise UserError(np.shape(values), f"one value of {name} for each of the {len(self.graphs):,} graphs")
        for name, values in (("labels", self.labels), ("targets", self.targets)):
            bad = np.flatnonzero(~np.isfinite(values))
            if len(bad):
                raise UserError(float(values[bad[0]]), f"finite {name}; row {bad[0]} and {len(bad) - 1} others are not")


def read_size(text: str | int, rows: int, protocol: str = "nasforge") -> int:
    """A training size: a count, or with `%` a part of what may be labelled (all rows; of `gates` the pool, half of
    them). Errors: UserError for what is no size, fewer than three, or more than there is."""
    available = rows // 2 if match(protocol, PROTOCOLS, "a protocol") == "gates" else rows
    stated = str(text).strip().replace("_", "")
    try:
        size = round(float(stated[:-1]) / 100 * available) if stated.endswith("%") else int(stated)
    except (ValueError, OverflowError):
        raise UserError(text, "a training size: a count such as 100, or a percentage such as 1%") from None
    if not LEAST <= size <= available:
        what = "half of the rows, the pool of `gates`" if protocol == "gates" else "the rows of the benchmark"
        raise UserError(text, f"a training size from {LEAST} to {available:,} ({what})")
    return size


def make_splits(
    protocol: str, rows: int, sizes: Sequence[int], seeds: Sequence[int] = range(10), space: str = ""
) -> list[Split]:
    """The splits of a protocol, by size and seed.

    nasforge: `default_rng(seed).permutation(rows)`, so that a smaller size is a part of a larger one of the same seed.
    pinat: the sizes of its space, one split each, by successive permutations of one RandomState(0), whatever `seeds`
    (Lu et al., PINAT, AAAI 2023, after TNASP, NeurIPS 2021); the rows here are in another order than there, so the
    recipe is the published one and the rows are not. gates: the first half of the permutation is the pool (Ning et
    al., GATES, ECCV 2020, section 4; their NAS-Bench-101 is a sample of it). Errors: UserError.
    """
    protocol = match(protocol, PROTOCOLS, "a protocol")
    for size in sizes:
        read_size(size, rows, protocol)
    if protocol == "pinat":
        return _pinat(rows, sizes, space)
    everything = np.arange(rows)
    splits = []
    for size in sizes:
        for seed in seeds:
            order = np.random.default_rng(seed).permutation(rows)
            test = np.sort(order[rows // 2 :]) if protocol == "gates" else everything
            splits.append(Split(size, seed, order[:size], test))
    return splits


def _pinat(rows: int, sizes: Sequence[int], space: str) -> list[Split]:
    if space not in PINAT_SIZES:
        raise UserError("pinat", f"the protocol nasforge or gates; this one has splits of {one_of(PINAT_SIZES)}")
    published = PINAT_SIZES[space]
    for size in sizes:
        if size not in published:
            raise UserError(size, f"a size of the protocol pinat on {space} ({one_of(map(str, published))})")
    state = np.random.RandomState(0)
    orders = {size: state.permutation(rows)[:size] for size in published}
    return [Split(size, 0, orders[size], np.arange(rows)) for size in sizes]


def rank_quality(predictions: np.ndarray, targets: np.ndarray, split: Split) -> dict[str, float]:
    """{statistic: value} over the split's test rows, and prefixed with `held_out_` without the labelled ones among them
    (where there are any). predictions: of the test rows; targets: [N].

    kendall_tau (tau-b), spearman, precision_at_T (of the best T %), best_rank_at_10 (N@10), regret (the best target
    minus that of the highest prediction), as `zero_cost.correlation` defines them.
    """
    truth = targets[split.test]
    labelled = np.zeros(len(targets), bool)
    labelled[split.train] = True
    others = ~labelled[split.test]
    found = _statistics(predictions, truth)
    if not others.all() and others.sum() > 1:
        held_out = _statistics(predictions[others], truth[others])
        found |= {HELD_OUT + name: value for name, value in held_out.items()}
    return found


def _statistics(predictions: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return {
        "kendall_tau": kendall_tau(predictions, truth),
        "spearman": spearman(predictions, truth),
        **{name: precision_at(predictions, truth, share) for name, share in SHARES.items()},
        "best_rank_at_10": float(best_rank_at(predictions, truth, 10)),
        "regret": regret(predictions, truth),
    }


def evaluate_splits(
    make: Callable[[], Any], task: Task, splits: Sequence[Split]
) -> Iterator[tuple[Split, dict[str, Any]]]:
    """(split, its statistics with `fit_seconds` and `predict_seconds`) as they come.

    make: an unfitted Predictor. One that offers `fit_many(problems, rngs) -> [fitted]`, with problems (graphs, labels,
    extra or None, unlabelled), learns all splits of one size together; their time is shared evenly. One that offers
    `member_predictions` and `combine` (an ensemble) has the statistics of its members too, under `members`:
    {name: {statistic: value}}. All graphs of the task are at hand unlabelled. The generator of a fit follows from the
    split's size and seed.
    """
    for size in dict.fromkeys(split.size for split in splits):
        same = [split for split in splits if split.size == size]
        together = hasattr(make(), "fit_many") and len(same) > 1
        for group in [same] if together else [[split] for split in same]:
            begun = time.perf_counter()
            fitted = _fit(make, task, group)
            seconds = (time.perf_counter() - begun) / len(group)
            for split, predictor in zip(group, fitted, strict=True):
                yield split, {**_judged(predictor, task, split), "fit_seconds": seconds}


def _fit(make: Callable[[], Any], task: Task, splits: Sequence[Split]) -> list[Any]:
    rngs = [np.random.default_rng((split.seed, split.size)) for split in splits]
    parts = [(task.graphs.take(s.train), task.labels[s.train], _rows(task, s.train)) for s in splits]
    if len(splits) > 1:
        return list(make().fit_many([(*part, task.graphs) for part in parts], rngs))
    ((graphs, labels, extra),) = parts
    return [make().fit(graphs, labels, extra=extra, unlabelled=task.graphs, rng=rngs[0])]


def _judged(predictor: Any, task: Task, split: Split) -> dict[str, Any]:
    whole = len(split.test) == len(task.graphs)
    graphs, extra = task.graphs if whole else task.graphs.take(split.test), _rows(task, split.test)
    begun = time.perf_counter()
    parts = None
    if hasattr(predictor, "member_predictions"):
        parts = predictor.member_predictions(graphs, extra=extra)
        predictions = predictor.combine(parts)
    else:
        predictions = predictor.predict(graphs, extra=extra)
    found: dict[str, Any] = {"predict_seconds": time.perf_counter() - begun}
    found |= rank_quality(predictions, task.targets, split)
    if parts is not None:
        found["members"] = {name: rank_quality(values, task.targets, split) for name, values in parts.items()}
    return found


def _rows(task: Task, rows: np.ndarray) -> dict[str, np.ndarray] | None:
    return {name: np.asarray(values)[rows] for name, values in task.extra.items()} or None


@dataclass(frozen=True)
class Summary:
    """A statistic over n splits: mean, standard deviation (NaN for one), 95 % interval of the mean (t distribution)."""

    mean: float
    std: float
    n: int
    interval: tuple[float, float]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"mean": self.mean, "std": self.std, "n": self.n, "interval": list(self.interval)}


def summarize(values: Sequence[float]) -> Summary:
    """Mean, deviation and interval of the finite ones among `values`; NaN where there are none.

    The interval is mean +- t(.975, n - 1) std / sqrt(n): Student, Biometrika 6, 1908.
    """
    found = np.array([v for v in values if math.isfinite(v)])
    n = len(found)
    mean = float(found.mean()) if n else math.nan
    if n < 2:
        return Summary(mean, math.nan, n, (math.nan, math.nan))
    from scipy.stats import t

    deviation = float(found.std(ddof=1))
    half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Summary(mean, deviation, n, (mean - half, mean + half))
