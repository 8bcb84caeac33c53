"""LayerSpace: random graphs of primitives as a search space of normalisation-activation layers.

Liu, Brock, Simonyan and Le, Evolving Normalization-Activation Layers, NeurIPS 2020 (arXiv 2004.02967), section 3.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import match, nearest
from search_spaces.graph import OpGraph
from search_spaces.layers.filters import normalizes
from search_spaces.layers.formula import format_formula
from search_spaces.layers.graph import LEAVES, LayerGraph, Node, X, make_node
from search_spaces.layers.identity import fingerprint
from search_spaces.layers.mutations import FIRST, MUTATIONS, graft
from search_spaces.layers.ops import PARAMETERS, arity, preset, split_name
from search_spaces.layers.patterns import with_guards
from search_spaces.layers.simplify import replace_inputs, simplify
from search_spaces.space import SearchSpace

SAMPLINGS = ("flat", "nested", "normalizing")
ROLES = {
    "div": "divisor",
    "sub": "subtrahend",
    "pow": "exponent",
}  # which of two inputs, in an OpGraph that has no order of inputs
_TRIES = 100
_BLOCK = 512  # random graphs that are tried together


class LayerSpace(SearchSpace[LayerGraph]):
    """Layers as graphs of at most `nodes` operations on x, zeros and two channel vectors; an architecture is a
    LayerGraph with its dead nodes.

    ops: a preset of `search_spaces.layers.ops` or names of operations. sampling: `flat` draws every node's operation
    uniformly, `nested` draws the aggregates together as one entry beside the element-wise ones, `normalizing` draws
    flat until `filters.normalizes` holds, of mutants and children too. mutations: of `MUTATIONS`, one drawn each time;
    the paper's is `replace`. immigrants: the probability that `mutate` returns a random layer instead; the paper's
    search uses one half. affine, groups, group_size: of the layers that are made. Errors: UserError.
    """

    name = "layers"

    def __init__(
        self,
        ops: str | Sequence[str] = "evonorm24",
        nodes: int = 10,
        sampling: str = "flat",
        *,
        mutations: Sequence[str] = ("replace",),
        immigrants: float = 0.5,
        affine: bool = True,
        groups: int = 32,
        group_size: int | None = None,
    ):
        self.settings: dict[str, Any] = {"ops": ops if isinstance(ops, str) else tuple(ops), "nodes": nodes}
        self.settings |= {"sampling": sampling, "mutations": tuple(mutations), "immigrants": immigrants}
        self.settings |= {"affine": affine, "groups": groups, "group_size": group_size}
        self.ops = preset(ops) if isinstance(ops, str) else tuple(ops)
        self.prototypes = tuple(make_node(name, (X,) * arity(split_name(name)[0])) for name in self.ops)
        self.nodes = nodes
        self.sampling = match(sampling, SAMPLINGS, "a way to sample layers")
        self.mutations = tuple(match(name, MUTATIONS, "a mutation of layers") for name in mutations)
        self.immigrants = immigrants
        self.vocabulary = ("input", "output", *LEAVES[1:], *self.ops)
        self.vocabulary += tuple(role for op, role in ROLES.items() if op in self.ops)
        self._aggregates = tuple(n for n in self.prototypes if n.aggregate)
        self._elementwise = tuple(n for n in self.prototypes if not n.aggregate)
        self._flags = (
            np.array([len(n.inputs) == 2 for n in self.prototypes]),
            np.array([n.aggregate for n in self.prototypes]),
            np.array([n.axes in ("", "channel", "channel-group") for n in self.prototypes]),
        )
        if not self.ops or len(set(self.ops)) < len(self.ops):
            raise UserError(str(self.ops), "at least one operation, none twice")
        if nodes < 1:
            raise UserError(nodes, "at least one node")
        if parameters := [name for name in self.ops if name in PARAMETERS]:
            raise UserError(parameters[0], "operations with inputs (v0 and v1 are this space's parameters)", "v1")
        if not self.mutations:
            raise UserError("mutations", f"at least one mutation ({one_of(MUTATIONS)})")
        if not 0 <= immigrants <= 1:
            raise UserError(immigrants, "a probability of immigrants from 0 to 1")
        if self.sampling == "normalizing" and not self._aggregates:
            raise UserError(str(ops), "operations with an aggregate, to sample normalising layers", "evonorm24")
        self._layer((), X)  # refuses wrong groups now

    # -- random layers -------------------------------------------------------------------------------------------

    def sample(self, rng: np.random.Generator) -> LayerGraph:
        """A random graph of exactly `nodes` nodes whose last one is the output."""
        if self.sampling != "normalizing":
            return self._random(rng.random((3, self.nodes)))
        while True:
            block = rng.random((_BLOCK, 3, self.nodes))
            for numbers in block[self._may_normalize(block)]:
                graph = self._random(numbers)
                if normalizes(graph):
                    return graph

    def _random(self, numbers: np.ndarray) -> LayerGraph:
        """The graph that uniform numbers [3, nodes] give: for each node its operation and two inputs."""
        nodes = [self._node(id, *three) for id, three in enumerate(zip(*numbers.tolist(), strict=True), FIRST)]
        return self._layer(nodes, FIRST + self.nodes - 1)

    def _may_normalize(self, block: np.ndarray) -> np.ndarray:
        """bool [N] for numbers [N, 3, nodes]: whether the last node varies over space and depends on a statistic of x.

        Hundreds of graphs fail for one that normalises, so they are tried together before any is made.
        """
        rows = np.arange(len(block))
        kinds = (block[:, 0] * len(self.prototypes)).astype(int)
        two, aggregate, spatial = (flags[kinds] for flags in self._flags)
        depends, statistic, varies = (np.zeros((len(block), FIRST + self.nodes), bool) for _ in range(3))
        depends[:, X] = varies[:, X] = True
        for at in range(self.nodes):
            id = FIRST + at
            first, second = ((block[:, slot, at] * id).astype(int) for slot in (1, 2))

            def either(flag: np.ndarray, at: int = at, first: np.ndarray = first, second: np.ndarray = second):
                return flag[rows, first] | (two[:, at] & flag[rows, second])

            depends[:, id] = either(depends)
            statistic[:, id] = either(statistic) | (aggregate[:, at] & depends[:, id])
            varies[:, id] = spatial[:, at] & either(varies)
        return statistic[:, -1] & varies[:, -1]

    def draw_node(self, id: int, rng: np.random.Generator) -> Node:
        """A random operation on random earlier values."""
        return self._node(id, *rng.random(3).tolist())

    def _node(self, id: int, pick: float, first: float, second: float) -> Node:
        if self.sampling == "nested" and self._aggregates:
            pick *= len(self._elementwise) + 1
            if pick < len(self._elementwise):
                kind = self._elementwise[int(pick)]
            else:
                kind = self._aggregates[int((pick % 1) * len(self._aggregates))]
        else:
            kind = self.prototypes[int(pick * len(self.prototypes))]
        inputs = (int(first * id),) if len(kind.inputs) == 1 else (int(first * id), int(second * id))
        return Node(kind.op, inputs, kind.axes, kind.eps, kind.clamp)

    def _layer(self, nodes: Sequence[Node], output: int) -> LayerGraph:
        about = self.settings
        return _guarded(
            LayerGraph(
                tuple(nodes), output, affine=about["affine"], groups=about["groups"], group_size=about["group_size"]
            )
        )

    def embed(self, layer: LayerGraph, rng: np.random.Generator) -> LayerGraph:
        """The layer in exactly `nodes` nodes: its live ones at random places, the output last, random dead ones
        between, so that a small layer can grow by mutation; with the space's settings and its guards of divisions.
        Errors: UserError if it has too many operations, none, or one that the space lacks."""
        layer = layer.compact()
        live = len(layer.nodes)
        if not 0 < live <= self.nodes:
            raise UserError(f"{live} nodes", f"a layer of 1 to {self.nodes} operations")
        self._check(layer)
        places = [*sorted(rng.choice(self.nodes - 1, live - 1, replace=False).tolist()), self.nodes - 1]
        ids = {**{id: id for id in range(FIRST)}, **{FIRST + k: FIRST + at for k, at in enumerate(places)}}
        nodes = [self.draw_node(id, rng) for id in range(FIRST, FIRST + self.nodes)]
        for at, node in zip(places, layer.nodes, strict=True):
            nodes[at] = replace_inputs(node, tuple(ids[i] for i in node.inputs))
        return self._layer(nodes, FIRST + self.nodes - 1)

    def mutate(self, arch: LayerGraph, rng: np.random.Generator) -> LayerGraph:
        """One of `mutations`, or a random layer with probability `immigrants`; another graph, maybe the same layer."""
        if rng.random() >= self.immigrants:
            for _ in range(_TRIES):
                kind = MUTATIONS[self.mutations[int(rng.integers(len(self.mutations)))]]
                changed = kind(arch, self, rng)
                if changed is not None and (child := _guarded(changed)) != arch and self._admits(child):
                    return child
        while (child := self.sample(rng)) == arch:
            pass
        return child

    def crossover(self, first: LayerGraph, second: LayerGraph, rng: np.random.Generator) -> LayerGraph:
        """`first` with a live node replaced by one of `second` and all it needs; mutated if nothing fits."""
        for _ in range(_TRIES):
            child = graft(first, second, rng)
            if child is not None and 0 < len(child.nodes) <= self.nodes:
                child = self.embed(child, rng)
                if self._admits(child):
                    return child
        return self.mutate(first, rng)

    def neighbors(self, arch: LayerGraph) -> Iterator[LayerGraph]:
        """All graphs with another source of one input, or another operation, at one live node.

        Inputs that the new operation shares with the old one stay; a second input runs over all earlier values.
        """
        seen = {arch}
        for id, node in arch.live_nodes:
            for other in self._variants(id, node):
                nodes = (*arch.nodes[: id - FIRST], other, *arch.nodes[id - FIRST + 1 :])
                graph = _guarded(replace(arch, nodes=nodes))
                if graph not in seen and self._admits(graph):
                    seen.add(graph)
                    yield graph

    def _variants(self, id: int, node: Node) -> Iterator[Node]:
        for slot in range(len(node.inputs)):
            for source in range(id):
                yield replace_inputs(node, (*node.inputs[:slot], source, *node.inputs[slot + 1 :]))
        for kind in self.prototypes:
            if kind.name == node.name:
                continue
            if len(kind.inputs) == len(node.inputs):
                yield replace_inputs(kind, node.inputs)
            elif len(kind.inputs) == 1:
                for source in node.inputs:
                    yield replace_inputs(kind, (source,))
            else:
                for source in range(id):
                    yield replace_inputs(kind, (node.inputs[0], source))
                    yield replace_inputs(kind, (source, node.inputs[0]))

    def _admits(self, graph: LayerGraph) -> bool:
        return self.sampling != "normalizing" or normalizes(graph)

    # -- notation and identity -----------------------------------------------------------------------------------

    def encode(self, arch: LayerGraph) -> str:
        """The graph's JSON in one line, dead nodes included."""
        return json.dumps(arch.to_json(), separators=(",", ":"))

    def readable(self, arch: LayerGraph) -> str:
        """The layer's formula, simplified."""
        return format_formula(simplify(arch))

    def decode(self, text: str) -> LayerGraph:
        """Inverse of `encode`. Errors: UserError for what is no graph, too large, or of operations that the space
        does not have."""
        graph = LayerGraph.from_json(text)
        self._check(graph)
        return graph

    def _check(self, graph: LayerGraph) -> None:
        if len(graph.nodes) > self.nodes:
            raise UserError(f"{len(graph.nodes)} nodes", f"a layer of at most {self.nodes}")
        for node in graph.nodes:
            if node.name not in self.ops:
                raise UserError(
                    node.name, f"an operation of this space ({one_of(self.ops, 40)})", nearest(node.name, self.ops)
                )

    @functools.lru_cache(maxsize=20_000)  # noqa: B019 (bounded)
    def key(self, arch: LayerGraph) -> str:
        """The fingerprint: layers that compute the same values and derivatives to five digits are one candidate."""
        return fingerprint(arch)

    def function_key(self, arch: LayerGraph) -> str:
        """The simplified graph with its settings, hashed: equal only if both provably compute the same function."""
        return simplify(arch).stable_hash()

    def graph(self, arch: LayerGraph) -> OpGraph:
        """The live nodes between input and output, with zeros and channel vectors where they are used.

        The second input of `div` and `sub` passes a node `divisor` or `subtrahend`, as edges have no order.
        """
        return op_graph(arch)

    def __reduce__(self):
        return functools.partial(type(self), **self.settings), ()

    def __repr__(self) -> str:
        return f"LayerSpace({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"


def _guarded(graph: LayerGraph) -> LayerGraph:
    return with_guards(graph) if any(node.op == "div" for node in graph.nodes) else graph


def op_graph(arch: LayerGraph) -> OpGraph:
    """The live graph as an OpGraph, see `LayerSpace.graph`."""
    arch = arch.compact()
    ops, place, edges = ["input"], {X: 0}, []
    for id in arch.live:
        if id == X:
            continue
        if id < FIRST:
            place[id] = len(ops)
            ops.append(LEAVES[id])
            continue
        node = arch.node(id)
        sources = [place[i] for i in node.inputs]
        if node.op in ROLES:
            edges.append((sources[1], len(ops)))
            sources[1] = len(ops)
            ops.append(ROLES[node.op])
        edges += [(source, len(ops)) for source in sources]
        place[id] = len(ops)
        ops.append(node.name)
    edges.append((place[arch.output], len(ops)))
    ops.append("output")
    adjacency = np.zeros((len(ops), len(ops)), bool)
    adjacency[tuple(zip(*edges, strict=True))] = True
    return OpGraph(tuple(ops), adjacency)
