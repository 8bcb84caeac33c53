"""Random search: the baseline that everything is measured against."""

from __future__ import annotations

from typing import TypeVar

from nas.strategies.strategy import Strategy

A = TypeVar("A")


class RandomSearch(Strategy[A]):
    """Architectures drawn by the space's own sampler, each class once (Li and Talwalkar, UAI 2019)."""

    name = "random-search"

    def _propose(self) -> tuple[A, int | None, int | None]:
        return self._unseen(lambda: self.space.sample(self.rng)), None, None
