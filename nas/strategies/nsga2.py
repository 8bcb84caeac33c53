"""NSGA-II: a population that spreads along the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from nas.objectives import Objective, losses, violation
from nas.strategies.strategy import Strategy, positive, probability
from search_spaces.common.errors import UserError
from search_spaces.space import SearchSpace

A = TypeVar("A")


def non_dominated_sort(points: np.ndarray) -> list[np.ndarray]:
    """Indices of `points` [N, m] front by front, less is better (Deb et al. 2002, section III.A).

    Equal points share a front. O(m N^2).
    """
    points = np.asarray(points, float)
    no_worse = np.all(points[:, None] <= points[None], axis=2)
    dominates = no_worse & ~no_worse.T
    dominators = dominates.sum(axis=0)
    fronts = []
    while (dominators == 0).any():
        front = np.flatnonzero(dominators == 0)
        dominators -= dominates[front].sum(axis=0)
        dominators[front] = -1
        fronts.append(front)
    return fronts


def constrained_sort(points: np.ndarray, violations: np.ndarray) -> list[np.ndarray]:
    """Fronts under constrained domination (section VI): feasible ones first, then by violation."""
    feasible = np.flatnonzero(violations == 0)
    fronts = [feasible[front] for front in non_dominated_sort(points[feasible])]
    excesses = np.unique(violations[violations > 0])
    return fronts + [np.flatnonzero(violations == excess) for excess in excesses]


def crowding_distance(front: np.ndarray) -> np.ndarray:
    """How far apart the neighbours of each point of `front` [N, m] are, summed over the objectives (section III.B).

    Each objective is scaled by its range on the front; extreme points get infinity.
    """
    front = np.asarray(front, float)
    distance = np.zeros(len(front))
    for values in front.T:
        order = np.argsort(values, kind="stable")
        width = values[order[-1]] - values[order[0]]
        distance[order[[0, -1]]] = np.inf
        if width > 0:
            distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / width
    return distance


class Nsga2(Strategy[A]):
    """Elitist non-dominated sorting with crowding and constrained domination (Deb, Pratap, Agarwal and Meyarivan,
    IEEE Transactions on Evolutionary Computation 2002), over all objectives; one objective makes it an elitist GA.

    population (20): parents, and children of a generation (the paper has 100 for budgets of 25,000; architecture
    searches have a few hundred trials). crossover (0.9, section IV): probability of crossing two parents; 0 where the
    space has no crossover. mutation (1.0): probability of one change to the child; the paper changes each of n
    variables with probability 1/n, which is one change on average.

    Random architectures are asked until the first population is told. After that every `population` tells, failed ones
    counted, parents and children are sorted together and the best become parents; failed trials never do. It never
    waits: with several trials in flight the first children of a generation have parents of the one before.
    """

    name = "nsga-ii"

    def __init__(
        self,
        space: SearchSpace[A],
        objectives: Sequence[Objective],
        rng: np.random.Generator,
        *,
        population: int = 20,
        crossover: float = 0.9,
        mutation: float = 1.0,
    ):
        super().__init__(space, objectives, rng)
        self.population_size = positive("population", population, least=2)
        self.crossover = probability("crossover", crossover)
        self.mutation = probability("mutation", mutation)
        self.parents: list[int] = []  # trial ids
        self.fitness: list[tuple[int, float]] = []  # of each parent: (front, -crowding distance), less is better
        self._generation: list[int] = []  # told since the last selection

    def _propose(self) -> tuple[A, int | None, int | None]:
        if not self.parents:
            return self._unseen(lambda: self.space.sample(self.rng)), None, None
        parent, child = -1, None

        def draw() -> A:
            nonlocal parent, child
            parent, other = self._tournaments()
            child = self._breed(self.trials[parent].arch, self.trials[other].arch)
            return child

        arch = self._unseen(draw)
        return arch, None, parent if arch is child else None

    def _tournaments(self) -> tuple[int, int]:
        """The winners of two binary tournaments by the crowded comparison."""
        a, b, c, d = self.rng.integers(len(self.parents), size=4).tolist()
        first = a if self.fitness[a] <= self.fitness[b] else b
        second = c if self.fitness[c] <= self.fitness[d] else d
        return self.parents[first], self.parents[second]

    def _breed(self, first: A, second: A) -> A:
        child = first
        if self.rng.random() < self.crossover:
            try:
                child = self.space.crossover(first, second, self.rng)
            except UserError:
                self.crossover = 0.0
        return self.space.mutate(child, self.rng) if self.rng.random() < self.mutation else child

    def _observe(self, trial, metrics) -> None:
        self._generation.append(trial.id)
        if len(self._generation) == self.population_size:
            self._select(self.parents + [i for i in sorted(self._generation) if self.metrics[i] is not None])
            self._generation = []

    def _select(self, ids: list[int]) -> None:
        """The best `population` of `ids`: whole fronts, the last one by crowding."""
        if not ids:
            return
        measured = [self.metrics[i] or {} for i in ids]
        points = np.array([losses(self.objectives, metrics) for metrics in measured])
        violations = np.array([violation(self.objectives, metrics) for metrics in measured])
        self.parents, self.fitness = [], []
        for rank, front in enumerate(constrained_sort(points, violations)):
            crowding = crowding_distance(points[front])
            order = np.argsort(-crowding, kind="stable")[: self.population_size - len(self.parents)]
            self.parents += [ids[i] for i in front[order]]
            self.fitness += [(rank, -float(crowding[i])) for i in order]
            if len(self.parents) == self.population_size:
                break
