"""Search strategies by their command-line names, one file each."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from nas.objectives import Objective
from nas.strategies.strategy import Strategy, Trial
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import match, nearest
from search_spaces.space import SearchSpace

STRATEGIES = {
    "random-search": "nas.strategies.random_search:RandomSearch",
    "local-search": "nas.strategies.local_search:LocalSearch",
    "regularized-evolution": "nas.strategies.regularized_evolution:RegularizedEvolution",
    "nsga-ii": "nas.strategies.nsga2:Nsga2",
    "successive-halving": "nas.strategies.successive_halving:SuccessiveHalving",
    "hyperband": "nas.strategies.hyperband:Hyperband",
    "grid": "nas.strategies.grid:Grid",
    "robot": "nas.strategies.robot:Robot",
    "warm-start": "nas.strategies.warm_start:WarmStart",
    "te-nas": "nas.strategies.te_nas:TeNas",
    "predictor": "nas.strategies.predictor_guided:PredictorGuided",
    "bananas": "nas.strategies.predictor_published:Bananas",
    "npenas": "nas.strategies.predictor_published:Npenas",
    "brp-nas": "nas.strategies.predictor_published:BrpNas",
    "weak-nas": "nas.strategies.predictor_published:WeakNas",
}
__all__ = ["STRATEGIES", "Strategy", "Trial", "make_strategy", "strategy_class", "strategy_settings"]


def strategy_class(name: str) -> type[Strategy]:
    """The class of the strategy called `name`. Errors: UserError with the nearest name."""
    module, _, attribute = STRATEGIES[match(name, STRATEGIES, "a strategy")].partition(":")
    return getattr(importlib.import_module(module), attribute)


def strategy_settings(name: str) -> dict[str, Any]:
    """The settings of a strategy and their defaults."""
    parameters = inspect.signature(strategy_class(name).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def make_strategy(
    name: str, space: SearchSpace, objectives: Sequence[Objective], rng: np.random.Generator, **settings: Any
) -> Strategy:
    """A strategy by name. Errors: UserError for an unknown name or setting."""
    known = strategy_settings(name)
    for setting in settings:
        if setting not in known:
            expected = f"a setting of {name} ({one_of(known)})" if known else f"no settings: {name} has none"
            raise UserError(setting, expected, nearest(setting, known))
    return strategy_class(name)(space, objectives, rng, **settings)
