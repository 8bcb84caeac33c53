"""The file of a table: a safetensors container that is memory-mapped and never read whole.

One array per column, rows sorted by the space's integer code; `_codes` int64 [N], `_arch_offsets` int64 [N + 1] and
`_arch_text` uint8 hold the architectures in the space's notation. The metadata entry `nasforge` is a JSON object.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.columns import parse_column
from search_spaces.common.errors import UserError
from search_spaces.common.files import atomic_write
from search_spaces.registry import load_space

FORMAT = 1
_BATCH = 8192
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U32": "uint32",
    "U8": "uint8",
}
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class TableData:
    """What an importer hands over: architectures in the space's notation and one array [N] per column.

    origin, licence: where the figures come from, for `nas bench info`. unreadable: rows that the importer could not
    read, {row: reason}; they hold places in `archs` and in the columns.
    """

    space: str
    archs: Sequence[str]
    columns: Mapping[str, np.ndarray]
    origin: str
    licence: str
    notes: tuple[str, ...] = ()
    unreadable: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Problems:
    """Rows that cannot stand in a table, by reason: row numbers of the source, from 0."""

    malformed: tuple[int, ...] = ()
    duplicate: tuple[int, ...] = ()
    non_finite: tuple[int, ...] = ()
    first_error: str = ""

    def __bool__(self) -> bool:
        return bool(self.malformed or self.duplicate or self.non_finite)

    def __str__(self) -> str:
        kinds = (("malformed", self.malformed), ("duplicate", self.duplicate), ("non-finite", self.non_finite))
        counts = [f"{len(rows):,} {kind} (first: row {rows[0]})" for kind, rows in kinds if rows]
        return ", ".join(counts) + (f"; {self.first_error}" if self.first_error else "")

    def rows(self) -> list[int]:
        """Every row with a problem."""
        return sorted({*self.malformed, *self.duplicate, *self.non_finite})


def write_table(
    path: Path, id: str, data: TableData, *, drop_bad_rows: bool = False, progress: Progress | None = None
) -> Problems:
    """Check, sort and write a table; nothing is left behind on failure.

    Returns the rows that were dropped. Errors: UserError that counts malformed, duplicate and non-finite rows (two
    architectures with one code are duplicates); with `drop_bad_rows` they are left out, but for the first duplicate.
    """
    columns = {name: plain_array(name, values, len(data.archs)) for name, values in data.columns.items()}
    codes, problems = check_rows(data, columns, progress)
    if problems and not drop_bad_rows:
        raise UserError(id, f"a table without bad rows, found {problems} (drop them with --drop-bad-rows)")
    keep = np.ones(len(data.archs), bool)
    keep[problems.rows()] = False
    rows = np.flatnonzero(keep)
    texts = [data.archs[i] for i in rows.tolist()]
    kept = {name: values[rows] for name, values in columns.items()}
    about = {"id": id, "space": data.space, "origin": data.origin, "licence": data.licence, "notes": list(data.notes)}
    write_arrays(path, about, codes[rows], texts, kept)
    return problems


def write_arrays(
    path: Path, about: Mapping[str, Any], codes: np.ndarray, texts: Sequence[str], columns: Mapping[str, np.ndarray]
) -> None:
    """Sort checked rows by code and write them in one step. Errors: UserError without rows, RunError (disk full)."""
    if len(codes) == 0:
        raise UserError(about["id"], "a table with at least one row")
    order = np.argsort(codes, kind="stable")
    encoded = [texts[i].encode() for i in order.tolist()]
    arrays: dict[str, np.ndarray] = {name: values[order] for name, values in columns.items()}
    arrays["_codes"] = codes[order]
    arrays["_arch_offsets"] = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    arrays["_arch_text"] = np.frombuffer(b"".join(encoded), np.uint8)
    header = {"format": FORMAT, **about, "rows": len(order)}
    from safetensors.numpy import save

    with atomic_write(path, "wb") as file:
        file.write(save(arrays, metadata={"nasforge": json.dumps(header)}))


def plain_array(name: str, values: Any, rows: int) -> np.ndarray:
    """`values` as a column of `rows` numbers in a type that tables store. Errors: UserError with the column's name."""
    parse_column(name)
    array = np.ascontiguousarray(values)
    wider = {"bool": np.uint8, "uint16": np.int64, "uint64": np.int64, "float16": np.float32}
    array = array.astype(wider.get(array.dtype.name, array.dtype), copy=False)
    if array.dtype.name not in _DTYPES.values() or array.shape != (rows,):
        raise UserError(name, f"a column of {rows:,} numbers, found {array.dtype} of shape {array.shape}")
    return array


