"""Evaluators: what an architecture is worth. Small frozen values, so that they can travel to workers."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from benchmarks.registry import open_table, resolve_id, table_path
from benchmarks.table import Table, TestSplitError
from nas.objectives import Objective
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import load_object, nearest
from search_spaces.registry import load_space
from search_spaces.space import SearchSpace

A = TypeVar("A")


@runtime_checkable
class Evaluator(Protocol):
    """Measures architectures. Implementations are frozen dataclasses of plain values; data are opened on first use."""

    def evaluate(self, arch: Any, fidelity: int | None = None, *, seed: int) -> Mapping[str, float]:
        """The metrics of `arch`, units in their names; `cost_seconds` feeds the simulated clock.

        fidelity: None is the full one. Everything random follows from `seed`. An exception makes a failed trial.
        """
        ...


class Rejected(Exception):
    """Raised by an evaluator that refuses an architecture on purpose: a failed trial that is not tried again.

    reason: a word such as `unstable`. cost_seconds: what finding out cost, on the simulated clock.
    """

    def __init__(self, reason: str, cost_seconds: float = 0.0):
        super().__init__(reason)
        self.reason, self.cost_seconds = reason, cost_seconds


@dataclass(frozen=True)
class TableEvaluator:
    """Reads the metrics of a compiled table.

    benchmark: its id. metrics: columns to report (default: its validation accuracy). seed_policy: `mean` over the
    measured seeds, a seed's number, or `random` (by the trial's seed). label: `val` hides the test columns
    (TestSplitError); `test` searches on them, for tables that have nothing else.
    """

    benchmark: str
    metrics: tuple[str, ...] = ()
    label: str = "val"
    seed_policy: int | str = "mean"

    def __post_init__(self) -> None:
        if self.label not in ("val", "test"):
            raise UserError(self.label, "a label: val or test", nearest(self.label, ["val", "test"]))
        object.__setattr__(self, "benchmark", resolve_id(self.benchmark))

    @property
    def table(self) -> Table:
        """The table, opened once in each process."""
        return open_table_here(self.benchmark)

    def columns(self) -> tuple[str, ...]:
        """The metrics that `evaluate` reports besides `cost_seconds`."""
        return self.metrics or (default_metric(self.table, self.label),)

    def evaluate(self, arch: Any, fidelity: int | None = None, *, seed: int) -> dict[str, float]:
        """Look up one architecture. Errors: UserError if it or a column is not in the table."""
        read = _reader(self)
        row = int(read.table.rows_of((arch,))[0])
        return read.metrics(row, fidelity, seed)

    def fidelities(self) -> list[int]:
        """The training lengths that the table has of the first metric, ascending."""
        return self.table.epochs(self.columns()[0])


@functools.lru_cache(maxsize=32)
def _open_file(path: str, stamp: int) -> Table:
    return Table.open(path)


def open_table_here(id: str) -> Table:
    """The table `id`, opened once per process; a table that was added anew is opened anew."""
    path = table_path(id)
    if not path.exists():
        open_table(id)  # compiles it
    return _open_file(str(path), os.stat(path).st_mtime_ns)


class _Reader:
    """The columns of a TableEvaluator as arrays, by fidelity."""

    def __init__(self, evaluator: TableEvaluator):
        self.evaluator = evaluator
        self.table = evaluator.table
        self.names = evaluator.columns()
        self._arrays: dict[int | None, list[tuple[str, list[np.ndarray]]]] = {}

    def metrics(self, row: int, fidelity: int | None, seed: int) -> dict[str, float]:
        arrays = self._arrays.get(fidelity)
        if arrays is None:
            arrays = self._arrays[fidelity] = self._read(fidelity)
        found: dict[str, float] = {}
        for name, values in arrays:
            if len(values) == 1:
                found[name] = float(values[0][row])
            else:
                measured = [v for v in (float(a[row]) for a in values) if not math.isnan(v)]
                pick = np.random.default_rng((seed, len(found))).integers(len(measured)) if measured else 0
                found[name] = measured[pick] if measured else math.nan
        return found

    def _read(self, fidelity: int | None) -> list[tuple[str, list[np.ndarray]]]:
        arrays = [(name, self._column(name, fidelity)) for name in self.names]
        if self.table.has("train_seconds") and "cost_seconds" not in self.names:
            lengths = self.table.epochs("train_seconds")
            metric_lengths = self.table.epochs(self.names[0])
            epochs = fidelity if fidelity is not None else (metric_lengths or lengths)[-1]
            if epochs in lengths:
                arrays.append(("cost_seconds", [self.table.column("train_seconds", epochs=epochs)]))
        return arrays

    def _column(self, name: str, fidelity: int | None) -> list[np.ndarray]:
        epochs = fidelity if self.table.epochs(name) else None  # costs are the same at any fidelity
        policy = self.evaluator.seed_policy
        if policy == "random":
            metric = name
            lengths = self.table.epochs(name)
            at = epochs if epochs is not None else (lengths[-1] if lengths else None)
            seeds: Sequence[int | str] = [
                c.seed for c in self.table.columns if c.metric == metric and c.epochs == at and c.seed is not None
            ] or ["mean"]
        else:
            seeds = [policy]
        return [self._values(name, epochs, seed) for seed in seeds]

    def _values(self, name: str, epochs: int | None, seed: int | str) -> np.ndarray:
        if name.startswith("test_") and self.evaluator.label == "test":
            return self.table.test_values(None, name, purpose="search on test labels", epochs=epochs, seed=seed)
        return self.table.column(name, epochs=epochs, seed=seed)


@functools.lru_cache(maxsize=32)
def _reader_of(evaluator: TableEvaluator, stamp: int) -> _Reader:
    return _Reader(evaluator)


def _reader(evaluator: TableEvaluator) -> _Reader:
    return _reader_of(evaluator, os.stat(table_path(evaluator.benchmark)).st_mtime_ns)


def reference_metric(table: Table) -> str:
    """The accuracy by which others are judged: of test images where the table has test values, else of validation."""
    return default_metric(table, "test" if any(m.startswith("test_") for m in table.metrics) else "val")


def default_metric(table: Table, label: str = "val") -> str:
    """The accuracy (or the one other quality) of the split `label`.

    Errors: TestSplitError where only test values are there and they were not asked for.
    """
    of_split = [m for m in table.metrics if m.startswith(f"{label}_")]
    for metric in (f"{label}_acc", *of_split):
        if metric in of_split:
            return metric
    if label == "val" and any(m.startswith("test_") for m in table.metrics):
        raise TestSplitError(table.id, "a table with validation values; this one has only test values (--label test)")
    raise UserError(table.id, f"a table with {label} values; it has {one_of(table.metrics)}")


@dataclass(frozen=True)
class ObjectEvaluator:
    """An evaluator of the user's own, named `package.module:object`; a function of (arch, fidelity, seed) will do."""

    path: str

    def evaluate(self, arch: Any, fidelity: int | None = None, *, seed: int) -> Mapping[str, float]:
        """What the named object says."""
        return as_evaluator(_load(self.path)).evaluate(arch, fidelity, seed=seed)

    def fidelities(self) -> list[int]:
        """The fidelities that the named object states, if it has any."""
        found = _load(self.path)
        return list(found.fidelities()) if hasattr(found, "fidelities") else []


