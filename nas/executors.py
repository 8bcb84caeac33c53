"""Executors: evaluate trials here, or in spawned processes with a time limit each."""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nas.evaluators import Evaluator, Rejected
from search_spaces.common.errors import RunError, UserError

START_SECONDS = 120.0  # a worker that has not come up by then (imports included) never will


@dataclass(frozen=True, slots=True)
class Job:
    """One evaluation to do."""

    id: int
    arch: Any
    fidelity: int | None
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job: metrics, or None and the reason. seconds: wall time of the last attempt.

    cost_seconds: of a failure, what an evaluator said it cost on the simulated clock.
    """

    id: int
    metrics: Mapping[str, float] | None
    error: str | None
    seconds: float
    worker: int
    attempts: int
    cost_seconds: float | None = None


class Executor(Protocol):
    """Takes jobs and gives outcomes, in whatever order they finish."""

    capacity: int

    def submit(self, job: Job) -> None:
        """Begin a job; at most `capacity` at a time."""
        ...

    def wait(self) -> list[Outcome]:
        """Block until at least one job has ended."""
        ...

    def close(self) -> None:
        """Stop at once; jobs under way are given up."""
        ...


def checked(metrics: object) -> dict[str, float]:
    """Metrics as plain finite floats. Errors: ValueError that names what is wrong."""
    if not isinstance(metrics, Mapping) or not metrics:
        raise ValueError(f"the evaluator returned {metrics!r}, expected a dict of metrics")
    plain: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"the metric {name!r} is {value!r}, expected a number") from None
        if not math.isfinite(number):
            raise ValueError(f"the metric {name!r} is {number}, expected a finite number")
        plain[str(name)] = number
    return plain


@dataclass(frozen=True, slots=True)
class _Answer:
    """One attempt: metrics, or None and the reason. final: trying again would give the same."""

    metrics: dict[str, float] | None
    error: str | None
    seconds: float
    final: bool = False
    cost_seconds: float | None = None


def _evaluate(evaluator: Evaluator, job: Job) -> _Answer:
    begin = time.perf_counter()
    try:
        metrics = checked(evaluator.evaluate(job.arch, job.fidelity, seed=job.seed))
        return _Answer(metrics, None, time.perf_counter() - begin, final=True)
    except Rejected as rejected:
        error, seconds = f"rejected: {rejected.reason}", time.perf_counter() - begin
        return _Answer(None, error, seconds, final=True, cost_seconds=rejected.cost_seconds)
    except Exception as error:
        return _Answer(None, f"{type(error).__name__}: {error}", time.perf_counter() - begin)


def _outcome(job: Job, answer: _Answer, worker: int, attempts: int) -> Outcome:
    return Outcome(job.id, answer.metrics, answer.error, answer.seconds, worker, attempts, answer.cost_seconds)


class SerialExecutor:
    """Evaluates in this process, one after another; a failed evaluation is tried again `retries` times."""

    capacity = 1

    def __init__(self, evaluator: Evaluator, retries: int = 1):
        self._evaluator = evaluator
        self._retries = retries
        self._jobs: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        """Queue a job; `wait` runs it."""
        self._jobs.append(job)

    def wait(self) -> list[Outcome]:
        """Run the next job."""
        job = self._jobs.popleft()
        attempts = 1
        answer = _evaluate(self._evaluator, job)
        while not answer.final and attempts <= self._retries:
            attempts += 1
            answer = _evaluate(self._evaluator, job)
        return [_outcome(job, answer, 0, attempts)]

    def close(self) -> None:
        """Nothing to stop."""


def _serve(connection: multiprocessing.connection.Connection, payload: bytes, parent: int) -> None:
    """A worker: evaluate what comes through the connection until it closes or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    try:
        evaluator = pickle.loads(payload)
    except Exception as problem:
        connection.send(f"{type(problem).__name__}: {problem}")
        return
    connection.send(None)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(_evaluate(evaluator, job))


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class _Worker:
    def __init__(self, number: int, payload: bytes, context: Any):
        self.number = number
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, payload, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.job: Job | None = None
        self.attempts = 0
        self.begun = self.started = time.perf_counter()

    def send(self, job: Job, attempt: int) -> None:
        self.job, self.attempts = job, attempt
        if self.ready:
            self._send()

    def _send(self) -> None:
        self.begun = time.perf_counter()
        self.connection.send(self.job)

    def came_up(self) -> None:
        self.ready = True
        if self.job is not None:
            self._send()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class ProcessExecutor:
    """Evaluates in `workers` spawned processes.

    timeout_seconds: limit of one evaluation; the worker is killed and replaced. retries: how often a failed
    evaluation is tried again (at most once by default). Errors: UserError if the evaluator cannot be pickled.
    """

    def __init__(self, evaluator: Evaluator, workers: int, *, timeout_seconds: float | None = None, retries: int = 1):
        try:
            self._payload = pickle.dumps(evaluator)
        except Exception as error:
            raise UserError(
                type(evaluator).__name__,
                f"an evaluator that can be pickled, to travel to workers ({error}); define it at the top of a module",
            ) from None
        self.capacity = workers
        self._timeout = timeout_seconds
        self._retries = retries
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = [_Worker(i, self._payload, self._context) for i in range(workers)]

    def submit(self, job: Job) -> None:
        """Give a job to a free worker."""
        next(w for w in self._workers if w.job is None).send(job, 1)

    def wait(self) -> list[Outcome]:
        """Outcomes of all jobs that ended by now; blocks for the first."""
        while True:
            outcomes = [o for w in self._ready_workers() if (o := self._receive(w)) is not None]
            outcomes += [o for w in list(self._workers) if (o := self._overdue(w)) is not None]
            if outcomes:
                return outcomes

    def _ready_workers(self) -> list[_Worker]:
        busy = {w.connection: w for w in self._workers if w.job is not None or not w.ready}
        limits = [w.begun + self._timeout for w in busy.values() if self._timeout and w.ready and w.job is not None]
        limits += [w.started + START_SECONDS for w in busy.values() if not w.ready]
        wait = max(0.0, min(limits) - time.perf_counter()) if limits else None
        return [busy[c] for c in multiprocessing.connection.wait(list(busy), wait)]  # type: ignore[index]

    def _receive(self, worker: _Worker) -> Outcome | None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            return self._died(worker)
        if not worker.ready:
            if message is not None:
                raise UserError("the evaluator", f"an evaluator that workers can import ({message})")
            worker.came_up()
            return None
        return self._ended(worker, message)

    def _died(self, worker: _Worker) -> Outcome | None:
        worker.process.join()
        if not worker.ready:
            raise RunError(
                f"a worker ended with status {worker.process.exitcode} before it could begin; a script that searches"
                " with workers needs its call under `if __name__ == '__main__':`"
            )
        error = f"the worker died (exit status {worker.process.exitcode})"
        return self._replace(worker, error)

    def _overdue(self, worker: _Worker) -> Outcome | None:
        now = time.perf_counter()
        if not worker.ready:
            if now - worker.started > START_SECONDS:
                raise RunError(f"a worker did not start within {START_SECONDS:.0f} s")
            return None
        if self._timeout is None or worker.job is None or now - worker.begun <= self._timeout:
            return None
        return self._replace(worker, f"no result within {self._timeout:g} s")

    def _replace(self, worker: _Worker, error: str) -> Outcome | None:
        worker.stop()
        fresh = _Worker(worker.number, self._payload, self._context)
        fresh.job, fresh.attempts = worker.job, worker.attempts
        self._workers[self._workers.index(worker)] = fresh
        return self._ended(fresh, _Answer(None, error, time.perf_counter() - worker.begun))

    def _ended(self, worker: _Worker, answer: _Answer) -> Outcome | None:
        job, attempts = worker.job, worker.attempts
        assert job is not None
        if not answer.final and attempts <= self._retries:
            worker.send(job, attempts + 1)
            return None
        worker.job = None
        return _outcome(job, answer, worker.number, attempts)

    def close(self) -> None:
        """Kill the workers."""
        for worker in self._workers:
            worker.stop()
        self._workers = []
