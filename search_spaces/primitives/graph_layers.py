"""The catalogue's layers (`search_spaces.layers.catalog`) as primitives: normalisation and activation in one."""

from __future__ import annotations

from functools import partial

from torch import nn

from search_spaces.layers.catalog import TOKENS, layer, named_layer, names
from search_spaces.layers.module import GraphLayer
from search_spaces.layers.plan import buffer_names, parameter_names
from search_spaces.primitives.primitive import Primitive

# Of these there is a primitive; the catalogue has them as graphs for comparisons and as starts of searches.
ELSEWHERE = ("batch-norm", "layer-norm", "instance-norm", "group-norm", "rms-norm", "frn-tlu", "relu", "silu", "gelu")


def graph_layer(name: str, channels: int, *, layout: str = "channels-first") -> nn.Module:
    """The catalogue's layer `name` as a module. Errors: UserError for channels below 1 and an unknown layout."""
    return GraphLayer(layer(name), channels, layout=layout)


def _primitive(name: str) -> Primitive:
    named = named_layer(name)
    graph = named.graph()
    ones = ("weight", "v1", *graph.parameters)
    *before, last = named.formula.split("; ")
    return Primitive(
        name,
        "layer",
        "; ".join([*before, f"({last}) * weight + bias" if graph.affine else last]),
        named.source,
        partial(graph_layer, name),
        parameters=", ".join(f"{each} [C] {int(each in ones)}" for each in parameter_names(graph)),
        needs=("running-statistics", "batch") if buffer_names(graph) else (),
    )


PRIMITIVES: tuple[Primitive, ...] = tuple(
    _primitive(name) for name in names() if name.removesuffix(TOKENS) not in ELSEWHERE
)
