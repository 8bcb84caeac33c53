"""Regularised (ageing) evolution: the oldest dies, not the worst."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from nas.objectives import Objective, losses, non_dominated, violation
from nas.strategies.strategy import Strategy, positive
from search_spaces.common.errors import UserError
from search_spaces.common.names import match
from search_spaces.space import SearchSpace

A = TypeVar("A")
WINNERS = ("best", "pareto")


class RegularizedEvolution(Strategy[A]):
    """Tournament selection, one mutation, removal of the oldest (Real et al., AAAI 2019, algorithm 1).

    population (10): members alive; as many random architectures begin. tournament (3): members drawn with
    replacement, the best of which becomes the parent. Both defaults are those of NATS-Bench (Dong et al., TPAMI 2021).
    winner (best): `best` by the primary objective, or `pareto`, a random one of those that no other drawn member
    dominates in all objectives (Liu et al., NeurIPS 2020, arXiv 2004.02967, section 3.3).

    It never waits: with several trials in flight a parent is chosen among those told so far (none yet: a random
    architecture is asked). Age counts from the tell. A failed trial does not enter the population.
    A child that was asked before is drawn again, tournament included.
    """

    name = "regularized-evolution"

    def __init__(
        self,
        space: SearchSpace[A],
        objectives: Sequence[Objective],
        rng: np.random.Generator,
        *,
        population: int = 10,
        tournament: int = 3,
        winner: str = "best",
    ):
        super().__init__(space, objectives, rng)
        self.population_size = positive("population", population)
        self.tournament_size = positive("tournament", tournament)
        if tournament > population:
            raise UserError(tournament, f"a tournament of at most the population ({population})")
        self.winner = match(winner, WINNERS, "a winner of tournaments")
        # (score, trial id), oldest first
        self.population: deque[tuple[tuple[float, float], int]] = deque(maxlen=self.population_size)

    def _propose(self) -> tuple[A, int | None, int | None]:
        if len(self.trials) < self.population_size or not self.population:
            return self._unseen(lambda: self.space.sample(self.rng)), None, None
        parent, child = -1, None

        def draw() -> A:
            nonlocal parent, child
            parent = self._tournament()
            child = self.space.mutate(self.trials[parent].arch, self.rng)
            return child

        arch = self._unseen(draw)
        return arch, None, parent if arch is child else None

    def _tournament(self) -> int:
        drawn = self.rng.integers(len(self.population), size=self.tournament_size).tolist()
        if self.winner == "best":
            return max((self.population[i] for i in drawn), key=lambda member: member[0])[1]
        ids = [self.population[i][1] for i in drawn]
        least = min(violation(self.objectives, self._metrics(i)) for i in ids)
        ids = [i for i in ids if violation(self.objectives, self._metrics(i)) == least]
        front = non_dominated(np.array([losses(self.objectives, self._metrics(i)) for i in ids]))
        return ids[int(front[self.rng.integers(len(front))])]

    def _metrics(self, id: int) -> Mapping[str, float]:
        metrics = self.metrics[id]
        assert metrics is not None  # failed trials are not in the population
        return metrics

    def _observe(self, trial, metrics) -> None:
        if metrics is not None:
            self.population.append((self.score(trial.id), trial.id))  # the oldest leaves by itself
