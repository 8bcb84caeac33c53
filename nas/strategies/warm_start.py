"""Warm start: any strategy, begun with what a proxy ranks best instead of random architectures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from nas.objectives import Objective
from nas.scoring.pool import Scores, make_pool
from nas.strategies.strategy import Strategy, Trial, positive
from search_spaces.common.errors import UserError
from search_spaces.space import SearchSpace
from zero_cost.correlation import log_rank_sum

A = TypeVar("A")


class WarmStart(Strategy[A]):
    """Another strategy whose first random architectures are the best of a pool by proxies (Abdelfattah et al.,
    Zero-Cost Proxies for Lightweight NAS, ICLR 2021, section 4.2).

    strategy (regularized-evolution), settings: which one, and its own settings. count (10): how many of its random
    draws are replaced. scores, table, scoring: as for `robot`; several proxies are put together by the sum of their
    log-ranks. pool (3,000): architectures that are ranked, as in the paper.
    Errors: UserError for a strategy that draws nothing at random (`grid`) or that begins with proxies itself.
    """

    name = "warm-start"

    def __init__(
        self,
        space: SearchSpace[A],
        objectives: Sequence[Objective],
        rng: np.random.Generator,
        *,
        strategy: str = "regularized-evolution",
        settings: Mapping[str, Any] | None = None,
        count: int = 10,
        scores: Scores = "live-macs",
        table: str | None = None,
        scoring: Mapping[str, Any] | None = None,
        pool: int = 3000,
    ):
        from nas.strategies import make_strategy, strategy_class

        super().__init__(space, objectives, rng)
        name = strategy_class(strategy).name
        if name in ("grid", "robot", self.name):
            raise UserError(strategy, "a strategy that begins with random architectures", "regularized-evolution")
        found = make_pool(space, scores, rng, size=positive("pool", pool), table=table, task=scoring)
        order = np.argsort(-log_rank_sum(list(found.scores.T)), kind="stable")[: positive("count", count)]
        first = [found.archs[k] for k in order]
        self.inner = make_strategy(name, _Begun(space, first), objectives, rng, **(settings or {}))  # type: ignore[arg-type]
        self.trials, self.metrics = self.inner.trials, self.inner.metrics

    def ask(self) -> Trial[A] | None:
        """As the other strategy."""
        return self.inner.ask()

    def tell(self, id: int, metrics: Mapping[str, float] | None) -> None:
        """As the other strategy."""
        self.inner.tell(id, metrics)

    def _propose(self) -> tuple[A, int | None, int | None] | None:
        raise AssertionError("the other strategy is asked")


class _Begun:
    """A space whose first samples are given; a copy of the list for each strategy."""

    def __init__(self, space: SearchSpace, first: list[Any]):
        self._space, self._first = space, first[::-1]

    def sample(self, rng: np.random.Generator) -> Any:
        return self._first.pop() if self._first else self._space.sample(rng)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._space, name)

    def __len__(self) -> int:
        return len(self._space)

    def __iter__(self) -> Any:
        return iter(self._space)
