"""Predictors by their command-line names."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

from predictors.base import LearnedPredictor, read_header, settings_of
from search_spaces.common.names import match

PREDICTORS = {
    "auto": "predictors.ensemble:Ensemble",
    "gp-graf": "predictors.classical:GaussianProcess",
    "gbt-graf": "predictors.trees:GradientBoosting",
    "rf-graf": "predictors.trees:Forest",
    "xgb-plus": "predictors.trees:LongBoosting",
    "linear": "predictors.classical:Ridge",
    "gp-wl": "predictors.classical:WeisfeilerLehman",
    "random-projection": "predictors.classical:RandomProjectionProcess",
    "cap": "predictors.neural.cap:Cap",
    "carl": "predictors.neural.carl:CausalPredictor",
    "feature-distilled": "predictors.neural.cap:FeatureDistilled",
    "gin": "predictors.neural.cap:Gin",
    "gmae": "predictors.neural.cap:Gmae",
    "graph-transformer": "predictors.neural.cap:GraphTransformer",
    "nn-former": "predictors.neural.cap:NnFormer",
    "two-direction": "predictors.neural.cap:TwoDirection",
    "path-mlp": "predictors.neural.path_ensemble:PathEnsemble",
    "brp-nas": "predictors.neural.pair_classifier:PairClassifier",
    "parzc": "predictors.neural.parzc:Parzc",
    "semi-nas": "predictors.neural.semi_supervised:SemiSupervised",
}


def predictor_class(name: str) -> type[LearnedPredictor]:
    """The class of the predictor called `name`. Errors: UserError with the nearest name."""
    module, _, attribute = PREDICTORS[match(name, PREDICTORS, "a predictor")].partition(":")
    return getattr(importlib.import_module(module), attribute)


def make_predictor(name: str, space_name: str, vocabulary: Sequence[str], **settings: Any) -> LearnedPredictor:
    """An unfitted predictor by name, bound to a space. Errors: UserError for an unknown name or setting."""
    kind = predictor_class(name)
    return kind(space_name, vocabulary, settings_of(kind.Settings, settings))


def load_predictor(folder: str | os.PathLike[str]) -> LearnedPredictor:
    """The predictor saved in `folder`, of whatever kind. Errors: UserError for an unknown kind or a newer format."""
    return predictor_class(read_header(folder)["kind"]).load(folder)
