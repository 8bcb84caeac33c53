"""A benchmark as what predictors learn from: its graphs as one GraphTable, its labels, its targets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.columns import parse_column
from benchmarks.table import Table
from nas.evaluators import default_metric
from nas.objectives import Objective, parse_objectives
from predictors.graphs import GraphTable, as_table, concatenate
from search_spaces.cells.nas_bench_101 import NasBench101
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.files import atomic_write, home, locked
from search_spaces.common.names import nearest
from search_spaces.space import SearchSpace

LABELS = ("val-run", "val-mean", "test-mean")
TARGETS = ("val-mean", "test-mean")
FORMAT = 1
CHUNK = 8192
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, eq=False)
class Labelled:
    """labels [N] to learn from and targets [N] to rank by, higher is better; what they are, for every table that is
    printed; the rows of the benchmark that have both; whether more was better in the benchmark too."""

    labels: np.ndarray
    targets: np.ndarray
    rows: np.ndarray
    label_kind: str
    target_kind: str
    metric: str
    maximize: bool
    notes: tuple[str, ...]


def labels_and_targets(table: Table, labels: str | None = None, target: str | None = None) -> Labelled:
    """What to learn from and what to rank by.

    labels: `val-run`, one validation measurement (of the lowest seed that the architecture has); `val-mean`, the mean
    over seeds; `test-mean`. target: `val-mean`, `test-mean`, or a column of the table (a device's latency, say; add
    :max or :min where its name does not tell what is better), which is then both label and target. Default val-run and
    test-mean; without test values in the table val-mean is the target, and one with test values alone has both
    test-mean, which `notes` say. Test values are read through `Table.test_values`, once. Errors: UserError for an
    unknown kind or one that the table lacks.
    """
    splits = {m.partition("_")[0] for m in table.metrics}
    has_val, has_test = "val" in splits, "test" in splits
    if target is not None and target not in TARGETS and _metric(target) in table.metrics:
        return _column(table, labels, target)
    if target is None and not (has_val or has_test):
        columns = one_of(table.metrics)
        raise UserError(table.id, f"a table with accuracies, or a column as --target ({columns})", table.metrics[0])
    notes = []
    if not has_val and has_test and (labels is None or target is None):
        notes.append(f"{table.id} has test values only: labels and targets are the mean test values")
    targets = (*TARGETS, *(m for m in table.metrics if parse_column(m).split != "test"))
    target = _kind(table, target or ("test-mean" if has_test else "val-mean"), targets, "targets", has_val, has_test)
    labels = _kind(table, labels or ("val-run" if has_val else "test-mean"), LABELS, "labels", has_val, has_test)
    if labels == "test-mean" and has_val:
        notes.append("learned from test labels (--labels test-mean): an easier task than learning from validation")
    objective = _objective(default_metric(table, "test" if target == "test-mean" else "val"))
    purpose = "predictor evaluation"
    test = None
    if "test-mean" in (labels, target):
        test = np.asarray(table.test_values(None, default_metric(table, "test"), purpose=purpose), np.float64)
    values = {"test-mean": lambda: test, "val-mean": lambda: _mean(table), "val-run": lambda: _one_run(table)}
    found, truth = (np.asarray(values[kind](), np.float64) for kind in (labels, target))
    return _labelled(table, found, truth, labels, target, objective, notes)


def _labelled(
    table: Table,
    found: np.ndarray,
    truth: np.ndarray,
    labels: str,
    target: str,
    objective: Objective,
    notes: Sequence[str] = (),
) -> Labelled:
    rows = np.flatnonzero(np.isfinite(found) & np.isfinite(truth))
    notes = list(notes)
    if not len(rows):
        raise UserError(table.id, f"a table with {labels} labels and {target} targets of the same architectures")
    if len(rows) < len(table):
        notes.append(f"{len(table) - len(rows):,} of {len(table):,} rows lack a label or a target and are left out")
    sign = 1.0 if objective.maximize else -1.0
    return Labelled(
        sign * found[rows], sign * truth[rows], rows, labels, target, objective.name, objective.maximize, tuple(notes)
    )


def _metric(text: str) -> str:
    """The metric of a column's name, with or without a direction; empty for what is no such name."""
    try:
        return parse_column(text.partition(":")[0].replace("-", "_")).metric
    except UserError:
        return ""


def _column(table: Table, labels: str | None, target: str) -> Labelled:
    """A column as label and target: hardware costs are learned as they are predicted."""
    if labels not in (None, target):
        raise UserError(labels, f"no --labels, or {target}: a column that is the target is the label too", target)
    if parse_column(_metric(target)).split == "test":
        raise UserError(target, "test values as targets by their kind", "test-mean")
    objective = _objective(target)
    values = np.asarray(table.column(objective.name), np.float64)
    return _labelled(table, values, values, objective.name, objective.name, objective)


