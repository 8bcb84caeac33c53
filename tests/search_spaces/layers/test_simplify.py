"""Simplification: every rewrite keeps values and gradients, as the torch interpreter computes them in fp64."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_reference import random_graph

from search_spaces.layers.evaluate import evaluate
from search_spaces.layers.graph import LEAVES, V0, V1, ZERO, LayerGraph, Node, X, make_node
from search_spaces.layers.ops import ELEMENTWISE
from search_spaces.layers.simplify import simplify

CHANNELS = 6
TOLERANCE = 1e-9
N4, N5, N6, N7 = range(4, 8)  # ids of the first intermediate nodes


def layer(*nodes, **settings) -> LayerGraph:
    """A graph from (operation, input, ...), the last one its output."""
    made = tuple(make_node(name, inputs) for name, *inputs in nodes)
    return LayerGraph(made, len(LEAVES) + len(made) - 1, groups=2, **settings)


def value_and_gradients(graph: LayerGraph, seed: int = 0, stretch: float = 1.0, initial: bool = False) -> list:
    """The value and the gradients of a random projection of it by x, v0 and v1."""
    generator = torch.Generator().manual_seed(seed)
    x, direction = torch.randn(2, 3, CHANNELS, 5, generator=generator, dtype=torch.float64)
    v0, v1 = torch.randn(2, CHANNELS, generator=generator, dtype=torch.float64)
    if initial:
        v0, v1 = torch.zeros_like(v0), torch.ones_like(v1)
    inputs = [(1.5 * x + 0.3) * stretch, v0, v1]
    inputs = [i.detach().requires_grad_() for i in inputs]
    value = evaluate(graph, inputs[0], {"v0": inputs[1], "v1": inputs[2]})
    if not value.requires_grad:
        return [value, *(torch.zeros_like(i) for i in inputs)]
    found = torch.autograd.grad((value * direction).sum(), inputs, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True))]


def distance(first: list, second: list) -> float:
    """The largest difference, relative to what is larger than one."""
    return max(float((a - b).abs().max() / (1 + a.abs().max())) for a, b in zip(first, second, strict=True))


def well_behaved(graph: LayerGraph, values: list) -> bool:
    """Finite, and not so ill-conditioned that rounding its input moves it (sqrt and log jump at zero)."""
    if not all(bool(torch.isfinite(v).all()) for v in values):
        return False
    return distance(values, value_and_gradients(graph, stretch=1 + 1e-13)) < 1e-10


@pytest.mark.parametrize("primitives", ["evonorm24", "tokens", "extended"])
def test_values_and_gradients_stay(primitives):
    rng = np.random.default_rng(0)
    compared = smaller = 0
    for _ in range(500):
        graph = random_graph(rng, primitives, groups=2)
        simple = simplify(graph)
        before = value_and_gradients(graph)
        if well_behaved(graph, before):
            compared += 1
            smaller += len(simple.nodes) < len(graph.compact().nodes)
            assert distance(before, value_and_gradients(simple)) < TOLERANCE
    assert compared > 480
    assert smaller > 100


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_values_and_gradients_stay_for_hostile_graphs(data):
    """Graphs of few operations on few values, where rewrites meet each other."""
    names = data.draw(st.sampled_from(REGIONS))
    nodes = []
    for id in range(len(LEAVES), len(LEAVES) + data.draw(st.integers(1, 9))):
        name = data.draw(st.sampled_from(names))
        count = 2 if name in ELEMENTWISE and ELEMENTWISE[name].arity == 2 else 1
        nodes.append((name, *(data.draw(st.integers(0, id - 1)) for _ in range(count))))
    graph = layer(*nodes)
    simple = simplify(graph)
    assert simplify(simple) == simple
    before = value_and_gradients(graph)
    if well_behaved(graph, before):
        assert distance(before, value_and_gradients(simple)) < TOLERANCE


REGIONS = (
    ("neg", "abs", "square", "max", "min", "add", "sub", "mul"),
    ("neg", "exp", "div", "mul", "sigmoid", "abs"),
    ("mean-instance", "mean-layer", "mean-group", "mean-batch", "std-instance", "std-batch", "add", "neg"),
    ("rms-layer", "l1-group", "std-channel", "mean-channel-group", "rms-channel", "abs", "sub", "exp"),
)


def test_values_stay_at_the_initial_parameters():
    rng = np.random.default_rng(1)
    for _ in range(300):
        graph = random_graph(rng, "evonorm24", groups=2)
        before = value_and_gradients(graph, initial=True)[0]
        stretched = value_and_gradients(graph, stretch=1 + 1e-13, initial=True)[0]
        if torch.isfinite(before).all() and distance([before], [stretched]) < 1e-10:
            assert distance([before], [value_and_gradients(simplify(graph), initial=True)[0]]) < TOLERANCE


def test_the_result_is_a_fixed_point_and_never_larger():
    rng = np.random.default_rng(2)
    for _ in range(1000):
        graph = random_graph(rng, "extended")
        simple = simplify(graph)
        assert simplify(simple) == simple
        assert len(simple.nodes) <= len(graph.compact().nodes)
        assert simple == simple.compact()


def test_presets_are_closed():
    rng = np.random.default_rng(3)
    for primitives in ("evonorm21", "tokens"):
        for _ in range(500):
            graph = random_graph(rng, primitives)
            added = {node.name for node in simplify(graph).nodes} - {node.name for node in graph.nodes}
            assert added <= {"exp", "square"}  # exp of zero is one; a * a is a square


def test_the_order_of_nodes_and_of_commuting_inputs_does_not_matter():
    rng = np.random.default_rng(4)
    moved = 0
    for _ in range(300):
        graph = random_graph(rng, "extended")
        other = shuffled(graph, rng)
        moved += other != graph
        assert simplify(other) == simplify(graph)
    assert moved > 250


def shuffled(graph: LayerGraph, rng: np.random.Generator) -> LayerGraph:
    """The same layer with its nodes in another topological order, inputs swapped, and one dead node."""
    ids, nodes = {i: i for i in range(len(LEAVES))}, [Node("tanh", (X,))]
    waiting = dict(enumerate(graph.nodes, len(LEAVES)))
    while waiting:
        ready = [id for id, node in waiting.items() if all(i in ids for i in node.inputs)]
        id = ready[rng.integers(len(ready))]
        node = waiting.pop(id)
        inputs = [ids[i] for i in node.inputs]
        if node.op in ELEMENTWISE and ELEMENTWISE[node.op].commutative and rng.random() < 0.5:
            inputs.reverse()
        ids[id] = len(LEAVES) + len(nodes)
        nodes.append(Node(node.op, tuple(inputs), node.axes, node.eps, node.clamp))
    return LayerGraph(tuple(nodes), ids[graph.output])


def test_settings_of_the_layer_stay():
    graph = layer(("neg", X), ("neg", N4), ("tanh", N5), affine=False, momentum=None, unbiased=True)
    assert simplify(graph) == layer(("tanh", X), affine=False, momentum=None, unbiased=True)


SAME = layer(("tanh", X))  # what many rewrites below should come to
X_ITSELF = [
    [("neg", X), ("neg", N4)],
    [("add", X, ZERO)],
    [("add", ZERO, X)],
    [("sub", X, ZERO)],
    [("max", X, X)],
    [("min", X, X)],
    [("exp", ZERO), ("mul", N4, X)],
    [("max", X, V0), ("min", N4, X)],
    [("tanh", ZERO), ("log", N4), ("sqrt", N5), ("add", N6, X)],
]


@pytest.mark.parametrize("nodes", X_ITSELF, ids=str)
def test_identities_vanish(nodes):
    last = len(LEAVES) + len(nodes) - 1
    assert simplify(layer(*nodes, ("tanh", last))) == SAME


ZEROS = [
    [("mul", X, ZERO)],
    [("neg", ZERO)],
    [("sub", X, X)],
    [("neg", X), ("add", N4, X)],
    [("div", ZERO, X)],
    [("square", ZERO), ("mean-batch", N4)],
    [("abs", X), ("min", N4, ZERO)],
]


@pytest.mark.parametrize("nodes", ZEROS, ids=str)
def test_zeros_fold(nodes):
    last = len(LEAVES) + len(nodes) - 1
    assert simplify(layer(*nodes, ("add", X, last), ("tanh", last + 1))) == SAME


EQUAL = [
    ([("square", X), ("abs", N4)], [("square", X)]),
    ([("neg", X), ("abs", N4)], [("abs", X)]),
    ([("neg", X), ("square", N4)], [("square", X)]),
    ([("abs", X), ("square", N4)], [("square", X)]),
    ([("mul", X, X)], [("square", X)]),
    ([("neg", X), ("neg", V1), ("mul", N4, N5)], [("mul", V1, X)]),
    ([("neg", X), ("rms-group", N4)], [("rms-group", X)]),
    ([("abs", X), ("rms-batch", N4)], [("rms-batch", X)]),
    ([("neg", X), ("std-layer", N4)], [("std-layer", X)]),
    ([("mean-instance", X), ("mean-instance", N4)], [("mean-instance", X)]),
    ([("mean-instance", X), ("mean-layer", N4)], [("mean-layer", X)]),
    ([("mean-group", X), ("mean-layer", N4)], [("mean-layer", X)]),
    ([("mean-instance", X), ("mean-batch", N4)], [("mean-batch", X)]),
    ([("mean-batch", X), ("mean-instance", N4)], [("mean-batch", X)]),
    ([("add", X, V0), ("std-batch", N4)], [("std-batch", X)]),
    ([("mean-group", X), ("sub", N4, X), ("std-group", N5)], [("std-group", X)]),
    ([("exp", X), ("l1-group", N4)], [("exp", X), ("mean-group", N4)]),
    ([("exp", X), ("mul", N4, X), ("exp", X), ("add", N5, N6)], [("exp", X), ("mul", X, N4), ("add", N4, N5)]),
    ([("max", X, V0), ("max", N4, X)], [("max", X, V0)]),
    ([("abs", X), ("neg", N4), ("max", N4, N5)], [("abs", X)]),
    ([("neg", X), ("sub", V1, N4)], [("add", X, V1)]),
    ([("sub", X, V1), ("neg", N4)], [("sub", V1, X)]),
]


@pytest.mark.parametrize(("before", "after"), EQUAL, ids=str)
def test_equal_graphs_come_out_equal(before, after):
    assert simplify(layer(*before)) == simplify(layer(*after))
    assert len(simplify(layer(*before)).nodes) == len(after)


def test_a_quotient_is_one_only_where_it_never_vanishes():
    one = simplify(LayerGraph((make_node("exp", (X,)), Node("div", (4, 4))), 5))
    assert one.nodes == (Node("exp", (ZERO,)),)
    for node in (Node("abs", (X,)), Node("mean", (X,), "layer"), Node("tanh", (X,))):
        for quotient in (
            make_node("div", (4, 4)),
            Node("div", (4, 4)),
            Node("div", (ZERO, 4)),
            make_node("div", (ZERO, 4)),
        ):
            graph = LayerGraph((node, quotient), 5)
            vanishes = quotient.eps > 0 and quotient.inputs[0] == ZERO
            assert simplify(graph) == (LayerGraph((), ZERO) if vanishes else graph)


KEPT = [
    [("abs", X)],
    [("square", X), ("sqrt", N4)],  # sqrt(x * x + eps)
    [("mean-layer", X), ("rms-layer", N4)],  # sqrt(mean^2 + eps)
    [("rms-group", X), ("rms-group", N4)],
    [("mean-layer", X), ("mul", N4, X), ("mean-group", N5)],
    [("mean-channel", X), ("mean-instance", N4)],
    [("mul", X, V1), ("std-layer", N4)],
    [("add", X, V1), ("std-layer", N4)],  # v1 varies over the channels of a layer
    [("std-layer", V1), ("std-layer", ZERO), ("add", N4, N5)],
    [("neg", X), ("neg", V0), ("max", N4, N5)],
]


@pytest.mark.parametrize("nodes", KEPT, ids=str)
def test_what_differs_stays(nodes):
    assert len(simplify(layer(*nodes)).nodes) == len(nodes)


def test_a_mean_over_space_of_a_channel_vector_is_itself():
    graph = layer(("mean-group", X), ("mean-instance", V0), ("sub", N4, N5), ("mul", N6, X))
    assert simplify(graph) == layer(("mean-group", X), ("sub", N4, V0), ("mul", X, N5))


def test_the_deviation_of_what_does_not_vary_is_the_constant_of_its_guard():
    for shape in ([("mean-layer", X), ("std-layer", N4)], [("std-instance", V1)], [("std-batch", V0)]):
        graph = simplify(layer(*shape, ("mul", len(LEAVES) + len(shape) - 1, X)))
        value = value_and_gradients(graph)[0]
        x = value_and_gradients(LayerGraph((), X))[0]
        torch.testing.assert_close(value, x * 1e-5**0.5, rtol=1e-12, atol=0)


def test_constants_of_one_value_are_one():
    sigmoid_of_zero = [("sigmoid", ZERO), ("exp", ZERO), ("neg", X), ("exp", ZERO)]
    graph = layer(*sigmoid_of_zero, ("add", N5, N7), ("add", N6, 8), ("div", 9, N4))
    assert sum(node.op == "exp" for node in simplify(graph).nodes) == 1


def test_a_chain_of_shared_squares_takes_no_time():
    nodes = functools.reduce(lambda nodes, id: [*nodes, ("mul", id, id)], range(N4, 60), [("mul", X, V1)])
    assert len(simplify(layer(*nodes)).nodes) == len(nodes)
