"""The functions of activation searches and trained channel vectors, through every executor, against SciPy."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import special

from search_spaces.common.errors import UserError
from search_spaces.layers.duals import Probe, evaluate_dual
from search_spaces.layers.evaluate import evaluate
from search_spaces.layers.formula import format_formula, parse_formula
from search_spaces.layers.graph import CLAMPED, LayerGraph, Node, make_node
from search_spaces.layers.identity import fingerprint
from search_spaces.layers.latex import format_latex
from search_spaces.layers.module import GraphLayer
from search_spaces.layers.ops import ELEMENTWISE, OPERATIONS, PARAMETERS, POINTWISE
from search_spaces.layers.pangaea_space import PangaeaSpace
from search_spaces.layers.patterns import NON_NEGATIVE, POSITIVE, signs
from search_spaces.layers.pointwise import UNARY, unary_slope
from search_spaces.layers.simplify import simplify
from search_spaces.layers.source import to_source
from search_spaces.layers.space import LayerSpace
from search_spaces.layers.swish_space import SwishSpace

SCALE, ALPHA = 1.0507009873554805, 1.6732632423543772
REFERENCE = {
    "zeros": lambda a: 0 * a,
    "ones": lambda a: 0 * a + 1,
    "identity": lambda a: a,
    "cube": lambda a: a * a * a,
    "sin": np.sin,
    "cos": np.cos,
    "sinh": lambda a: (np.exp(a) - np.exp(-a)) / 2,
    "cosh": lambda a: (np.exp(a) + np.exp(-a)) / 2,
    "expm1": special.expm1,
    "asinh": lambda a: np.sign(a) * np.log(np.abs(a) + np.sqrt(a * a + 1)),
    "atan": np.arctan,
    "sinc": lambda a: special.spherical_jn(0, np.abs(a)),
    "gaussian": lambda a: np.exp(-(a**2)),
    "erfc": special.erfc,
    "logsigmoid": special.log_expit,
    "i0e": special.i0e,
    "i1e": special.i1e,
    "relu": lambda a: (a + np.abs(a)) / 2,
    "elu": lambda a: np.where(a > 0, a, np.expm1(a)),
    "selu": lambda a: SCALE * np.where(a > 0, a, ALPHA * np.expm1(a)),
    "silu": lambda a: a * special.expit(a),
    "softsign": lambda a: a / (1 + np.abs(a)),
    "hardsigmoid": lambda a: np.minimum(np.maximum(a / 5 + 0.5, 0), 1),
    "reciprocal": lambda a: 1 / (a + np.where(a < 0, -1e-5, 1e-5)),
    "logabs": lambda a: np.log(np.abs(a) + 1e-5),
    "pow": lambda a, b: np.exp(b * np.log(np.abs(a) + 1e-5)),
}
every_function = pytest.mark.parametrize("name", POINTWISE)


def points() -> torch.Tensor:
    """Off the kinks, [40, 2, 1], with tiny and large numbers."""
    x = np.concatenate([np.linspace(-6.03, 6.01, 72), [1e-3, -1e-3, 2e-2, -2e-2, 1e-8, -1e-8, 8.0, -8.0]])
    return torch.from_numpy(x).reshape(40, 2, 1)


def graph_of(name: str, **options) -> LayerGraph:
    inputs = (0,) if POINTWISE[name].arity == 1 else (0, 4)
    nodes = () if POINTWISE[name].arity == 1 else (make_node("sin", (0,)),)
    return LayerGraph((*nodes, make_node(name, inputs, **options)), 4 + len(nodes), affine=False)


def gradient(graph: LayerGraph) -> torch.Tensor:
    x = points().requires_grad_()
    value = evaluate(graph, x)
    return torch.autograd.grad(value.sum(), x)[0] if value.requires_grad else torch.zeros_like(x)


def test_every_function_has_a_reference():
    assert set(REFERENCE) == set(POINTWISE)
    assert not set(POINTWISE) & set(ELEMENTWISE)
    assert set(UNARY) == set(POINTWISE) - {"reciprocal", "logabs", "pow"}


@every_function
def test_values(name):
    x = points().numpy()
    expected = REFERENCE[name](x) if POINTWISE[name].arity == 1 else REFERENCE[name](x, np.sin(x))
    np.testing.assert_allclose(evaluate(graph_of(name), points()).numpy(), expected, rtol=1e-9, atol=1e-13)


@every_function
def test_slopes_are_those_of_differences_and_of_duals(name):
    graph = graph_of(name)
    slope = gradient(graph)
    probe = Probe(points().numpy(), np.zeros(2), np.ones(2), 1, np.ones_like(points().numpy()))
    value, change = evaluate_dual(graph, probe)
    np.testing.assert_allclose(value, evaluate(graph, points()).numpy(), rtol=1e-12)
    np.testing.assert_allclose(np.broadcast_to(change, slope.shape), slope.numpy(), rtol=1e-9, atol=1e-8)
    far = points()[points().abs() > 0.05]
    step = 1e-6

    def at(shift: float) -> np.ndarray:
        return evaluate(graph, (far + shift).reshape(-1, 1)).flatten().numpy()

    middle = (at(step) - at(-step)) / (2 * step)
    np.testing.assert_allclose(slope.numpy()[np.abs(points().numpy()) > 0.05], middle, rtol=2e-6, atol=2e-8)


@pytest.mark.parametrize("name", [n for n in POINTWISE if POINTWISE[n].arity == 1])
def test_slopes_of_the_table(name):
    slope = unary_slope(make_node(name, (0,)), points())
    torch.testing.assert_close(slope, gradient(graph_of(name)), rtol=1e-9, atol=1e-8)  # torch's sinc has 0 below 1e-8


@every_function
def test_no_sign_is_claimed_in_vain(name):
    graph = graph_of(name)
    value = evaluate(graph, torch.cat([points(), torch.zeros(1, 2, 1, dtype=torch.double)]))
    claimed = signs(graph)[graph.output]
    assert value.min() > 0 if claimed == POSITIVE else value.min() >= 0 if claimed == NON_NEGATIVE else True
    positive = LayerGraph((Node("exp", (0,)), *(make_node(name, (4,) * POINTWISE[name].arity),)), 5, affine=False)
    value = evaluate(positive, points())
    claimed = signs(positive)[5]
    assert value.min() > 0 if claimed == POSITIVE else value.min() >= 0 if claimed == NON_NEGATIVE else True


@pytest.mark.parametrize("name", CLAMPED)
def test_clamps(name):
    graph = graph_of(name, clamp=2.0) if name != "exp" else LayerGraph((Node("exp", (0,), clamp=2.0),), 4, affine=False)
    x = torch.tensor([[-1000.0], [-2.5], [1.5], [2.5], [1000.0]], dtype=torch.double)
    low = -2.0 if name in ("sinh", "cosh") else -np.inf
    expected = getattr(np, name)(np.clip(x.numpy(), low, 2.0))
    np.testing.assert_allclose(evaluate(graph, x).numpy(), expected, rtol=1e-12)
    with pytest.raises(UserError, match="clamp"):
        Node("tanh", (0,), clamp=2.0) and LayerGraph((Node("tanh", (0,), clamp=2.0),), 4)


def test_plain_and_guarded_stand_side_by_side():
    """The guard is an attribute: without it the published formula, infinite where that is."""
    zero = torch.zeros(1, 1)
    assert evaluate(graph_of("reciprocal", eps=0.0), zero).item() == np.inf
    assert evaluate(graph_of("reciprocal"), zero).item() == pytest.approx(1e5)
    assert evaluate(graph_of("logabs", eps=0.0), zero).item() == -np.inf
    assert torch.isnan(evaluate(graph_of("pow", eps=0.0), torch.tensor([[-2.0]]))).all()
    assert evaluate(graph_of("pow"), torch.tensor([[-2.0]])).item() == pytest.approx(2.00001 ** np.sin(-2), rel=1e-6)
    for graph in (graph_of("reciprocal", eps=0.0), graph_of("pow", eps=0.0), graph_of("sinh", clamp=3.0)):
        assert parse_formula(format_formula(graph), affine=False) == graph
        assert LayerGraph.from_json(graph.to_json()) == graph


def test_formulas_and_latex_round_trip():
    from matplotlib.mathtext import MathTextParser

    parser = MathTextParser("path")
    for name in POINTWISE:
        graph = graph_of(name)
        assert parse_formula(format_formula(graph), affine=False) == graph
        parser.parse(f"${format_latex(graph)}$")
    graph = parse_formula("max(alpha * x, beta) + beta * silu(gamma * x)")
    assert [node.op for node in graph.nodes if not node.inputs] == ["alpha", "beta", "gamma"]
    assert format_formula(graph) == "max(alpha * x, beta) + beta * silu(gamma * x)"
    assert parse_formula(format_formula(graph)) == graph
    parser.parse(f"${format_latex(graph)}$")
    assert format_latex(parse_formula("alpha * x^2")) == r"\alpha \, x^{2}"
    with pytest.raises(UserError, match="a new name"):
        parse_formula("alpha = x; alpha")


@pytest.fixture(scope="module")
def random_graphs() -> list[LayerGraph]:
    rng = np.random.default_rng(5)
    found = []
    for space in (PangaeaSpace(), SwishSpace(), SwishSpace(units=2), PangaeaSpace(guarded=False)):
        arch = space.sample(rng)
        for _ in range(60):
            arch = space.mutate(arch, rng)
            found.append(arch)
    return found


def params_of(graph: LayerGraph, generator: torch.Generator, channels: int = 4) -> dict[str, torch.Tensor]:
    return {name: torch.randn(channels, generator=generator, dtype=torch.double) for name in graph.parameters}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10, equal_nan=True)


def test_every_executor_agrees(random_graphs):
    generator = torch.Generator().manual_seed(0)
    for graph in random_graphs:
        x = torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.double)
        params = params_of(graph, generator)
        expected = evaluate(graph, x, params)
        layer = GraphLayer(graph, 4).double()
        assert set(dict(layer.named_parameters())) == set(params)
        assert all((p == 1).all() for p in layer.parameters())
        layer.load_state_dict(params)
        close(layer(x), expected)
        space: dict = {"__name__": "layer"}
        exec(to_source(graph, "Exported"), space)
        exported = space["Exported"](4).double()
        assert all((p == 1).all() for p in exported.parameters())
        exported.load_state_dict(layer.state_dict())
        close(exported(x), expected)
        vectors = {name: (vector.numpy(), np.zeros(4)) for name, vector in params.items()}
        with np.errstate(all="ignore"):
            value, _ = evaluate_dual(graph, Probe(x.flatten(2).numpy(), np.zeros(4), np.ones(4), 1, vectors=vectors))
        close(torch.from_numpy(np.array(np.broadcast_to(value, (3, 4, 4)))), expected.flatten(2))


def test_simplification_keeps_finite_values(random_graphs):
    generator = torch.Generator().manual_seed(1)
    shorter = 0
    for graph in random_graphs:
        simple = simplify(graph)
        assert simplify(simple) == simple
        shorter += len(simple.nodes) < len(graph.compact().nodes)
        x = torch.randn(6, 4, generator=generator, dtype=torch.double)
        params = params_of(graph, generator)
        before, after = evaluate(graph, x, params), evaluate(simple, x, params)
        if torch.isfinite(before).all():
            torch.testing.assert_close(after, before, rtol=1e-8, atol=1e-9)
    assert shorter > 20


def test_fingerprints_tell_parameters_apart():
    def same(a: str, b: str) -> bool:
        return fingerprint(parse_formula(a)) == fingerprint(parse_formula(b))

    assert same("relu(x)", "max(x, 0)")
    assert same("alpha * relu(x)", "relu(x) * alpha")
    assert same("ones(x) * identity(x)", "x")
    assert same("cosh(-x)", "cosh(x)")
    assert same("silu(x)", "x * sigmoid(x)")
    assert not same("alpha * x", "x")
    assert not same("alpha * x", "beta * x")
    assert not same("relu(alpha * x)", "alpha * relu(x)")  # alpha has both signs
    assert not same("abs(alpha) * x", "alpha * x")


def test_parameters_are_nodes_without_inputs():
    graph = parse_formula("alpha * x + beta")
    assert graph.parameters == ("alpha", "beta")
    assert LayerGraph.from_json(graph.to_json()) == graph
    assert all(OPERATIONS[name].arity == 0 for name in PARAMETERS)
    with pytest.raises(UserError, match="0 inputs of alpha"):
        LayerGraph((Node("alpha", (0,)),), 4)
    with pytest.raises(UserError, match="alpha"):
        LayerSpace(["add", "alpha"], 3)
    layer = GraphLayer(graph, 5)
    assert list(dict(layer.named_parameters())) == ["weight", "bias", "alpha", "beta"]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    copied = copy.deepcopy(layer)
    copied.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.autograd.gradcheck(
        GraphLayer(graph, 2).double(), torch.randn(2, 2, dtype=torch.double).requires_grad_()
    )


@every_function
def test_half_precision_keeps_its_type(name):
    graph = graph_of(name)
    x = torch.linspace(-2, 2, 12).reshape(3, 4)
    for dtype in (torch.float16, torch.bfloat16):
        low = GraphLayer(graph, 4)(x.to(dtype))
        assert low.dtype == dtype
        wide = evaluate(graph, x.to(dtype).float())
        torch.testing.assert_close(low.float(), wide, rtol=0.05, atol=0.05)


def test_export_and_compile():
    graph = parse_formula("alpha * silu(x) + beta * asinh(x) - hardsigmoid(cube(x))", affine=False)
    layer, x = GraphLayer(graph, 3), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in POINTWISE if n not in ("i0e", "i1e")])
def test_onnx(name):
    runtime = pytest.importorskip("onnxruntime")
    layer, x = GraphLayer(graph_of(name), 3).eval(), torch.randn(2, 3, 4, 4)
    buffer = io.BytesIO()
    torch.onnx.export(layer, (x,), dynamo=True, verbose=False).save(buffer)
    session = runtime.InferenceSession(buffer.getvalue())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, layer(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_replacing_inputs_of_settings_keeps_the_graph():
    graph = graph_of("reciprocal")
    assert replace(graph, affine=True).stable_hash() != graph.stable_hash()
