"""Classical predictors: Gaussian process, boosted trees, forests and ridge regression on feature sets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from predictors.base import LearnedPredictor
from predictors.colours import ColourCounts
from predictors.features import Standardizer, feature_matrix
from predictors.gaussian_process import Process, fit_process
from predictors.graphs import GraphTable
from predictors.labels import Target, scaled

CHUNK = 8192  # graphs predicted at a time: the features of a whole space need not fit into memory


class FeaturePredictor(LearnedPredictor):
    """Base of predictors that learn from rows of features; settings name the sets (`features`) and the `target`."""

    def _fit(self, table, y, extra, unlabelled, rng) -> None:
        self._prepare(table)
        rows = self._rows(table, extra)
        self._standardizer = self._scaler(rows)
        self._learn(self._standardizer(rows), scaled(y, self.settings.target), rng)

    def _predict(self, table, extra, std) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for start in range(0, len(table), CHUNK):
            rows = np.arange(start, min(start + CHUNK, len(table)))
            found.append(self._infer(self._standardizer(self._rows(table.take(rows), extra[rows])), std))
        mean, deviation = zip(*found, strict=True)
        return np.concatenate(mean), np.concatenate(deviation)

    def _prepare(self, table: GraphTable) -> None:
        """Note what the columns depend on in the training graphs."""
        self._parts, self._nodes = table.part_names, table.nodes

    def _rows(self, table: GraphTable, extra: np.ndarray) -> np.ndarray:
        return np.concatenate([feature_matrix(table, self.settings.features, self._parts, self._nodes), extra], 1)

    def _scaler(self, rows: np.ndarray) -> Standardizer:
        return Standardizer(rows)

    def _learn(self, rows: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> None:
        raise NotImplementedError

    def _infer(self, rows: np.ndarray, std: bool) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError


@dataclass(frozen=True)
class GaussianProcessSettings:
    """features, target: see `feature_matrix` and `scaled`. kernel: rbf or matern-5/2."""

    features: tuple[str, ...] = ("graf",)
    target: Target = "normal-score"
    kernel: str = "matern-5/2"


class GaussianProcess(FeaturePredictor):
    """Gaussian process on path features, hyper-parameters by marginal likelihood; knows how sure it is."""

    kind = "gp-graf"
    Settings = GaussianProcessSettings
    _process: Process

    def _learn(self, rows: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> None:
        self._process = fit_process(rows, targets - targets.mean(), kernel=self.settings.kernel)

    def _infer(self, rows: np.ndarray, std: bool) -> tuple[np.ndarray, np.ndarray]:
        return self._process.predict(rows, std=std)


@dataclass(frozen=True)
class RidgeSettings:
    """features, target: see `feature_matrix` and `scaled`. penalties: among these one is chosen by leave-one-out."""

    features: tuple[str, ...] = ("one-hot",)
    target: Target = "normal-score"
    penalties: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1000.0)


class Ridge(FeaturePredictor):
    """Linear regression on the operations and edges themselves: what any predictor has to beat."""

    kind = "linear"
    Settings = RidgeSettings

    def _learn(self, rows: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> None:
        from sklearn.linear_model import RidgeCV

        self._model = RidgeCV(alphas=np.array(self.settings.penalties)).fit(rows, targets)

    def _infer(self, rows: np.ndarray, std: bool) -> tuple[np.ndarray, np.ndarray]:
        return self._model.predict(rows), np.full(len(rows), np.nan)


@dataclass(frozen=True)
class RandomProjectionSettings(GaussianProcessSettings):
    """As gp-graf, on sparse random projections."""

    features: tuple[str, ...] = ("random-projection",)


class RandomProjectionProcess(GaussianProcess):
    """Control: a Gaussian process on embeddings that nothing was learned for."""

    kind = "random-projection"
    Settings = RandomProjectionSettings


@dataclass(frozen=True)
class WeisfeilerLehmanSettings(GaussianProcessSettings):
    """rounds: of colour refinement (NAS-BOWL uses 1 to 2). target, kernel: as gp-graf; features are the colours."""

    rounds: int = 2
    kernel: str = "rbf"
    features: tuple[str, ...] = ()


class WeisfeilerLehman(GaussianProcess):
    """Gaussian process on counts of Weisfeiler-Lehman colours; the kernel is a function of the angle between two.

    Ru, Wan, Dong and Osborne, Interpretable Neural Architecture Search via Bayesian Optimisation with
    Weisfeiler-Lehman Kernels, ICLR 2021.
    """

    kind = "gp-wl"
    Settings = WeisfeilerLehmanSettings
    _colours: ColourCounts

    def _prepare(self, table: GraphTable) -> None:
        self._colours = ColourCounts.of(table, self.settings.rounds)

    def _rows(self, table: GraphTable, extra: np.ndarray) -> np.ndarray:
        rows = self._colours.rows(table)
        return np.concatenate([rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), extra], 1)

    def _scaler(self, rows: np.ndarray) -> Standardizer:
        """Counts stay at unit length; the extra columns, standardised, weigh as much together."""
        scaler = Standardizer(rows)
        counts = np.flatnonzero(scaler.kept) < len(self._colours.colours)
        scaler.mean[counts], scaler.deviation[counts] = 0, 1
        scaler.deviation[~counts] *= np.sqrt((~counts).sum())
        return scaler
