"""Graphs, labels and targets of tables against decoding row by row."""

from __future__ import annotations

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from benchmarks import add_table, open_table
from nas.prediction import tables
from nas.prediction.tables import graphs_of, labels_and_targets
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

SPACE = load_space("nas-bench-201")


@pytest.fixture
def make_table(tmp_path, monkeypatch):
    """A function: columns (and a space) -> a table of as many architectures, in a home of its own."""
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path / "home"))

    def make(columns, space="nas-bench-201", count=40, seed=0):
        drawn, rng = {}, np.random.default_rng(seed)
        found = load_space(space)
        while len(drawn) < count:
            arch = found.sample(rng)
            drawn[found.key(arch)] = found.encode(arch)
        file = tmp_path / "measured.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"arch": list(drawn.values()), **columns}), file)
        (tmp_path / "home/tables/my/table.safetensors").unlink(missing_ok=True)
        add_table("my/table", space, file)
        return open_table("my/table"), list(drawn.values())

    return make


def by_arch(table, archs, values):
    """`values`, given by architecture, in the order of the table's rows."""
    return np.array([values[archs.index(table.text(row))] for row in range(len(table))])


def test_labels_of_one_run_fall_back_to_the_next_seed(make_table, rng):
    first, second = rng.random(40) * 90, rng.random(40) * 90
    first[[3, 8]] = np.nan
    test = rng.random(40) * 90
    table, archs = make_table({"val_acc_12_seed0": first, "val_acc_12_seed1": second, "test_acc_12": test})
    found = labels_and_targets(table)
    assert (found.label_kind, found.target_kind, found.notes) == ("val-run", "test-mean", ())
    expected = np.where(np.isnan(first), second, first)
    np.testing.assert_allclose(found.labels, by_arch(table, archs, expected))
    np.testing.assert_allclose(found.targets, by_arch(table, archs, test))
    mean = np.where(np.isnan(first), second, (first + second) / 2)
    means = labels_and_targets(table, "val-mean", "val-mean").targets
    np.testing.assert_allclose(means, by_arch(table, archs, mean))


def test_test_values_are_read_once_and_recorded(make_table, rng):
    table, _ = make_table({"val_acc_12": rng.random(40), "test_acc_12": rng.random(40)})
    labels_and_targets(table, "val-run", "val-mean")
    assert table.test_uses == []
    labels_and_targets(table, "test-mean", "test-mean")
    assert [(use.metric, use.count, use.purpose) for use in table.test_uses] == [
        ("test_acc_12", 40, "predictor evaluation")
    ]


def test_tables_without_one_of_the_splits(make_table, rng):
    table, _ = make_table({"val_acc_12": rng.random(40)})
    assert labels_and_targets(table).target_kind == "val-mean"
    with pytest.raises(UserError, match="'test-mean': expected targets that my/table has.*did you mean 'val-mean'"):
        labels_and_targets(table, target="test-mean")
    with pytest.raises(UserError, match="did you mean 'val-run'"):
        labels_and_targets(table, labels="val-rnu")
    table, _ = make_table({"test_acc_12": rng.random(40)})
    found = labels_and_targets(table)
    assert (found.label_kind, found.target_kind) == ("test-mean", "test-mean")
    assert "test values only" in found.notes[0]
    assert not labels_and_targets(table, "test-mean", "test-mean").notes  # it was said explicitly
    with pytest.raises(UserError, match="it has no val values; did you mean 'test-mean'"):
        labels_and_targets(table, labels="val-run")


def test_what_is_better_when_smaller_is_turned_round(make_table, rng):
    loss = rng.random(40)
    table, archs = make_table({"val_loss_12": loss})
    found = labels_and_targets(table)
    np.testing.assert_allclose(found.labels, -by_arch(table, archs, loss))
    np.testing.assert_allclose(found.targets, found.labels)
    assert not found.maximize


