"""The ensemble `auto`: members on one scale, weighted by cross-validation inside the labelled graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import scipy.optimize
from scipy.special import ndtri

from predictors.base import LearnedPredictor
from predictors.graphs import GraphTable
from predictors.labels import scaled
from search_spaces.common.errors import UserError, one_of
from search_spaces.graph import OpGraph

REFERENCE = 1000  # graphs on which members are brought to one scale
LEAST_PER_FOLD = 5  # fewer labelled graphs than folds times this: equal weights
WEIGHTINGS = ("cross-validation", "equal")


@dataclass(frozen=True)
class EnsembleSettings:
    """members: names of predictors; those that need unlabelled graphs are left out where none are given. weighting:
    cross-validation or equal. folds: of the cross-validation; above `many` labels one fifth is held out once instead.
    shrink: pull of the weights to equal ones, in labels: 0 trusts the folds alone."""

    members: tuple[str, ...] = ("gp-graf", "gbt-graf", "feature-distilled")
    weighting: str = "cross-validation"
    folds: int = 3
    many: int = 1000
    shrink: float = 20.0

    def __post_init__(self) -> None:
        if not self.members:
            raise UserError(self.members, "at least one member")
        if self.weighting not in WEIGHTINGS:
            raise UserError(self.weighting, f"a weighting ({one_of(WEIGHTINGS)})", WEIGHTINGS[0])
        if self.folds < 2:
            raise UserError(self.folds, "at least 2 folds")


class Ensemble(LearnedPredictor[EnsembleSettings]):
    """Weighted mean of gp-graf, gbt-graf and feature-distilled (or others), weights by cross-validation.

    Predictions are first brought to normal scores on a reference population.
    Weights are not negative and fit the out-of-fold predictions to the labels' normal scores by least squares (Breiman,
    Stacked Regressions, 1996), pulled towards equal weights, then divided by their sum. The standard deviation joins
    the members' own with that between them.
    """

    kind = "auto"
    Settings = EnsembleSettings
    progress: Any = None
    weights: dict[str, float]  # of the members, after fit
    _job: _Job | None = None
    _waits = False

    def fit_many(
        self,
        problems: Sequence[
            tuple[Sequence[OpGraph], np.ndarray, Mapping[str, np.ndarray] | None, Sequence[OpGraph] | None]
        ],
        rngs: Sequence[np.random.Generator],
    ) -> list[Self]:
        """New predictors of these settings, one for each problem (graphs, y, extra, unlabelled); members that train in
        stacks train for all problems and folds at once."""
        fitted = [type(self)(self.space_name, self.vocabulary, self.settings) for _ in problems]
        for predictor, (graphs, y, extra, unlabelled), rng in zip(fitted, problems, rngs, strict=True):
            predictor._waits, predictor.progress = True, self.progress
            predictor.fit(graphs, y, extra=extra, unlabelled=unlabelled, rng=rng)
            predictor._waits = False
        _train_together(fitted)
        return fitted

    def _fit(self, table, y, extra, unlabelled, rng) -> None:
        from predictors.registry import make_predictor

        members = {}
        for name in self.settings.members:
            member = make_predictor(name, self.space_name, self.vocabulary)
            if unlabelled is not None or not member.needs_unlabelled:
                members[name] = member
        if not members:
            raise UserError(list(self.settings.members), "a member that needs no unlabelled graphs, or some of these")
        self._job = _Job(table, y, extra, self.extra_names, unlabelled, self.settings, rng)
        self._members = members
        if not self._waits:
            _train_together([self])

    def member_predictions(
        self, graphs: Sequence[OpGraph], *, extra: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """[N] predictions of every member, each on its own scale."""
        return {name: member.predict(graphs, extra=extra) for name, member in self._members.items()}

    def combine(self, predictions: Mapping[str, np.ndarray]) -> np.ndarray:
        """[N] predictions of the ensemble from those of its members."""
        return sum(
            (
                self.weights[name] * to_normal_scores(values, self._references[name])
                for name, values in predictions.items()
            ),
            np.zeros(()),
        )

    def _predict(self, table, extra, std) -> tuple[np.ndarray, np.ndarray]:
        columns = dict(zip(self.extra_names, extra.T, strict=True))
        if not std:
            return self.combine(self.member_predictions(table, extra=columns)), np.full(len(table), np.nan)
        mean, second = np.zeros(len(table)), np.zeros(len(table))
        for name, member in self._members.items():
            values, own = member.predict(table, extra=columns, return_std=True)
            place = to_normal_scores(values, self._references[name])
            own = np.nan_to_num(own / max(self._references[name].std(), 1e-12))
            mean += self.weights[name] * place
            second += self.weights[name] * (place**2 + own**2)
        return mean, np.sqrt(np.maximum(second - mean**2, 0))

    def _state(self) -> dict[str, np.ndarray]:
        state = {"weights": np.array([self.weights[name] for name in self._members])}
        state["names"] = np.frombuffer("\n".join(self._members).encode(), np.uint8)
        for name, member in self._members.items():
            assert member._data is not None
            state[f"{name}/reference"] = self._references[name]
            state[f"{name}/seed"] = np.array([member._data[3]], np.int64)
            state |= {f"{name}/state.{key}": value for key, value in member._state().items()}
        return state

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        from predictors.registry import make_predictor

        assert self._data is not None
        table, y, extra, _ = self._data
        names = state["names"].tobytes().decode().split("\n")
        self.weights = dict(zip(names, state["weights"].tolist(), strict=True))
        self._references = {name: state[f"{name}/reference"] for name in names}
        self._members = {}
        for name in names:
            member = make_predictor(name, self.space_name, self.vocabulary)
            member.extra_names = self.extra_names
            member._data = (table, y, extra, int(state[f"{name}/seed"][0]))
            start = f"{name}/state."
            member._restore({key[len(start) :]: value for key, value in state.items() if key.startswith(start)})
            self._members[name] = member


class _Job:
    """What one fit was given, its folds and its reference population."""

    def __init__(self, table: GraphTable, y: np.ndarray, extra: np.ndarray, names, unlabelled, settings, rng):
        self.table, self.y, self.extra, self.names, self.unlabelled = table, y, extra, names, unlabelled
        size = len(table)
        order = rng.permutation(size)
        self.folds: list[np.ndarray] = []
        if settings.weighting == "cross-validation" and len(settings.members) > 1:
            if size > settings.many:
                self.folds = [order[: size // 5]]
            elif size >= LEAST_PER_FOLD * settings.folds:
                self.folds = np.array_split(order, settings.folds)
        population = table if unlabelled is None or extra.shape[1] else unlabelled
        chosen = np.sort(rng.choice(len(population), min(REFERENCE, len(population)), replace=False))
        self.reference = population.take(chosen)
        self.reference_extra = extra[chosen] if extra.shape[1] else np.zeros((len(chosen), 0))
        self.seeds = rng.integers(2**63, size=(len(settings.members), len(self.folds) + 1))

    def columns(self, extra: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self.names, extra.T, strict=True))

    def problems(self) -> list[tuple]:
        """(graphs, y, extra, unlabelled) of all labelled graphs, then without each fold."""
        kept = [np.arange(len(self.y)), *(np.setdiff1d(np.arange(len(self.y)), fold) for fold in self.folds)]
        return [(self.table.take(k), self.y[k], self.columns(self.extra[k]), self.unlabelled) for k in kept]


def _train_together(ensembles: Sequence[Any]) -> None:
    """Fit the members of several ensembles, a member of all of them at once where it can, and set their weights."""
    jobs: list[_Job] = [ensemble._job for ensemble in ensembles]
    found: list[dict[str, list[LearnedPredictor]]] = [{} for _ in jobs]
    for name in dict.fromkeys(name for ensemble in ensembles for name in ensemble._members):
        having = [i for i, ensemble in enumerate(ensembles) if name in ensemble._members]
        problems, rngs, owner = [], [], []
        for i in having:
            row = ensembles[i].settings.members.index(name)
            for problem, seed in zip(jobs[i].problems(), jobs[i].seeds[row], strict=True):
                problems.append(problem)
                rngs.append(np.random.default_rng(seed))
                owner.append(i)
        first = ensembles[having[0]]._members[name]
        for i, fitted in zip(owner, _fit_all(first, problems, rngs), strict=True):
            found[i].setdefault(name, []).append(fitted)
    for ensemble, job, members in zip(ensembles, jobs, found, strict=True):
        reference = job.columns(job.reference_extra)
        ensemble._members = {name: fitted[0] for name, fitted in members.items()}
        ensemble._references = {
            name: np.sort(member.predict(job.reference, extra=reference)) for name, member in ensemble._members.items()
        }
        ensemble.weights = _weights(job, members, ensemble.settings.shrink)
        ensemble._job = None


def _fit_all(member: LearnedPredictor, problems: list[tuple], rngs: list[np.random.Generator]) -> list[Any]:
    many = getattr(member, "fit_many", None)
    if many is not None:
        return many(problems, rngs)
    fitted = []
    for (graphs, y, extra, unlabelled), rng in zip(problems, rngs, strict=True):
        fresh = type(member)(member.space_name, member.vocabulary, member.settings)
        fitted.append(fresh.fit(graphs, y, extra=extra, unlabelled=unlabelled, rng=rng))
    return fitted


def _weights(job: _Job, members: dict[str, list[LearnedPredictor]], shrink: float) -> dict[str, float]:
    count = len(members)
    if not job.folds or count == 1:
        return dict.fromkeys(members, 1 / count)
    reference = job.columns(job.reference_extra)
    held_out = np.concatenate(job.folds)
    rows = np.empty((len(held_out), count))
    for column, fitted in enumerate(members.values()):
        start = 0
        for fold, predictor in zip(job.folds, fitted[1:], strict=True):
            known = np.sort(predictor.predict(job.reference, extra=reference))
            values = predictor.predict(job.table.take(fold), extra=job.columns(job.extra[fold]))
            rows[start : start + len(fold), column] = to_normal_scores(values, known)
            start += len(fold)
    return dict(zip(members, stacking_weights(rows, scaled(job.y, "normal-score")[held_out], shrink), strict=True))


def stacking_weights(predictions: np.ndarray, targets: np.ndarray, shrink: float) -> list[float]:
    """Weights [M] >= 0: least squares of predictions [N, M] against targets [N], plus `shrink` times the squared
    distance to 1 / M; then divided by their sum, for the scale of a prediction has no meaning."""
    count = predictions.shape[1]
    pull = np.sqrt(shrink)
    rows = np.concatenate([predictions, pull * np.eye(count)])
    wanted = np.concatenate([targets, np.full(count, pull / count)])
    found = scipy.optimize.nnls(rows, wanted)[0]
    total = found.sum()
    return (found / total if total > 0 else np.full(count, 1 / count)).tolist()


def to_normal_scores(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Normal quantiles of the ranks that `values` would have in the sorted `reference`, interpolated; beyond its ends
    they go on in proportion to its standard deviation, so that no order is lost."""
    distinct, counts = np.unique(reference, return_counts=True)
    quantiles = ndtri((np.cumsum(counts) - counts / 2) / len(reference))
    scores = np.interp(values, distinct, quantiles)
    spread = max(float(reference.std()), 1e-12)
    below, above = np.minimum(values - distinct[0], 0), np.maximum(values - distinct[-1], 0)
    return scores + (below + above) / spread
