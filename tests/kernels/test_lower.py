"""Lowered layers against `evaluate` and GraphLayer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from kernel_cases import make_case, random_cases

from kernels.lower import lower
from kernels.nodes import FULL, C, Unsupported
from kernels.reference import execute, from_program, to_program
from search_spaces.common.errors import UserError
from search_spaces.layers import catalog
from search_spaces.layers.evaluate import evaluate
from search_spaces.layers.formula import parse_formula
from search_spaces.layers.graph import LayerGraph, make_node
from search_spaces.layers.module import GraphLayer
from search_spaces.layers.ops import AXES, MOMENTS, OPERATIONS, PARAMETERS, PRESETS


def forward(graph: LayerGraph, x: torch.Tensor, layout: str = "channels-first", **inputs: torch.Tensor):
    """y by the lowered program, in training."""
    lowered = lower(graph, layout=layout, mixed=True)
    groups = graph.group_count(x.shape[-1 if layout == "tokens" else 1])
    found = execute(lowered.program, {"x": to_program(x, layout, lowered.flat), **inputs}, groups=groups)
    return from_program(found["y"], x.shape, layout, lowered.flat)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize(("layout", "shape"), [("channels-first", (3, 12, 4, 2)), ("tokens", (3, 5, 12))])
def test_every_aggregate_is_the_moment_over_its_axes(moment, axes, layout, shape):
    graph = LayerGraph((make_node(f"{moment}-{axes}", (0,)),), 4, affine=False, groups=4)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3
    values = np.moveaxis(x.numpy(), 1, -1) if layout == "channels-first" else x.numpy()  # channels last
    wanted = np.empty(values.shape)
    for at in np.ndindex(values.shape):  # brute force: the numbers that share a statistic with each number
        same = [slice(None) if axes == "batch" else at[0], *(slice(None) for _ in shape[2:]), at[-1]]
        if axes in ("channel", "channel-group"):
            same[1:-1] = at[1:-1]
        if axes in ("layer", "channel"):
            same[-1] = slice(None)
        elif "group" in axes:
            same[-1] = slice(at[-1] // 3 * 3, at[-1] // 3 * 3 + 3)
        part = values[tuple(same)].ravel()
        centre = math.fsum(part) / part.size
        wanted[at] = {
            "mean": centre,
            "rms": math.sqrt(math.fsum(part**2) / part.size + 1e-5),
            "std": math.sqrt(math.fsum((part - centre) ** 2) / part.size + 1e-5),
            "l1": math.fsum(np.abs(part)) / part.size,
        }[moment]
    found = forward(graph, x, layout).numpy()
    np.testing.assert_allclose(np.moveaxis(found, 1, -1) if layout == "channels-first" else found, wanted, rtol=1e-12)


@pytest.mark.parametrize("op", sorted(set(OPERATIONS) - set(PARAMETERS)))
def test_every_elementwise_operation(op):
    inputs = (0, 3)[: OPERATIONS[op].arity]
    graph = LayerGraph((make_node(op, inputs),), 4, affine=False)
    x = torch.linspace(-6, 6, 200, dtype=torch.float64).reshape(4, 50)  # has no zero
    v1 = torch.linspace(-2, 2, 50, dtype=torch.float64)
    found = forward(graph, torch.cat([x, torch.zeros(1, 50)]), v1=v1)
    torch.testing.assert_close(
        found, evaluate(graph, torch.cat([x, torch.zeros(1, 50)]), {"v1": v1}), rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("op", ["div", "log", "sqrt", "rsqrt", "reciprocal", "logabs", "exp", "expm1", "sinh", "cosh"])
def test_guards_and_clamps_are_the_nodes_own(op):
    x = torch.tensor([[-30.0, -1.0, -1e-3, 0.0, -0.0, 1e-3, 2.0, 30.0]], dtype=torch.float64)
    clamps = op in ("exp", "expm1", "sinh", "cosh")
    node = (
        make_node(op, (0,) * OPERATIONS[op].arity, clamp=2.0)
        if clamps
        else make_node(op, (2, 0)[-OPERATIONS[op].arity :], eps=0.125)
    )
    graph = LayerGraph((node,), 4, affine=False)
    given = {"v0": torch.full((8,), 3.0, dtype=torch.float64)}
    torch.testing.assert_close(forward(graph, x, **given), evaluate(graph, x, given), rtol=1e-13, atol=1e-15)
    unguarded = LayerGraph((make_node(op, node.inputs, eps=0.0),), 4, affine=False)
    assert not torch.equal(forward(unguarded, x, **given), forward(graph, x, **given))


@pytest.mark.parametrize("name", ["batch-norm", "evonorm-b0", "evonorm-b1", "frn-tlu", "bn-silu", "maxtanh-rms"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 4, 1)])
def test_training_gives_the_moments_that_a_layer_keeps_and_evaluation_takes_them(name, unbiased, shape):
    graph = catalog.layer(name, unbiased=unbiased, momentum=1.0)  # buffers become the batch's statistics
    layer = GraphLayer(graph, 4).double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer(x)
    buffers = dict(layer.named_buffers())
    lowered = lower(graph)
    params = {name: value.detach() for name, value in layer.named_parameters()}
    assert set(lowered.parameters) == set(params)
    found = execute(lowered.program, {"x": x, **params}, groups=graph.group_count(4))
    assert len(lowered.statistics) == len(buffers)
    for statistic, buffer in zip(lowered.statistics, buffers.values(), strict=True):
        assert statistic.id in graph.batch_aggregates()
        torch.testing.assert_close(found[statistic.name], buffer, rtol=1e-12, atol=1e-14)
    evaluated = lower(graph, training=False)
    assert "moment_0" not in dict(evaluated.program.outputs)
    running = {s.name: buffer for s, buffer in zip(evaluated.statistics, buffers.values(), strict=True)}
    y = execute(evaluated.program, {"x": x, **params, **running}, groups=graph.group_count(4))["y"]
    torch.testing.assert_close(y, layer.eval()(x).detach(), rtol=1e-12, atol=1e-13)


def test_without_tracking_evaluation_is_training_without_moments():
    graph = catalog.layer("batch-norm")
    assert lower(graph, training=False, track=False) == lower(graph, training=True, track=False)
    assert [name for name, _ in lower(graph, track=False).program.outputs] == ["y"]
    assert [name for name, _ in lower(graph).program.outputs] == ["y", "moment_0", "moment_1"]


def test_moments_of_values_that_vary_less_are_spread_over_channels():
    graph = parse_formula("x / rms[batch](mean[layer](x)) + std[batch](mean[group](x))", groups=2)
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    lowered = lower(graph)
    ones = dict.fromkeys(lowered.parameters, torch.ones(4, dtype=torch.float64))
    found = execute(lowered.program, {"x": x, **ones}, groups=2)
    collected: dict[int, torch.Tensor] = {}
    evaluate(graph, x, collect=collected)
    for statistic in lowered.statistics:
        torch.testing.assert_close(found[statistic.name], collected[statistic.id].flatten().expand(4))


def test_positions_are_samples_where_statistics_allow_it():
    assert lower(catalog.layer("layer-norm-tokens"), layout="tokens").flat
    assert lower(catalog.layer("layer-norm-tokens")).flat  # the same layer on images
    assert lower(catalog.layer("batch-norm"), layout="tokens").flat
    assert lower(catalog.layer("silu"), layout="tokens").flat
    assert not lower(catalog.layer("group-norm"), layout="tokens").flat
    assert not lower(catalog.layer("batch-norm")).flat
    both = parse_formula("x / std[channel](x) + mean[instance](x)")
    with pytest.raises(Unsupported, match=r"channel.*found also instance"):
        lower(both)
    assert not lower(both, mixed=True).flat
    with pytest.raises(UserError, match="a layout"):
        lower(both, layout="nhwc")


@pytest.mark.parametrize("preset", PRESETS)
def test_spaces_of_inputs_and_outputs(preset):
    for case in random_cases(preset, 20, 5):
        lowered = lower(case.graph, mixed=True)
        spaces = lowered.program.spaces
        assert {name: spaces[at] for name, at in lowered.program.outputs} == {"y": FULL} | {
            s.name: C for s in lowered.statistics
        }
        assert {n for n, at in lowered.program.inputs.items() if spaces[at] == C} <= set(lowered.parameters)


def test_dead_nodes_their_order_and_commuting_inputs_do_not_show():
    a = parse_formula("max(x, 0) + v1 * x")
    b = parse_formula("d = exp(v0); q = x * v1; q + max(0, x)")
    assert a != b
    assert lower(a).program == lower(b).program


def test_programs_are_independent_of_channels_and_groups():
    texts = {lower(catalog.layer("group-norm", groups=groups)).program.to_text() for groups in (1, 4, 32)}
    assert len(texts) == 1
    with pytest.raises(UserError, match="divides the 6 channels"):
        execute(lower(catalog.layer("group-norm", affine=False)).program, {"x": torch.zeros(1, 6, 2)}, groups=4)


def test_powers_without_a_guard():
    """NaN for roots of negative numbers, signs of odd powers, 1 for the power 0."""
    graph = LayerGraph((make_node("pow", (0, 3), eps=0.0),), 4, affine=False)
    x = torch.tensor([-2.5, -1.0, -0.0, 0.0, 0.5, 1.0, 3.0, math.inf, -math.inf, math.nan], dtype=torch.float64)
    exponents = torch.tensor([-3.0, -2.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, math.inf, math.nan], dtype=torch.float64)
    x, v1 = x[:, None].expand(10, 10), exponents
    torch.testing.assert_close(forward(graph, x, v1=v1), evaluate(graph, x, {"v1": v1}), equal_nan=True)


def test_trained_channel_vectors_are_parameters():
    nodes = tuple(make_node(name, ()) for name in PARAMETERS[:2])
    graph = LayerGraph((*nodes, make_node("mul", (0, 5)), make_node("max", (4, 6))), 7)
    assert lower(graph).parameters == ("weight", "bias", "alpha", "beta")
    case = make_case(graph, (2, 3, 4), layout="channels-first", training=True, seed=1)
    torch.testing.assert_close(forward(graph, case.x, **case.params), evaluate(graph, case.x, case.params))


def test_depth_counts_passes_over_the_input():
    assert lower(catalog.layer("silu")).program.depth == 0
    assert lower(catalog.layer("evonorm-b0"), training=True).program.depth == 1
    assert lower(catalog.layer("evonorm-b0"), training=False).program.depth == 1  # its instance variance
    assert lower(catalog.layer("bn-relu"), training=False).program.depth == 0
    deep = parse_formula("a = x / std[batch](x); b = a * sigmoid(a); b / rms[layer](b)")
    assert [lower(deep, training=t).program.depth for t in (True, False)] == [2, 1]
    assert lower(parse_formula("x / mean[batch](std[instance](x))")).program.depth == 1  # the second pass is small


def test_products_stay_where_they_carry_non_finite_numbers():
    graph = parse_formula("x * 0 + v1", affine=False)
    x = torch.tensor([[1.0, math.inf, math.nan]])
    given = {"v1": torch.ones(3)}
    torch.testing.assert_close(forward(graph, x, **given), evaluate(graph, x, given), equal_nan=True)


@pytest.mark.parametrize(
    ("axes", "layout", "shape"), [("group", "channels-first", (2, 12, 3)), ("channel-group", "tokens", (2, 3, 12))]
)
def test_group_sizes(axes, layout, shape):
    graph = parse_formula(f"x / std[{axes}](x)", group_size=4)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ones, zeros = torch.ones(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    found = forward(graph, x, layout, weight=ones, bias=zeros)
    torch.testing.assert_close(found, evaluate(graph, x, layout=layout), rtol=1e-12, atol=0)
