"""The official files of NAS-Bench-201 and NATS-Bench (topology and size).

Read: `NAS-Bench-201-v1_*.pth` (both formats of torch.save, without torch), `NATS-*.pickle.pbz2` and the `-simple`
folders. Splits follow the benchmark's protocol (Dong and Yang, ICLR 2020, section 2.2): CIFAR-10 is validated in the
runs on half of the training set and tested in the runs on all of it.
"""

from __future__ import annotations

import bz2
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from benchmarks.importers.streaming import Source, StreamingUnpickler
from benchmarks.table_file import Progress, TableData
from search_spaces.common.errors import UserError
from search_spaces.common.pickles import load_pickle

# data set -> ((official data set, evaluation, our split), ...); the first one also gives times, latency and size
PROTOCOL = {
    "cifar10": (("cifar10-valid", "x-valid", "val"), ("cifar10", "ori-test", "test")),
    "cifar100": (("cifar100", "x-valid", "val"), ("cifar100", "x-test", "test")),
    "imagenet16": (("ImageNet16-120", "x-valid", "val"), ("ImageNet16-120", "x-test", "test")),
}
TRUSTED_SEED = 888  # where params and flop of the seeds disagree, through an old bug of the benchmark
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_REDUCED = "nasforge"
Reduce = Callable[[dict], bool]


@dataclass
class Record:
    """What is kept of one architecture on one data set: accuracies and times by column, sizes by seed, latencies."""

    numbers: dict[str, float] = field(default_factory=dict)
    sizes: dict[int, tuple[float, float]] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)

    def add(self, other: Record) -> None:
        """Join the same architecture at another training length."""
        self.numbers |= other.numbers
        self.sizes |= {seed: size for seed, size in other.sizes.items() if seed not in self.sizes}
        self.latencies += other.latencies

    def row(self) -> dict[str, float]:
        """One value per column."""
        params, macs = self.sizes.get(TRUSTED_SEED, next(iter(self.sizes.values())))
        row = self.numbers | {"params": params, "macs": macs}
        if self.latencies:
            row["latency_ms"] = 1000 * sum(self.latencies) / len(self.latencies)
        return row


def read_nas_bench_201(
    path: Path, space: str, data_set: str, licence: str, progress: Progress | None = None
) -> TableData:
    """One data set out of an official file or folder, in bounded memory.

    Columns: `val_acc_<epochs>_seed<k>`, `test_acc_...`, `train_seconds_...` for every training length in the file (its
    last epoch), `latency_ms`, `params`, `macs`. Errors: UserError that names the file and what is wrong with it.
    """
    records: dict[int, dict[str, float]] = {}
    names: dict[int, str] = {}
    try:
        if path.is_dir():
            meta, infos = _read_folder(path, data_set, progress)
        else:
            meta, infos = _read_file(path, data_set, progress)
        for index, info in infos:
            record = Record()
            for state in info.values():
                names[index], part = state[_REDUCED]
                record.add(part)
            if not record.sizes or not any(column.startswith("val") for column in record.numbers):
                raise KeyError(f"results of {' '.join(PROTOCOL[data_set][0][:2])} for architecture {index}")
            records[index] = record.row()
    except UserError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # broken official files can raise nearly anything
        raise UserError(str(path), f"a complete official file of {space} ({_reason(error)})") from None
    return _table(path, space, data_set, licence, meta, names, records)


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__


# -- files ---------------------------------------------------------------------------------------------------------


def _read_folder(path: Path, data_set: str, progress: Progress | None) -> tuple[list[str], Iterator[tuple[int, dict]]]:
    meta = _load_small(path / "meta.pickle.pbz2")["meta_archs"]

    def infos() -> Iterator[tuple[int, dict]]:
        for index in range(len(meta)):
            info = _load_small(path / f"{index:06d}.pickle.pbz2")
            for state in info.values():
                reduce_state(state, data_set)
            if progress:
                progress(index + 1, len(meta))
            yield index, info

    return list(meta), infos()


def _load_small(path: Path) -> dict:
    try:
        with bz2.open(path) as file:
            content = load_pickle(file, str(path))
    except OSError as error:
        raise UserError(str(path), f"a file of the official folder ({error.strerror or error})") from None
    if not isinstance(content, dict):
        raise UserError(str(path), f"a pickled dict, found {type(content).__name__}")
    return content


