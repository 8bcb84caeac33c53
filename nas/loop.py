"""search: the one loop between strategies and evaluators."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nas.budget import Budget
from nas.evaluators import Evaluator, TableEvaluator, as_evaluator, default_metric
from nas.executors import Executor, Job, Outcome, ProcessExecutor, SerialExecutor
from nas.objectives import Objective, parse_objectives
from nas.result import SearchResult
from nas.run import Run, TrialRecord
from nas.strategies import make_strategy
from nas.strategies.strategy import Strategy, Trial
from search_spaces.common.errors import RunError, UserError
from search_spaces.registry import space_text
from search_spaces.space import SearchSpace

Progress = Callable[[int, int | None], None]


def search(
    space: SearchSpace,
    evaluator: Evaluator | Callable[..., Mapping[str, float]],
    strategy: str | Callable[..., Strategy] = "regularized-evolution",
    *,
    budget: int | Budget,
    objectives: str | Sequence[Objective] | None = None,
    seed: int = 0,
    workers: int = 1,
    timeout_seconds: float | None = None,
    out: str | Path | None = None,
    strategy_settings: Mapping[str, Any] | None = None,
    describe: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Search `space` for what `evaluator` says is best.

    evaluator: an Evaluator or a function of (arch, fidelity, seed). strategy: a name, or a class or function that
    makes a Strategy of (space, objectives, rng, **strategy_settings). budget: queries, or a Budget. objectives: as
    on the command line, `val_acc,params<=1e6`; default the table's validation accuracy. workers: processes; one and
    no time limit evaluate in this process. out: the run folder; one that holds the same search is continued.
    describe: names for the run's settings (`space`, `evaluator`, `command`, ...).
    Errors: UserError for bad input, RunError if the run cannot go on.
    """
    evaluator = as_evaluator(evaluator)
    if isinstance(budget, int | float):
        budget = Budget(queries=budget)  # type: ignore[arg-type]
    if isinstance(workers, bool) or workers < 1 or workers != int(workers):
        raise UserError(workers, "a number of workers from 1")
    if timeout_seconds is not None and not timeout_seconds > 0:
        raise UserError(timeout_seconds, "a time limit above 0 seconds")
    if isinstance(seed, bool) or seed < 0:
        raise UserError(seed, "a seed from 0")
    evaluator, objectives = _agree(evaluator, objectives)
    settings = {
        "kind": "search",
        "space": space_text(space),
        "evaluator": _name(evaluator),
        "label": evaluator.label if isinstance(evaluator, TableEvaluator) else "val",
        "seed_policy": evaluator.seed_policy if isinstance(evaluator, TableEvaluator) else None,
        "objectives": ",".join(map(str, objectives)),
        "strategy": strategy if isinstance(strategy, str) else getattr(strategy, "name", None) or strategy.__name__,
        "strategy_settings": dict(strategy_settings or {}),
        "budget": {k: v for k, v in dataclasses.asdict(budget).items() if v is not None},
        "seed": int(seed),
        "workers": int(workers),
        "timeout_seconds": timeout_seconds,
        **(describe or {}),
    }
    rng = np.random.default_rng(seed)
    if isinstance(strategy, str):
        chosen = make_strategy(strategy, space, objectives, rng, **(strategy_settings or {}))
    else:
        chosen = strategy(space, objectives, rng, **(strategy_settings or {}))
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(_open_run(Path(out), settings).writing()) if out is not None else None
        loop = _Loop(space, chosen, budget, objectives, seed, run, progress)
        loop.replay()
        if not loop.finished():
            executor = _executor(evaluator, workers, timeout_seconds)
            stack.callback(executor.close)
            loop.go(executor)
        if run is not None and not run.settings.get("finished"):
            run.update_settings(finished=True)
    return SearchResult(settings, list(loop.records.values()), space, run, evaluator)


