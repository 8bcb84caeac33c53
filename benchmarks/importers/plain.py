"""Tables of one's own: Parquet, CSV or JSON-lines with a column `arch` and columns of numbers."""

from __future__ import annotations

import csv
import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.columns import parse_column
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest

ARCH = "arch"
ENDINGS = (".parquet", ".csv", ".jsonl")
_EXACT = 2**53  # beyond it a float64 no longer holds every integer


@dataclass(frozen=True)
class PlainTable:
    """The content of a file: architectures as written, numeric columns, and rows that could not be read."""

    archs: Sequence[str]
    columns: Mapping[str, np.ndarray]
    unreadable: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def is_plain(path: Path) -> bool:
    """Whether the file's ending is one that `read_plain` takes."""
    return path.suffix.lower() in ENDINGS


def read_plain(path: Path) -> PlainTable:
    """Read a table row by row or batch by batch.

    Empty cells and nulls are NaN. A row with too few or too many cells, or with a cell that is no number in a column of
    numbers, is unreadable. Errors: UserError for a file that is missing, empty, of another ending, without `arch`
    (nearest column suggested), or with a column that holds no number (named).
    """
    readers = {".parquet": _parquet, ".csv": _csv, ".jsonl": _json_lines}
    if not is_plain(path):
        raise UserError(str(path), f"a table file ({one_of(ENDINGS)})", nearest(path.suffix.lower(), ENDINGS))
    try:
        table = readers[path.suffix.lower()](path)
    except OSError as error:
        raise UserError(str(path), f"a file that can be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise UserError(str(path), f"UTF-8 text ({error})") from None
    if len(table.archs) == 0:
        raise UserError(str(path), "a table with at least one row")
    return table


def rename_columns(table: PlainTable, rename: Mapping[str, str]) -> PlainTable:
    """Columns under new names. Errors: UserError for an unknown old name (nearest suggested) or a new one twice."""
    for old in rename:
        if old not in table.columns:
            raise UserError(old, f"a column of the file ({one_of(table.columns)})", nearest(old, table.columns))
    return replace(table, columns=_distinct((rename.get(name, name), name, v) for name, v in table.columns.items()))


def strip_data_set(table: PlainTable, data_set: str, others: Iterable[str]) -> PlainTable:
    """Take `<data set>_` off the columns and leave out, with a note, those of `others`."""
    kept, left_out = [], []
    for name, values in table.columns.items():
        owner = max((d for d in {data_set, *others} if name.startswith(f"{d}_")), key=len, default=None)
        if owner in (None, data_set):
            kept.append((name.removeprefix(f"{data_set}_") if owner else name, name, values))
        else:
            left_out.append(name)
    notes = table.notes
    if left_out:
        notes += (f"left out, of other data sets: {', '.join(left_out)}",)
    return replace(table, columns=_distinct(kept), notes=notes)


def unit_hints(names: Iterable[str]) -> tuple[str, ...]:
    """What to rename: measurements whose names state no unit."""
    units = {"latency": "_ms", "energy": "_mj", "time": "_seconds"}
    endings = ((name, units.get(parse_column(name).metric.rpartition("_")[2])) for name in names)
    return tuple(f"{name} names no unit; --rename {name}={name}{unit} says it" for name, unit in endings if unit)


def _distinct(named: Iterable[tuple[str, str, np.ndarray]]) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    for name, old, values in named:
        if name in columns:
            raise UserError(old, f"another name than {name!r}, which a second column has; use --rename {old}=NAME")
        columns[name] = values
    return columns


# -- formats -------------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> PlainTable:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            _require_arch(path, schema.names)
            for entry in schema:
                kind = entry.type
                numeric = pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)
                if entry.name != ARCH and not (numeric or pyarrow.types.is_boolean(kind)):
                    raise UserError(entry.name, f"a column of numbers in {path.name}, found {kind}")
            archs: list[str] = []
            parts: dict[str, list[np.ndarray]] = {name: [] for name in schema.names if name != ARCH}
            for batch in file.iter_batches(65536):
                archs += [str(v) if v is not None else "" for v in batch.column(ARCH).to_pylist()]
                for name, values in parts.items():
                    # Integers with nulls come as floats with NaN.
                    values.append(batch.column(name).to_numpy(zero_copy_only=False))
    except pyarrow.ArrowException as error:
        raise UserError(str(path), f"a complete Parquet file ({error})") from None
    columns = {}
    for name, pieces in parts.items():
        whole = np.concatenate(pieces) if pieces else np.empty(0)
        columns[name] = whole.astype(np.float64) if whole.dtype == object else whole
    return PlainTable(archs, columns)