def _read_file(path: Path, data_set: str, progress: Progress | None) -> tuple[list[str], Iterator[tuple[int, dict]]]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        magic = file.read(4)
        file.seek(0)
        done = 0

        def reduce(content: dict) -> bool:
            nonlocal done
            found = reduce_state(content, data_set)
            if found and progress and file.tell() != done:
                done = file.tell()
                progress(done, size)
            return found

        if magic[:3] == b"BZh":
            with bz2.BZ2File(file) as stream:
                content = _whole(stream, reduce)  # type: ignore[arg-type]
        elif magic == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive, _torch_pickle(archive) as member:
                content = _whole(member, reduce)
        elif magic[:1] == b"\x80":
            content = _legacy_torch(Source(file), reduce)
        else:
            raise pickle.UnpicklingError("neither a bz2 file nor one that torch.save wrote")
    if not isinstance(content, dict):
        raise pickle.UnpicklingError(f"a dict is expected, found {type(content).__name__}")
    return list(content["meta_archs"]), iter(content["arch2infos"].items())


def _whole(file: IO[bytes], reduce: Reduce) -> Any:
    content = StreamingUnpickler(Source(file), reduce).load()
    while file.read(1 << 20):  # to the end, where the container's checksum is compared
        pass
    return content


def _torch_pickle(archive: zipfile.ZipFile) -> IO[bytes]:
    found = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(found) != 1:
        raise pickle.UnpicklingError("a zip file that torch.save did not write")
    return archive.open(found[0])


def _legacy_torch(source: Source, reduce: Reduce) -> Any:
    """torch.save before 1.6: magic number, protocol, system and the object as pickles in a row; storages follow."""
    if StreamingUnpickler(source).load() != _TORCH_MAGIC:
        raise pickle.UnpicklingError("a pickle that torch.save did not write")
    StreamingUnpickler(source).load()
    StreamingUnpickler(source).load()
    return StreamingUnpickler(source, reduce).load()


# -- what one record says ------------------------------------------------------------------------------------------


def reduce_state(state: dict, data_set: str) -> bool:
    """Replace the content of an architecture's state by (arch_str, its Record on one data set).

    False, and nothing done, for any other dict. Errors: KeyError for a result without the entries it should have.
    """
    if "all_results" not in state or "arch_str" not in state:
        return False
    reduced = str(state["arch_str"]), _record(state["all_results"], data_set)
    state.clear()
    state[_REDUCED] = reduced
    return True


def _record(results: Mapping[tuple[str, int], dict], data_set: str) -> Record:
    record = Record()
    for (official, seed), result in results.items():
        epochs, seed = int(result["epochs"]), int(seed)
        for name, evaluation, split in PROTOCOL[data_set]:
            accuracy = result["eval_acc1es"].get(f"{evaluation}@{epochs - 1}")
            if official == name and accuracy is not None:
                record.numbers[f"{split}_acc_{epochs}_seed{seed}"] = float(accuracy)
        if official == PROTOCOL[data_set][0][0]:
            times = result.get("train_times") or {}
            if len(times) == epochs:
                record.numbers[f"train_seconds_{epochs}_seed{seed}"] = float(sum(times.values()))
            record.sizes[seed] = float(result["params"]), float(result["flop"])
            record.latencies += _measured(result.get("latency"))
    return record


def _measured(latency: Any) -> list[float]:
    """The measurements in seconds among a number, a list or None; -1 and None mean none."""
    values = latency if isinstance(latency, (list, tuple)) else [latency]
    return [float(v) for v in values if v is not None and v >= 0]


# -- the table -----------------------------------------------------------------------------------------------------


def _table(
    path: Path,
    space: str,
    data_set: str,
    licence: str,
    meta: list[str],
    names: Mapping[int, str],
    records: Mapping[int, Mapping[str, float]],
) -> TableData:
    missing = [index for index in range(len(meta)) if index not in records]
    if missing or len(records) != len(meta) or not meta:
        first = f"; architecture {missing[0]} is missing" if missing else ""
        raise UserError(str(path), f"results of all {len(meta):,} architectures, found {len(records):,}{first}")
    for index, name in names.items():
        if name != meta[index]:
            raise UserError(str(path), f"one name for architecture {index}, found {meta[index]!r} and {name!r}")
    columns = sorted({column for numbers in records.values() for column in numbers})
    values = {c: np.array([records[i].get(c, np.nan) for i in range(len(meta))]) for c in columns}
    for column, unit in (("params", 1e6), ("macs", 1e6)):  # millions in the file
        values[column] = np.rint(values[column] * unit).astype(np.int64)
    return TableData(
        space,
        meta,
        values,
        origin=f"{path.name} (NAS-Bench-201, ICLR 2020; NATS-Bench, TPAMI 2021)",
        licence=licence,
        notes=(
            *(f"{split}: {evaluation} of {official}" for official, evaluation, split in PROTOCOL[data_set]),
            "accuracies of the last epoch of every training length",
        ),
    )
