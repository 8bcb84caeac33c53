"""The product of a space and its layers: text, counts, network, choices; the registry's factories."""

import itertools
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

from search_spaces import UserError, live, select
from search_spaces.cells.nas_bench_201 import NasBench201
from search_spaces.cells.nas_bench_graph import NasBenchGraph
from search_spaces.choice import find_choices
from search_spaces.layered import LayeredArchitecture, with_layers
from search_spaces.primitives.registry import ACTIVATIONS, act_factory, norm_factory

INNER = NasBench201()
SPACE = with_layers(INNER, norms=["batch-norm", "group-norm", "identity"], acts=["relu", "silu"])
CELL = INNER.decode("|nor_conv_3x3~0|+|none~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_1x1~1|none~2|")
SMALL = {"channels": 8, "cells_per_stage": 1}
AFFINE = ["batch-norm", "group-norm", "layer-norm", "instance-norm", "layer-norm-2d", "power-norm", "evonorm-s2"]


def learned_layer(channels: int) -> nn.Module:
    return nn.PReLU(channels)


def test_the_text_states_both_layers():
    arch = LayeredArchitecture(CELL, "group-norm", "silu")
    assert SPACE.encode(arch) == INNER.encode(CELL) + " # norm=group-norm act=silu"
    assert SPACE.decode(SPACE.encode(arch)) == arch


@pytest.mark.parametrize(
    ("suffix", "suggestion"),
    [
        (" # norm=grop-norm act=relu", "group-norm"),
        (" # norm=identity act=sillu", "silu"),
        (" # act=relu", None),
        ("", None),
    ],
)
def test_unknown_layers_are_refused_with_the_nearest(suffix, suggestion):
    with pytest.raises(UserError) as caught:
        SPACE.decode(INNER.encode(CELL) + suffix)
    assert caught.value.suggestion == suggestion


def test_enumeration_is_the_product():
    assert len(SPACE) == 15_625 * 3 * 2
    first = set(itertools.islice(SPACE, 6))
    assert first == {LayeredArchitecture((0,) * 6, n, a) for n in SPACE.norms for a in SPACE.acts}


def test_mutations_change_one_part_and_reach_all(rng):
    arch = LayeredArchitecture(CELL, "batch-norm", "relu")
    changed = {"arch": 0, "norm": 0, "act": 0}
    for _ in range(600):
        other = SPACE.mutate(arch, rng)
        (part,) = (name for name in changed if getattr(other, name) != getattr(arch, name))
        changed[part] += 1
    assert all(150 < count < 250 for count in changed.values())  # 200 each; a deviation of 50 is 4 sigma


def test_one_choice_leaves_mutations_to_the_rest(rng):
    space = with_layers(INNER, norms=["layer-norm"])
    arch = space.sample(rng)
    assert {(other.norm, other.act) for other in (space.mutate(arch, rng) for _ in range(20))} == {
        ("layer-norm", "relu")
    }


def test_neighbors_are_those_of_all_parts():
    arch = LayeredArchitecture(CELL, "batch-norm", "relu")
    assert len(set(SPACE.neighbors(arch))) == 24 + 2 + 1


def test_keys_keep_inner_classes_and_tell_layers_apart():
    archs = [LayeredArchitecture(cell, n, a) for cell in (CELL, (0,) * 6) for n in SPACE.norms for a in SPACE.acts]
    assert len({SPACE.key(arch) for arch in archs}) == len({SPACE.function_key(arch) for arch in archs}) == len(archs)
    same = [cell for cell in INNER if INNER.function_key(cell) == INNER.function_key((0,) * 6)][:5]
    assert len({SPACE.function_key(LayeredArchitecture(cell, "identity", "relu")) for cell in same}) == 1


@pytest.mark.parametrize("norm", [*AFFINE, "identity"])
@pytest.mark.parametrize("act", ["relu", "prelu"])
def test_params_are_those_of_the_built_network(norm, act):
    """Independently: BatchNorm's network has two parameters per normalised channel, so has any other with an affine."""
    acts = {"relu": ACTIVATIONS["relu"], "prelu": learned_layer}
    space = with_layers(INNER, norms=[norm], acts=acts)
    arch = LayeredArchitecture(CELL, norm, act)
    network = space.build(arch, **SMALL)
    cost = space.cost(arch, input_size=8, **SMALL)
    assert cost["params"] == sum(p.numel() for p in network.parameters())
    inner = INNER.cost(CELL, input_size=8, **SMALL)
    assert {**cost, "params": 0} == {**inner, "params": 0}
    channels = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]
    normalised = sum(channels) - 16 - 32 + 32  # two projections have no normalisation, the last one no convolution
    activated = sum(m.num_parameters for m in network.modules() if isinstance(m, nn.PReLU))
    assert cost["params"] == inner["params"] + activated - 2 * normalised * (norm == "identity")


def test_every_layer_of_the_network_is_the_chosen_one():
    network = SPACE.build(LayeredArchitecture(CELL, "group-norm", "silu"), **SMALL)
    kinds = {type(module) for module in network.modules()}
    assert {nn.GroupNorm, nn.SiLU} <= kinds
    assert not kinds & {nn.BatchNorm2d, nn.ReLU}
    with pytest.raises(UserError):
        SPACE.build(LayeredArchitecture(CELL, "group-norm", "silu"), norm=norm_factory("identity"))


