"""RoBoT: a search for the weighting of proxies whose first choice is good, then down its ranking."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from nas.objectives import Objective
from nas.scoring.pool import Scores, make_pool, unit_scale
from nas.strategies.strategy import REAL, Strategy, positive
from search_spaces.common.errors import UserError
from search_spaces.space import SearchSpace

A = TypeVar("A")
CANDIDATES = 1000  # weightings among which the acquisition is maximised
DEFAULT_SCORES = "params,macs,live-macs,depth,paths"


class Robot(Strategy[A]):
    """Bayesian optimisation over the weights of proxies, then greedily by the best weighting (He et al., RoBoT:
    Robustifying and Boosting Training-Free Neural Architecture Search, ICLR 2024, algorithms 1 and 2).

    scores: a function [architectures] -> [N, M], or names of proxies (default: the counts of `space.cost`). table: a
    Parquet file with the scores, whose architectures are then the pool. scoring: settings of `ScoringTask` for proxies
    that must be computed. pool (20,000): the most architectures that are ranked. explore (16): how many architectures
    the search over weights asks for before the ranking is followed; 16 suits 20 queries. kappa (2.576): of the upper
    confidence bound. Proxies are scaled to [0, 1] over the pool, weights lie in [-1, 1].

    Unlike the paper: the first weighting is the equal one, since all proxies are oriented so that higher is better;
    and of the weightings drawn only those compete whose first choice is new, since what the others would give is known.
    When the pool is used up, random architectures follow. It never waits.
    """

    name = "robot"

    def __init__(
        self,
        space: SearchSpace[A],
        objectives: Sequence[Objective],
        rng: np.random.Generator,
        *,
        scores: Scores = DEFAULT_SCORES,
        table: str | None = None,
        scoring: Mapping[str, Any] | None = None,
        pool: int = 20_000,
        explore: int = 16,
        kappa: float = 2.576,
    ):
        super().__init__(space, objectives, rng)
        self.explore = positive("explore", explore)
        if isinstance(kappa, bool) or not isinstance(kappa, REAL) or not 0 <= kappa < math.inf:
            raise UserError(kappa, "a number of at least 0 for kappa")
        self.kappa = float(kappa)
        found = make_pool(space, scores, rng, size=positive("pool", pool), table=table, task=scoring)
        self.pool, self.proxies = found.archs, unit_scale(found.scores)
        self._asked = np.full(len(self.pool), -1)  # the trial of each architecture of the pool
        self._weightings: list[tuple[np.ndarray, int]] = []  # with the trial that its first choice is
        self._order: tuple[int, np.ndarray] | None = None

    def _propose(self) -> tuple[A, int | None, int | None]:
        if len(self._weightings) < min(self.explore, len(self.pool)) and (self._asked < 0).any():
            weights, choice = self._weighting()
            self._weightings.append((weights, len(self.trials)))
        elif (following := self._next_in_ranking()) is not None:
            choice = following
        else:
            return self._random_unseen(), None, None
        self._asked[choice] = len(self.trials)
        if not self._take(self.pool[choice]):
            raise AssertionError("the pool holds one architecture of each key")
        return self.pool[choice], None, None

    def _weighting(self) -> tuple[np.ndarray, int]:
        """The weighting to try next, and its first choice."""
        count = self.proxies.shape[1]
        if not self._weightings:
            equal = np.ones(count)
            return equal, int(np.argmax(self.proxies @ equal))
        drawn = self.rng.uniform(-1, 1, (CANDIDATES, count))
        firsts = np.argmax(drawn @ self.proxies.T, axis=1)
        fresh = self._asked[firsts] < 0
        if not fresh.any():  # few architectures are anyone's first choice: the best of the others by a drawn weighting
            left = np.flatnonzero(self._asked < 0)
            weights = drawn[int(np.argmax(self._acquisition(drawn)))]
            return weights, int(left[np.argmax(self.proxies[left] @ weights)])
        drawn, firsts = drawn[fresh], firsts[fresh]
        best = int(np.argmax(self._acquisition(drawn)))
        return drawn[best], int(firsts[best])

    def _acquisition(self, drawn: np.ndarray) -> np.ndarray:
        """The upper confidence bound of a Gaussian process; all alike while nothing tells weightings apart."""
        weights, values = self._observations()
        if len(set(values)) < 2:
            return np.zeros(len(drawn))
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import Matern

        kernel = Matern(nu=2.5, length_scale_bounds=(0.1, 10.0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound is fine
            model = GaussianProcessRegressor(kernel, alpha=1e-6, normalize_y=True).fit(weights, values)
            mean, deviation = model.predict(drawn, return_std=True)
        return mean + self.kappa * deviation

    def _observations(self) -> tuple[np.ndarray, np.ndarray]:
        """Weightings whose first choice was told, and its value; one that breaks a bound counts as the worst."""
        told = [(w, self.score(id)) for w, id in self._weightings if self.metrics.get(id) is not None]
        allowed = [value for _, (violation, value) in told if violation == 0]
        worst = min(allowed, default=0.0)
        values = [value if violation == 0 else worst for _, (violation, value) in told]
        return np.array([w for w, _ in told]), np.array(values)

    def _next_in_ranking(self) -> int | None:
        """The best architecture that was not asked for by the best weighting so far; None when all were."""
        told = [(self.score(id), -k) for k, (_, id) in enumerate(self._weightings) if self.metrics.get(id) is not None]
        place = -max(told)[1] if told else 0
        if self._order is None or self._order[0] != place:
            weights = self._weightings[place][0]
            self._order = place, np.argsort(-(self.proxies @ weights), kind="stable")
        left = self._order[1][self._asked[self._order[1]] < 0]
        return int(left[0]) if len(left) else None
