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
    """The space called `name`, or the one at `package.module:object`.

    That is a space, a class of one, or a class or function that makes modules with Choices (`ModuleSpace`). Behind
    either can stand a choice of layers: `nas-bench-201+norm=batch-norm,group-norm+act=relu,silu` is `with_layers`.
    Errors: UserError with the nearest name.
    """
    plain, plus, layers = name.partition("+")
    if plus:
        return _with_layers(name, load_space(plain), layers)
    if ":" in name:
        return _own(name)
    module, _, attribute = SPACES[match(name, SPACES, "a search space")].partition(":")
    return getattr(importlib.import_module(module), attribute)()


def space_text(space: SearchSpace) -> str:
    """What `load_space` takes to give `space` again: its name, or `package.module:object` for a user's own."""
    if space.name in SPACES or ":" in space.name:
        return space.name
    if hasattr(space, "norms") and hasattr(space, "space"):
        factories = {**space.norms, **space.acts}  # type: ignore[attr-defined]
        if all(getattr(factory, "name", None) == name for name, factory in factories.items()):
            layers = f"+norm={','.join(space.norms)}+act={','.join(space.acts)}"  # type: ignore[attr-defined]
            return space_text(space.space) + layers
    return f"{type(space).__module__}:{type(space).__qualname__}"


def _own(name: str) -> SearchSpace:
    """The space at `package.module:object`."""
    from search_spaces.module_space import ModuleSpace

    found = load_object(name, "a search space")
    if isinstance(found, ModuleSpace):
        return ModuleSpace(found.make, name)  # so that its text is this name
    if isinstance(found, SearchSpace):
        return found
    if isinstance(found, type) and issubclass(found, SearchSpace):
        return found()
    if not callable(found):
        raise UserError(name, "a SearchSpace, a class of one, or a class or function that makes modules with Choices")
    return ModuleSpace(found, name)


def _with_layers(name: str, space: SearchSpace, text: str) -> SearchSpace:
    from search_spaces.layered import with_layers

    given: dict[str, list[str]] = {}
    for part in text.split("+"):
        role, _, names = part.partition("=")
        if role not in ("norm", "act") or role in given or not names:
            raise UserError(name, "a space, then +norm=<names> and +act=<names>, with commas between names")
        given[role] = names.split(",")
    return with_layers(space, **{f"{role}s": names for role, names in given.items()})