@functools.lru_cache(maxsize=32)
def _load(path: str) -> object:
    found = load_object(path, "an evaluator")
    found = found() if isinstance(found, type) else found
    as_evaluator(found)
    return found


@dataclass(frozen=True)
class FunctionEvaluator:
    """A plain function `(arch, fidelity, seed) -> metrics` as an evaluator."""

    function: Any

    def evaluate(self, arch: Any, fidelity: int | None = None, *, seed: int) -> Mapping[str, float]:
        """Call the function."""
        return self.function(arch, fidelity, seed)


def as_evaluator(found: object) -> Evaluator:
    """An object with `evaluate`, or a function, as an Evaluator. Errors: UserError."""
    if isinstance(found, Evaluator):
        return found
    if callable(found):
        return FunctionEvaluator(found)
    raise UserError(found, "an evaluator: an object with evaluate(arch, fidelity, *, seed) or a function of the three")


def make_evaluator(
    text: str,
    objectives: Sequence[Objective] | None = None,
    label: str = "val",
    seed_policy: int | str = "mean",
    training: Mapping[str, Any] | None = None,
    scoring: Mapping[str, Any] | None = None,
) -> Evaluator:
    """The evaluator that `text` names: `table:ID`, `train`, `proxy:NAMES`, `predictor:DIR`, `supernet:RUN` or
    `package.module:object`.

    training: the settings of `train`, as `TrainEvaluator.as_json` gives them. scoring: those of `proxy:NAMES`, the
    fields of `ProxyEvaluator` but the names. Errors: UserError; TestSplitError for an objective on test images.
    """
    kind, colon, rest = text.partition(":")
    if text == "train":
        return _train_evaluator(objectives or (), label, training)
    if kind == "proxy" and rest:
        return _proxy_evaluator(rest, objectives or (), scoring)
    if kind == "predictor" and rest:
        return _predictor_evaluator(rest, objectives or ())
    if kind == "supernet" and rest:
        return _supernet_evaluator(rest, objectives or ())
    if kind == "table" and rest:
        metrics = tuple(dict.fromkeys(o.name for o in objectives or ()))
        return TableEvaluator(rest, metrics, label, seed_policy)
    if colon and rest.replace(".", "_").isidentifier():
        _load(text)
        return ObjectEvaluator(text)
    named = "table:<benchmark id>, train, proxy:<names>, predictor:<folder>, supernet:<run>"
    raise UserError(text, f"an evaluator: {named} or package.module:object", _similar(text))


