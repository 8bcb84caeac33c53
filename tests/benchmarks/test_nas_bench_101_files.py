"""NAS-Bench-101's TFRecords: framing, checksums, protocol buffers, the table."""

from __future__ import annotations

import io
import json

import numpy as np
import official_files as official
import pytest

from benchmarks import add_file, open_table
from benchmarks.importers.tfrecord import crc32c, read_message, read_records
from search_spaces import UserError, load_space

FIELDS = {"train_seconds": 2, "train_acc": 3, "val_acc": 4, "test_acc": 5}


@pytest.fixture(autouse=True)
def _empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def runs() -> list[tuple]:
    """(module hash, epochs, cell, evaluations, parameters) of three runs of each cell at each length, shuffled."""
    space, rng = load_space("nas-bench-101"), np.random.default_rng(0)
    cells = {space.key(cell): cell for cell in (space.sample(rng) for _ in range(15))}
    found = []
    for key, cell in cells.items():
        params = space.cost(cell)["params"]
        for epochs in (4, 12, 36, 108):
            for _ in range(3):
                evaluations = [{1: float(e), **{f: float(rng.random()) for f in (2, 3, 4, 5)}} for e in range(3)]
                found.append((key, epochs, cell, evaluations, params))
    return [found[i] for i in rng.permutation(len(found))]


@pytest.fixture(scope="module")
def records(runs) -> list[bytes]:
    return [
        official.record_101(key, epochs, cell.matrix, list(cell.ops), official.metrics(evaluations, params, 7.5))
        for key, epochs, cell, evaluations, params in runs
    ]


def write(path, records):
    path.write_bytes(b"".join(map(official.frame, records)))
    return path


def test_crc32c_known_values_and_definition(rng):
    # RFC 3720, appendix B.4
    vectors = {bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E, b"123456789": 0xE3069283}
    assert crc32c(list(vectors)).tolist() == list(vectors.values())
    mixed = [rng.bytes(int(n)) for n in rng.integers(0, 300, 40)]
    assert crc32c(mixed).tolist() == [official.crc32c(data) for data in mixed]
    assert crc32c([]).tolist() == []


def test_protocol_buffers_known_messages():
    # The examples of the encoding guide on protobuf.dev.
    assert list(read_message(bytes.fromhex("089601"))) == [(1, 150)]
    assert list(read_message(bytes.fromhex("120774657374696e67"))) == [(2, b"testing")]
    assert [(f, list(read_message(v))) for f, v in read_message(bytes.fromhex("1a03089601"))] == [(3, [(1, 150)])]
    assert list(read_message(bytes.fromhex("09000000000000f03f0d0000c03f"))) == [(1, 1.0), (1, 1.5)]
    for broken in ("08", "0896", "1207", "09000000", "0b", "08" + "ff" * 11):
        with pytest.raises(ValueError, match="protocol buffer"):
            list(read_message(bytes.fromhex(broken)))


def test_the_table_holds_every_run(tmp_path, runs, records):
    added = add_file("nas-bench-101/cifar10", write(tmp_path / "nasbench_full.tfrecord", records))
    table = open_table("nas-bench-101/cifar10")
    assert added.covers == (len({run[0] for run in runs}), 423_624)
    assert table.epochs("val_acc") == [4, 12, 36, 108]
    seen: dict = {}
    for key, epochs, cell, evaluations, params in runs:
        seed = seen[key, epochs] = seen.get((key, epochs), -1) + 1
        row = table.rows_of([cell])[0]
        assert table.column("params")[row] == params
        for metric, field in FIELDS.items():
            scale = 1 if metric == "train_seconds" else 100
            values = (
                table.test_values(None, metric, purpose="test", epochs=epochs, seed=seed)
                if metric == "test_acc"
                else table.column(metric, epochs=epochs, seed=seed)
            )
            assert values[row] == np.float32(evaluations[-1][field] * scale)