def _agree(
    evaluator: Evaluator, objectives: str | Sequence[Objective] | None
) -> tuple[Evaluator, tuple[Objective, ...]]:
    """Objectives and, for a table, an evaluator that reports exactly their metrics (checked against the table)."""
    if isinstance(objectives, str):
        objectives = parse_objectives(objectives)
    if not isinstance(evaluator, TableEvaluator):
        if not objectives:
            raise UserError("objectives", "objectives beside an evaluator that is no table, such as 'val_acc'")
        return evaluator, tuple(objectives)
    table = evaluator.table
    if not objectives:
        name = evaluator.metrics[0] if evaluator.metrics else default_metric(table, evaluator.label)
        objectives = (Objective(name, maximize=True),)
    names = tuple(dict.fromkeys([*(o.name for o in objectives), *evaluator.metrics]))
    for name in names:
        if not (name.startswith("test_") and evaluator.label == "test"):
            table.column(name)  # refuses unknown names and the test split
    return dataclasses.replace(evaluator, metrics=names), tuple(objectives)


def _name(evaluator: Evaluator) -> str:
    if isinstance(evaluator, TableEvaluator):
        return f"table:{evaluator.benchmark}"
    return getattr(evaluator, "path", None) or re.sub(r" at 0x[0-9a-f]+", "", repr(evaluator))


def _executor(evaluator: Evaluator, workers: int, timeout_seconds: float | None) -> Executor:
    if workers == 1 and timeout_seconds is None:
        return SerialExecutor(evaluator)
    return ProcessExecutor(evaluator, workers, timeout_seconds=timeout_seconds)


# What may change between the beginning of a run and its continuation without making it another search.
_FREE = {"format", "command", "environment", "version", "workers", "timeout_seconds", "finished"}


def _open_run(path: Path, settings: Mapping[str, Any]) -> Run:
    if not Run.exists(path):
        return Run.create(path, settings)
    run = Run.open(path)
    if _grown(run.settings.get("budget", {}), settings["budget"]):
        run.update_settings(budget=settings["budget"], finished=False)
    keys = sorted((set(run.settings) | set(settings)) - _FREE)
    changed = [k for k in keys if run.settings.get(k) != _plain(settings.get(k))]
    if changed:
        listed = "; ".join(f"{k} was {run.settings.get(k)!r}, now {settings.get(k)!r}" for k in changed)
        raise UserError(str(path), f"the settings that the run was begun with ({listed}), or another folder")
    return run


