"""Spaces by their command-line names."""

from __future__ import annotations

import importlib

from search_spaces.common.errors import UserError
from search_spaces.common.names import load_object, match
from search_spaces.space import SearchSpace

SPACES = {
    "nas-bench-101": "search_spaces.cells.nas_bench_101:NasBench101",
    "nas-bench-201": "search_spaces.cells.nas_bench_201:NasBench201",
    "nats-size": "search_spaces.cells.nats_size:NatsSize",
    "nas-bench-macro": "search_spaces.cells.nas_bench_macro:NasBenchMacro",
    "nas-bench-graph": "search_spaces.cells.nas_bench_graph:NasBenchGraph",
    "nas-bench-graph-proteins": "search_spaces.cells.nas_bench_graph:NasBenchGraphProteins",
    "darts": "search_spaces.cells.darts:Darts",
    "layers": "search_spaces.layers.space:LayerSpace",
}


def space_names() -> list[str]:
    """The names that `load_space` knows."""
    return list(SPACES)


def load_space(name: str) -> SearchSpace:
    """The space called `name`, or the one at `package.module:object` (a space or a class of one).

    Errors: UserError with the nearest name.
    """
    if ":" in name:
        found = load_object(name, "a search space")
        space = found() if isinstance(found, type) else found
        if not isinstance(space, SearchSpace):
            raise UserError(name, "a SearchSpace or a class of one")
        return space
    module, _, attribute = SPACES[match(name, SPACES, "a search space")].partition(":")
    return getattr(importlib.import_module(module), attribute)()


def space_text(space: SearchSpace) -> str:
    """What `load_space` takes to give `space` again: its name, or `package.module:Class` for a user's own."""
    return space.name if space.name in SPACES else f"{type(space).__module__}:{type(space).__qualname__}"
