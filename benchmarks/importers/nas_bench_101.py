"""NAS-Bench-101's official TFRecords (Ying et al., ICML 2019), without TensorFlow.

Every record is one training run; three runs of a cell at 4, 12, 36 and 108 epochs, or at 108 only.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np

from benchmarks.importers.tfrecord import read_message, read_records
from benchmarks.table_file import Progress, TableData
from search_spaces.common.errors import UserError

RUNS = 3
EPOCHS = (4, 12, 36, 108)
# of EvaluationData: field number -> (our metric, factor to our unit)
FIELDS = {2: ("train_seconds", 1), 3: ("train_acc", 100), 4: ("val_acc", 100), 5: ("test_acc", 100)}


class _Columns:
    """float32 columns that grow; NaN where nothing was measured."""

    def __init__(self) -> None:
        self.values: dict[str, np.ndarray] = {}

    def set(self, name: str, row: int, value: float) -> None:
        column = self.values.get(name)
        if column is None or row >= len(column):
            old = column if column is not None else np.empty(0, np.float32)
            column = np.full(max(1024, 2 * row), np.nan, np.float32)
            column[: len(old)] = old
            self.values[name] = column
        column[row] = value

    def cut(self, rows: int) -> dict[str, np.ndarray]:
        for name, column in self.values.items():
            if len(column) < rows:
                column = np.concatenate([column, np.full(rows - len(column), np.nan, np.float32)])
            self.values[name] = column[:rows]
        return self.values


def read_nas_bench_101(path: Path, licence: str, progress: Progress | None = None) -> TableData:
    """`nasbench_full.tfrecord` or `nasbench_only108.tfrecord`, record by record; all checksums are compared.

    Columns: `val_acc_<epochs>_seed<k>`, `test_acc_...`, `train_acc_...`, `train_seconds_...` at the end of each run
    (float32, as measured; the half-way evaluations are left out) and `params`; runs are numbered in file order.
    Errors: UserError that names the file, the record and the reason.
    """
    rows: dict[bytes, int] = {}  # module hash -> row
    archs: list[str] = []
    params: list[int] = []
    runs = {epochs: bytearray() for epochs in EPOCHS}  # how many of each cell were read
    columns = _Columns()
    number = 0
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            for number, record in enumerate(read_records(file)):
                module, epochs, adjacency, operations, metrics = json.loads(record)
                if epochs not in EPOCHS:
                    raise ValueError(f"{epochs} epochs")
                digest = bytes.fromhex(module)
                row = rows.setdefault(digest, len(archs))
                final, trainable = _final(base64.b64decode(metrics, validate=True))
                if row == len(archs):
                    archs.append(_arch(adjacency, operations))
                    params.append(trainable)
                counts = runs[epochs]
                counts.extend(bytes(max(0, row + 1 - len(counts))))
                run = counts[row]
                counts[row] += 1
                if run >= RUNS:
                    raise ValueError(f"more than {RUNS} runs of one cell at {epochs} epochs")
                for metric, value in final.items():
                    columns.set(f"{metric}_{epochs}_seed{run}", row, value)
                if progress and number % 4096 == 0:
                    progress(file.tell(), size)
    except MemoryError:
        raise
    except ValueError as error:
        where = "" if "record" in str(error) else f"; record {number}"
        raise UserError(str(path), f"a complete TFRecord of NAS-Bench-101 ({error}{where})") from None
    except (TypeError, AttributeError, RecursionError) as error:
        raise UserError(str(path), f"a complete TFRecord of NAS-Bench-101 ({error}; record {number})") from None
    if not archs:
        raise UserError(str(path), "a complete TFRecord of NAS-Bench-101 (the file is empty)")
    for epochs, counts in runs.items():
        lacking = len(archs) - counts.count(RUNS)
        if counts and lacking:
            expected = f"{RUNS} runs of every cell at {epochs} epochs; {lacking:,} cells lack some (is it broken off?)"
            raise UserError(str(path), expected)
    return TableData(
        "nas-bench-101",
        archs,
        {**columns.cut(len(archs)), "params": np.array(params, np.int64)},
        origin=f"{path.name} (NAS-Bench-101, ICML 2019)",
        licence=licence,
        notes=("values at the end of each run; half-way evaluations are left out",),
    )


def _final(data: bytes) -> tuple[dict[str, float], int]:
    """The last evaluation of a ModelMetrics message and the trainable parameters."""
    evaluations = []
    params = -1
    for field, value in read_message(data):
        if field == 1:
            evaluations.append(value)
        elif field == 2:
            params = value
    if len(evaluations) < 2 or not isinstance(params, int) or params < 0:
        raise ValueError("metrics without a final evaluation or without parameters")
    found = {FIELDS[f][0]: value * FIELDS[f][1] for f, value in read_message(evaluations[-1]) if f in FIELDS}
    if len(found) != len(FIELDS):
        raise ValueError("an evaluation without all of its metrics")
    return found, params


def _arch(adjacency: str, operations: str) -> str:
    """Our notation of the file's matrix of 0 and 1 (n * n) and its comma-separated labels."""
    names = operations.split(",")
    n = len(names)
    if len(adjacency) != n * n:
        raise ValueError(f"an adjacency of {len(adjacency)} places for {n} operations")
    bits = "".join(adjacency[i * n + i + 1 : (i + 1) * n] for i in range(n))
    return f"{bits}:{','.join(names[1:-1])}"
