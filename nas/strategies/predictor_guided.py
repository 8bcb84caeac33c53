"""Searches guided by a learned predictor: fit on what was measured, ask for what it promises, again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from nas.objectives import Objective
from nas.strategies.strategy import REAL, Strategy, positive, probability
from predictors.graphs import GraphTable, as_table
from search_spaces.common.errors import UserError
from search_spaces.common.names import match
from search_spaces.space import SearchSpace

A = TypeVar("A")
PredictorChoice = str | Callable[[str, tuple[str, ...]], Any]
DEFAULT_PREDICTOR = "gp-graf"
CANDIDATES = ("auto", "space", "mutations", "local")
PARENTS = ("best", "tournament")
ACQUISITIONS = ("auto", "mean", "ucb", "its")
LEAST_LABELS = 3
MUTATIONS_TRIED = 5  # per candidate wanted, before fewer will do
MOST_STEPS = 20  # of a climb over predictions


class PredictorGuided(Strategy[A]):
    """Random architectures, then in each round those that a predictor of what was measured ranks best.

    predictor (gp-graf): a name (`nas predict list`) or a function (space name, vocabulary) -> Predictor; settings: its
    own. initial (20): random architectures first. batch (10): queries between two fits. acquisition (auto): what
    candidates are ranked by: `mean`, the prediction; `ucb`, plus kappa (1) standard deviations; `its`, a draw of
    independent Thompson sampling (White et al., BANANAS, AAAI 2021, section 4); auto: `its` where the predictor knows
    how sure it is, else `mean`.

    candidates (auto): `space`, everything that was not asked, for spaces of at most `pool` (50,000); `mutations`,
    `count` (200) mutations of parents, of which the best are mutated again for `generations` (2) rounds by prediction
    alone; `local`, what climbs over predicted neighbours from the parents meet; auto: `space` where that is possible,
    else `mutations`. parents (best): the `population` (20) best told, or `tournament`: winners among `tournament` (5)
    drawn of the `population` told last (Ji, Feng and Sun, CAP, IJCAI 2024, supplement). among (0): where it exceeds
    `batch`, the batch is drawn from so many best candidates. random_share (0): of the queries after the first, drawn
    at random. unlabelled (0): random architectures handed to predictors that pre-train; where the candidates are the
    whole space, it is that. warm_from: the folder of a search or of a saved predictor, from which every fit starts
    (see `nas.prediction.transfer`); it has to stay as it is while the search may be resumed.

    It never waits: with several trials in flight it fits on what was told. Failed trials are left out of the fit; one
    that breaks a bound counts as worse than all that keep them. Fewer than three different values: random again.
    """

    name = "predictor"

    def __init__(
        self,
        space: SearchSpace[A],
        objectives: Sequence[Objective],
        rng: np.random.Generator,
        *,
        predictor: PredictorChoice = DEFAULT_PREDICTOR,
        settings: Mapping[str, Any] | None = None,
        initial: int = 20,
        batch: int = 10,
        acquisition: str = "auto",
        kappa: float = 1.0,
        candidates: str = "auto",
        pool: int = 50_000,
        count: int = 200,
        generations: int = 2,
        parents: str = "best",
        population: int = 20,
        tournament: int = 5,
        among: int = 0,
        random_share: float = 0.0,
        unlabelled: int = 0,
        warm_from: str | None = None,
    ):
        super().__init__(space, objectives, rng)
        self.initial, self.batch = positive("initial", initial), positive("batch", batch)
        self.acquisition = match(str(acquisition), ACQUISITIONS, "an acquisition")
        if isinstance(kappa, bool) or not isinstance(kappa, REAL) or not 0 <= kappa < np.inf:
            raise UserError(kappa, "a number of at least 0 for kappa")
        self.kappa = float(kappa)
        self.count, self.generations = positive("count", count), positive("generations", generations)
        self.parents = match(str(parents), PARENTS, "a choice of parents")
        self.population, self.tournament = positive("population", population), positive("tournament", tournament)
        self.among = positive("among", among, least=0)
        self.random_share = probability("random_share", random_share)
        self._make = _maker(predictor, settings or {}, space, warm_from)
        self._make()  # a name or setting that is unknown is refused now
        kind = match(str(candidates), CANDIDATES, "a choice of candidates")
        self._pool = self._whole_space(kind, positive("pool", pool))
        self.candidates = kind if kind != "auto" else ("mutations" if self._pool is None else "space")
        self._unlabelled = self._background(positive("unlabelled", unlabelled, least=0))
        self._queue: list[tuple[A, int | None]] = []  # what the last fit chose, the best last

    def _whole_space(self, kind: str, most: int) -> _Pool[A] | None:
        if kind not in ("auto", "space"):
            return None
        try:
            size = len(self.space)
        except (UserError, OverflowError, TypeError):
            size = most + 1
        if size <= most:
            return _whole(self.space)
        if kind == "space":
            raise UserError(kind, f"`mutations` or `local`: {self.space.name} is no space of at most {most:,}", "auto")
        return None

    def _background(self, count: int) -> GraphTable | None:
        if self._pool is not None:
            return self._pool.table
        return self._table([self.space.sample(self.rng) for _ in range(count)]) if count else None

    def _propose(self) -> tuple[A, int | None, int | None]:
        if len(self.trials) < self.initial or (self.random_share and self.rng.random() < self.random_share):
            return self._unseen(lambda: self.space.sample(self.rng)), None, None
        for _ in range(2):  # what stands in the queue may have been asked at random since
            while self._queue:
                arch, parent = self._queue.pop()
                if self._take(arch):
                    return arch, None, parent
            self._queue = self._choose()
            if not self._queue:
                break
        return self._unseen(lambda: self.space.sample(self.rng)), None, None

    def _choose(self) -> list[tuple[A, int | None]]:
        """The next batch, the best last; empty where nothing can be learned yet or nothing is left."""
        told = [id for id in range(len(self.trials)) if self.metrics.get(id) is not None]
        labels = self._labels(told)
        if len(told) < LEAST_LABELS or labels.min() == labels.max():
            return []
        predictor = self._make()
        measured = self._table([self.trials[id].arch for id in told])
        predictor.fit(measured, labels, unlabelled=self._unlabelled, rng=self.rng)
        found: _Ranking[A] = _Ranking(lambda archs: self._values(predictor, self._table(archs)))
        if self.candidates == "space":
            assert self._pool is not None
            unseen = np.array([k for k, key in enumerate(self._pool.keys) if key not in self._seen], np.int64)
            if not len(unseen):
                return []
            archs = [self._pool.archs[k] for k in unseen]
            found.add(archs, [None] * len(archs), self._values(predictor, self._pool.table.take(unseen)))
        elif self.candidates == "mutations":
            self._mutate(found, told)
        else:
            self._climb(found, told)
        return self._best(found)

    def _best(self, found: _Ranking[A]) -> list[tuple[A, int | None]]:
        order = np.argsort(-np.array(found.values), kind="stable")[: max(self.among, self.batch)]
        if len(order) > self.batch:
            order = np.sort(self.rng.permutation(len(order))[: self.batch])
            order = np.argsort(-np.array(found.values), kind="stable")[order]
        return [(found.archs[k], found.parents[k]) for k in order.tolist()][::-1]

    # -- candidates ----------------------------------------------------------------------------------------------

    def _mutate(self, found: _Ranking[A], told: Sequence[int]) -> None:
        """Mutations of the parents, then of the best of them by prediction."""
        origins: list[tuple[A, int | None]] = [(self.trials[id].arch, id) for id in self._parents(told)]
        met = set(self._seen)
        for _ in range(self.generations):
            archs: list[A] = []
            parents: list[int | None] = []
            for _ in range(MUTATIONS_TRIED * self.count):
                if len(archs) == self.count:
                    break
                origin, parent = origins[int(self.rng.integers(len(origins)))]
                child = self.space.mutate(origin, self.rng)
                if (key := self.space.key(child)) not in met:
                    met.add(key)
                    archs.append(child)
                    parents.append(parent)
            if not archs:
                return
            found.rank(archs, parents)
            best = np.argsort(-np.array(found.values), kind="stable")[: self.population].tolist()
            origins = [(found.archs[k], found.parents[k]) for k in best]

    def _climb(self, found: _Ranking[A], told: Sequence[int]) -> None:
        """Hill climbing on predictions from every parent; what was asked counts as a step but is no candidate."""
        met = set(self._seen)
        for start in dict.fromkeys(self._parents(told)):
            centre, height = self.trials[start].arch, -np.inf
            for _ in range(MOST_STEPS):
                fresh = []
                for other in self.space.neighbors(centre):
                    if (key := self.space.key(other)) not in met:
                        met.add(key)
                        fresh.append(other)
                if not fresh:
                    break
                values = found.rank(fresh, [start] * len(fresh))
                top = int(np.argmax(values))
                if not values[top] > height:
                    break
                centre, height = fresh[top], values[top]

    def _parents(self, told: Sequence[int]) -> list[int]:
        if self.parents == "best":
            return sorted(told, key=lambda id: (self.score(id), -id), reverse=True)[: self.population]
        alive = told[-self.population :]
        drawn = self.rng.integers(len(alive), size=(self.population, self.tournament)).tolist()
        return [max((alive[k] for k in row), key=self.score) for row in drawn]

    # -- learning ------------------------------------------------------------------------------------------------

    def _labels(self, told: Sequence[int]) -> np.ndarray:
        """The primary metric, higher is better; what breaks a bound lies below all that keep them, by how much."""
        scores = np.array([self.score(id) for id in told]).reshape(-1, 2)
        kept = scores[:, 0] == 0
        if kept.all():
            return scores[:, 1]
        floor, room = scores[:, 1].min(), max(float(np.ptp(scores[:, 1])), 1.0)
        return np.where(kept, scores[:, 1], floor + room * scores[:, 0])

    def _values(self, predictor: Any, table: GraphTable) -> np.ndarray:
        if self.acquisition == "mean":
            return np.asarray(predictor.predict(table), np.float64)
        mean, deviation = predictor.predict(table, return_std=True)
        if np.isnan(deviation).all():
            if self.acquisition == "auto":
                return np.asarray(mean, np.float64)
            raise UserError(self.acquisition, "a predictor that knows how sure it is beside it, or `mean`", "mean")
        if self.acquisition == "ucb":
            return mean + self.kappa * deviation
        return mean + deviation * self.rng.standard_normal(len(mean))

    def _table(self, archs: Sequence[A]) -> GraphTable:
        return as_table([self.space.graph(arch) for arch in archs], self.space.vocabulary)


class _Ranking(Generic[A]):
    """Candidates with the trials that they descend from and their values."""

    def __init__(self, value: Callable[[list[A]], np.ndarray]):
        self._value = value
        self.archs: list[A] = []
        self.parents: list[int | None] = []
        self.values: list[float] = []

    def add(self, archs: Sequence[A], parents: Sequence[int | None], values: np.ndarray) -> None:
        self.archs += archs
        self.parents += parents
        self.values += values.tolist()

    def rank(self, archs: list[A], parents: Sequence[int | None]) -> np.ndarray:
        values = self._value(archs)
        self.add(archs, parents, values)
        return values


class _Pool(Generic[A]):
    """A whole space, one architecture of each key, as a GraphTable too."""

    def __init__(self, space: SearchSpace[A]):
        first: dict[str, A] = {}
        for arch in space:
            first.setdefault(space.key(arch), arch)
        self.keys, self.archs = list(first), list(first.values())
        self.table = as_table([space.graph(arch) for arch in self.archs], space.vocabulary)


@functools.lru_cache(maxsize=2)
def _whole(space: SearchSpace) -> _Pool:
    """Many seeds on one space share it."""
    return _Pool(space)


def _maker(
    predictor: PredictorChoice, settings: Mapping[str, Any], space: SearchSpace, warm_from: str | None
) -> Callable[[], Any]:
    if callable(predictor):
        plain = functools.partial(predictor, space.name, space.vocabulary)
    else:
        from predictors.registry import make_predictor

        plain = functools.partial(make_predictor, str(predictor), space.name, space.vocabulary, **settings)
    if warm_from is None:
        return plain
    from nas.prediction.transfer import warm_start

    return warm_start(warm_from, plain, DEFAULT_PREDICTOR if callable(predictor) else str(predictor), settings)
