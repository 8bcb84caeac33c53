"""nasforge: search for architectures and layers, and take the result home as a PyTorch module."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "search": "nas.loop",
    "SearchResult": "nas.result",
    "Budget": "nas.budget",
    "compare": "nas.comparison",
    "Objective": "nas.objectives",
    "parse_objectives": "nas.objectives",
    "Strategy": "nas.strategies.strategy",
    "Trial": "nas.strategies.strategy",
    "make_strategy": "nas.strategies",
    "Evaluator": "nas.evaluators",
    "TableEvaluator": "nas.evaluators",
    "Run": "nas.run",
    "UserError": "search_spaces.common.errors",
}
__all__ = sorted([*_HOMES, "__version__"])

if TYPE_CHECKING:
    from nas.budget import Budget
    from nas.comparison import compare
    from nas.evaluators import Evaluator, TableEvaluator
    from nas.loop import search
    from nas.objectives import Objective, parse_objectives
    from nas.result import SearchResult
    from nas.run import Run
    from nas.strategies import make_strategy
    from nas.strategies.strategy import Strategy, Trial
    from search_spaces.common.errors import UserError


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