def _grown(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
    return set(before) == set(now) and all(now[k] >= before[k] for k in before) and before != now


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def trial_seed(run_seed: int, trial_id: int) -> int:
    """The seed of a trial: it depends on neither the worker nor the order."""
    return int(np.random.SeedSequence(run_seed, spawn_key=(trial_id,)).generate_state(1)[0])


class _Loop:
    """Asks, submits, records, tells; in that order, so that a killed run can be replayed."""

    def __init__(
        self,
        space: SearchSpace,
        strategy: Strategy,
        budget: Budget,
        objectives: Sequence[Objective],
        seed: int,
        run: Run | None,
        progress: Progress | None,
    ):
        self.space, self.strategy, self.budget, self.objectives = space, strategy, budget, objectives
        self.seed, self.run, self.progress = seed, run, progress
        self.records: dict[int, TrialRecord] = {}
        self.open: list[Trial] = []  # asked in an earlier process, not told
        self.told = 0
        self.simulated_seconds = 0.0
        self.evaluation_seconds = 0.0  # of earlier sessions; counted against a budget in wall seconds
        self.begun = time.monotonic()
        self.exhausted = False

    def replay(self) -> None:
        """Bring the strategy to where the run stopped. Errors: RunError if it asks for something else than before."""
        if self.run is None:
            return
        recorded = {r.id: r for r in self.run.trials()}
        waiting: dict[int, Trial] = {}
        for kind, id in self.run.events():
            record = recorded[id]
            if kind == "ask":
                trial = self.strategy.ask()
                asked = (
                    None if trial is None else (trial.id, self.space.encode(trial.arch), trial.fidelity, trial.parent)
                )
                if trial is None or asked != (record.id, record.arch, record.fidelity, record.parent):
                    raise RunError(
                        f"{self.run.path}: on resuming, trial {id} should be {record.arch} but the strategy asks for"
                        f" {asked and asked[1]}; the run was made by another version"
                    )
                waiting[id] = trial
                self.records[id] = record
            else:
                del waiting[id]
                self._count(record)
                self.strategy.tell(id, record.metrics if record.status == "done" else None)
        self.open = list(waiting.values())
        self.evaluation_seconds = sum(r.seconds or 0.0 for r in self.records.values())
        if self.records:
            self.run.log(f"resumed with {self.told} trials told and {len(self.open)} to evaluate again")

    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return not self.open and self._spent()

    def _spent(self) -> bool:
        b = self.budget
        return (
            (b.queries is not None and len(self.records) - len(self.open) >= b.queries)
            or (b.simulated_seconds is not None and self.simulated_seconds >= b.simulated_seconds)
            or (
                b.wall_seconds is not None and time.monotonic() - self.begun + self.evaluation_seconds >= b.wall_seconds
            )
        )

    def go(self, executor: Executor) -> None:
        """Run until the budget is spent or the strategy has nothing left."""
        in_flight = 0
        while True:
            while in_flight < executor.capacity and (job := self._next()) is not None:
                executor.submit(job)
                in_flight += 1
            if in_flight == 0:
                if not self.exhausted and not self._spent():
                    raise RunError(f"the strategy {self.strategy.name} waits for a trial although none is under way")
                return
            for outcome in executor.wait():
                in_flight -= 1
                self._tell(outcome)

    def _next(self) -> Job | None:
        if self.open:
            trial = self.open.pop(0)
            return Job(trial.id, trial.arch, trial.fidelity, trial_seed(self.seed, trial.id))
        if self.exhausted or self._spent():
            return None
        try:
            asked = self.strategy.ask()
        except StopIteration:
            self.exhausted = True
            return None
        return None if asked is None else self._record_ask(asked)

    def _record_ask(self, trial: Trial) -> Job:
        seed = trial_seed(self.seed, trial.id)
        record = TrialRecord(
            trial.id,
            self.space.encode(trial.arch),
            self.space.key(trial.arch),
            "asked",
            trial.fidelity,
            parent=trial.parent,
            seed=seed,
            asked_at=time.time(),
        )
        if self.run is not None:
            self.run.add_ask(record)
        self.records[trial.id] = record
        return Job(trial.id, trial.arch, trial.fidelity, seed)

    def _tell(self, outcome: Outcome) -> None:
        metrics, error = outcome.metrics, outcome.error
        if metrics is not None:
            missing = [o.name for o in self.objectives if o.name not in metrics]
            if missing:
                error = f"the evaluator gave {', '.join(metrics)} but not {missing[0]}"
                metrics = None
        cost = None if outcome.cost_seconds is None else {"cost_seconds": outcome.cost_seconds}
        record = self.records[outcome.id]
        record = TrialRecord(
            record.id,
            record.arch,
            record.key,
            "failed" if metrics is None else "done",
            record.fidelity,
            cost if metrics is None else metrics,
            error,
            outcome.seconds,
            outcome.worker,
            record.parent,
            record.seed,
            record.asked_at,
            time.time(),
            outcome.attempts,
        )
        if self.run is not None:
            self.run.add_tell(record)
            if error is not None:
                self.run.log(f"trial {record.id} failed: {error}")
        self._count(record)
        self.strategy.tell(record.id, metrics)
        if self.progress is not None:
            self.progress(self.told, self.budget.queries)

    def _count(self, record: TrialRecord) -> None:
        self.records[record.id] = record
        self.told += 1
        self.simulated_seconds += (record.metrics or {}).get("cost_seconds", 0.0)