def _csv(path: Path) -> PlainTable:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        try:
            names = next(reader, None)
            if not names:
                raise UserError(str(path), "a table with a header line")
            names = [name.strip() for name in names]
            _require_arch(path, names)
            if len(set(names)) < len(names):
                twice = next(n for n in names if names.count(n) > 1)
                raise UserError(twice, f"one column of this name in {path.name}")

            def rows() -> Iterator[dict[str, Any] | str]:
                for cells in reader:
                    if len(cells) == len(names):
                        yield dict(zip(names, cells, strict=True))
                    elif cells:
                        yield f"{len(cells)} cells in {len(names)} columns"

            return _collect(path, rows(), [n for n in names if n != ARCH])
        except csv.Error as error:
            raise UserError(str(path), f"a CSV file ({error}; line {reader.line_num})") from None


def _json_lines(path: Path) -> PlainTable:
    names: dict[str, None] = {}

    def rows(file: Iterable[str]) -> Iterator[dict[str, Any] | str]:
        for line in file:
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield f"no JSON ({error})"
                    continue
                yield row if isinstance(row, dict) else f"a JSON object is expected, found {type(row).__name__}"

    with open(path, encoding="utf-8") as file:  # the first pass finds the columns
        for row in rows(file):
            if isinstance(row, dict):
                names |= dict.fromkeys(row)
    if not names:
        raise UserError(str(path), "a table with at least one row, a JSON object per line")
    _require_arch(path, list(names))
    with open(path, encoding="utf-8") as file:
        return _collect(path, rows(file), [n for n in names if n != ARCH])


def _require_arch(path: Path, names: Sequence[str]) -> None:
    if ARCH not in names:
        close = nearest(ARCH, names) or next((n for n in names if ARCH in n.lower()), None)
        hint = f"; is it {close!r}?" if close else ""
        raise UserError(str(path), f"a column {ARCH!r} in the space's notation among {one_of(names)}{hint}")


def _collect(path: Path, rows: Iterable[dict[str, Any] | str], names: Sequence[str]) -> PlainTable:
    """Columns of numbers from rows of cells (text or JSON values). A string for a row says why it is unreadable."""
    archs: list[str] = []
    values = {name: array("d") for name in names}
    whole = dict.fromkeys(names, True)
    words: dict[str, Any] = {}  # column -> its first cell that is no number
    numbers: set[str] = set()
    unreadable: dict[int, str] = {}
    for index, row in enumerate(rows):
        if isinstance(row, str):
            unreadable[index] = row
            row = {}
        archs.append(str(row.get(ARCH, "")))
        for name, column in values.items():
            cell = row.get(name)
            try:
                value = _number(cell)
            except ValueError:
                words.setdefault(name, cell)
                unreadable.setdefault(index, f"{cell!r} in column {name!r} is no number")
                value = math.nan
            else:
                if not math.isnan(value):
                    numbers.add(name)
            whole[name] &= index in unreadable or _looks_whole(cell)
            column.append(value)
    for name, word in words.items():
        if name not in numbers:
            raise UserError(name, f"a column of numbers in {path.name}, found {word!r}")
    columns = {}
    for name, column in values.items():
        found = np.array(column)
        if whole[name] and name in numbers and np.nanmax(np.abs(found)) < _EXACT:
            found = np.nan_to_num(found, nan=0).astype(np.int64)  # NaN stands in unreadable rows only
        columns[name] = found
    return PlainTable(archs, columns, unreadable)


def _number(cell: Any) -> float:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return math.nan
    if isinstance(cell, str):
        if "_" in cell:  # a digit separator of Python, not of tables
            raise ValueError(cell)
        return float(cell)
    if isinstance(cell, (int, float)):
        return float(cell)
    raise ValueError(cell)


def _looks_whole(cell: Any) -> bool:
    return isinstance(cell, int) or (isinstance(cell, str) and cell.strip().lstrip("+-").isdigit())
