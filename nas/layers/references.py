"""A layer by what a user types: a catalogue name, a run's trial, a JSON file, a formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from search_spaces.common.errors import UserError
from search_spaces.common.names import nearest
from search_spaces.layers.catalog import layer, names
from search_spaces.layers.formula import parse_formula
from search_spaces.layers.graph import LayerGraph, X


def find_layer(text: str, **rules: Any) -> LayerGraph:
    """The layer that `text` names: `evonorm-s0`, `RUN:best`, `RUN:17`, `layer.json` or `x * sigmoid(x)`.

    rules: settings of the graph (group_size, ...) for names and formulas. Errors: UserError.
    """
    graph = _find(text, rules)
    if X not in graph.live:
        raise UserError(text, "a layer whose output depends on x")
    return graph


def _find(text: str, rules: dict[str, Any]) -> LayerGraph:
    from nas.references import find_architecture
    from nas.run import Run

    if text.lower().replace("_", "-") in names():
        return layer(text, **rules)
    if text.endswith(".json"):
        try:
            return LayerGraph.from_json(Path(text).read_text())
        except OSError as error:
            raise UserError(text, f"a file with a layer as JSON ({error.strerror})") from None
    folder, colon, _ = text.rpartition(":")
    if Run.exists(text) or (colon and Run.exists(folder)):
        found = find_architecture(text)
        arch = found.space.decode(found.record.arch)
        if not isinstance(arch, LayerGraph):
            raise UserError(text, f"a run that searched layers, not {found.space.name}")
        return arch
    if any(sign in text for sign in "()*+/^"):
        return parse_formula(text, **rules)
    raise UserError(
        text, "a layer: a name of `nas layers list`, RUN:best, FILE.json or a formula", nearest(text, names())
    )
