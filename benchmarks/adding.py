"""Tables from files: official benchmark files and one's own. This is what `nas bench add` calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.columns import parse_column
from benchmarks.importers import plain
from benchmarks.registry import BENCHMARKS, Benchmark, is_available, known_ids, open_table, resolve_id, table_path
from benchmarks.table import Table
from benchmarks.table_file import (
    Problems,
    Progress,
    TableData,
    check_rows,
    map_table,
    plain_array,
    write_arrays,
    write_table,
)
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.files import locked
from search_spaces.common.names import canonical, nearest
from search_spaces.registry import load_space, space_names


@dataclass(frozen=True)
class Added:
    """What `nas bench add` did.

    columns: names as stored. dropped: rows that were left out. covers: (rows, size of the space), the size None where
    the space cannot be counted.
    """

    id: str
    path: Path
    rows: int
    columns: tuple[str, ...]
    dropped: Problems
    covers: tuple[int, int | None]
    notes: tuple[str, ...]


def add_file(id: str, file: str | Path, *, progress: Progress | None = None) -> Added:
    """Compile an official file of benchmark `id`; a table that is there already is replaced once the new one is whole.

    A Parquet, CSV or JSON-lines file is added as by `add_table`. Errors: UserError for an unknown id, an id without
    official files, and a file that is missing, foreign or broken (named, with the reason).
    """
    file = _existing(file)
    if plain.is_plain(file):
        return add_table(id, None, file, progress=progress)
    id = resolve_id(id)
    benchmark = BENCHMARKS.get(id)
    if benchmark is None or not benchmark.files:
        how = benchmark.how_to_get() if benchmark else f"a table file ({one_of(plain.ENDINGS)})"
        raise UserError(str(file), f"no official file: {id} has none; {how}")
    data = _read_official(benchmark, file, progress)
    path = table_path(id)
    with locked(path.with_suffix(".lock")):
        write_table(path, id, data, progress=progress)
    return _added(id, path, Problems(), data.notes)


def add_table(
    id: str,
    space: str | None,
    file: str | Path,
    *,
    rename: Mapping[str, str] | None = None,
    merge: bool = False,
    columns: Sequence[str] | None = None,
    drop_bad_rows: bool = False,
    fill_missing: bool = False,
    progress: Progress | None = None,
) -> Added:
    """Add a table of one's own, or with `merge` its columns to the table that `id` names.

    space: a name or `package.module:object`; by default the id's first half. rename: {old column: new}. columns: take
    only these (old or new names). Columns named after the id's data set (`cifar10_val_acc`) lose that prefix; those
    named after another data set of the space are left out, which `notes` says.
    merge: rows are matched by architecture. fill_missing: architectures that the file lacks get NaN.
    drop_bad_rows: leave out malformed, duplicate, non-finite rows and, when merging, unknown architectures.
    Errors: UserError, with counts of bad rows; nothing is written then.
    """
    path = _existing(file)
    folder, _, data_set = id.partition("/")
    if merge or canonical(id) in map(canonical, BENCHMARKS):
        id = resolve_id(id)
        folder, _, data_set = id.partition("/")
    target = table_path(id)
    base = _base(id) if merge else None
    space = base.space_name if base else _space_of(id, folder, space)
    table = plain.read_plain(path)
    original = dict(table.columns)
    table = plain.rename_columns(table, rename or {})
    others = [b.partition("/")[2] for b in known_ids() if b.partition("/")[0] == folder]
    table = plain.strip_data_set(table, data_set, others)
    table = _selected(table, columns, original, rename or {}, data_set)
    if not table.columns:
        raise UserError(str(path), f"a column of numbers for {id}" + "".join(f"; {note}" for note in table.notes))
    notes = (*table.notes, *plain.unit_hints(table.columns))
    data = TableData(
        space, table.archs, table.columns, origin=path.name, licence="as of the file", unreadable=table.unreadable
    )
    if base is None:
        with locked(target.with_suffix(".lock")):
            dropped = write_table(target, id, data, drop_bad_rows=drop_bad_rows, progress=progress)
        return _added(id, target, dropped, notes)
    dropped, said = _merge(id, target, base, data, drop_bad_rows, fill_missing, progress)
    return _added(id, target, dropped, (*notes, *said))


def _existing(file: str | Path) -> Path:
    path = Path(file).expanduser()
    if not path.exists():
        folder = path.parent
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        raise UserError(str(path), "a file that exists", nearest(path.name, names))
    return path


def _added(id: str, path: Path, dropped: Problems, notes: tuple[str, ...]) -> Added:
    table = Table.open(path)
    try:
        size: int | None = len(table.space)
    except UserError:
        size = None
    return Added(id, path, len(table), tuple(c.name for c in table.columns), dropped, (len(table), size), notes)


def _read_official(benchmark: Benchmark, file: Path, progress: Progress | None) -> TableData:
    data_set = benchmark.id.partition("/")[2]
    if file.is_dir() and benchmark.space not in ("nas-bench-201", "nats-size"):
        raise UserError(str(file), f"a file of {benchmark.id} ({one_of(benchmark.files)}), found a folder")
    if benchmark.space in ("nas-bench-201", "nats-size"):
        from benchmarks.importers.nas_bench_201 import read_nas_bench_201

        return read_nas_bench_201(file, benchmark.space, data_set, benchmark.licence, progress)
    if benchmark.space == "nas-bench-101":
        from benchmarks.importers.nas_bench_101 import read_nas_bench_101

        return read_nas_bench_101(file, benchmark.licence, progress)
    from benchmarks.importers.nas_bench_macro import read_nas_bench_macro

    return read_nas_bench_macro(file, benchmark.licence)


def _space_of(id: str, folder: str, space: str | None) -> str:
    published = BENCHMARKS[id].space if id in BENCHMARKS else folder if folder in space_names() else None
    if space is None and published is None:
        raise UserError(
            id, f"--space for a table of one's own ({one_of(space_names())})", nearest(folder, space_names())
        )
    chosen = published if space is None else load_space(space).name if ":" not in space else space
    if published is not None and chosen != published:
        raise UserError(space, f"the space {published!r}, which the id {id!r} names")
    assert chosen is not None
    return chosen


def _base(id: str) -> Table:
    if not is_available(id):
        raise UserError(id, "a table to merge into; add it first without --merge")
    return open_table(id)


def _selected(
    table: plain.PlainTable,
    columns: Sequence[str] | None,
    original: Mapping[str, np.ndarray],
    rename: Mapping[str, str],
    data_set: str,
) -> plain.PlainTable:
    """Only the columns asked for, under their name in the file or their name now."""
    if columns is None:
        return table
    kept = {}
    for name in columns:
        now = name if name in table.columns else rename.get(name, name).removeprefix(f"{data_set}_")
        if now not in table.columns:
            known = [*table.columns, *original]
            raise UserError(name, f"a column of the file ({one_of(original)})", nearest(name, known))
        kept[now] = table.columns[now]
    return replace(table, columns=kept)


# -- merging -------------------------------------------------------------------------------------------------------


def _merge(
    id: str,
    target: Path,
    base: Table,
    data: TableData,
    drop_bad_rows: bool,
    fill_missing: bool,
    progress: Progress | None,
) -> tuple[Problems, tuple[str, ...]]:
    """Write `base` with the columns of `data` beside its own; returns the dropped rows and what is to be said."""
    columns = {name: plain_array(name, values, len(data.archs)) for name, values in data.columns.items()}
    codes, problems = check_rows(data, columns, progress)
    known = np.isin(codes, base.codes)
    unknown = np.flatnonzero(~known & (codes >= 0))
    if (problems or len(unknown)) and not drop_bad_rows:
        found = [str(problems)] if problems else []
        if len(unknown):
            found.append(f"{len(unknown):,} architectures that {id} lacks (first: {data.archs[int(unknown[0])]!r})")
        raise UserError(id, f"rows that fit the table, found {', '.join(found)} (drop them with --drop-bad-rows)")
    keep = known.copy()
    keep[problems.rows()] = False
    if not keep.any():
        raise UserError(id, "at least one architecture that both tables hold")
    rows = base.rows_of_codes(codes[keep])
    lacking = len(base) - len(rows)
    if lacking and not fill_missing:
        raise UserError(
            id, f"values for all {len(base):,} architectures, {lacking:,} are missing (--fill-missing: NaN)"
        )
    arrays = {name: values for name, values in map_table(base.path).arrays.items() if not name.startswith("_")}
    same = []
    for name, values in columns.items():
        new = _spread(values[keep], rows, len(base))
        if name in arrays and _equal(arrays[name], new):
            same.append(name)
        elif base.has(parse_column(name).metric, parse_column(name).epochs) and not _another_seed(base, name):
            raise UserError(name, f"a column that {id} does not have yet; use --rename {name}=NAME or choose --columns")
        else:
            arrays[name] = new
    said = [f"already there with the same values: {', '.join(same)}"] if same else []
    if lacking:
        said.append(f"{lacking:,} architectures without a value (NaN)")
    if len(unknown):
        said.append(f"{len(unknown):,} rows dropped: architectures that {id} lacks")
    merged = ", ".join(n for n in columns if n not in same)
    about = {key: base.about[key] for key in ("id", "space", "origin", "licence", "notes")}
    about["notes"] = [*about["notes"], f"{merged}: merged from {data.origin}"] if merged else about["notes"]
    with locked(target.with_suffix(".lock")):
        write_arrays(target, about, base.codes, [base.text(i) for i in range(len(base))], arrays)
    return problems, tuple(said)


def _spread(values: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    """[size] `values` at `rows`; where there is none NaN, for which integers become float64."""
    if len(rows) == size:
        spread = np.empty(size, values.dtype)
    else:
        spread = np.full(size, np.nan, values.dtype if values.dtype.kind == "f" else np.float64)
    spread[rows] = values
    return spread


def _equal(old: np.ndarray, new: np.ndarray) -> bool:
    return bool(((old == new) | ((old != old) & (new != new))).all())


def _another_seed(base: Table, name: str) -> bool:
    """A further seed of a metric that is stored by seed. A seedless column would hide the seeds' mean instead."""
    column = parse_column(name)
    alike = [c for c in base.columns if (c.metric, c.epochs) == (column.metric, column.epochs)]
    return column.seed is not None and all(c.seed not in (None, column.seed) for c in alike)