def check_rows(
    data: TableData, columns: Mapping[str, np.ndarray], progress: Progress | None = None
) -> tuple[np.ndarray, Problems]:
    """(int64 [N] code of every row, -1 where it has none; the rows with problems)."""
    space = load_space(data.space)
    codes = np.full(len(data.archs), -1, np.int64)
    malformed: list[int] = []
    first_error = next((f"row {row}: {reason}" for row, reason in data.unreadable.items()), "")
    for begin in range(0, len(data.archs), _BATCH):  # in batches: 400,000 decoded architectures are hundreds of MB
        archs: list[Any] = []
        valid: list[int] = []
        for row in range(begin, min(begin + _BATCH, len(data.archs))):
            if row in data.unreadable:
                malformed.append(row)
                continue
            try:
                archs.append(space.decode(data.archs[row]))
                valid.append(row)
            except UserError as error:
                malformed.append(row)
                first_error = first_error or str(error)
        codes[valid] = space.codes(archs)
        if progress:
            progress(min(begin + _BATCH, len(data.archs)), len(data.archs))
    bad = np.zeros(len(data.archs), bool)
    for name, values in columns.items():
        column = parse_column(name)
        if values.dtype.kind == "f":
            # A missing seed or device measurement is no fault of the row.
            optional = column.hardware or column.seed is not None
            bad |= np.isinf(values) if optional else ~np.isfinite(values)
    bad[malformed] = False  # counted once
    _, first = np.unique(codes, return_index=True)
    duplicate = np.ones(len(codes), bool)
    duplicate[first] = False
    duplicate[malformed] = False
    duplicates, non_finite = (tuple(np.flatnonzero(rows).tolist()) for rows in (duplicate, bad))
    return codes, Problems(tuple(malformed), duplicates, non_finite, first_error)


@dataclass(frozen=True)
class MappedTable:
    """A table file as memory-mapped arrays and its description."""

    path: Path
    about: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


def map_table(path: Path) -> MappedTable:
    """Memory-map the table at `path`; only the header is read.

    Errors: UserError for a missing, truncated or foreign file and for a newer format.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"a table file ({getattr(error, 'strerror', None) or error})") from None
    try:
        length = int.from_bytes(mapped[:8], "little")
        if length > size - 8:
            raise ValueError("truncated header")
        header = json.loads(mapped[8 : 8 + length])
        about = json.loads(header.pop("__metadata__")["nasforge"])
        if about["format"] > FORMAT:
            raise UserError(str(path), f"a table of format {FORMAT} or older, found {about['format']}; update nasforge")
        arrays = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if 8 + length + end > size:
                raise ValueError("truncated data")
            dtype = np.dtype(_DTYPES[entry["dtype"]]).newbyteorder("<")
            arrays[name] = np.frombuffer(mapped, dtype, (end - begin) // dtype.itemsize, 8 + length + begin)
        lengths = {len(values) for name, values in arrays.items() if not name.startswith("_")}
        if {*lengths, len(arrays["_codes"]), len(arrays["_arch_offsets"]) - 1} != {about["rows"]}:
            raise ValueError("columns of different lengths")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(str(path), f"a complete nasforge table ({error}); remove it and add it again") from None
    return MappedTable(path, about, arrays)
