"""Grid: every architecture of an enumerable space, once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from nas.objectives import Objective
from nas.strategies.strategy import Strategy
from search_spaces.common.errors import UserError
from search_spaces.space import SearchSpace

A = TypeVar("A")


class Grid(Strategy[A]):
    """The space in its own order of iteration; of every class of equal keys the first member.

    shuffle (False): a random order instead; it lists the whole space in memory first.
    Errors: UserError for a space that cannot be enumerated.
    """

    name = "grid"

    def __init__(
        self, space: SearchSpace[A], objectives: Sequence[Objective], rng: np.random.Generator, *, shuffle: bool = False
    ):
        super().__init__(space, objectives, rng)
        if not isinstance(shuffle, bool):
            raise UserError(shuffle, "True or False for shuffle")
        self._order: Iterator[A] = iter(space)
        if shuffle:
            listed = list(self._order)
            self._order = (listed[i] for i in rng.permutation(len(listed)))

    def _propose(self) -> tuple[A, int | None, int | None]:
        for arch in self._order:
            if self._take(arch):
                return arch, None, None
        raise StopIteration
