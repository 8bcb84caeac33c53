"""`evaluate` against an interpreter that expands every value to the full shape (NumPy, float64)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layer_reference import live_graphs, reference

from search_spaces.common.errors import UserError
from search_spaces.layers.evaluate import evaluate
from search_spaces.layers.graph import LayerGraph, Node, make_node
from search_spaces.layers.ops import AXES, ELEMENTWISE, MOMENTS, arity, preset, split_name

SHAPES = {
    "NCHW": ((3, 12, 4, 5), "channels-first"),
    "NCL": ((3, 12, 7), "channels-first"),
    "NCDHW": ((2, 12, 2, 3, 2), "channels-first"),
    "NC": ((4, 12), "channels-first"),
    "tokens": ((3, 6, 12), "tokens"),
    "batch 1": ((1, 12, 3, 3), "channels-first"),
    "1x1": ((3, 12, 1, 1), "channels-first"),
    "batch 1, 1x1": ((1, 12, 1, 1), "channels-first"),
    "one channel": ((2, 1, 3, 3), "channels-first"),
}


def case(rng: np.random.Generator, shape: tuple[int, ...], layout: str):
    """An input and parameters of both signs, in float64."""
    channels = shape[-1 if layout == "tokens" else 1]
    x = rng.normal(0.3, 1.5, shape)
    return x, {name: rng.normal(size=channels) for name in ("weight", "bias", "v0", "v1")}


def run(graph: LayerGraph, x: np.ndarray, params: dict[str, np.ndarray], layout: str, **more) -> np.ndarray:
    tensors = {name: torch.from_numpy(value) for name, value in params.items()}
    return evaluate(graph, torch.from_numpy(x), tensors, layout=layout, **more).numpy()


def one_operation(name: str) -> LayerGraph:
    return LayerGraph((make_node(name, [0, 2][: arity(split_name(name)[0])]),), 4, groups=4)


@pytest.mark.parametrize("name", preset("extended"))
def test_every_operation_in_every_layout(name, rng):
    for shape, layout in SHAPES.values():
        x, params = case(rng, shape, layout)
        x.flat[0] = 0.0  # the point where guards and signs decide
        got = run(one_operation(name), x, params, layout)
        assert got.shape == shape
        np.testing.assert_allclose(got, reference(one_operation(name), x, params, layout == "tokens"), rtol=1e-11)


def test_the_presets_hold_what_the_paper_says():
    assert len(preset("evonorm24")) == 24
    assert len(preset("evonorm21")) == 21
    assert set(preset("evonorm24")) - set(preset("evonorm21")) == {"mean-batch", "rms-batch", "std-batch"}
    assert len(preset("extended")) == len(ELEMENTWISE) + len(MOMENTS) * len(AXES)


@pytest.mark.parametrize("where", SHAPES)
def test_reduced_values_equal_full_ones(where, rng):
    """Random graphs: keeping a mean at [B, C, 1, 1] changes nothing."""
    shape, layout = SHAPES[where]
    compared = 0
    for graph in live_graphs(rng, 60, groups=4):
        x, params = case(rng, shape, layout)
        expected = reference(graph, x, params, layout == "tokens")
        if not np.isfinite(expected).all() or np.abs(expected).max() > 1e6:
            continue
        got = run(graph, x, params, layout)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8, err_msg=graph.canonical_text())
        compared += 1
    assert compared >= 45


def test_initial_parameters(rng):
    """What is missing in `params` is weight 1, bias 0, v0 = 0 and v1 = 1."""
    graph = LayerGraph((make_node("mul", [3, 0]), make_node("sub", [4, 2])), 5)
    x = rng.normal(size=(2, 4, 3))
    np.testing.assert_array_equal(run(graph, x, {}, "channels-first"), x)
    np.testing.assert_array_equal(run(LayerGraph((), 1), x, {}, "channels-first"), 0 * x)


@pytest.mark.parametrize(("channels", "groups"), [(48, 24), (20, 20), (7, 7), (64, 32), (37, 1), (33, 11), (1, 1)])
def test_groups_are_the_largest_divisor_not_above_32(channels, groups):
    graph = LayerGraph((make_node("mean-group", [0]),), 4, affine=False)
    assert graph.group_count(channels) == groups
    assert LayerGraph((), 0, group_size=4).group_count(48) == 12
    x = torch.randn(2, channels, 3, generator=torch.Generator().manual_seed(0))
    out = evaluate(graph, x)
    assert torch.allclose(out, x.reshape(2, groups, -1).mean(2).repeat_interleave(channels // groups, 1)[..., None])


def test_group_size_that_does_not_divide():
    """48 // 7 = 6 groups; 50 // 7 = 7 does not divide 50, so 5."""
    assert LayerGraph((), 0, group_size=7).group_count(48) == 6
    assert LayerGraph((), 0, group_size=7).group_count(50) == 5
    assert LayerGraph((), 0, group_size=100).group_count(50) == 1


def test_guards_are_exact_in_float64():
    """a / (b + sign0(b) eps), sign0(0) = 1, without float32 on the way."""
    graph = LayerGraph((Node("div", (3, 0), eps=1e-5),), 4, affine=False)
    x = torch.tensor([[0.0, 1e-5, -1e-5, 2.0]], dtype=torch.float64)
    expected = [[1 / 1e-5, 1 / 2e-5, -1 / 2e-5, 1 / (2 + 1e-5)]]
    np.testing.assert_allclose(evaluate(graph, x).numpy(), expected, rtol=1e-15)


