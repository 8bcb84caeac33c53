"""Official files of NAS-Bench-201 and NATS-Bench, in all their formats."""

from __future__ import annotations

import bz2
import io
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import official_files as official
import pytest

from benchmarks import TestSplitError, add_file, open_table, table_path
from benchmarks.importers.nas_bench_201 import read_nas_bench_201
from benchmarks.importers.streaming import Source, StreamingUnpickler
from search_spaces import UserError, load_space

TOPOLOGY = {"12": 12, "200": 200}
OLD = {"less": 12, "full": 200}


def some_archs(space: str, count: int) -> list[str]:
    found = load_space(space)
    rng = np.random.default_rng(1)
    return list(dict.fromkeys(found.encode(found.sample(rng)) for _ in range(2 * count)))[:count]


@pytest.fixture(scope="module")
def topology() -> dict:
    return official.content(some_archs("nas-bench-201", 8), TOPOLOGY, np.random.default_rng(2))


def write_torch(path: Path, content: dict, *, zip_format: bool, tensors: bool = True) -> Path:
    torch = pytest.importorskip("torch")
    content = pickle.loads(pickle.dumps(content))
    if tensors:  # weights, as some of the published files hold
        result = next(iter(content["arch2infos"][0]["full"]["all_results"].values()))
        result["net_state_dict"] = {"stem.weight": torch.randn(64, 3, 3, 3), "bias": torch.nn.Parameter(torch.ones(7))}
    torch.save(content, path, _use_new_zipfile_serialization=zip_format)
    return path


@pytest.fixture(scope="module")
def old() -> dict:
    return official.content(some_archs("nas-bench-201", 6), OLD, np.random.default_rng(3))


@pytest.fixture
def write(tmp_path, topology, old):
    """A function: kind of file -> (path, what it holds)."""

    def make(kind: str) -> tuple[Path, dict]:
        if kind.startswith("pbz2"):
            return official.write_bz2(tmp_path / "NATS-tss.pickle.pbz2", topology, int(kind[-1])), topology
        if kind == "simple":
            return official.write_simple(tmp_path / "NATS-tss-simple", topology), topology
        return write_torch(tmp_path / "NAS-Bench-201.pth", old, zip_format=kind == "zip"), old

    return make


@pytest.fixture(autouse=True)
def _empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path / "home"))


KINDS = ("pbz2-2", "pbz2-4", "simple", "zip", "legacy")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data_set", ["cifar10", "cifar100", "imagenet16"])
def test_every_format_gives_the_protocols_values(kind, data_set, write):
    path, content = write(kind)
    added = add_file(f"nas-bench-201/{data_set}", path)
    assert added.rows == len(content["meta_archs"])
    assert added.covers == (added.rows, 15_625)
    table = open_table(f"nas-bench-201/{data_set}")
    name = {"cifar10": "cifar10-valid", "cifar100": "cifar100", "imagenet16": "ImageNet16-120"}[data_set]
    test_at = ("cifar10", "ori-test") if data_set == "cifar10" else (name, "x-test")
    for index, info in content["arch2infos"].items():
        row = table.rows_of([table.space.decode(content["meta_archs"][index])])[0]
        for state in info.values():
            for seed in state["dataset_seed"][name]:
                result = state["all_results"][name, seed]
                tested = state["all_results"][test_at[0], seed]
                epochs = result["epochs"]
                assert (
                    table.column("val_acc", epochs=epochs, seed=seed)[row]
                    == (result["eval_acc1es"][f"x-valid@{epochs - 1}"])
                )
                test = table.test_values(None, "test_acc", purpose="test", epochs=epochs, seed=seed)
                assert test[row] == tested["eval_acc1es"][f"{test_at[1]}@{epochs - 1}"]
                assert table.column("train_seconds", epochs=epochs, seed=seed)[row] == pytest.approx(
                    sum(result["train_times"].values())
                )
        # Seed 888 is believed where it ran; every file here gives it other parameters than seed 777.
        assert table.column("params")[row] == 123_456
        assert table.column("macs")[row] == 12_500_000
        assert table.column("latency_ms")[row] == pytest.approx(20)  # of [0.01, 0.03], [-1] and None
    with pytest.raises(TestSplitError):
        table.column("test_acc")
    seeds = [c.seed for c in table.columns if c.metric == "val_acc" and c.epochs == 200]
    assert seeds == [777, 888, 999]
    assert np.isnan(table.column("val_acc", seed=999)).any()  # every other architecture ran twice


