"""Evaluation of predictors on a benchmark: every result is stored as it comes, so that a killed one goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.table import Table
from nas.prediction.tables import Labelled, graphs_of, labels_and_targets
from nas.run import Run, TrialRecord
from predictors.evaluation import (
    HELD_OUT,
    SECONDS,
    STATISTICS,
    Split,
    Summary,
    Task,
    evaluate_splits,
    make_splits,
    read_size,
    summarize,
)
from predictors.registry import PREDICTORS, make_predictor
from search_spaces.common.errors import RunError, UserError
from search_spaces.common.names import match
from search_spaces.registry import space_text

KIND = "predict-evaluate"
PINAT_SEEDS = 1
MEMBER = "/"  # auto/gp-graf: a member as it was trained inside the ensemble
Progress = Callable[[int, int | None], None]
_FREE = {"format", "predictors", "train_sizes", "seeds", "seed", "strategy", "command", "environment", "version"}
_FREE |= {"finished", "predictor_settings"}


@dataclass(frozen=True)
class Result:
    """How one predictor ranks after training on so many labels: {statistic: Summary over the splits}."""

    predictor: str
    train_size: int
    statistics: Mapping[str, Summary]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        found = {name: summary.as_json() for name, summary in self.statistics.items()}
        return {"predictor": self.predictor, "train_size": self.train_size, **found}


@dataclass(frozen=True)
class Evaluation:
    """Results by predictor and size; what they were judged on; what failed, {(predictor, size): message}."""

    benchmark: str
    protocol: str
    rows: int
    seeds: int
    labels: str
    target: str
    metric: str
    notes: tuple[str, ...]
    results: tuple[Result, ...]
    failures: Mapping[tuple[str, int], str]

    def of(self, predictor: str) -> list[Result]:
        """The results of one predictor, by size."""
        return sorted((r for r in self.results if r.predictor == predictor), key=lambda r: r.train_size)

    def statement(self) -> str:
        """Protocol, labels and target in one line, for every table."""
        splits = "1 split per size" if self.seeds == 1 else f"{self.seeds} seeds"
        ranked = f"half of {self.rows:,} rows" if self.protocol == "gates" else f"{self.rows:,} rows"
        return (
            f"{self.benchmark}: protocol {self.protocol}, {splits}; labels {self.labels}, target {self.target}"
            f" ({self.metric}, {ranked})"
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "benchmark": self.benchmark,
            "protocol": self.protocol,
            "labels": self.labels,
            "target": self.target,
            "metric": self.metric,
            "rows": self.rows,
            "seeds": self.seeds,
            "notes": list(self.notes),
            "results": [result.as_json() for result in self.results],
            "failures": [
                {"predictor": name, "train_size": size, "error": text} for (name, size), text in self.failures.items()
            ],
        }


def evaluate_predictors(
    table: Table,
    predictors: Sequence[str],
    sizes: Sequence[str | int],
    out: Path,
    *,
    seeds: int = 10,
    seed: int = 0,
    protocol: str = "nasforge",
    labels: str | None = None,
    target: str | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    describe: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Train every predictor on every size and seed and see how it ranks the benchmark.

    out: a run folder; results that stand in it already are taken from there, also when predictors, sizes or seeds are
    added. sizes: counts or percentages. seeds: how many, from `seed` on; 1 of `pinat`. labels, target: as for
    `labels_and_targets`. settings: {predictor: {setting: value}}. extra: columns [rows of the table], such as proxies.
    The members of an ensemble are results of their own, named as `auto/gp-graf`; their time is that of the ensemble.
    A predictor that refuses a size (UserError) is reported in `failures` and tried again on resuming.
    Errors: UserError for bad input, RunError when nothing could be evaluated.
    """
    names = [match(name, PREDICTORS, "a predictor") for name in predictors]
    if not names:
        raise UserError("--predictors", "at least one predictor")
    space = space_text(table.space)
    given = {match(name, names, "a predictor of this evaluation"): dict(s) for name, s in (settings or {}).items()}
    settings_of = {}
    for name in names:
        unfitted: Any = make_predictor(name, space, table.space.vocabulary, **given.get(name, {}))
        settings_of[name] = asdict(unfitted.settings) if hasattr(unfitted, "settings") else given.get(name, {})
    if isinstance(seeds, bool) or seeds < 1:
        raise UserError(seeds, "a number of seeds from 1")
    known = labels_and_targets(table, labels, target)
    counts = [read_size(size, len(known.rows), protocol) for size in sizes]
    if not counts:
        raise UserError("--train-sizes", "at least one training size")
    splits = make_splits(protocol, len(known.rows), counts, range(seed, seed + seeds), table.space.name)
    wanted = {
        "kind": KIND,
        "evaluator": f"table:{table.id}",
        "strategy": ", ".join(names),
        "seed": seed,
        "protocol": protocol,
        "labels": known.label_kind,
        "target": known.target_kind,
        "rows": len(known.rows),
        "predictor_settings": json.loads(json.dumps(settings_of)),  # as they are read again
        "extra": sorted(extra or {}),
        **(describe or {}),
    }
    with _open(out, wanted).writing() as run:
        known_settings = run.settings.get("predictor_settings", {})
        run.update_settings(predictor_settings={**known_settings, **wanted["predictor_settings"]})
        book = _Book(run)
        missing = [(name, [s for s in splits if not book.done(name, s)]) for name in dict.fromkeys(names)]
        total, left = len(splits) * len(missing), sum(len(part) for _, part in missing)
        if left:
            task = _task(table, known, extra, progress)
            begun = total - left
            for name, part in missing:
                make = _Make(name, space, table.space.vocabulary, given.get(name, {}))
                begun = _run(book, make, task, part, begun, total, progress)
        run.update_settings(finished=not book.failures(names, splits))
        results, failures = book.results(names, splits), book.failures(names, splits)
    if not results:
        raise RunError("; ".join(f"{name} on {size} labels: {text}" for (name, size), text in failures.items()))
    number = PINAT_SEEDS if protocol == "pinat" else seeds
    return Evaluation(
        table.id, protocol, len(known.rows), number, known.label_kind, known.target_kind, known.metric, known.notes,
        tuple(results), failures,
    )  # fmt: skip