def test_rows_without_a_label_are_left_out_and_counted(make_table, rng):
    first, test = rng.random(40), rng.random(40)
    first[5] = np.nan
    table, archs = make_table({"val_acc_12_seed0": first, "test_acc_12": test})
    found = labels_and_targets(table)
    assert len(found.rows) == len(found.labels) == 39
    assert archs[5] not in [table.text(int(row)) for row in found.rows]
    assert "1 of 40 rows" in found.notes[0]


@pytest.mark.parametrize("space", ["nas-bench-101", "nas-bench-201", "darts"])
def test_graphs_are_those_of_the_space_and_are_kept(make_table, rng, monkeypatch, space):
    table, _ = make_table({"val_acc_12": rng.random(60)}, space=space, count=60)
    found = graphs_of(table)
    expected = [table.space.graph(table.arch(row)) for row in range(60)]
    assert list(found) == expected
    assert found.vocabulary == table.space.vocabulary
    monkeypatch.setattr(tables, "_parse", None)  # what is kept is not parsed again
    again = graphs_of(open_table("my/table"))
    assert list(again) == expected


def test_kept_graphs_give_way_to_a_new_table_and_survive_damage(make_table, rng, tmp_path):
    table, _ = make_table({"val_acc_12": rng.random(40)})
    before = list(graphs_of(table))
    file = tmp_path / "home" / "cache" / "graphs" / "my" / "table.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert list(graphs_of(table)) == before
    table, _ = make_table({"val_acc_12": rng.random(50)}, count=50, seed=1)
    after = graphs_of(table)
    assert list(after) == [table.space.graph(table.arch(row)) for row in range(50)]


@pytest.mark.slow
def test_all_of_nas_bench_101(shared_table, tmp_path, monkeypatch):
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path))
    add_table("nas-bench-101/cifar10", None, shared_table("nas-bench-101/accuracy.parquet"))
    table = open_table("nas-bench-101/cifar10")
    found = graphs_of(table)
    assert len(found) == 423_624
    for row in np.random.default_rng(0).integers(len(found), size=500).tolist():
        assert found[row] == table.space.graph(table.arch(row))


def test_a_column_of_costs_is_label_and_target(make_table, rng):
    latency, worth = rng.random(40) * 9 + 1, rng.random(40)
    latency[[2, 30]] = -1  # missing, as hardware tables write it
    table, archs = make_table({"raspi4_latency_ms": latency, "worth": worth, "test_acc_9": worth})
    found = labels_and_targets(table, target="raspi4_latency_ms")
    kept = [k for k in range(40) if latency[archs.index(table.text(k))] > 0]
    np.testing.assert_array_equal(found.rows, kept)
    np.testing.assert_allclose(found.labels, -by_arch(table, archs, latency)[kept])  # less is better
    np.testing.assert_array_equal(found.targets, found.labels)
    assert (found.label_kind, found.target_kind, found.maximize) == ("raspi4_latency_ms", "raspi4_latency_ms", False)
    assert "2 of 40 rows" in found.notes[0]
    assert table.test_uses == []
    assert labels_and_targets(table, target="worth:max").maximize
    np.testing.assert_allclose(labels_and_targets(table, target="worth:min").labels, -by_arch(table, archs, worth))
    for given, expected in (
        ({"target": "raspi4_latency"}, "did you mean 'raspi4_latency_ms'"),
        ({"target": "test_acc"}, "did you mean 'test-mean'"),
        ({"target": "worth"}, "worth:max, worth:min"),
        ({"target": "raspi4_latency_ms", "labels": "test-mean"}, "no --labels, or raspi4_latency_ms"),
    ):
        with pytest.raises(UserError, match=expected):
            labels_and_targets(table, **given)
    alone, _ = make_table({"raspi4_latency_ms": latency})
    with pytest.raises(UserError, match="a column as --target.*raspi4_latency_ms"):
        labels_and_targets(alone)
