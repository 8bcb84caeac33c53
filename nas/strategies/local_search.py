"""Local search: climb to a local optimum, start again elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from nas.objectives import Objective
from nas.strategies.strategy import Strategy
from search_spaces.common.names import match
from search_spaces.space import SearchSpace

A = TypeVar("A")
FIRST_IMPROVEMENT, FULL = "first-improvement", "full"


@dataclass(eq=False, slots=True)
class Climb(Generic[A]):
    """One ascent. `centre` and `best` are trial ids, -1 until the start is told."""

    centre: int = -1
    best: int = -1
    best_score: tuple[float, float] = (0.0, 0.0)
    unvisited: list[A] = field(default_factory=list)  # neighbours of the centre, in random order
    waiting: set[int] = field(default_factory=set)  # trials in flight that this climb needs


class LocalSearch(Strategy[A]):
    """Hill climbing with random restarts (White, Nolen and Savani, UAI 2021; settings of the authors' naszilla).

    query ("first-improvement"): neighbours are asked in random order and the first that is strictly better becomes
    the new centre; "full": all of them are asked and the best becomes it. At a local optimum a fresh random
    architecture starts the next climb. A neighbour that was asked before costs nothing: its score is known.

    It never waits: with several trials in flight, a worker that no open climb can use starts a climb of its own;
    a better result of an abandoned neighbourhood still moves its climb. A failed start is given up.
    """

    name = "local-search"

    def __init__(
        self,
        space: SearchSpace[A],
        objectives: Sequence[Objective],
        rng: np.random.Generator,
        *,
        query: str = FIRST_IMPROVEMENT,
    ):
        super().__init__(space, objectives, rng)
        self.query = match(str(query), (FIRST_IMPROVEMENT, FULL), "a value of query")
        self.climbs: list[Climb[A]] = []  # those that are not at their optimum yet, oldest first

    def _propose(self) -> tuple[A, int | None, int | None]:
        for climb in tuple(self.climbs):
            arch = self._next_neighbor(climb)
            if arch is not None:
                climb.waiting.add(len(self.trials))
                return arch, None, climb.centre
        arch = self._unseen(lambda: self.space.sample(self.rng))
        self.climbs.append(Climb(waiting={len(self.trials)}))
        return arch, None, None

    def _observe(self, trial, metrics) -> None:
        for climb in tuple(self.climbs):
            if trial.id in climb.waiting:
                climb.waiting.remove(trial.id)
                if climb.centre >= 0:
                    self._compare(climb, trial.id)
                elif metrics is None:
                    self.climbs.remove(climb)
                else:
                    self._move(climb, trial.id)

    def _next_neighbor(self, climb: Climb[A]) -> A | None:
        """A neighbour that must be asked; None if the climb ended here or has to wait."""
        while climb.unvisited:
            arch = climb.unvisited.pop()
            known = self._seen.get(self.space.key(arch))
            if known is None:
                self._take(arch)
                return arch
            if known in self.metrics:
                self._compare(climb, known)
            else:
                climb.waiting.add(known)
        if not climb.waiting:
            self.climbs.remove(climb)  # a local optimum
        return None

    def _compare(self, climb: Climb[A], id: int) -> None:
        score = self.score(id)
        if score > climb.best_score:
            climb.best, climb.best_score = id, score
        complete = not climb.unvisited and not climb.waiting
        if climb.best != climb.centre and (complete or self.query == FIRST_IMPROVEMENT):
            self._move(climb, climb.best)

    def _move(self, climb: Climb[A], id: int) -> None:
        climb.centre = climb.best = id
        climb.best_score = self.score(id)
        around = list(self.space.neighbors(self.trials[id].arch))
        climb.unvisited = [around[i] for i in self.rng.permutation(len(around)).tolist()]
