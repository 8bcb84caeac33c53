"""Splits, statistics and intervals against scipy, brute force and the written recipes."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from cheap_predictor import Linear

from predictors.evaluation import (
    HELD_OUT,
    PINAT_SIZES,
    Split,
    Task,
    evaluate_splits,
    make_splits,
    rank_quality,
    read_size,
    summarize,
)
from predictors.graphs import as_table
from search_spaces.cells.nas_bench_201 import NasBench201
from search_spaces.common.errors import UserError

SPACE = NasBench201()


@pytest.fixture(scope="module")
def task():
    """200 cells whose worth is linear in their operations, and labels with noise."""
    rng = np.random.default_rng(5)
    archs = [SPACE.from_code(int(code)) for code in rng.permutation(len(SPACE))[:200]]
    weights = rng.normal(size=(6, 5))
    worth = np.array([sum(weights[place, op] for place, op in enumerate(arch)) for arch in archs])
    graphs = as_table([SPACE.graph(arch) for arch in archs], SPACE.vocabulary)
    return Task(graphs, worth + 0.1 * rng.normal(size=200), worth)


def test_splits_of_the_project_are_nested_permutations():
    splits = make_splits("nasforge", 500, (10, 40), range(3))
    assert [(s.size, s.seed) for s in splits] == [(n, seed) for n in (10, 40) for seed in range(3)]
    for small, large in zip(splits[:3], splits[3:], strict=True):
        assert len(set(large.train)) == 40
        assert set(small.train) < set(large.train)
        assert np.array_equal(small.test, np.arange(500))
    assert set(splits[0].train) != set(splits[1].train)


def test_splits_of_gates_are_apart():
    for split in make_splits("gates", 501, (20, 250), range(3)):
        assert len(split.train) == split.size
        assert len(split.test) == 251
        assert not set(split.train) & set(split.test)
    full = make_splits("gates", 501, (250,), (0,))[0]
    assert sorted([*full.train, *full.test]) == list(range(501))


def test_splits_of_pinat_follow_the_published_recipe():
    state = np.random.RandomState(0)
    expected = {n: state.permutation(15_625)[:n] for n in (78, 156, 469, 781, 1563)}
    for size in (469, 78):
        (split,) = make_splits("pinat", 15_625, (size,), range(10), "nas-bench-201")
        assert np.array_equal(split.train, expected[size])
        assert len(split.test) == 15_625
    assert PINAT_SIZES["nas-bench-101"] == (100, 172, 424, 4236)
    with pytest.raises(UserError, match="100: expected a size of the protocol pinat on nas-bench-201"):
        make_splits("pinat", 15_625, (100,), range(1), "nas-bench-201")
    with pytest.raises(UserError, match="the protocol nasforge or gates"):
        make_splits("pinat", 6561, (100,), range(1), "nas-bench-macro")


def test_sizes_are_counts_or_percentages():
    assert read_size("100", 500) == 100
    assert read_size("1%", 15_625) == 156
    assert read_size("1%", 15_625, "gates") == 78  # the published pool: half
    assert read_size("100%", 7) == 7
    for wrong in ("2", "-5", "501", "many", "1e3", "inf%", "nan%", "0.1%", ""):
        with pytest.raises(UserError, match="a training size"):
            read_size(wrong, 500)
    with pytest.raises(UserError, match="from 3 to 250"):
        read_size("251", 500, "gates")


def best_rank(predictions, truth, count):
    chosen = sorted(range(len(truth)), key=lambda k: -predictions[k])[:count]
    return min(1 + sum(truth[j] > truth[k] for j in range(len(truth))) for k in chosen)


def precision(predictions, truth, count):
    def top(values):
        return set(sorted(range(len(values)), key=lambda k: -values[k])[:count])

    return len(top(predictions) & top(truth)) / count


def test_statistics_are_those_of_scipy_and_of_brute_force(rng):
    truth = rng.normal(size=400)
    predictions = truth + rng.normal(size=400)
    split = Split(100, 0, rng.permutation(400)[:100], np.arange(400))
    found = rank_quality(predictions, truth, split)
    others = np.setdiff1d(np.arange(400), split.train)
    for prefix, rows in (("", np.arange(400)), (HELD_OUT, others)):
        p, t = predictions[rows], truth[rows]
        assert found[f"{prefix}kendall_tau"] == pytest.approx(scipy.stats.kendalltau(p, t).statistic)
        assert found[f"{prefix}spearman"] == pytest.approx(scipy.stats.spearmanr(p, t).statistic)
        for name, share in (("0.5", 0.005), ("1", 0.01), ("5", 0.05)):
            expected = precision(p, t, int(np.ceil(share * len(t))))
            assert found[f"{prefix}precision_at_{name}"] == pytest.approx(expected)
        assert found[f"{prefix}best_rank_at_10"] == best_rank(p, t, 10)
        assert found[f"{prefix}regret"] == pytest.approx(t.max() - t[np.argmax(p)])


def test_held_out_statistics_need_rows_that_are_held_out(rng):
    truth = rng.normal(size=50)
    apart = Split(10, 0, np.arange(10), np.arange(25, 50))  # gates: nothing of the pool is ranked
    assert not [name for name in rank_quality(truth[25:], truth, apart) if name.startswith(HELD_OUT)]
    everything = Split(50, 0, np.arange(50), np.arange(50))
    assert not [name for name in rank_quality(truth, truth, everything) if name.startswith(HELD_OUT)]


class Together(Linear):
    """Learns all problems at once, and counts."""

    calls: list[int] = []  # noqa: RUF012

    def fit_many(self, problems, rngs):
        self.calls.append(len(problems))
        return [
            Linear(self.space_name, self.vocabulary).fit(graphs, y, extra=extra, unlabelled=unlabelled, rng=rng)
            for (graphs, y, extra, unlabelled), rng in zip(problems, rngs, strict=True)
        ]


def test_predictors_learn_from_labels_and_are_judged_on_targets(task):
    made = []

    def make():
        made.append(Linear("nas-bench-201", SPACE.vocabulary))
        return made[-1]

    splits = make_splits("nasforge", 200, (20, 150), range(2))
    found = list(evaluate_splits(make, task, splits))
    fitted = [predictor for predictor in made if hasattr(predictor, "y")]
    for split, predictor in zip(splits, fitted, strict=True):
        assert np.array_equal(predictor.y, task.labels[split.train])
        assert [predictor.graphs[k] for k in range(3)] == [task.graphs[int(r)] for r in split.train[:3]]
        assert len(predictor.unlabelled) == 200
    assert [split for split, _ in found] == splits
    few, many = found[0][1]["kendall_tau"], found[-1][1]["kendall_tau"]
    assert many > 0.93 > few
    predictions = fitted[-1].predict(task.graphs)
    assert many == pytest.approx(scipy.stats.kendalltau(predictions, task.targets).statistic)
    assert len({predictor.draw for predictor in fitted}) == 4  # a generator of its own for every fit
    assert all(metrics["fit_seconds"] > 0 and metrics["predict_seconds"] > 0 for _, metrics in found)


def test_learning_together_gives_what_learning_apart_gives(task):
    splits = make_splits("nasforge", 200, (20, 50), range(3))
    apart = [m for _, m in evaluate_splits(lambda: Linear("s", SPACE.vocabulary), task, splits)]
    together = [m for _, m in evaluate_splits(lambda: Together("s", SPACE.vocabulary), task, splits)]
    assert Together.calls == [3, 3]
    for one, other in zip(apart, together, strict=True):
        assert {k: v for k, v in one.items() if "seconds" not in k} == {
            k: v for k, v in other.items() if "seconds" not in k
        }


def test_extra_columns_follow_their_rows(task):
    seen = []

    class Spy(Linear):
        def fit(self, graphs, y, *, extra=None, unlabelled=None, rng):
            seen.append(extra)
            return super().fit(graphs, y, rng=rng)

        def predict(self, graphs, *, extra=None, return_std=False):
            seen.append(extra)
            return super().predict(graphs)

    split = make_splits("gates", 200, (20,), (0,))
    column = np.arange(200.0)
    list(
        evaluate_splits(
            lambda: Spy("s", SPACE.vocabulary), Task(task.graphs, task.labels, task.targets, {"p": column}), split
        )
    )
    assert np.array_equal(seen[0]["p"], split[0].train)
    assert np.array_equal(seen[1]["p"], split[0].test)


def test_bad_labels_and_targets_are_refused_with_their_row(task):
    bad = task.labels.copy()
    bad[[7, 9]] = np.nan, np.inf
    with pytest.raises(UserError, match="finite labels; row 7 and 1 others"):
        Task(task.graphs, bad, task.targets)
    with pytest.raises(UserError, match="one value of targets for each of the 200"):
        Task(task.graphs, task.labels, task.targets[:50])


def test_intervals_are_those_of_the_t_distribution(rng):
    values = rng.normal(size=10).tolist()
    found = summarize([*values, float("nan")])
    low, high = scipy.stats.t.interval(0.95, 9, np.mean(values), scipy.stats.sem(values))
    assert (found.mean, found.n) == (pytest.approx(np.mean(values)), 10)
    assert found.std == pytest.approx(np.std(values, ddof=1))
    assert found.interval == (pytest.approx(low), pytest.approx(high))
    alone = summarize([2.0])
    assert (alone.mean, alone.n) == (2.0, 1)
    assert np.isnan([alone.std, *alone.interval]).all()
    assert np.isnan(summarize([]).mean)