@dataclass(frozen=True)
class _Make:
    name: str
    space: str
    vocabulary: tuple[str, ...]
    settings: Mapping[str, Any]

    def __call__(self) -> Any:
        return make_predictor(self.name, self.space, self.vocabulary, **self.settings)


def _run(
    book: _Book, make: _Make, task: Task, splits: Sequence[Split], done: int, total: int, progress: Progress | None
) -> int:
    """Evaluate one predictor, by size, so that a size that it refuses does not end the others."""
    for size in dict.fromkeys(split.size for split in splits):
        same = [split for split in splits if split.size == size]
        stored = set()
        try:
            for split, found in evaluate_splits(make, task, same):
                for member, statistics in found.pop("members", {}).items():
                    book.add(f"{make.name}{MEMBER}{member}", split, statistics)
                book.add(make.name, split, found)
                stored.add(split.seed)
                if progress is not None:
                    progress(done + len(stored), total)
        except UserError as error:
            for split in same:
                if split.seed not in stored:
                    book.add(make.name, split, None, str(error))
        done += len(same)
    return done


def _task(table: Table, known: Labelled, extra: Mapping[str, np.ndarray] | None, progress: Progress | None) -> Task:
    graphs = graphs_of(table, progress)
    if len(known.rows) < len(graphs):
        graphs = graphs.take(known.rows)
    columns = {name: np.asarray(values)[known.rows] for name, values in (extra or {}).items()}
    return Task(graphs, known.labels, known.targets, columns)


def _open(path: Path, wanted: Mapping[str, Any]) -> Run:
    if not Run.exists(path):
        return Run.create(path, wanted)
    run = Run.open(path)
    if run.settings.get("kind") != KIND:
        raise UserError(str(path), "the folder of an evaluation of predictors, or a new one")
    changed = [(k, run.settings.get(k), wanted[k]) for k in sorted(set(wanted) - _FREE)]
    known, now = run.settings.get("predictor_settings", {}), wanted["predictor_settings"]
    for name in sorted(known.keys() & now):  # given or default: results of two settings do not mix
        keys = dict.fromkeys([*known[name], *now[name]])
        changed += [(f"{name}.{k}", known[name].get(k), now[name].get(k)) for k in keys]
    listed = "; ".join(f"{k} was {before!r}, now {after!r}" for k, before, after in changed if before != after)
    if listed:
        raise UserError(str(path), f"what the evaluation was begun with ({listed}), or another folder")
    return run


class _Book:
    """The results in a run folder: one trial for each predictor (`arch`), size (`fidelity`) and seed."""

    def __init__(self, run: Run):
        self.run = run
        self._found = {(r.arch, r.fidelity, r.seed): r for r in run.trials()}

    def done(self, name: str, split: Split) -> bool:
        record = self._found.get((name, split.size, split.seed))
        return record is not None and record.status == "done"

    def add(self, name: str, split: Split, metrics: Mapping[str, float] | None, error: str | None = None) -> None:
        """Store one result at once."""
        key, now = (name, split.size, split.seed), time.time()
        record = self._found.get(key)
        if record is None:
            record = TrialRecord(
                len(self._found), name, name, "asked", split.size, seed=split.seed, asked_at=now
            )  # fmt: skip
            self.run.add_ask(record)
        seconds = None if metrics is None else sum(metrics.get(name, 0.0) for name in SECONDS)
        record = TrialRecord(
            record.id, name, name, "failed" if metrics is None else "done", split.size, metrics, error, seconds, None,
            None, split.seed, record.asked_at, now, record.attempts + 1,
        )  # fmt: skip
        self.run.add_tell(record)
        self._found[key] = record

    def results(self, names: Sequence[str], splits: Sequence[Split]) -> list[Result]:
        """By predictor and size, over the seeds that succeeded."""
        found = []
        for name in self._with_members(names):
            for size in dict.fromkeys(split.size for split in splits):
                seeds = [split.seed for split in splits if split.size == size]
                records = [self._found.get((name, size, seed)) for seed in seeds]
                metrics = [r.metrics for r in records if r is not None and r.status == "done" and r.metrics]
                if metrics:
                    order = (*STATISTICS, *(HELD_OUT + s for s in STATISTICS), *SECONDS)
                    present = [s for s in order if all(s in m for m in metrics)]
                    found.append(Result(name, size, {s: summarize([m[s] for m in metrics]) for s in present}))
        return found

    def _with_members(self, names: Sequence[str]) -> list[str]:
        kept = list(dict.fromkeys(name for name, _, _ in self._found))
        return [n for name in dict.fromkeys(names) for n in (name, *(k for k in kept if k.startswith(name + MEMBER)))]

    def failures(self, names: Sequence[str], splits: Sequence[Split]) -> dict[tuple[str, int], str]:
        """{(predictor, size): the message}."""
        found = {}
        for name in names:
            for split in splits:
                record = self._found.get((name, split.size, split.seed))
                if record is not None and record.status == "failed":
                    found[name, split.size] = record.error or ""
        return found