def _proxy_evaluator(names: str, objectives: Sequence[Objective], scoring: Mapping[str, Any] | None) -> Evaluator:
    from nas.scoring.evaluator import ProxyEvaluator
    from nas.scoring.task import proxy_names

    if scoring is None or "space" not in scoring:
        raise UserError(f"proxy:{names}", "the settings of scoring beside it (a space, and data)")
    evaluator = ProxyEvaluator(**{**scoring, "proxies": tuple(proxy_names(names))})
    for objective in objectives:
        if objective.name not in evaluator.metrics():
            known = evaluator.metrics()
            raise UserError(
                objective.name, f"a proxy of the evaluator ({one_of(known)})", nearest(objective.name, known)
            )
    return evaluator


def _predictor_evaluator(folder: str, objectives: Sequence[Objective]) -> Evaluator:
    from nas.prediction.evaluator import METRIC, PredictorEvaluator

    for objective in objectives:
        if objective.name != METRIC:
            raise UserError(objective.name, f"the metric of a predictor ({METRIC}:max)", METRIC)
    return PredictorEvaluator(folder)


def _supernet_evaluator(reference: str, objectives: Sequence[Objective]) -> Evaluator:
    from nas.supernet.evaluator import METRICS, SupernetEvaluator

    _refuse_others("a metric of a supernet", METRICS, objectives)
    return SupernetEvaluator(reference)


def _refuse_others(expected: str, known: Sequence[str], objectives: Sequence[Objective]) -> None:
    """UserError for an objective that is not known, TestSplitError for one on test images."""
    for objective in objectives:
        if objective.name.startswith("test_"):
            hint = "a metric of training or validation images; test images are for `nas train` and `nas evaluate`"
            raise TestSplitError(objective.name, hint, objective.name.replace("test_", "val_", 1))
        if objective.name not in known:
            raise UserError(objective.name, f"{expected} ({one_of(known)})", nearest(objective.name, known))


def _train_evaluator(objectives: Sequence[Objective], label: str, training: Mapping[str, Any] | None) -> Evaluator:
    from nas.training.evaluator import METRICS, TrainEvaluator

    if training is None:
        raise UserError("train", "the settings of a training beside it (a space and a recipe)")
    if label != "val":
        raise TestSplitError(label, "validation images: a search by training never sees test images", "val")
    _refuse_others("a metric of a training", METRICS, objectives)
    return TrainEvaluator.from_json(training)


def _similar(text: str) -> str | None:
    from benchmarks.registry import known_ids

    if nearest(text, ["train"]):
        return "train"
    close = nearest(text.partition(":")[2] or text, known_ids())
    return f"table:{close}" if close else None


def space_of(evaluator: Evaluator) -> SearchSpace:
    """The space of a table, or the one that the evaluator names itself. Errors: UserError for others, which must be
    given one."""
    if isinstance(evaluator, TableEvaluator):
        return load_space(evaluator.table.space_name)
    named = getattr(evaluator, "space", None)
    if isinstance(named, str):
        return load_space(named)
    raise UserError("--space", "a space beside an evaluator that is no table")
