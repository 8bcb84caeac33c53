"""Derivatives of programs against torch's autograd through `evaluate` in fp64, and against finite differences."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import IMAGES, TOKENS, check, make_case, random_cases

from kernels.autodiff import differentiate
from kernels.lower import lower
from kernels.nodes import FULL, REDUCTIONS, C, N, S
from kernels.reference import execute
from search_spaces.common.errors import UserError
from search_spaces.layers import catalog
from search_spaces.layers.formula import parse_formula
from search_spaces.layers.graph import LayerGraph, make_node
from search_spaces.layers.ops import OPERATIONS, PARAMETERS

SETS = [
    ("evonorm24", {"sampling": "flat"}),
    ("evonorm24", {"sampling": "normalizing"}),
    ("extended", {"sampling": "nested"}),
    ("extended", {"sampling": "normalizing"}),
    ("tokens", {"sampling": "nested"}),
    ("tokens", {"sampling": "normalizing"}),
    ("pangaea", {"sampling": "flat"}),
]
ROUNDING = {"pangaea": 1e-10}  # 1 - erf(a) and e^a - 1 have fewer digits near zero than torch's own functions


@pytest.mark.parametrize(("preset", "settings"), SETS)
@pytest.mark.parametrize("seed", range(2))
def test_random_layers(preset, settings, seed):
    for case in random_cases(preset, 45, seed, **settings):
        check(case, ROUNDING.get(preset, 1e-12))


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "settings"), SETS)
@pytest.mark.parametrize("seed", range(10, 20))
def test_many_random_layers(preset, settings, seed):
    for case in random_cases(preset, 150, seed, nodes=10 + seed % 3 * 6, **settings):
        check(case, ROUNDING.get(preset, 1e-12))


@pytest.mark.parametrize("name", catalog.names())
def test_the_catalogue(name):
    for variant in (None, *catalog.named_layer(name).variants):
        for training in (True, False):
            for layout, shapes in (("channels-first", IMAGES), ("tokens", TOKENS)):
                for seed, shape in enumerate(shapes[training::2], 2):
                    graph = catalog.layer(name, variant, groups=3)
                    check(make_case(graph, shape, layout=layout, training=training, seed=seed))


@pytest.mark.parametrize("op", sorted(set(OPERATIONS) - set(PARAMETERS)))
@pytest.mark.parametrize("clamp", [None, 1.0])
def test_slopes_at_zeros_ties_and_bounds(op, clamp):
    """Seed 0 rounds x, so kinks and ties occur; v1 is x's first row there."""
    if clamp and op not in ("exp", "expm1", "sinh", "cosh"):
        clamp = None
    graph = LayerGraph((make_node(op, (0, 3)[: OPERATIONS[op].arity], clamp=clamp),), 4, affine=False)
    case = make_case(graph, (20, 4, 3), layout="channels-first", training=True, seed=0)
    assert (case.x == 0).any()
    if "v1" in case.params:
        case.params["v1"][:] = case.x[0, :, 0]
        assert (case.x == case.params["v1"][:, None]).any()
    check(case)


def test_groups_and_group_sizes_that_do_not_divide():
    for channels in (1, 7, 12):
        for settings in ({"groups": 5}, {"groups": 1}, {"group_size": 4}, {"group_size": 1}, {"group_size": 100}):
            graph = catalog.layer("evonorm-s0", **settings)
            check(make_case(graph, (2, channels, 5), layout="channels-first", training=True, seed=1))


@pytest.mark.parametrize("op", ["mul", "div", "sub"])
def test_long_chains(op):
    """Longer than Python's stack is deep, on a value that becomes a factor of every sum."""
    nodes = [make_node("rms-instance", (0,)), make_node(op, (0, 4))]
    nodes += [make_node(op, (4 + i, (3, 4)[i % 2])) for i in range(1, 1200)]
    graph = LayerGraph(tuple(nodes), 4 + 1200)
    check(make_case(graph, (2, 3, 4), layout="channels-first", training=True, seed=1))


def test_repeated_squares_take_no_time():
    nodes = [make_node("mul", (0, 3)), *(make_node("mul", (4 + i, 4 + i)) for i in range(60))]  # 2^60 factors
    graph = LayerGraph(tuple(nodes), 64)
    assert len(differentiate(lower(graph).program, ("x", "v1")).backward.nodes) < 1000


FINITE_DIFFERENCES = ["evonorm-b0", "evonorm-s0", "bn-silu", "gelu", "layer-norm-tokens", "frn-tlu"]