def test_the_graph_passes_everything_through_both_layers():
    arch = LayeredArchitecture(CELL, "identity", "silu")
    inner, graph = INNER.graph(CELL), SPACE.graph(arch)
    assert graph.ops == ("input", "norm=identity", "act=silu", *inner.ops[1:])
    assert set(graph.ops) <= set(SPACE.vocabulary)
    np.testing.assert_array_equal(live(graph)[2:], live(inner))
    contracted = {(max(i - 2, 0), j - 2) for i, j in graph.edges() if i >= 2}
    assert contracted == set(inner.edges())


def test_choices_run_the_selected_layers():
    arch = LayeredArchitecture(CELL, "group-norm", "silu")
    torch.manual_seed(0)
    supernet = SPACE.choices(**SMALL).eval()
    assert set(find_choices(supernet)) == {*INNER.select(CELL), "norm", "act"}
    select(supernet, SPACE.select(arch))
    chosen = {name: module.selected for name, module in supernet.named_modules() if hasattr(module, "selected")}
    state = {}
    for name, value in supernet.state_dict().items():
        picks = [(name[: found.start() - 1], int(found[1])) for found in re.finditer(r"candidates\.(\d+)\.", name)]
        if all(chosen[place] == index for place, index in picks):
            state[re.sub(r"candidates\.\d+\.", "", name)] = value
    network = SPACE.build(arch, **SMALL).eval()
    network.load_state_dict(state)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(network(x), supernet(x))


def test_layers_of_graph_networks_see_the_graph_as_one_image(rng):
    inner = NasBenchGraph()
    norms = [*AFFINE, "identity", "rms-norm", "dyt", "bn-relu"]
    space = with_layers(inner, norms=norms, acts=["gelu"])
    x, edge_index = torch.randn(7, 12), torch.randint(7, (2, 20))
    for norm in norms:
        arch = LayeredArchitecture(inner.sample(rng), norm, "gelu")
        network = space.build(arch, in_features=12, num_classes=3, hidden=8)
        assert network(x, edge_index).isfinite().all()
        assert space.cost(arch, nodes=7, in_features=12, num_classes=3, hidden=8)["params"] == sum(
            p.numel() for p in network.parameters()
        )


def test_a_space_with_own_layers_pickles():
    space = with_layers(INNER, norms={"mine": learned_layer})
    copy = pickle.loads(pickle.dumps(space))
    assert copy.norms == {"mine": learned_layer}
    assert copy.name == space.name


@pytest.mark.parametrize("wrong", [{"norms": ["bach-norm"]}, {"acts": []}, {"norms": {"two words": learned_layer}}])
def test_wrong_layers_are_refused(wrong):
    with pytest.raises(UserError):
        with_layers(INNER, **wrong)


@pytest.mark.parametrize(("channels", "groups"), [(16, 16), (64, 32), (36, 18), (37, 1), (6, 6)])
def test_group_norm_takes_the_largest_divisor(channels, groups):
    assert norm_factory("group-norm")(channels).num_groups == groups


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("batch-norm", (0, 2, 3)),
        ("instance-norm", (2, 3)),
        ("layer-norm", (1, 2, 3)),
        ("layer-norm-2d", (1,)),
        ("group-norm", (2, 3)),  # 8 channels: a group for each
        ("adab2n", (0, 2, 3)),
    ],
)
def test_norms_normalise_over_their_axes(name, axes):
    y = norm_factory(name)(8)(5 + 3 * torch.randn(4, 8, 6, 6))
    torch.testing.assert_close(y.mean(axes), torch.zeros_like(y.mean(axes)), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(axes, correction=0), torch.ones_like(y.mean(axes)), atol=1e-3, rtol=0)


def test_activations_have_their_formulas():
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    formulas = {
        "relu": x.clamp(min=0),
        "silu": x / (1 + (-x).exp()),
        "gelu": x * (1 + torch.erf(x / 2**0.5)) / 2,
        "leaky-relu": torch.where(x > 0, x, 0.01 * x),
        "hardswish": x * (x + 3).clamp(0, 6) / 6,
        "crrelu": x.clamp(min=0) + 0.01 * x * (-x * x / 2).exp(),
        "identity": x,
    }
    for name, expected in formulas.items():
        torch.testing.assert_close(act_factory(name)(4).double()(x.view(1, 1, -1)).flatten(), expected)


def test_any_primitive_by_name_and_the_reason_where_one_does_not_fit():
    space = with_layers(INNER, norms=["Dyt", "power_norm", "evonorm-b0"], acts=["prelu", "crrelu", "poly-norm"])
    assert list(space.norms) == ["dyt", "power-norm", "evonorm-b0"]
    assert pickle.loads(pickle.dumps(space)).norms == space.norms
    arch = LayeredArchitecture(CELL, "power-norm", "crrelu")
    kinds = {type(module).__name__ for module in space.build(arch, **SMALL).modules()}
    assert {"PowerNorm", "CRReLU"} <= kinds
    with pytest.raises(UserError, match="gives half.*'silu'"):
        with_layers(INNER, acts=["swiglu"])
    with pytest.raises(UserError, match="this is an activation"):
        with_layers(INNER, norms=["relu"])
