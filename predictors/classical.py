"""Classical predictors: Gaussian process, boosted trees, forests and ridge regression on feature sets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from predictors.base import LearnedPredictor
from predictors.features import Standardizer, feature_matrix
from predictors.gaussian_process import Process, fit_process
from predictors.graphs import GraphTable
from predictors.labels import Target, scaled


class FeaturePredictor(LearnedPredictor):
    """Base of predictors that learn from rows of features; settings name the sets (`features`) and the `target`."""

    def _fit(self, table, y, extra, unlabelled, rng) -> None:
        self._parts, self._nodes = table.part_names, table.nodes
        rows = self._rows(table, extra)
        self._standardizer = Standardizer(rows)
        self._learn(self._standardizer(rows), scaled(y, self.settings.target), rng)

    def _predict(self, table, extra, std) -> tuple[np.ndarray, np.ndarray]:
        return self._infer(self._standardizer(self._rows(table, extra)), std)

    def _rows(self, table: GraphTable, extra: np.ndarray) -> np.ndarray:
        return np.concatenate([feature_matrix(table, self.settings.features, self._parts, self._nodes), extra], 1)

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
