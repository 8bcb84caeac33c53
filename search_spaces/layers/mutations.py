"""Random changes of layer graphs. Each takes (graph, space, rng) and returns another graph, or None if it has no place.

`replace` is the mutation of Liu et al. 2020 (section 3.3); the others are extra. Divisions are guarded anew afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from search_spaces.layers.graph import LEAVES, LayerGraph, Node
from search_spaces.layers.simplify import replace_inputs

if TYPE_CHECKING:
    from search_spaces.layers.space import LayerSpace

FIRST = len(LEAVES)  # the id of the first intermediate node
Mutation = Callable[[LayerGraph, "LayerSpace", np.random.Generator], LayerGraph | None]


def replace(graph: LayerGraph, space: LayerSpace, rng: np.random.Generator) -> LayerGraph | None:
    """Another operation with other inputs at one intermediate node, all uniform; dead nodes included."""
    if not graph.nodes:
        return None
    at = int(rng.integers(len(graph.nodes)))
    return _with_node(graph, FIRST + at, space.draw_node(FIRST + at, rng))


def insert(graph: LayerGraph, space: LayerSpace, rng: np.random.Generator) -> LayerGraph | None:
    """A random node on one edge of the live graph; a dead one gives up its place if there is none."""
    if len(graph.nodes) >= space.nodes:
        dead = [id for id in range(FIRST, FIRST + len(graph.nodes)) if id not in graph.live]
        if not dead:
            return None
        graph = _without(graph, dead[int(rng.integers(len(dead)))], 0)
    edges = [(id, slot) for id, node in graph.live_nodes for slot in range(len(node.inputs))] + [(-1, 0)]
    target, slot = edges[int(rng.integers(len(edges)))]
    at = target if target >= 0 else FIRST + len(graph.nodes)
    source = graph.node(target).inputs[slot] if target >= 0 else graph.output
    node = space.draw_node(at, rng)
    kept = int(rng.integers(len(node.inputs)))
    node = replace_inputs(node, (*node.inputs[:kept], source, *node.inputs[kept + 1 :]))
    later = [replace_inputs(n, tuple(i + (i >= at) for i in n.inputs)) for n in graph.nodes[at - FIRST :]]
    if target >= 0:
        inputs = later[0].inputs
        later[0] = replace_inputs(later[0], (*inputs[:slot], at, *inputs[slot + 1 :]))
    output = at if target < 0 else graph.output + 1
    return dataclasses.replace(graph, nodes=(*graph.nodes[: at - FIRST], node, *later), output=output)


def delete(graph: LayerGraph, space: LayerSpace, rng: np.random.Generator) -> LayerGraph | None:
    """One live node goes; what read it reads one of its inputs. The last operation never goes."""
    live = graph.live_nodes
    if not live:
        return None
    id, node = live[int(rng.integers(len(live)))]
    heir = node.inputs[int(rng.integers(len(node.inputs)))]
    return None if id == graph.output and heir < FIRST else _without(graph, id, heir)


def swap_axes(graph: LayerGraph, space: LayerSpace, rng: np.random.Generator) -> LayerGraph | None:
    """Another axis set at one live aggregate, the same moment."""
    return _swap(graph, space, rng, lambda old, new: old.op == new.op and old.axes != new.axes)


def swap_moment(graph: LayerGraph, space: LayerSpace, rng: np.random.Generator) -> LayerGraph | None:
    """Another moment at one live aggregate, the same axes."""
    return _swap(graph, space, rng, lambda old, new: old.axes == new.axes and old.op != new.op)


def rewire(graph: LayerGraph, space: LayerSpace, rng: np.random.Generator) -> LayerGraph | None:
    """Another source for one input of a live node."""
    slots = [(id, slot) for id, node in graph.live_nodes for slot in range(len(node.inputs))]
    if not slots:
        return None
    id, slot = slots[int(rng.integers(len(slots)))]
    node = graph.node(id)
    source = int(rng.integers(id - 1))
    source += source >= node.inputs[slot]
    return _with_node(graph, id, replace_inputs(node, (*node.inputs[:slot], source, *node.inputs[slot + 1 :])))


MUTATIONS: dict[str, Mutation] = {
    "replace": replace,
    "insert": insert,
    "delete": delete,
    "swap-axes": swap_axes,
    "swap-moment": swap_moment,
    "rewire": rewire,
}


def graft(first: LayerGraph, second: LayerGraph, rng: np.random.Generator) -> LayerGraph | None:
    """`first` with one live node replaced by a live node of `second` and all that this one needs; without dead nodes.

    None if either graph has no operation.
    """
    first, second = first.compact(), second.compact()
    if not first.nodes or not second.nodes:
        return None
    at = FIRST + int(rng.integers(len(first.nodes)))
    root = FIRST + int(rng.integers(len(second.nodes)))
    donated = dataclasses.replace(second, output=root).compact().nodes
    move = len(donated)
    nodes = list(first.nodes[: at - FIRST])  # then the donated nodes in place of node `at`, then the rest
    nodes += [replace_inputs(n, tuple(i if i < FIRST else i + at - FIRST for i in n.inputs)) for n in donated]
    for node in first.nodes[at - FIRST + 1 :]:
        nodes.append(replace_inputs(node, tuple(i if i < at else i + move - 1 for i in node.inputs)))
    return dataclasses.replace(first, nodes=tuple(nodes), output=first.output + move - 1).compact()


def _with_node(graph: LayerGraph, id: int, node: Node) -> LayerGraph:
    at = id - FIRST
    return dataclasses.replace(graph, nodes=(*graph.nodes[:at], node, *graph.nodes[at + 1 :]))


def _without(graph: LayerGraph, id: int, heir: int) -> LayerGraph:
    """The graph without node `id`, whose readers read `heir`."""

    def moved(source: int) -> int:
        return heir if source == id else source - (source > id)

    later = (replace_inputs(n, tuple(map(moved, n.inputs))) for n in graph.nodes[id - FIRST + 1 :])
    return dataclasses.replace(graph, nodes=(*graph.nodes[: id - FIRST], *later), output=moved(graph.output))


def _swap(
    graph: LayerGraph, space: LayerSpace, rng: np.random.Generator, fits: Callable[[Node, Node], bool]
) -> LayerGraph | None:
    places = [
        (id, new)
        for id, old in graph.live_nodes
        if old.aggregate
        for new in space.prototypes
        if new.aggregate and fits(old, new)
    ]
    if not places:
        return None
    id, new = places[int(rng.integers(len(places)))]
    return _with_node(graph, id, replace_inputs(new, graph.node(id).inputs))