@pytest.mark.parametrize("place", ["length", "length-sum", "body", "body-sum"])
def test_every_damaged_byte_is_found(place, tmp_path, records):
    frames = [official.frame(r) for r in records]
    offset = {"length": 0, "length-sum": 9, "body": 40, "body-sum": len(frames[20]) - 2}[place]
    broken = bytearray(frames[20])
    broken[offset] ^= 1
    path = tmp_path / "nasbench_full.tfrecord"
    path.write_bytes(b"".join([*frames[:20], bytes(broken), *frames[21:]]))
    with pytest.raises(UserError, match="nasbench_full.*record 20"):
        add_file("nas-bench-101/cifar10", path)


def test_a_file_that_is_broken_off_anywhere_is_refused(tmp_path, records, rng):
    data = b"".join(map(official.frame, records))
    path = tmp_path / "nasbench_full.tfrecord"
    boundary = len(data) - len(official.frame(records[-1]))
    for cut in (0, 1, 11, 12, boundary, len(data) - 1, *rng.integers(13, len(data), 15).tolist()):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match="nasbench_full"):
            add_file("nas-bench-101/cifar10", path)


def test_foreign_records_are_named(tmp_path, records):
    path = tmp_path / "nasbench_only108.tfrecord"
    good = json.loads(records[0])

    def refused(record: bytes, reason: str) -> None:
        with pytest.raises(UserError, match=reason) as caught:
            add_file("nas-bench-101/cifar10", write(path, [records[0], record]))
        assert path.name in str(caught.value)
        assert "record 1" in str(caught.value)

    refused(b"hello", "TFRecord")
    refused(b"[1, 2]", "unpack")
    refused(json.dumps([good[0], 5, *good[2:]]).encode(), "5 epochs")
    refused(json.dumps([*good[:4], "!!!"]).encode(), "TFRecord")
    refused(json.dumps([*good[:4], "CAEQ"]).encode(), "protocol buffer|evaluation")
    other = json.loads(next(r for r in records if json.loads(r)[0] != good[0]))
    refused(json.dumps([*other[:2], good[2] + "0", *other[3:]]).encode(), "places")
    path.write_bytes(b"PK\x03\x04 some archive, long enough to be mistaken for a length")
    with pytest.raises(UserError, match="record 0"):
        add_file("nas-bench-101/cifar10", path)


def test_records_are_read_a_batch_at_a_time():
    """A consumer that stops early has made the reader read little."""
    frame = official.frame(b"x" * 500)
    file = io.BytesIO(frame * 20_000)
    reader = read_records(file)
    next(reader)
    assert file.tell() < len(frame) * 5_000
    assert sum(1 for _ in reader) == 19_999


def test_macro_json(tmp_path, shared_table):
    import pyarrow.parquet

    shared = pyarrow.parquet.read_table(shared_table("nas-bench-macro/accuracy.parquet")).to_pylist()
    content = {
        row["arch"]: {
            "test_acc": [row[f"cifar10_test_acc_seed{k}"] for k in range(3)],
            "mean_acc": 0.0,
            "std": 0.0,
            "params": row["params"],
            "flops": row["flops"],
        }
        for row in shared
    }
    path = tmp_path / "nas-bench-macro_cifar10.json"
    path.write_text(json.dumps(content))
    added = add_file("nas-bench-macro/cifar10", path)
    assert added.covers == (6_561, 6_561)
    table = open_table("nas-bench-macro/cifar10")
    test = table.test_values(None, purpose="test")
    assert round(float(test.max()), 2) == 93.13
    best = {table.text(int(row)) for row in np.argsort(test)[-2:]}
    assert best == {"22212220", "22212202"}
    for row in (0, 1234, 6560):
        cost = table.space.cost(table.arch(row))
        assert (cost["params"], cost["macs"]) == (table.column("params")[row], table.column("macs")[row])
    text = path.read_text()
    for broken in (text[:-1], "", "[]", "{}", '{"00000000": {"test_acc": [1, 2]}}', '{"00000000": 3}', text[:5000]):
        path.write_text(broken)
        with pytest.raises(UserError, match="nas-bench-macro"):
            add_file("nas-bench-macro/cifar10", path)
