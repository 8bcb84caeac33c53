"""Boosted trees and forests on feature sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from predictors.classical import FeaturePredictor
from predictors.labels import Target
from search_spaces.common.errors import UserError


@dataclass(frozen=True)
class BoostingSettings:
    """features, target: see `feature_matrix` and `scaled`. library: sklearn, or xgboost / lightgbm where the extra
    `boost` is installed. trees, depth, rate, row_share, column_share: of the boosting; column_share is per split with
    sklearn, per tree with the others. Defaults measured on NAS-Bench-101 and -201 (docs/predictors.md)."""

    features: tuple[str, ...] = ("graf",)
    target: Target = "normal-score"
    library: str = "sklearn"
    trees: int = 1600
    depth: int = 3
    rate: float = 0.015
    row_share: float = 0.5
    column_share: float = 0.1


class GradientBoosting(FeaturePredictor):
    """Gradient-boosted regression trees (Friedman, Stochastic Gradient Boosting, 2002)."""

    kind = "gbt-graf"
    Settings = BoostingSettings
    _model: Any

    def _learn(self, rows: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> None:
        s = self.settings
        seed = int(rng.integers(2**31))
        if s.library == "sklearn":
            from sklearn.ensemble import GradientBoostingRegressor

            model: Any = GradientBoostingRegressor(
                n_estimators=s.trees,
                max_depth=s.depth,
                learning_rate=s.rate,
                subsample=s.row_share,
                max_features=s.column_share,
                random_state=seed,
            )
        elif s.library == "xgboost":
            model = _extra("xgboost").XGBRegressor(
                n_estimators=s.trees,
                max_depth=s.depth,
                learning_rate=s.rate,
                subsample=s.row_share,
                colsample_bytree=s.column_share,
                random_state=seed,
                n_jobs=1,
            )
        elif s.library == "lightgbm":
            model = _extra("lightgbm").LGBMRegressor(
                n_estimators=s.trees,
                max_depth=s.depth,
                learning_rate=s.rate,
                subsample=s.row_share,
                subsample_freq=1,
                colsample_bytree=s.column_share,
                min_child_samples=min(5, max(1, len(rows) // 10)),
                random_state=seed,
                n_jobs=1,
                verbose=-1,
            )
        else:
            raise UserError(s.library, "sklearn, xgboost or lightgbm as the library of boosted trees", "sklearn")
        self._model = model.fit(rows, targets)

    def _infer(self, rows: np.ndarray, std: bool) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self._model.predict(rows), np.float64), np.full(len(rows), np.nan)


@dataclass(frozen=True)
class LongBoostingSettings(BoostingSettings):
    """XGB+ of GRAF's study: 10,000 trees at rate .01 on .9 of the rows (Kadlecova et al., ICML 2024, configurations of
    the release)."""

    trees: int = 10_000
    rate: float = 0.01
    row_share: float = 0.9
    column_share: float = 0.3


class LongBoosting(GradientBoosting):
    """Boosting with very many small steps, the strongest learner of GRAF's study; slow without xgboost."""

    kind = "xgb-plus"
    Settings = LongBoostingSettings


@dataclass(frozen=True)
class ForestSettings:
    """features, target: see `feature_matrix` and `scaled`. trees, column_share, leaf: of the forest (random forest's
    usual regression settings, Breiman 2001)."""

    features: tuple[str, ...] = ("graf",)
    target: Target = "normal-score"
    trees: int = 300
    column_share: float = 0.33
    leaf: int = 1


class Forest(FeaturePredictor):
    """Random forest; the standard deviation is that between its trees."""

    kind = "rf-graf"
    Settings = ForestSettings
    _model: Any

    def _learn(self, rows: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> None:
        from sklearn.ensemble import RandomForestRegressor

        s = self.settings
        self._model = RandomForestRegressor(
            n_estimators=s.trees,
            max_features=s.column_share,
            min_samples_leaf=s.leaf,
            random_state=int(rng.integers(2**31)),
        ).fit(rows, targets)

    def _infer(self, rows: np.ndarray, std: bool) -> tuple[np.ndarray, np.ndarray]:
        if not std:
            return self._model.predict(rows), np.full(len(rows), np.nan)
        each = np.stack([tree.predict(rows.astype(np.float32)) for tree in self._model.estimators_])
        return each.mean(0), each.std(0)


def _extra(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(name, "an installed library; `pip install nasforge[boost]` brings it", "sklearn") from None