def test_parameters_without_the_trusted_seed_are_the_first_seeds(tmp_path, topology):
    content = pickle.loads(pickle.dumps(topology))
    for info in content["arch2infos"].values():
        for state in info.values():
            for key in [k for k in state["all_results"] if k[1] == 888]:
                del state["all_results"][key]
    data = read_nas_bench_201(
        official.write_bz2(tmp_path / "x.pickle.pbz2", content), "nas-bench-201", "cifar10", "MIT"
    )
    assert set(data.columns["params"]) == {654_321}


def test_size_space(tmp_path):
    archs = some_archs("nats-size", 8)
    content = official.content(archs, {"01": 1, "12": 12, "90": 90}, np.random.default_rng(4))
    added = add_file("nats-size/cifar100", official.write_bz2(tmp_path / "NATS-sss.pickle.pbz2", content))
    table = open_table("nats-size/cifar100")
    assert added.covers == (8, 32_768)
    assert table.epochs("val_acc") == [1, 12, 90]
    result = content["arch2infos"][3]["90"]["all_results"]["cifar100", 777]
    assert table.values([table.space.decode(archs[3])], "val_acc", seed=777)[0] == result["eval_acc1es"]["x-valid@89"]


@pytest.mark.parametrize("kind", ["pbz2-4", "pbz2-2", "zip", "legacy"])
def test_a_file_that_is_broken_off_anywhere_is_refused(kind, write, rng):
    path, _ = write(kind)
    data = path.read_bytes()
    target = table_path("nas-bench-201/cifar100")
    target.unlink(missing_ok=True)
    # In the old format of torch.save storages follow the pickle; nothing of a table is lost with them.
    end = len(data) if kind != "legacy" else data.rindex(b"evaluated_indexes")
    for cut in [0, 1, 2, 3, 5, 100, *rng.integers(100, end, 8).tolist(), end - 1]:
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match=path.name):
            add_file("nas-bench-201/cifar100", path)
    assert not target.exists()
    assert not list(target.parent.glob("*cifar100.safetensors*"))


@pytest.mark.parametrize("kind", ["pbz2-4", "zip"])
def test_a_flipped_bit_is_refused(kind, write):
    path, _ = write(kind)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=path.name):
        add_file("nas-bench-201/cifar100", path)


def _without(content: dict, *keys: str) -> dict:
    return {k: v for k, v in content.items() if k not in keys}


def test_missing_parts_are_named(tmp_path):
    topology = official.content(some_archs("nas-bench-201", 8), {"12": 12}, np.random.default_rng(2))
    file = tmp_path / "NATS-tss.pickle.pbz2"

    def refused(value: object, reason: str) -> None:
        with pytest.raises(UserError, match=reason) as caught:
            add_file("nas-bench-201/cifar10", official.write_bz2(file, value))
        assert "NATS-tss" in str(caught.value)

    refused(_without(topology, "meta_archs"), "meta_archs")
    refused(_without(topology, "arch2infos"), "arch2infos")
    refused([1, 2], "dict")
    infos = topology["arch2infos"]
    refused({**topology, "arch2infos": {i: infos[i] for i in infos if i != 5}}, "architecture 5 is missing")
    refused({**topology, "meta_archs": topology["meta_archs"][::-1]}, "architecture 0")
    for key in ("eval_acc1es", "params", "epochs"):
        content = pickle.loads(pickle.dumps(topology))
        del content["arch2infos"][2]["12"]["all_results"]["cifar10-valid", 777][key]
        refused(content, key)
    content = pickle.loads(pickle.dumps(topology))
    for state in content["arch2infos"][7].values():
        for key in [k for k in state["all_results"] if k[0] == "cifar10-valid"]:
            del state["all_results"][key]
    refused(content, "x-valid for architecture 7")


def test_an_incomplete_folder_is_refused(tmp_path, topology):
    folder = official.write_simple(tmp_path / "NATS-tss-simple", topology)
    (folder / "000004.pickle.pbz2").unlink()
    with pytest.raises(UserError, match="000004"):
        add_file("nas-bench-201/cifar10", folder)
    (folder / "meta.pickle.pbz2").unlink()
    with pytest.raises(UserError, match="meta"):
        add_file("nas-bench-201/cifar10", folder)


