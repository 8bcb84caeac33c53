"""What there is to search, and how it becomes a module: spaces, OpGraph, Choice.

>>> space = load_space("nas-bench-201")
>>> network = space.build(space.sample(np.random.default_rng(0)))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "UserError": "search_spaces.common.errors",
    "SearchSpace": "search_spaces.space",
    "TupleSpace": "search_spaces.space",
    "OpGraph": "search_spaces.graph",
    "live": "search_spaces.graph",
    "Choice": "search_spaces.choice",
    "select": "search_spaces.choice",
    "selected_state_dict": "search_spaces.choice",
    "load_space": "search_spaces.registry",
    "space_names": "search_spaces.registry",
    "with_layers": "search_spaces.layered",
}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from search_spaces.choice import Choice, select, selected_state_dict
    from search_spaces.common.errors import UserError
    from search_spaces.graph import OpGraph, live
    from search_spaces.layered import with_layers
    from search_spaces.registry import load_space, space_names
    from search_spaces.space import SearchSpace, TupleSpace


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
