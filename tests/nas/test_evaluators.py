"""Evaluators: tables, seed policies, the guard, a user's own."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_space

from benchmarks.table import TestSplitError
from nas.evaluators import FunctionEvaluator, TableEvaluator, as_evaluator, default_metric, make_evaluator, space_of
from nas.loop import search
from nas.objectives import parse_objectives
from search_spaces.common.errors import UserError


@pytest.fixture(scope="module")
def only_test_labels(tmp_path_factory):
    """A small table of the user's own that has no validation column."""
    from benchmarks.adding import add_table

    space = small_space.Digits()
    file = tmp_path_factory.mktemp("table") / "mine.parquet"
    archs = [space.encode(a) for a in space]
    pq.write_table(pa.table({"arch": archs, "test_acc": [float(sum(map(int, a))) for a in archs]}), file)
    return add_table("my/digits", "small_space:Digits", file).id


def test_reads_the_means_of_the_table(nas_bench_201):
    evaluator = TableEvaluator(nas_bench_201, ("val_acc", "latency_ms"))
    table = evaluator.table
    arch = table.arch(1234)
    metrics = evaluator.evaluate(arch, seed=0)
    seeds = [table.column(f"val_acc_200_seed{k}")[1234] for k in range(3)]
    assert metrics["val_acc"] == pytest.approx(np.nanmean(seeds))
    assert set(metrics) == {"val_acc", "latency_ms", "cost_seconds"}
    assert metrics["cost_seconds"] == pytest.approx(table.column("train_seconds")[1234])


def test_random_seed_policy_draws_measured_seeds_by_the_trials_seed(nas_bench_201):
    evaluator = TableEvaluator(nas_bench_201, ("val_acc",), seed_policy="random")
    table = evaluator.table
    row = int(np.flatnonzero(np.isnan(table.column("val_acc_200_seed2")))[0])
    arch = table.arch(row)
    drawn = {evaluator.evaluate(arch, seed=s)["val_acc"] for s in range(60)}
    assert drawn == {float(table.column(f"val_acc_200_seed{k}")[row]) for k in range(2)}
    assert evaluator.evaluate(arch, seed=5) == evaluator.evaluate(arch, seed=5)


def test_travels_by_pickle(nas_bench_201):
    evaluator = TableEvaluator(nas_bench_201, ("val_acc",))
    arch = (3, 3, 3, 1, 3, 3)
    assert pickle.loads(pickle.dumps(evaluator)).evaluate(arch, seed=0) == evaluator.evaluate(arch, seed=0)
    assert len(pickle.dumps(evaluator)) < 500


def test_a_search_never_sees_test_columns(only_test_labels):
    space = small_space.Digits()
    with pytest.raises(TestSplitError, match="--label test"):
        search(space, TableEvaluator(only_test_labels), budget=3)
    with pytest.raises(TestSplitError):
        search(space, TableEvaluator(only_test_labels), budget=3, objectives="test_acc")
    result = search(space, TableEvaluator(only_test_labels, label="test"), "random-search", budget=125)
    assert result.best.metrics == {"test_acc": 12.0}
    assert result.settings["label"] == "test"
    assert default_metric(TableEvaluator(only_test_labels).table, "test") == "test_acc"


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("table:nas-bench-201/cifar-10", "nas-bench-201/cifar10"),
        ("nas-bench-201/cifar10", "table:nas-bench-201/cifar10"),
        ("tabel:nas-bench-201/cifar10", "table:nas-bench-201/cifar10"),
    ],
)
def test_the_nearest_evaluator_is_suggested(text, suggestion):
    with pytest.raises(UserError) as caught:
        make_evaluator(text)
    assert caught.value.suggestion == suggestion


@pytest.mark.parametrize("text", ["no.such.module:thing", "small_space:absent", "os.path:sep"])
def test_a_users_evaluator_that_is_none_is_refused(text):
    with pytest.raises(UserError):
        make_evaluator(text)


def test_unknown_objectives_and_labels_are_refused(nas_bench_201):
    with pytest.raises(UserError) as caught:
        search(
            space_of(TableEvaluator(nas_bench_201)), TableEvaluator(nas_bench_201), budget=3, objectives="latecny_ms"
        )
    assert caught.value.suggestion == "latency_ms"
    with pytest.raises(UserError, match="did you mean 'val'"):
        TableEvaluator(nas_bench_201, label="vall")


def test_functions_and_objects_are_evaluators():
    objectives = parse_objectives("val_acc")
    assert as_evaluator(small_space.score).evaluate((1, 2, 3), seed=0)["val_acc"] == 6
    assert as_evaluator(small_space.Faulty("raise")).evaluate((1, 2, 3), seed=0)["val_acc"] == 6
    assert isinstance(as_evaluator(small_space.score), FunctionEvaluator)
    assert objectives[0].maximize
    with pytest.raises(UserError):
        as_evaluator(3)
