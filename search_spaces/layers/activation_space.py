"""Spaces of activation functions: the operation sets of two published searches on the LayerGraph without aggregates.

An architecture is a LayerGraph of x alone, without weight and bias. Everything numeric is in its nodes, so each space
has two forms: `guarded`, where divisors, logarithms and exponentials carry an eps or a clamp and no input gives
anything infinite, and plain, the published formulas as they stand (1 / x is infinite at 0).
"""

from __future__ import annotations

import abc
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from search_spaces.common.errors import UserError, one_of
from search_spaces.graph import OpGraph
from search_spaces.layers.formula import format_formula, parse_formula
from search_spaces.layers.graph import CLAMPED, GUARDED, LEAVES, LayerGraph, Node, X, make_node
from search_spaces.layers.identity import fingerprint
from search_spaces.layers.ops import PARAMETERS
from search_spaces.layers.simplify import simplify
from search_spaces.layers.space import ROLES, op_graph
from search_spaces.space import SearchSpace

CLAMP = 10.0  # e^10 = 22,026 is finite in half precision
EPS = 1e-5
_HALF = "(1 + 1)"
BASELINES: Mapping[str, str] = {  # the eight that AQuaSurF begins with (arXiv 2301.05785), then GELU and Mish
    **{name: f"{name}(x)" for name in ("elu", "relu", "selu", "sigmoid", "softplus", "softsign", "silu", "tanh")},
    "gelu": f"x * (1 + erf(x / sqrt[eps=0]{_HALF})) / {_HALF}",
    "mish": "x * tanh(softplus(x))",
}


def activation(text: str) -> LayerGraph:
    """A known activation function by name (of BASELINES) or a formula, without weight and bias. Errors: UserError."""
    return parse_formula(BASELINES.get(text, text), affine=False)


class GraphBuilder:
    """Nodes one after the other, guarded or plain; parameters get the next free name."""

    def __init__(self, guarded: bool) -> None:
        self.guarded = guarded
        self.nodes: list[Node] = []
        self.parameters = 0

    def add(self, name: str, *inputs: int) -> int:
        """The id of a new node."""
        eps = EPS if self.guarded and name in GUARDED else 0.0
        clamp = CLAMP if self.guarded and name in CLAMPED else None
        self.nodes.append(make_node(name, inputs, eps, clamp))
        return len(LEAVES) + len(self.nodes) - 1

    def parameter(self) -> int:
        """The id of a new channel vector that begins as ones. Errors: UserError when there are no more names."""
        if self.parameters == len(PARAMETERS):
            raise UserError(self.parameters + 1, f"at most {len(PARAMETERS)} trainable vectors")
        self.parameters += 1
        return self.add(PARAMETERS[self.parameters - 1])

    def graph(self, output: int) -> LayerGraph:
        """What was built."""
        return LayerGraph(tuple(self.nodes), output, affine=False)


class ActivationSpace(SearchSpace[LayerGraph]):
    """What the spaces of activation functions share: notation and identity. settings: arguments of the class."""

    settings: dict[str, Any]
    ops: tuple[str, ...]

    @abc.abstractmethod
    def embed(self, arch: LayerGraph) -> LayerGraph:
        """The same function as an architecture of this space. Errors: UserError for what it does not hold."""

    @abc.abstractmethod
    def neighbors(self, arch: LayerGraph) -> Iterator[LayerGraph]:
        """All architectures one change away."""

    def _name(self, ops: tuple[str, ...]) -> None:
        self.ops = ops
        roles = tuple(role for op, role in ROLES.items() if op in ops)
        self.vocabulary = tuple(dict.fromkeys(("input", "output", *LEAVES[1:], *ops, *PARAMETERS, *roles)))

    def encode(self, arch: LayerGraph) -> str:
        """The graph's JSON in one line."""
        return json.dumps(arch.to_json(), separators=(",", ":"))

    def decode(self, text: str) -> LayerGraph:
        """Inverse of `encode`. Errors: UserError for what is no graph or not of this space."""
        graph = LayerGraph.from_json(text)
        for node in graph.nodes:
            if node.name not in self.ops and node.op not in PARAMETERS:
                raise UserError(node.name, f"an operation of this space ({one_of(self.ops, 60)})")
        self._check(graph)
        return graph

    def _check(self, graph: LayerGraph) -> None:
        """UserError unless the graph is an architecture of this space."""
        self.embed(graph)

    def readable(self, arch: LayerGraph) -> str:
        """The function's formula, simplified."""
        return format_formula(simplify(arch))

    @functools.lru_cache(maxsize=20_000)  # noqa: B019 (bounded)
    def key(self, arch: LayerGraph) -> str:
        """The fingerprint: functions with the same values and derivatives to five digits are one candidate."""
        return fingerprint(replace(arch, affine=False))

    def function_key(self, arch: LayerGraph) -> str:
        """The simplified graph, hashed: equal only if both provably compute the same function."""
        return simplify(arch).stable_hash()

    def graph(self, arch: LayerGraph) -> OpGraph:
        """The live nodes between input and output, as `LayerSpace.graph` gives them."""
        return op_graph(arch)

    def __reduce__(self):
        return functools.partial(type(self), **self.settings), ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"


def depends_on_x(graph: LayerGraph) -> bool:
    """Whether x is an ancestor of the output, after simplification (zeros(x) is not)."""
    return X in simplify(graph).live
