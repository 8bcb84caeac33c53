"""The file of a table: a safetensors container that is memory-mapped and never read whole.

One array per column, rows sorted by the space's integer code; `_codes` int64 [N], `_arch_offsets` int64 [N + 1] and
`_arch_text` uint8 hold the architectures in the space's notation. The metadata entry `nasforge` is a JSON object.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.columns import Column, parse_column
from search_spaces.common.errors import UserError
from search_spaces.common.files import atomic_write
from search_spaces.registry import load_space

FORMAT = 1
_DTYPES = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "U32": "<u4", "I16": "<i2", "U8": "|u1", "I8": "|i1"}


@dataclass(frozen=True)
class TableData:
    """What an importer hands over: architectures in the space's notation and one array [N] per column.

    origin, licence: where the figures come from, for `nas bench info`.
    """

    space: str
    archs: Sequence[str]
    columns: Mapping[str, np.ndarray]
    origin: str
    licence: str
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Problems:
    """Rows that cannot stand in a table, by reason: row numbers of the source."""

    malformed: tuple[int, ...]
    duplicate: tuple[int, ...]
    non_finite: tuple[int, ...]
    first_error: str = ""

    def __bool__(self) -> bool:
        return bool(self.malformed or self.duplicate or self.non_finite)

    def __str__(self) -> str:
        counts = [
            f"{len(rows):,} {kind} (first: row {rows[0]})"
            for kind, rows in (
                ("malformed", self.malformed),
                ("duplicate", self.duplicate),
                ("non-finite", self.non_finite),
            )
            if rows
        ]
        return ", ".join(counts) + (f"; {self.first_error}" if self.first_error else "")


def write_table(path: Path, id: str, data: TableData, *, drop_bad_rows: bool = False) -> Problems:
    """Check, sort and write a table; nothing is left behind on failure.

    Returns the rows that were dropped. Errors: UserError that counts malformed, duplicate and non-finite rows (two
    architectures with one code are duplicates); with `drop_bad_rows` they are left out, but for the first duplicate.
    """
    columns = {name: _plain(name, values, len(data.archs)) for name, values in data.columns.items()}
    parsed = {name: parse_column(name) for name in columns}
    codes, problems = _check(data, columns, parsed)
    if problems and not drop_bad_rows:
        raise UserError(id, f"a table without bad rows, found {problems} (drop them with --drop-bad-rows)")
    keep = np.ones(len(data.archs), bool)
    keep[[*problems.malformed, *problems.duplicate, *problems.non_finite]] = False
    rows = np.flatnonzero(keep)
    if len(rows) == 0:
        raise UserError(id, "a table with at least one row")
    rows = rows[np.argsort(codes[rows], kind="stable")]
    texts = [data.archs[i].encode() for i in rows.tolist()]
    arrays: dict[str, np.ndarray] = {name: values[rows] for name, values in columns.items()}
    arrays["_codes"] = codes[rows]
    arrays["_arch_offsets"] = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    arrays["_arch_text"] = np.frombuffer(b"".join(texts), np.uint8)
    about = {"format": FORMAT, "id": id, "space": data.space, "rows": len(rows)}
    about |= {"origin": data.origin, "licence": data.licence, "notes": list(data.notes)}
    from safetensors.numpy import save

    with atomic_write(path, "wb") as file:
        file.write(save(arrays, metadata={"nasforge": json.dumps(about)}))
    return problems


def _plain(name: str, values: Any, rows: int) -> np.ndarray:
    array = np.ascontiguousarray(values)
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if array.dtype == np.uint64 or array.dtype == np.uint16:
        array = array.astype(np.int64)
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    if array.dtype.kind not in "fiu" or array.shape != (rows,):
        raise UserError(name, f"a column of {rows:,} numbers, found {array.dtype} of shape {array.shape}")
    return array


def _check(
    data: TableData, columns: Mapping[str, np.ndarray], parsed: Mapping[str, Column]
) -> tuple[np.ndarray, Problems]:
    space = load_space(data.space)
    archs: list[Any] = []
    valid: list[int] = []
    malformed: list[int] = []
    first_error = ""
    for row, text in enumerate(data.archs):
        try:
            archs.append(space.decode(text))
            valid.append(row)
        except UserError as error:
            malformed.append(row)
            first_error = first_error or str(error)
    codes = np.full(len(data.archs), -1, np.int64)
    codes[valid] = space.codes(archs)
    bad = np.zeros(len(data.archs), bool)
    for name, values in columns.items():
        column = parsed[name]
        if values.dtype.kind == "f":
            # A missing seed or device measurement is no fault of the row.
            optional = column.hardware or column.seed is not None
            bad |= np.isinf(values) if optional else ~np.isfinite(values)
    _, first = np.unique(codes, return_index=True)
    duplicate = np.ones(len(codes), bool)
    duplicate[first] = False
    duplicate[malformed] = False
    return codes, Problems(
        tuple(malformed),
        tuple(int(i) for i in np.flatnonzero(duplicate)),
        tuple(int(i) for i in np.flatnonzero(bad)),
        first_error,
    )


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
        arrays = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if 8 + length + end > size:
                raise ValueError("truncated data")
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            arrays[name] = np.frombuffer(mapped, dtype, (end - begin) // dtype.itemsize, 8 + length + begin)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(str(path), f"a complete nasforge table ({error}); remove it and add it again") from None
    if about["format"] > FORMAT:
        raise UserError(str(path), f"a table of format {FORMAT} or older, found {about['format']}; update nasforge")
    return MappedTable(path, about, arrays)
