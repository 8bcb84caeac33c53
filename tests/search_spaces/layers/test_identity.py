"""Fingerprints: against torch in fp64, on inputs of their own, and where they must and must not merge."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from layer_reference import live_graphs
from torch.autograd.functional import jvp

from search_spaces.layers import identity
from search_spaces.layers.catalog import layer
from search_spaces.layers.duals import Probe, evaluate_dual
from search_spaces.layers.evaluate import evaluate
from search_spaces.layers.filters import static
from search_spaces.layers.formula import parse_formula
from search_spaces.layers.graph import ZERO, LayerGraph, X, make_node
from search_spaces.layers.identity import _quantised, fingerprint
from search_spaces.layers.ops import ELEMENTWISE
from search_spaces.layers.simplify import simplify
from search_spaces.layers.space import LayerSpace

CHANNELS, GROUPS = 6, 3


@pytest.fixture(scope="module")
def valid() -> list[LayerGraph]:
    """Random layers that pass the static checks, both samplings."""
    found: list[LayerGraph] = []
    for sampling in ("flat", "nested"):
        space, rng, graphs = LayerSpace(sampling=sampling, groups=2, affine=False), np.random.default_rng(6), []
        while len(graphs) < 450:
            graph = space.sample(rng)
            if static(graph) is None:
                graphs.append(graph)
        found += graphs
    return found


# -- the evaluator in numpy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("primitives", ["evonorm24", "extended"])
def test_duals_are_torch_s_values_and_derivatives(primitives):
    rng = np.random.default_rng(0)
    compared = 0
    for graph in live_graphs(rng, 250, primitives, groups=GROUPS, affine=False):
        x, dx = rng.standard_normal((2, 3, CHANNELS, 5))
        v0, v1, dv0, dv1 = rng.standard_normal((4, CHANNELS))
        with np.errstate(all="ignore"):
            value, change = evaluate_dual(graph, Probe(x, v0, v1, GROUPS, dx, dv0, dv1))
        change = np.zeros_like(x) if change is None else np.broadcast_to(change, x.shape)

        def function(x: torch.Tensor, v0: torch.Tensor, v1: torch.Tensor, graph=graph) -> torch.Tensor:
            return evaluate(graph, x, {"v0": v0, "v1": v1})

        expected = jvp(
            function, tuple(map(torch.from_numpy, (x, v0, v1))), tuple(map(torch.from_numpy, (dx, dv0, dv1)))
        )
        if all(bool(torch.isfinite(e).all()) for e in expected):
            compared += 1
            for found, reference in zip((np.broadcast_to(value, x.shape), change), expected, strict=True):
                np.testing.assert_allclose(found, reference.numpy(), rtol=1e-9, atol=1e-9 * (1 + np.abs(found).max()))
    assert compared > 220


@pytest.mark.parametrize("name", ["log", "sqrt", "abs", "rsqrt", "max", "min", "div", "softplus"])
def test_derivatives_at_kinks_are_torch_s(name):
    graph = LayerGraph((make_node(name, (X, ZERO) if ELEMENTWISE[name].arity == 2 else (X,)),), 4, affine=False)
    x, dx = np.zeros((1, 2, 3)), np.ones((1, 2, 3))
    value, change = evaluate_dual(graph, Probe(x, np.zeros(2), np.ones(2), 1, dx))
    expected = jvp(lambda x: evaluate(graph, x), torch.from_numpy(x), torch.from_numpy(dx))
    np.testing.assert_allclose(value, expected[0].numpy())
    np.testing.assert_allclose(change, expected[1].numpy())


def test_half_precision_statistics_are_single_precision():
    graph = parse_formula("x / rms[instance](x)")
    x = np.full((2, 4, 8), 300, np.float16)  # its square overflows
    value, _ = evaluate_dual(graph, Probe(x, np.zeros(4, np.float16), np.ones(4, np.float16), 2))
    assert value.dtype == np.float16
    np.testing.assert_allclose(value, 1, rtol=1e-3)


# -- what is one candidate ---------------------------------------------------------------------------------------

EQUAL = [  # beyond what rewriting finds
    ("x * sigmoid(x) / std[group](x)", "x / std[group](x) * sigmoid(x)"),
    ("max(x, 0)", "(x + abs(x)) * sigmoid(0)"),
    ("max(-x, -v0)", "-min(x, v0)"),
    ("(x - mean[batch](x)) / std[batch](x)", "x / std[batch](x) - mean[batch](x) / std[batch](x)"),
    ("tanh(-x) * v1", "-tanh(x) * v1"),
    ("x * (v0 + v1)", "x * v1 + x * v0"),
    ("exp(x) * exp(v0)", "exp(v0 + x)"),
]

DIFFERENT = [
    ("max(x, v0)", "max(x, v1)"),
    ("x / std[group](x)", "x / std[instance](x)"),
    ("x / std[group](x)", "x / std[layer](x)"),
    ("x / std[batch](x)", "x / std[instance](x)"),
    ("x / rms[batch](x)", "x / std[batch](x)"),
    ("x", "x / std[batch](x)"),
    ("max(x, v0)", "max(x, tanh(v0))"),
    ("max(exp(x), mean[layer](v0))", "exp(x)"),
    ("x / mean[channel](x)", "x / mean[channel-group](x)"),
]
SCALED = [  # different, but only by what a weight absorbs
    ("x * v1", "x * abs(v1)"),  # equal for v1 > 0
    ("x * v0", "x * v1"),
    ("x * max(v1, sigmoid(v0))", "x * sigmoid(v0)"),
    ("rms[batch](v0) * x", "rms[layer](v0) * x"),
]


@pytest.mark.parametrize(("first", "second"), EQUAL)
def test_equal_functions_have_one_fingerprint(first, second):
    a, b = parse_formula(first), parse_formula(second)
    assert simplify(a) != simplify(b)
    assert fingerprint(a) == fingerprint(b)
    assert fingerprint(a, refit=True) == fingerprint(b, refit=True)


@pytest.mark.parametrize(("first", "second"), DIFFERENT + SCALED)
def test_different_functions_have_two(first, second):
    assert fingerprint(parse_formula(first)) != fingerprint(parse_formula(second))


REFITTED = [
    ("x * sigmoid(x)", "-(x * sigmoid(x) + x * sigmoid(x))"),
    ("max(x, 0)", "max(x, 0) * v1 + v0"),
    ("x / std[batch](x)", "(x / std[batch](x) - exp(v0)) / exp(v1)"),
    ("x", "v1 - x"),
    ("tanh(x)", "tanh(x) - sigmoid(0)"),
]


@pytest.mark.parametrize(("first", "second"), REFITTED + SCALED)
def test_refitting_forgives_what_weight_and_bias_absorb(first, second):
    a, b = parse_formula(first), parse_formula(second)
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint(a, refit=True) == fingerprint(b, refit=True)


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_refitting_forgives_nothing_else(first, second):
    assert fingerprint(parse_formula(first), refit=True) != fingerprint(parse_formula(second), refit=True)


def test_settings_count_where_they_matter():
    s0, b0, relu = layer("evonorm-s0"), layer("evonorm-b0"), parse_formula("max(x, 0)")

    def key(graph: LayerGraph, **settings) -> str:
        return fingerprint(LayerGraph(graph.nodes, graph.output, **settings))

    assert key(s0) != key(s0, groups=8) != key(s0, group_size=8)
    assert key(b0) == key(b0, groups=8)
    assert key(b0) != key(b0, momentum=0.01)
    assert key(b0) != key(b0, unbiased=True)
    assert key(s0) == key(s0, momentum=0.01)
    assert key(relu) == key(relu, groups=8, momentum=None) != key(relu, affine=False)
    whole, single = parse_formula("x / std[layer](x)"), parse_formula("x / std[instance](x)")
    group = parse_formula("x / std[group](x)")
    assert key(group, groups=1) == key(whole)
    assert key(group, group_size=1) == key(single)


def test_derivatives_count(monkeypatch):
    graph, before = layer("evonorm-s0"), fingerprint(layer("evonorm-s0"))

    def twice_as_steep(graph: LayerGraph, probe: Probe):
        value, change = evaluate_dual(graph, probe)
        return value, None if change is None else 2 * change

    monkeypatch.setattr(identity, "evaluate_dual", twice_as_steep)
    assert fingerprint(graph) != before


def test_dead_nodes_and_order_do_not_count(valid):
    space, rng = LayerSpace(groups=2, affine=False), np.random.default_rng(1)
    for graph in valid[:60]:
        assert fingerprint(space.embed(graph, rng)) == fingerprint(graph)


# -- against an evaluation of our own ----------------------------------------------------------------------------


def values_in_torch(graph: LayerGraph) -> np.ndarray:
    """Values on inputs that no fingerprint has seen, for three draws of v0 and v1."""
    generator = torch.Generator().manual_seed(99)
    found = []
    for scale, offset in ((1.0, 0.0), (3.0, -1.0), (0.3, 0.5)):
        x = torch.randn(6, 8, 4, 4, generator=generator, dtype=torch.float64) * scale + offset
        v0, v1 = 1.5 * torch.randn(2, 8, generator=generator, dtype=torch.float64)
        found.append(evaluate(graph, x, {"v0": v0, "v1": v1}).flatten())
    return torch.cat(found).numpy()


def test_classes_are_those_of_values_on_other_inputs(valid):
    classes: dict[str, list[LayerGraph]] = collections.defaultdict(list)
    for graph in valid:
        classes[fingerprint(graph)].append(graph)
    for graphs in classes.values():
        first = values_in_torch(graphs[0])
        for other in graphs[1:]:
            np.testing.assert_allclose(values_in_torch(other), first, rtol=1e-4, atol=1e-5)
    # Different fingerprints, different values; few functions differ so rarely that random inputs do not show it.
    values = {np.round(values_in_torch(graphs[0]), 7).tobytes() for graphs in classes.values()}
    assert len(classes) - 3 <= len(values) <= len(classes)
    exact = {simplify(graph).stable_hash() for graph in valid}
    assert len(classes) < len(exact) < len({graph.stable_hash() for graph in valid})
    assert len({fingerprint(graph, refit=True) for graph in valid}) < len(classes)


def test_rounding_errors_move_no_digit():
    rng = np.random.default_rng(2)
    ties = np.concatenate([k * 2.0 ** -np.arange(40) for k in (1, 3, 5, 7, 1.1, 9.99995, 12345.5)])
    values = np.concatenate([ties, -ties, rng.standard_normal(20_000), [0.0, np.inf, -np.inf, np.nan]])
    for scale in (1.0, 1e-6, 1e6):
        noisy = scale * values * (1 + 1e-14 * rng.standard_normal(len(values))) + 1e-17 * rng.standard_normal(
            len(values)
        )
        np.testing.assert_array_equal(_quantised(noisy), _quantised(scale * values))
    assert len(set(_quantised(np.array([0.0, np.inf, -np.inf, np.nan])).tolist())) == 4
    others = values[np.isfinite(values) & (np.abs(values) > 1e-2)]
    assert (_quantised(others * (1 + 3e-5)) != _quantised(others)).all()
