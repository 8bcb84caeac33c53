"""Strategy: ask for a trial, tell what came of it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from nas.objectives import Objective, primary_score
from search_spaces.common.errors import UserError, one_of
from search_spaces.space import SearchSpace

A = TypeVar("A")
REDRAWS = 100  # duplicates redrawn free of charge before a random unseen architecture is taken
MOST_ENUMERATED = 1_000_000  # spaces up to this size are enumerated when random draws find nothing new
REAL = (int, float, np.integer, np.floating)
BLIND_DRAWS = 100_000  # draws before a space that cannot be enumerated counts as exhausted


@dataclass(frozen=True, slots=True)
class Trial(Generic[A]):
    """One question to the evaluator. `fidelity` None is the full one; `parent` is a trial's id."""

    id: int
    arch: A
    fidelity: int | None = None
    parent: int | None = None


class Strategy(abc.ABC, Generic[A]):
    """Base of all strategies: numbering, duplicates, memory of what was told.

    A subclass implements `_propose` and may extend `_observe`. It never sees an evaluator. Given the same rng and
    the same order of asks and tells it repeats itself exactly; that is how runs resume. Unless its docstring says
    otherwise, a strategy optimises the first objective and keeps the bounds of the others (see `primary_score`).
    """

    name: ClassVar[str]

    def __init__(self, space: SearchSpace[A], objectives: Sequence[Objective], rng: np.random.Generator):
        self.space = space
        self.objectives = tuple(objectives)
        self.rng = rng
        self.trials: list[Trial[A]] = []
        self.metrics: dict[int, Mapping[str, float] | None] = {}
        self._seen: dict[str, int] = {}  # key -> the id of the trial that first asked for it
        self._rest: list[A] | None = None  # what a nearly exhausted space has left, in random order

    def ask(self) -> Trial[A] | None:
        """The next trial; None when a tell must come first. Raises StopIteration when nothing is left."""
        proposal = self._propose()
        if proposal is None:
            return None
        arch, fidelity, parent = proposal
        trial = Trial(len(self.trials), arch, fidelity, parent)
        self.trials.append(trial)
        return trial

    def tell(self, id: int, metrics: Mapping[str, float] | None) -> None:
        """What trial `id` gave; None if it failed.

        Errors: UserError for an id that was not asked or was told before, or for metrics that lack an objective.
        """
        if not 0 <= id < len(self.trials):
            asked = f"0 to {len(self.trials) - 1}" if self.trials else "none so far"
            raise UserError(id, f"the id of a trial that was asked ({asked})")
        if id in self.metrics:
            raise UserError(id, "a trial that was not told before")
        if metrics is not None:
            for objective in self.objectives:
                if objective.name not in metrics:
                    raise UserError(objective.name, f"a metric of the evaluator ({one_of(metrics)})")
        self.metrics[id] = metrics
        self._observe(self.trials[id], metrics)

    @abc.abstractmethod
    def _propose(self) -> tuple[A, int | None, int | None] | None:
        """(architecture, fidelity, parent) of the next trial, or None to wait; StopIteration when exhausted."""

    def _observe(self, trial: Trial[A], metrics: Mapping[str, float] | None) -> None:
        """Learn from a finished trial (nothing by default)."""

    def score(self, id: int) -> tuple[float, float]:
        """How good trial `id` was; more is better, failed and infeasible trials compare below the others."""
        return primary_score(self.objectives, self.metrics[id])

    def pending(self) -> int:
        """How many trials were asked and not told."""
        return len(self.trials) - len(self.metrics)

    def _unseen(self, draw: Callable[[], A]) -> A:
        """An architecture from `draw` whose key is new; after 100 duplicates a random unseen one.

        Raises StopIteration when the space has none left (or none was found in 100,000 random draws).
        """
        for _ in range(REDRAWS):
            arch = draw()
            if self._take(arch):
                return arch
        return self._random_unseen()

    def _random_unseen(self) -> A:
        for _ in range(REDRAWS):
            arch = self.space.sample(self.rng)
            if self._take(arch):
                return arch
        if self._rest is None and self._countable():
            self._rest = [arch for arch in self.space if self.space.key(arch) not in self._seen]
            self.rng.shuffle(self._rest)  # type: ignore[arg-type]
        if self._rest is not None:
            while self._rest:
                arch = self._rest.pop()
                if self._take(arch):
                    return arch
        else:
            for _ in range(BLIND_DRAWS):
                arch = self.space.sample(self.rng)
                if self._take(arch):
                    return arch
        raise StopIteration

    def _countable(self) -> bool:
        try:
            return len(self.space) <= MOST_ENUMERATED
        except UserError:
            return False

    def _take(self, arch: A) -> bool:
        """Mark `arch` as asked by the coming trial; False if an equal key was asked before."""
        key = self.space.key(arch)
        if key in self._seen:
            return False
        self._seen[key] = len(self.trials)
        return True


def positive(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int of at least `least`. Errors: UserError naming the setting."""
    if isinstance(value, bool) or not isinstance(value, REAL) or value != value // 1 or value < least:
        raise UserError(value, f"a whole number of at least {least} for {name}")
    return int(value)


def probability(name: str, value: Any) -> float:
    """`value` as a float from 0 to 1. Errors: UserError naming the setting."""
    if isinstance(value, bool) or not isinstance(value, REAL) or not 0 <= value <= 1:
        raise UserError(value, f"a probability from 0 to 1 for {name}")
    return float(value)