def _kind(table: Table, kind: str, kinds: Sequence[str], what: str, has_val: bool, has_test: bool) -> str:
    if kind not in kinds:
        raise UserError(kind, f"a kind of {what} ({one_of(kinds)})", nearest(kind, kinds))
    if not (has_test if kind == "test-mean" else has_val):
        there = "test-mean" if has_test else "val-mean"
        raise UserError(kind, f"{what} that {table.id} has; it has no {kind.partition('-')[0]} values", there)
    return kind


def _objective(metric: str) -> Objective:
    return parse_objectives(metric)[0]


def _mean(table: Table) -> np.ndarray:
    return table.column(default_metric(table))


def _one_run(table: Table) -> np.ndarray:
    """The first measured seed of each row; the column as it stands where it has no seeds."""
    metric = default_metric(table)
    epochs = max(table.epochs(metric), default=None)
    measured = (c.seed for c in table.columns if c.metric == metric and c.epochs == epochs)
    seeds = sorted(seed for seed in measured if seed is not None)
    if not seeds:
        return table.column(metric)
    found = np.array(table.column(metric, epochs=epochs, seed=seeds[0]), np.float64)
    for seed in seeds[1:]:
        found = np.where(np.isfinite(found), found, table.column(metric, epochs=epochs, seed=seed))
    return found


def graphs_of(table: Table, progress: Progress | None = None) -> GraphTable:
    """All graphs of a benchmark, by row. Read once and kept in the home folder, with the adjacency as bits: the 423,624
    of NAS-Bench-101 take seconds at first and a fraction of one afterwards."""
    path = home() / "cache" / "graphs" / f"{table.id}.safetensors"
    stamp = _stamp(table)
    found = _read(path, stamp)
    if found is None:
        with locked(path.with_suffix(".lock")):
            found = _read(path, stamp)
            if found is None:
                found = _parse(table, progress)
                _write(path, stamp, found)
    return found


def _stamp(table: Table) -> str:
    about = table.path.stat()
    return f"{FORMAT}:{len(table)}:{about.st_size}:{about.st_mtime_ns}"


def _parse(table: Table, progress: Progress | None) -> GraphTable:
    space = table.space
    parse = _nas_bench_101 if type(space) is NasBench101 else _decoded
    parts = []
    for start in range(0, len(table), CHUNK):
        end = min(start + CHUNK, len(table))
        parts.append(parse(space, [table.text(row) for row in range(start, end)]))
        if progress is not None:
            progress(end, len(table))
    return concatenate(parts)


def _decoded(space: SearchSpace, texts: Sequence[str]) -> GraphTable:
    return as_table([space.graph(space.decode(text)) for text in texts], space.vocabulary)


def _nas_bench_101(space: SearchSpace, texts: Sequence[str]) -> GraphTable:
    """The notation read in bulk: bits of the upper triangle, a colon, the inner operations."""
    split = [text.partition(":")[::2] for text in texts]
    nodes = np.array([1 + len(names.split(",")) + 1 if names else 2 for _, names in split])
    widest = int(nodes.max())
    ops = np.full((len(texts), widest), -1, np.int8)
    adjacency = np.zeros((len(texts), widest, widest), bool)
    number = {op: i for i, op in enumerate(space.vocabulary)}
    known = {names: _codes(names, number) for names in dict.fromkeys(names for _, names in split)}
    for n in np.unique(nodes).tolist():
        rows = np.flatnonzero(nodes == n)
        bits = np.frombuffer("".join(split[row][0] for row in rows).encode(), np.uint8) == ord("1")
        upper, lower = np.triu_indices(n, 1)
        adjacency[rows[:, None], upper, lower] = bits.reshape(len(rows), -1)
        ops[rows, :n] = [known[split[row][1]] for row in rows]
    return GraphTable(space.vocabulary, ops, adjacency, ops >= 0, np.zeros_like(ops))


def _codes(names: str, number: dict[str, int]) -> list[int]:
    return [number[op] for op in ("input", *(names.split(",") if names else ()), "output")]


def _write(path: Path, stamp: str, table: GraphTable) -> None:
    from safetensors.numpy import save

    bits = np.packbits(table.adjacency.reshape(len(table), -1), axis=1)
    header = {"stamp": stamp, "vocabulary": table.vocabulary, "part_names": table.part_names, "nodes": table.nodes}
    with atomic_write(path, "wb") as file:
        file.write(
            save({"ops": table.ops, "bits": bits, "parts": table.parts}, metadata={"graphs": json.dumps(header)})
        )


def _read(path: Path, stamp: str) -> GraphTable | None:
    """What was kept, None where nothing was, the table has changed since, or the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            header = json.loads((file.metadata() or {})["graphs"])
            if header["stamp"] != stamp:
                return None
            ops, bits, parts = (file.get_tensor(name) for name in ("ops", "bits", "parts"))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    n = header["nodes"]
    adjacency = np.unpackbits(bits, axis=1, count=n * n).reshape(-1, n, n).view(bool)
    vocabulary, part_names = tuple(header["vocabulary"]), tuple(header["part_names"])
    return GraphTable(vocabulary, ops, adjacency, ops >= 0, parts, part_names)