@pytest.mark.parametrize("name", ["NATS-tss.pickle.pbz2", "NAS-Bench-201.pth"])
def test_foreign_files_are_refused(name, tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("hello.txt", "hello")
    foreign = (b"hello", b"PK\x03\x04rubbish", archive.getvalue(), bz2.compress(b"hello"), pickle.dumps({"a": 1}), b"")
    for data in foreign:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            add_file("nas-bench-201/cifar10", tmp_path / name)


class _Evil:
    """Unpickled carelessly, it creates a file."""

    def __init__(self, path: Path, how: str):
        self.path, self.how = path, how

    def __reduce__(self):
        if self.how == "system":
            import os

            return os.system, (f"touch {self.path}",)
        if self.how == "eval":
            return eval, (f"open({str(self.path)!r}, 'w').close()",)
        return open, (str(self.path), "w")


@pytest.mark.parametrize("how", ["system", "eval", "open"])
@pytest.mark.parametrize("kind", ["pbz2-2", "pbz2-4", "simple", "zip", "legacy"])
def test_code_in_a_file_is_refused_not_run(kind, how, tmp_path, topology, old):
    mark = tmp_path / "it-ran"
    content = pickle.loads(pickle.dumps(old if kind in ("zip", "legacy") else topology))
    hp = "full" if kind in ("zip", "legacy") else "200"
    content["arch2infos"][3][hp]["all_results"]["cifar10-valid", 777]["arch_config"] = _Evil(mark, how)
    if kind.startswith("pbz2"):
        path = official.write_bz2(tmp_path / "evil.pickle.pbz2", content, int(kind[-1]))
    elif kind == "simple":
        path = official.write_simple(tmp_path / "evil-simple", content)
    else:
        torch = pytest.importorskip("torch")
        path = tmp_path / "evil.pth"
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match=r"evil.*which a table has no use for"):
        add_file("nas-bench-201/cifar10", path)
    assert not mark.exists()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_the_streaming_reader_reads_what_pickle_reads(protocol, rng):
    shared = ["again", {1: 2.5}]
    value = {
        "curve": {e: float(v) for e, v in enumerate(rng.random(256))},
        "long": {e: float(e) for e in range(3000)},
        "kinds": [None, True, -1, 2**40, 2**70, 1e300, float("inf"), "ü", b"bytes", (), (1,), (1, 2, 3, 4), set(), {7}],
        "scalar": np.float64(0.5),
        "array": rng.random((3, 4)),
        "shared": [shared, shared, {"deep": [shared]}],
        "K": {75: 1.0, 71: 2.0},  # the opcodes' own letters as keys
    }
    data = pickle.dumps(value, protocol)
    found = StreamingUnpickler(Source(io.BytesIO(data))).load()
    assert pickle.dumps(found, protocol) == pickle.dumps(pickle.loads(data), protocol)


LIMIT = """
import re, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from benchmarks.importers.nas_bench_201 import StreamingUnpickler, Source, reduce_state
file = open({path!r}, "rb")
found = StreamingUnpickler(Source(file), lambda content: reduce_state(content, "cifar10")).load()
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())  # ru_maxrss would begin at the parent's
print(len(found["arch2infos"]), peak[1])
"""


def _peak_memory(path: Path, archs: list[str]) -> float:
    official.write_large(path, archs, TOPOLOGY, np.random.default_rng(0))
    code = LIMIT.format(folder=str(Path(__file__).parents[2]), path=str(path))
    count, peak = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.split())
    assert count == len(archs)
    return peak / 1024


def test_memory_does_not_grow_with_the_file(tmp_path):
    """60 more architectures are 14 MB more of file and would be some 100 MB of Python objects."""
    space = load_space("nas-bench-201")
    archs = [space.encode(arch) for _, arch in zip(range(90), space, strict=False)]
    few, many = (_peak_memory(tmp_path / "big.pkl", archs[:n]) for n in (30, 90))
    assert many - few < 20


@pytest.mark.slow
def test_memory_of_a_large_file(tmp_path):
    space = load_space("nas-bench-201")
    archs = [space.encode(arch) for _, arch in zip(range(2_000), space, strict=False)]
    path = tmp_path / "big.pkl"
    peak = _peak_memory(path, archs)
    assert path.stat().st_size > 400e6
    assert peak < 300