def test_statistics_are_collected_and_used(rng):
    """`collect` gives the moments before the root; `stats` replaces them; the rest of the layer stays per sample."""
    graph = LayerGraph(
        (make_node("std-batch", [0]), make_node("rms-batch", [0]), make_node("div", [0, 4], 0.0), Node("mul", (6, 5))),
        7,
    )
    x, params = case(rng, (4, 6, 3, 3), "channels-first")
    collected: dict[int, torch.Tensor] = {}
    trained = run(graph, x, params, "channels-first", collect=collected)
    assert set(collected) == {4, 5} == set(graph.batch_aggregates())
    np.testing.assert_allclose(collected[4].flatten().numpy(), x.var(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(collected[5].flatten().numpy(), (x**2).mean(axis=(0, 2, 3)), rtol=1e-12)
    known = {id: moment.flatten() for id, moment in collected.items()}
    np.testing.assert_allclose(run(graph, x, params, "channels-first", stats=known), trained, rtol=1e-13)
    alone = run(graph, x[:1], params, "channels-first", stats=known)  # evaluation does not look at the batch
    np.testing.assert_allclose(alone, trained[:1], rtol=1e-13)


def test_batch_statistics_of_parameters_are_no_statistics(rng):
    """std[batch](v1) is a constant: nothing to collect."""
    graph = LayerGraph((make_node("std-batch", [3]), make_node("add", [0, 4])), 5, affine=False)
    x, params = case(rng, (2, 3, 4), "channels-first")
    collected: dict[int, torch.Tensor] = {}
    out = run(graph, x, params, "channels-first", collect=collected, stats={})
    np.testing.assert_allclose(out, x + np.sqrt(1e-5))
    assert collected == {}
    assert graph.batch_aggregates() == []


def test_batch_mean_is_asked_for_every_mean_over_the_batch(rng):
    """Two halves, each with the other's sums at hand, give what the whole batch gives (several devices)."""
    graph = LayerGraph((make_node("std-batch", [0]), make_node("div", [0, 4], 0.0)), 5, affine=False)
    x = torch.from_numpy(rng.normal(5.0, 2.0, (6, 3, 4)))
    queue = [x.mean((0, 2), keepdim=True), x.var((0, 2), unbiased=False, keepdim=True)]
    halves = []
    for half in (x[:2], x[2:]):
        answers = list(queue)
        halves.append(evaluate(graph, half, batch_mean=lambda value, dims, a=answers: a.pop(0)))
        assert answers == []
    torch.testing.assert_close(torch.cat(halves), evaluate(graph, x))


def test_two_passes_keep_a_small_deviation(rng):
    """E[x^2] - E[x]^2 would lose all digits of a deviation of 0.01 around 1000 in float32."""
    x = torch.from_numpy(rng.normal(1000.0, 0.01, (8, 4, 8, 8))).float()
    exact = x.double().var((2, 3), unbiased=False).add(1e-5).sqrt()
    for axes in ("instance", "group"):
        got = evaluate(LayerGraph((make_node(f"std-{axes}", [0]),), 4, affine=False), x)[:, :, 0, 0]
        torch.testing.assert_close(got.double(), exact, rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", preset("extended"))
def test_gradients_of_every_operation(name, rng):
    graph = one_operation(name)
    x = torch.from_numpy(rng.choice([-1, 1], (2, 4, 3)) * rng.uniform(0.2, 2.0, (2, 4, 3))).requires_grad_()
    names = ("weight", "bias", "v0", "v1")
    params = [torch.from_numpy(rng.uniform(0.6, 1.4, 4) * (-1) ** np.arange(4)).requires_grad_() for _ in names]
    used = [p for p, n in zip(params, names) if n != "v1"]

    def value(x, weight, bias, v0):
        return evaluate(graph, x, {"weight": weight, "bias": bias, "v0": v0})

    layouts = [value, lambda *a: evaluate(graph, a[0].mT, dict(zip(names, a[1:])), layout="tokens")]
    for function in layouts:
        assert torch.autograd.gradcheck(function, (x, *used))


def test_gradients_are_finite_where_roots_and_logarithms_have_a_pole():
    x = torch.zeros(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    for name in ("sqrt", "log", "rsqrt", "std-batch", "rms-group", "std-layer", "div"):
        (gradient,) = torch.autograd.grad(evaluate(one_operation(name), x).sum(), x)
        assert gradient.isfinite().all(), name


def test_bad_inputs():
    graph = LayerGraph((), 0)
    with pytest.raises(UserError, match="tokens of shape"):
        evaluate(graph, torch.zeros(2, 3, 4, 4), layout="tokens")
    with pytest.raises(UserError, match="a layout"):
        evaluate(graph, torch.zeros(2, 3, 4, 4), layout="NHWC")
    with pytest.raises(UserError, match=r"\[B, C, ...\]"):
        evaluate(graph, torch.zeros(3))
    with pytest.raises(UserError, match="one channel"):
        evaluate(graph, torch.zeros(3, 0, 2))
