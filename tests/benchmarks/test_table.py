"""Table: rows, seeds, splits, and files that are not what they should be."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import (
    Column,
    Table,
    TableData,
    TestSplitError,
    known_ids,
    open_table,
    parse_column,
    random_split,
    resolve_id,
    write_table,
)
from search_spaces import UserError, load_space


@pytest.fixture
def table(tmp_path, rng) -> Table:
    """500 cells of NAS-Bench-201 with three seeds, of which some are missing."""
    space = load_space("nas-bench-201")
    codes = rng.choice(len(space), 500, replace=False)
    seeds = rng.random((3, 500)) * 100
    seeds[2, ::2] = np.nan
    columns = {f"val_acc_200_seed{k}": seeds[k] for k in range(3)}
    columns |= {f"test_acc_200_seed{k}": seeds[k] + 1 for k in range(3)}
    columns |= {"val_acc_12": rng.random(500), "params": rng.integers(1, 100, 500), "pi_latency_ms": rng.random(500)}
    columns["pi_latency_ms"][:7] = -1
    archs = [space.encode(space.from_code(int(c))) for c in codes]
    write_table(tmp_path / "t.safetensors", "my/t", TableData("nas-bench-201", archs, columns, "a test", "none"))
    opened = Table.open(tmp_path / "t.safetensors")
    opened.expected = dict(zip(archs, zip(*columns.values(), strict=True), strict=True))
    return opened


def test_rows_against_brute_force(table, rng):
    texts = list(table.expected)
    order = rng.permutation(500)
    archs = [table.space.decode(texts[i]) for i in order]
    rows = table.rows_of(archs)
    assert [table.text(int(row)) for row in rows] == [texts[i] for i in order]
    assert [table.arch(int(row)) for row in rows] == archs
    assert table.values(archs, "params").tolist() == [table.expected[texts[i]][7] for i in order]
    assert np.array_equal(table.rows_of_codes(table.space.codes(archs)), rows)
    assert (np.diff(table.codes) > 0).all()
    absent = next(a for a in table.space if table.space.encode(a) not in table.expected)
    with pytest.raises(UserError, match=r"\|none~0\|") as caught:
        table.rows_of([archs[0], absent])
    assert caught.value.value == table.space.encode(absent)


def test_seed_policies(table, rng):
    stacked = np.stack([table.column("val_acc", seed=k) for k in range(3)])
    mean = table.column("val_acc")
    assert np.allclose(mean, np.nanmean(stacked, axis=0))
    assert np.array_equal(table.column("val_acc_200_seed1"), stacked[1])
    with pytest.raises(UserError, match="rng"):
        table.column("val_acc", seed="random")
    with pytest.raises(UserError, match="mean, random, 0, 1, 2"):
        table.column("val_acc", seed=7)
    with pytest.raises(UserError, match="mean, random"):
        table.column("val_acc", seed="median")
    assert table.column("params", seed=1).tolist() == table.column("params").tolist()  # measured once


def test_random_seeds_are_uniform_over_those_measured(table, rng):
    """Chi-squared over 3,000 draws of every row, at a level that one seed in a million would fail."""
    stacked = np.stack([table.column("val_acc", seed=k) for k in range(3)])
    draws = np.stack([table.column("val_acc", seed="random", rng=rng) for _ in range(300)])
    counts = np.stack([(draws == stacked[k]).sum(axis=0) for k in range(3)])
    assert (counts.sum(axis=0) == 300).all()  # never a missing one, never a mixture
    two = np.isnan(stacked[2])
    for runs, rows in ((2, two), (3, ~two)):
        total = counts[:runs, rows].sum(axis=1)
        expected = total.sum() / runs
        assert ((total - expected) ** 2 / expected).sum() < 28


def test_epochs_and_names(table):
    assert table.epochs("val_acc") == [12, 200]
    assert table.metrics == ["params", "pi_latency_ms", "test_acc", "val_acc"]
    assert table.has("val_acc", 12)
    assert not table.has("val_acc", 13)
    assert not table.has("test_acc", 12)
    assert table.column("val_acc", epochs=12).max() < 1
    for call, words in (
        (lambda: table.column("val_ac"), "did you mean 'val_acc'"),
        (lambda: table.column("val_acc", epochs=90), "one of 12, 200"),
        (lambda: table.column("params", epochs=12), "no learning curve"),
        (lambda: table.column("val_acc_12", epochs=200), "not 12 and 200"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    assert np.isnan(table.column("pi_latency_ms")).sum() == 7
    with pytest.raises(ValueError, match="read-only"):
        table.column("val_acc")[0] = 1


def test_the_guard(table):
    for name in ("test_acc", "test_acc_200", "test_acc_200_seed0"):
        with pytest.raises(TestSplitError, match="test_values"):
            table.column(name)
        with pytest.raises(TestSplitError):
            table.values([table.arch(0)], name)
    assert table.test_uses == []
    value = table.test_values([table.arch(3)], purpose="report", seed=0)
    assert value[0] == pytest.approx(table.column("val_acc", seed=0)[3] + 1)
    table.test_values(None, "test_acc", purpose="predictor evaluation")
    assert [(u.count, u.purpose) for u in table.test_uses] == [(1, "report"), (500, "predictor evaluation")]


def test_column_names():
    assert parse_column("val_acc_200_seed1") == Column("val_acc", 200, 1)
    assert parse_column("raspi4_latency_ms") == Column("raspi4_latency_ms")
    assert parse_column("cifar10_acc") == Column("cifar10_acc")
    for name in ("val_acc_200_seed1", "params", "a_7", "a_seed0"):
        assert parse_column(name).name == name
    for name in ("", "Val", "7_acc", "a b", "acc-1", "val_acc_012", "_codes"):
        with pytest.raises(UserError):
            parse_column(name)
    assert [parse_column(n).split for n in ("val_x", "x_test_acc", "train_seconds", "latest_acc")] == [
        "val",
        "test",
        "train",
        None,
    ]


def test_a_file_that_is_no_table_is_refused(table, tmp_path):
    data = table.path.read_bytes()
    path = tmp_path / "broken.safetensors"
    for content in (b"", b"x", b"\0" * 8, data[:100], data[:-1], data[: len(data) // 2], b"\xff" * 100, data[8:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="broken"):
            Table.open(path)
    with pytest.raises(UserError, match="absent"):
        Table.open(tmp_path / "absent.safetensors")
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for about, words in (({"format": 99}, "update nasforge"), ({}, "complete"), (None, "complete")):
        if about is None:
            changed = {**header, "__metadata__": {}}
        else:
            described = json.loads(header["__metadata__"]["nasforge"])
            described = {**described, **about} if about else {"format": 1}
            changed = {**header, "__metadata__": {"nasforge": json.dumps(described)}}
        text = json.dumps(changed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(UserError, match=words):
            Table.open(path)


def test_ids():
    assert resolve_id("NAS_Bench_201/CIFAR10") == "nas-bench-201/cifar10"
    assert "nas-bench-graph/proteins" in known_ids()
    with pytest.raises(UserError, match="did you mean 'nas-bench-201/cifar100'"):
        resolve_id("nas-bench-201/cifar1000")
    with pytest.raises(UserError, match="did you mean 'nas-bench-101/cifar10'"):
        resolve_id("nas-bench-102/cifar10")
    with pytest.raises(UserError, match="nas bench add nats-size/cifar10"):
        open_table("nats-size/cifar10")


def test_random_split(rng):
    parts = random_split(100, [20, 30], rng)
    assert [len(p) for p in parts] == [20, 30, 50]
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    for sizes in ([90, 20], [-1, 5]):
        with pytest.raises(UserError, match="at most 100"):
            random_split(100, sizes, rng)


def test_importing_tables_imports_no_torch():
    code = (
        "import sys, benchmarks; assert 'numpy' not in sys.modules; from benchmarks import Table, add_table; "
        "heavy = {'torch', 'pyarrow', 'scipy', 'networkx'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
