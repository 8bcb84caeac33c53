"""Synthetic learning curves over any space: an evaluator for trying out and testing searches. It measures nothing."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from nas.strategies.strategy import positive
from search_spaces.common.errors import UserError
from search_spaces.graph import live
from search_spaces.registry import load_space
from search_spaces.space import SearchSpace

LOWEST, HIGHEST = 60.0, 95.0  # percent: limits of the curves
SLOWEST, FASTEST = 0.5, 0.9  # exponents of the power law


def learning_curve(limit: float, epochs: int, *, gap: float, exponent: float) -> float:
    """`limit - gap * epochs^-exponent`: the power law pow3 of Domhan, Springenberg and Hutter (IJCAI 2015)."""
    return limit - gap * epochs**-exponent


@dataclass(frozen=True)
class SyntheticCurves:
    """Made-up validation accuracies (percent) that grow with training; nothing is trained or looked up.

    space: a name of the registry or `package.module:object`. epochs (200): the full fidelity. landscape (0): seed of
    the random weights that rate an architecture; another one is another benchmark. gap (40): percent between the
    limit and one epoch. noise (1): standard deviation in percent after one epoch, shrinking with the square root of
    the epochs; it follows from the trial's seed. seconds_per_epoch (10): `cost_seconds` is proportional to the epochs.

    The limit, from 60 to 95, and the speed of learning depend on the live graph's operations and pairs of connected
    operations only, so isomorphic architectures and neighbours are alike. Fast learners need not be good ones: curves
    cross. A graph without a path from input to output gets the lowest limit.
    Errors: UserError for an unknown space or a setting out of range.
    """

    space: str = "nas-bench-201"
    epochs: int = 200
    landscape: int = 0
    gap: float = 40.0
    noise: float = 1.0
    seconds_per_epoch: float = 10.0

    def __post_init__(self) -> None:
        load_space(self.space)
        positive("epochs", self.epochs)
        positive("landscape", self.landscape, least=0)
        if not 0 <= self.gap <= LOWEST:
            raise UserError(self.gap, f"a number from 0 to {LOWEST:g} for gap")
        if not 0 <= self.noise < math.inf:
            raise UserError(self.noise, "a number of at least 0 for noise")
        if not self.seconds_per_epoch > 0:
            raise UserError(self.seconds_per_epoch, "a number above 0 for seconds_per_epoch")

    def evaluate(self, arch: Any, fidelity: int | None = None, *, seed: int) -> dict[str, float]:
        """`val_acc` and `cost_seconds` after `fidelity` epochs (None: all). Errors: UserError outside 1 to `epochs`."""
        epochs = self.epochs if fidelity is None else fidelity
        if not 1 <= epochs <= self.epochs:
            raise UserError(fidelity, f"a fidelity from 1 to {self.epochs} epochs")
        limit, exponent = self.traits(arch)
        value = learning_curve(limit, epochs, gap=self.gap, exponent=exponent)
        value += self.noise / math.sqrt(epochs) * float(np.random.default_rng((seed, epochs)).standard_normal())
        return {"val_acc": min(max(value, 0.0), 100.0), "cost_seconds": self.seconds_per_epoch * epochs}

    def fidelities(self) -> list[int]:
        """Four rungs from 1/27 of the epochs up, a factor of 3 apart, for searches over several fidelities."""
        return sorted({max(1, round(self.epochs / 3**k)) for k in range(4)})

    def traits(self, arch: Any) -> tuple[float, float]:
        """(limit in percent, exponent) of the architecture's curve."""
        space, weights = _landscape(self.space, self.landscape)
        graph = space.graph(arch)
        alive = np.flatnonzero(live(graph))
        ops = np.array([space.vocabulary.index(graph.ops[i]) for i in alive])
        sources, targets = np.nonzero(graph.adjacency[np.ix_(alive, alive)])
        if len(sources) == 0:
            return LOWEST, SLOWEST
        # The sine keeps a random sum within limits and spreads the architectures over all of them.
        rating = weights[:, ops, -1].sum(axis=1) + weights[:, ops[sources], ops[targets]].sum(axis=1)
        share = 0.5 + 0.5 * np.sin(rating / math.sqrt(len(ops) + len(sources)))
        return LOWEST + (HIGHEST - LOWEST) * float(share[0]), SLOWEST + (FASTEST - SLOWEST) * float(share[1])


@functools.lru_cache(maxsize=8)
def _landscape(space_name: str, landscape: int) -> tuple[SearchSpace, np.ndarray]:
    """The space and its weights [2, operations, operations + 1]: pairs, and in the last column single operations."""
    space = load_space(space_name)
    count = len(space.vocabulary)
    return space, np.random.default_rng(landscape).standard_normal((2, count, count + 1))