@pytest.mark.parametrize("name", FINITE_DIFFERENCES)
def test_finite_differences(name):
    """The slope along a random direction of x and the parameters, by central differences of the program itself."""
    graph = catalog.layer(name, groups=2)
    case = make_case(graph, (3, 4, 5), layout="channels-first", training=True, seed=1)
    lowered = lower(graph)
    x = case.x.movedim(1, -1).reshape(-1, 4, 1) if lowered.flat else case.x
    inputs = {"x": x, **case.params}
    generator = torch.Generator().manual_seed(9)
    direction = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in inputs.items()}
    dy = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    derivative = differentiate(lowered.program, tuple(inputs))

    def run(step: float) -> dict[str, torch.Tensor]:
        return execute(derivative.forward, {k: v + step * direction[k] for k, v in inputs.items()}, groups=2)

    slopes = execute(derivative.backward, {**inputs, **run(0.0), "dy": dy}, groups=2)
    wanted = ((run(1e-5)["y"] - run(-1e-5)["y"]) * dy).sum() / 2e-5
    found = sum((slopes[f"d{name}"] * direction[name]).sum() for name in inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


def backward_reductions(name: str, **settings) -> tuple[list[int], list[str]]:
    """Depths of what the backward's big reductions reduce, and the names of what it gets from the forward."""
    lowered = lower(catalog.layer(name, **settings))
    backward = differentiate(lowered.program, ("x", *lowered.parameters)).backward
    reduced = {node.args[0] for node in backward.nodes if node.op in REDUCTIONS and backward.spaces[node.args[0]] & S}
    return [backward.depths[at] for at in reduced], [name for name in backward.inputs if name.startswith("saved_")]


@pytest.mark.parametrize(
    ("name", "sums", "saved"),
    [
        ("batch-norm", 2, 2),  # of dy and x dy; the mean and the variance
        ("layer-norm", 2, 2),
        ("group-norm", 2, 2),
        ("evonorm-s0", 3, 2),  # of dy, dy x sigmoid, and v1's; the variance and, beside it, the mean
        ("silu", 3, 0),  # of weight, bias and v1 only
    ],
)
def test_the_backward_of_known_layers_needs_no_more_sums_than_by_hand(name, sums, saved):
    depths, inputs = backward_reductions(name)
    assert (len(depths), len(inputs)) == (sums, saved)
    assert set(depths) == {0}


def test_the_forward_saves_only_statistics_and_keeps_its_outputs():
    for case in random_cases("evonorm24", 40, 3, sampling="normalizing"):
        program = lower(case.graph).program
        derivative = differentiate(program, ("x",))
        forward, backward = derivative.forward, derivative.backward
        assert forward.outputs[: len(program.outputs)] == program.outputs
        assert forward.depth == program.depth
        saved = {name: forward.spaces[at] for name, at in forward.outputs if name.startswith("saved_")}
        assert all(not space & S for space in saved.values())
        assert saved == {n: backward.spaces[at] for n, at in backward.inputs.items() if n.startswith("saved_")}
        assert {"x", "dy", "weight", "bias", "v0", "v1", *saved} >= set(backward.inputs)


def test_only_what_is_asked_for_is_computed():
    lowered = lower(catalog.layer("evonorm-b0"))
    everything = differentiate(lowered.program, ("x", *lowered.parameters)).backward
    only = differentiate(lowered.program, ("weight",)).backward
    assert [name for name, _ in only.outputs] == ["dweight"]
    assert len(only.nodes) < len(everything.nodes) / 2


def test_inputs_that_do_not_matter_get_zeros():
    derivative = differentiate(lower(parse_formula("v0 + v0")).program, ("x", "v1", "v0"))
    spaces = {name: derivative.backward.spaces[at] for name, at in derivative.backward.outputs}
    assert spaces == {"dx": FULL, "dv1": C, "dv0": C}
    x = torch.ones(2, 3, 4)
    found = execute(derivative.backward, {"x": x, "dy": x, "weight": torch.full((3,), 2.0)})
    assert found["dx"].shape == (2, 3, 4)
    assert not found["dx"].any()
    assert not found["dv1"].any()
    assert found["dv0"].tolist() == [2 * 8 * 2.0] * 3


def test_names_are_checked():
    program = lower(catalog.layer("silu")).program
    with pytest.raises(UserError, match="none twice"):
        differentiate(program, ("x", "x"))
    with pytest.raises(UserError, match="none twice"):
        differentiate(program, ())
    with pytest.raises(UserError, match="an output"):
        differentiate(program, ("x",), output="z")


def test_sums_over_axes_a_gradient_does_not_vary_over():
    """d of mean over everything: every number of x gets dy's total by its count."""
    program = lower(parse_formula("mean[batch](mean[layer](x))", affine=False)).program
    derivative = differentiate(program)
    assert derivative.backward.depth == 1
    dy = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = execute(derivative.backward, {"x": dy, "dy": dy})
    torch.testing.assert_close(found["dx"], (dy.sum() / 60).expand(3, 4, 5))
    assert {derivative.backward.spaces[n.args[0]] for n in derivative.backward.nodes if n.op == "sum"} <= {FULL, N}
