"""Hyperband: successive halving with several trade-offs between many and long."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from nas.objectives import Objective
from nas.strategies.successive_halving import Bracket, SuccessiveHalving
from search_spaces.space import SearchSpace

A = TypeVar("A")


class Hyperband(SuccessiveHalving[A]):
    """Brackets of successive halving that begin on every rung in turn (Li et al., JMLR 2018, algorithm 1).

    fidelities (12, 200): the rungs, ascending. eta (3, the paper's default): 1/eta of a rung goes on.
    The paper spaces its rungs by eta; here they are what the table or the training offers, and s_max is their number
    less one. Bracket s = s_max, ..., 0 begins s rungs below the top with n = ceil((s_max + 1) / (s + 1) * eta^s)
    fresh architectures; after s = 0 it starts over. The rest is as in SuccessiveHalving.
    """

    name = "hyperband"

    def __init__(
        self,
        space: SearchSpace[A],
        objectives: Sequence[Objective],
        rng: np.random.Generator,
        *,
        fidelities: Sequence[int] = (12, 200),
        eta: int = 3,
    ):
        super().__init__(space, objectives, rng, fidelities=fidelities, eta=eta)
        self._levels = itertools.cycle(reversed(range(len(self.fidelities))))

    def _next_bracket(self) -> Bracket:
        level, most = next(self._levels), len(self.fidelities) - 1
        entering = math.ceil(((most + 1) * self.eta**level) / (level + 1))
        return Bracket(self.fidelities[most - level :], deque([None] * entering))
