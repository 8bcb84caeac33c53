"""Named layers against timm's and torch's modules, in training and in evaluation, with their gradients."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from oracles import allow_timm_without_torchvision
from torch import Tensor, nn

from search_spaces.common.errors import UserError
from search_spaces.layers.catalog import CATALOG, layer, named_layer, names
from search_spaces.layers.evaluate import evaluate
from search_spaces.layers.formula import format_formula, parse_formula
from search_spaces.layers.graph import LayerGraph
from search_spaces.layers.ops import preset

IMAGE = (4, 64, 7, 5)
FORWARD, GRADIENT = 2e-6, 1e-5  # bar 2, in float32
TORCH = 1e-6  # bar 3


@pytest.fixture(scope="module")
def timm(importable):
    """A function: a module below timm.layers -> it; skips without timm."""
    allow_timm_without_torchvision()
    return lambda name: importable(f"timm.layers.{name}")


def randomise(module: nn.Module, seed: int, positive: bool = False) -> nn.Module:
    """Parameters of both signs around 1 in size, so that nothing hides behind the initial 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
            if positive:
                parameter.abs_().add_(0.1)
    return module


def images(seed: int, shape: tuple[int, ...] = IMAGE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.3


def largest(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


def compare(graph: LayerGraph, params: dict[str, Tensor], module: nn.Module, x: Tensor, stats=None, **more) -> dict:
    """Values and gradients of the graph and of the module, `params` being the module's; the collected moments."""
    parameters = [p for p in module.parameters() if any(p is q for q in params.values())]
    collected: dict[int, Tensor] = {}
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ours, theirs = evaluate(graph, xs[0], params, stats, collect=collected, **more), module(xs[1])
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype)
    gradients = torch.autograd.grad((ours * direction).sum(), [xs[0], *parameters])
    expected = torch.autograd.grad((theirs * direction).sum(), [xs[1], *parameters])
    # parameter gradients sum over the batch and space: bound relative to the number of terms' root
    scale = [1.0] + [(x.numel() / p.numel()) ** 0.5 for p in parameters]
    return {
        "forward": largest(ours, theirs),
        "gradient": max(largest(a, b) / s for a, b, s in zip(gradients, expected, scale)),
        "collected": collected,
    }


# -- bar 1: containment ------------------------------------------------------------------------------------------

LIVE_NODES = {  # counted by hand on the formulas of the paper
    "evonorm-b0": 6,
    "evonorm-b1": 7,
    "evonorm-b2": 6,
    "evonorm-s0": 5,
    "evonorm-s1": 4,
    "evonorm-s2": 4,
    "bn-relu": 6,
    "gn-relu": 6,
    "ln-relu": 6,
    "in-relu": 6,
    "layer-norm": 5,
    "instance-norm": 5,
    "silu": 3,
    "frn-tlu": 3,
}


@pytest.mark.parametrize("name", LIVE_NODES)
def test_known_layers_are_in_the_space_of_the_paper(name):
    graph = layer(name)
    assert len(graph.live_nodes) == LIVE_NODES[name] <= 10
    used = {node.name for _, node in graph.live_nodes}
    assert used <= set(preset("evonorm24"))
    if name.startswith("evonorm-s") or name in ("gn-relu", "ln-relu", "in-relu", "silu", "frn-tlu"):
        assert used <= set(preset("evonorm21"))
        assert graph.batch_aggregates() == []


# -- bar 2: timm -------------------------------------------------------------------------------------------------

EVONORMS = ["b0", "b1", "b2", "s0", "s0a", "s1", "s1a", "s2", "s2a"]


def timm_evonorm(timm, which: str, channels: int = 64, **settings) -> nn.Module:
    return randomise(
        getattr(timm("evo_norm"), f"EvoNorm2d{which.replace('b', 'B').replace('s', 'S')}")(channels, **settings), seed=1
    )


def evonorm_params(module: nn.Module) -> dict[str, Tensor]:
    """timm's names in ours."""
    found = {"weight": module.weight, "bias": module.bias}
    if getattr(module, "v", None) is not None:
        found["v1"] = module.v
    return found


@pytest.mark.parametrize("which", EVONORMS)
def test_evonorm_equals_timm(timm, which):
    """Forward and gradients in training, the running variance over four steps, and evaluation with it."""
    module, graph = timm_evonorm(timm, which), layer(f"evonorm-{which}", "timm")
    running = torch.ones(64)
    for step in range(4):
        x = images(step)
        found = compare(graph, evonorm_params(module), module, x)
        assert found["forward"] <= FORWARD
        assert found["gradient"] <= GRADIENT
        count = x.numel() / 64
        for moment in found["collected"].values():
            running = (1 - graph.momentum) * running + graph.momentum * moment.detach().flatten() * count / (count - 1)
    assert graph.unbiased == which.startswith("b")
    assert bool(found["collected"]) == which.startswith("b")
    if which.startswith("b"):
        assert largest(running, module.running_var) <= 1e-6
    restored = timm_evonorm(timm, which)
    restored.load_state_dict(module.state_dict())
    stats = dict.fromkeys(graph.batch_aggregates(), restored.state_dict().get("running_var"))
    found = compare(graph, evonorm_params(restored), restored.eval(), images(9), stats)
    assert found["forward"] <= FORWARD
    assert found["gradient"] <= GRADIENT
    for x in (images(10, (1, 64, 3, 3)), images(11, (1, 64, 1, 1))):  # one pixel is divided by sqrt(eps): relative
        ours = evaluate(graph, x, evonorm_params(restored), stats)
        torch.testing.assert_close(ours, restored(x), rtol=1e-5, atol=1e-5)


def test_frn_tlu_equals_timm(timm):
    """Weights of both signs: the affine inside as v1 and v0, tau as what is subtracted and added again."""
    module = randomise(timm("filter_response_norm").FilterResponseNormTlu2d(64), seed=2)
    graph = layer("frn-tlu", "timm")

    def params(m):
        tau = m.tau.flatten()
        return {"v1": m.weight.flatten(), "v0": m.bias.flatten() - tau, "bias": tau, "weight": torch.ones(64)}

    xs = [images(3).requires_grad_() for _ in range(2)]
    ours, theirs = evaluate(graph, xs[0], params(module)), module(xs[1])
    assert largest(ours, theirs) <= FORWARD
    inputs = list(module.parameters())
    direction = images(4)
    for a, b in zip(
        torch.autograd.grad((ours * direction).sum(), [xs[0], *inputs]),
        torch.autograd.grad((theirs * direction).sum(), [xs[1], *inputs]),
    ):
        assert largest(a, b) <= GRADIENT * (1 if a.ndim == 4 and a.shape[0] > 1 else 20)


def test_the_short_frn_tlu_has_the_same_functions_for_positive_weights(timm):
    """weight max(n, (tau - bias) / weight) + bias: three nodes, as the EvoNorm space writes it."""
    module = randomise(timm("filter_response_norm").FilterResponseNormTlu2d(64), seed=2, positive=True)
    weight, bias, tau = (p.detach().flatten() for p in (module.weight, module.bias, module.tau))
    graph = layer("frn-tlu", eps=1e-5)
    x = images(5)
    ours = evaluate(graph, x, {"weight": weight, "bias": bias, "v0": (tau - bias) / weight})
    assert largest(ours, module(x)) <= 2 * FORWARD
    weight = -weight  # and not for negative ones
    module.weight.data.neg_()
    ours = evaluate(graph, x, {"weight": weight, "bias": bias, "v0": (tau - bias) / weight})
    assert largest(ours, module(x)) > 0.1


def test_group_size_as_in_timm(timm):
    module = timm_evonorm(timm, "s0", 48, group_size=16)
    graph = layer("evonorm-s0", group_size=16)
    assert compare(graph, evonorm_params(module), module, images(6, (2, 48, 5, 4)))["forward"] <= FORWARD


# -- bar 3: torch ------------------------------------------------------------------------------------------------


def torch_norm(name: str, channels: int) -> nn.Module:
    """torch's module of a normalisation with weight and bias per channel."""
    return {
        "batch-norm": lambda: nn.BatchNorm2d(channels),
        "group-norm": lambda: nn.GroupNorm(32, channels),
        "layer-norm": lambda: nn.GroupNorm(1, channels),  # torch's LayerNorm of an image has weights per position
        "instance-norm": lambda: nn.InstanceNorm2d(channels, affine=True),
    }[name]()


@pytest.mark.parametrize("name", ["batch-norm", "group-norm", "layer-norm", "instance-norm"])
def test_normalisations_equal_torch(name):
    module = randomise(torch_norm(name, 64), seed=3)
    affine = {"weight": module.weight, "bias": module.bias}
    found = compare(layer(name), affine, module, images(1))
    assert found["forward"] <= 2 * TORCH
    assert found["gradient"] <= GRADIENT
    double = compare(
        layer(name), {k: v.double() for k, v in affine.items()}, copy.deepcopy(module).double(), images(1).double()
    )
    assert double["forward"] <= 1e-13


def test_layer_norm_of_images_equals_torch_without_its_weights():
    x = images(2)
    assert largest(evaluate(layer("layer-norm"), x), nn.LayerNorm(IMAGE[1:], elementwise_affine=False)(x)) <= TORCH
    expected = nn.RMSNorm(IMAGE[1:], eps=None, elementwise_affine=False)(x)
    assert largest(evaluate(layer("rms-norm", "torch"), x), expected) <= TORCH


def test_running_statistics_of_batch_norm_equal_torch():
    """Mean, unbiased variance and evaluation over three steps."""
    module, graph = randomise(nn.BatchNorm2d(64), seed=4), layer("batch-norm", "torch")
    mean_id, std_id = graph.batch_aggregates()
    assert (graph.node(mean_id).op, graph.node(std_id).op) == ("mean", "std")
    assert graph.unbiased
    running = {mean_id: torch.zeros(64), std_id: torch.ones(64)}
    for step in range(3):
        x = images(step)
        collected: dict[int, Tensor] = {}
        evaluate(graph, x, collect=collected)
        module(x)
        count = x.numel() / 64
        for id, moment in collected.items():
            factor = count / (count - 1) if id == std_id else 1.0
            running[id] = running[id] * 0.9 + moment.flatten() * 0.1 * factor
    assert largest(running[mean_id], module.running_mean) <= 1e-6
    assert largest(running[std_id], module.running_var) <= 1e-6
    module.eval()
    params = {"weight": module.weight, "bias": module.bias}
    for x in (images(8), images(9, (1, 64, 1, 1))):
        assert compare(graph, params, module, x, running)["forward"] <= FORWARD


@pytest.mark.parametrize("name", ["layer-norm-tokens", "rms-norm-tokens", "group-norm-tokens"])
def test_token_layers_equal_torch(name):
    """On [B, N, C]; and on images the same at each position."""
    x = images(5, (3, 9, 64))
    if name == "group-norm-tokens":
        x = x.double()  # groups of two channels: torch's float32 loses digits
        flat = nn.GroupNorm(32, 64).double()(x.reshape(27, 64)).reshape(x.shape)
        assert largest(evaluate(layer(name), x, layout="tokens"), flat) <= 1e-10
        return
    module = randomise(nn.LayerNorm(64) if name.startswith("layer") else nn.RMSNorm(64), seed=6)
    params = {"weight": module.weight} | ({"bias": module.bias} if name.startswith("layer") else {})
    found = compare(layer(name, "torch"), params, module, x, layout="tokens")
    assert found["forward"] <= FORWARD
    assert found["gradient"] <= GRADIENT
    picture = images(7)
    expected = module(picture.movedim(1, -1)).movedim(-1, 1)
    assert largest(evaluate(layer(name, "torch"), picture, params), expected) <= FORWARD


@pytest.mark.parametrize("name", ["bn-relu", "gn-relu", "ln-relu", "in-relu", "bn-silu", "gn-silu"])
def test_pairs_equal_torch_with_trained_weights(name):
    """The torch variant: weights of both signs between the normalisation and the activation."""
    kind = {"b": "batch-norm", "g": "group-norm", "l": "layer-norm", "i": "instance-norm"}[name[0]]
    norm = randomise(torch_norm(kind, 64), seed=8)
    module = nn.Sequential(norm, nn.ReLU() if name.endswith("-relu") else nn.SiLU())
    graph = layer(name, "torch")
    assert not graph.affine
    found = compare(graph, {"v1": norm.weight, "v0": norm.bias}, module, images(1))
    assert found["forward"] <= 2 * FORWARD
    assert found["gradient"] <= GRADIENT
    untrained = nn.Sequential(torch_norm(kind, 64), module[1])  # there the form of the EvoNorm space is the same
    assert largest(evaluate(layer(name), images(2)), untrained(images(2))) <= FORWARD
    assert largest(evaluate(graph, images(2)), untrained(images(2))) <= FORWARD


@pytest.mark.parametrize(("name", "module"), [("relu", nn.ReLU()), ("silu", nn.SiLU()), ("gelu", nn.GELU())])
def test_activations_equal_torch(name, module):
    x = images(1)
    for variant in (None, "torch"):
        assert largest(evaluate(layer(name, variant), x), module(x)) <= TORCH
    assert not layer(name, "torch").affine
    v = torch.linspace(-2, 2, 64)[None, :, None, None]
    assert largest(evaluate(layer("silu"), x, {"v1": v.flatten()}), x * torch.sigmoid(v * x)) <= TORCH


# -- bar 4: the authors' settings ----------------------------------------------------------------------------------


def test_the_authors_settings():
    """tensorflow/tpu: eps 1e-5, biased running variance with momentum .9, groups lowered from 32 to a divisor of C."""
    for which in EVONORMS[:4]:
        graph = layer(f"evonorm-{which}")
        assert {node.eps for _, node in graph.live_nodes if node.aggregate} == {1e-5}
        assert {node.eps for _, node in graph.live_nodes if node.op == "div"} == {0.0}
        assert (graph.unbiased, graph.momentum, graph.groups, graph.affine) == (False, 0.1, 32, True)
    assert [layer("evonorm-s0").group_count(c) for c in (48, 20, 7)] == [24, 20, 7]
    assert {node.eps for _, node in layer("evonorm-b0", "timm").live_nodes if node.aggregate} == {1e-3}


@pytest.mark.parametrize(("channels", "groups"), [(48, 24), (20, 20), (7, 7)])
def test_s0_by_hand_where_32_groups_do_not_divide(channels, groups):
    x = images(3, (2, channels, 4, 3)).double()
    deviation = (x.reshape(2, groups, -1).var(2, unbiased=False) + 1e-5).sqrt()
    deviation = deviation.repeat_interleave(channels // groups, 1)[:, :, None, None]
    v = torch.linspace(-1, 2, channels, dtype=torch.float64)
    expected = x * torch.sigmoid(v[:, None, None] * x) / deviation
    assert largest(evaluate(layer("evonorm-s0"), x, {"v1": v}), expected) <= 1e-14


# -- the catalogue itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_every_entry(name):
    """A source with a year, a formula that reads back, and finite values for one sample of one pixel."""
    variants = [None, *named_layer(name).variants]
    assert re.search(r"(19|20)\d\d", named_layer(name).source)
    tokens = name.endswith("-tokens")
    for variant in variants:
        graph = layer(name, variant)
        settings = {"affine": graph.affine, "unbiased": graph.unbiased}
        assert parse_formula(format_formula(graph), **settings) == graph
        for x in (torch.ones(1, 8, 1, 1), torch.zeros(2, 8, 4, 4), 1e4 * images(1, (2, 8, 4, 4))):
            x = x.flatten(2).mT if tokens else x
            x.requires_grad_()
            out = evaluate(graph, x, layout="tokens" if tokens else "channels-first")
            (gradient,) = torch.autograd.grad(out.sum(), x)
            assert out.shape == x.shape
            assert out.isfinite().all()
            assert gradient.isfinite().all()


def test_token_names_exist_where_the_statistics_span_channels():
    assert "evonorm-s0-tokens" in names()
    assert "rms-norm-tokens" in names()
    assert not {"evonorm-b0-tokens", "in-relu-tokens", "silu-tokens"} & set(names())
    assert len(set(names())) == len(names()) > len(CATALOG)


def test_settings():
    graph = layer("EvoNorm_B0", eps=0.1, momentum=None, unbiased=True, affine=False)
    assert (graph.momentum, graph.unbiased, graph.affine) == (None, True, False)
    assert {node.eps for _, node in graph.live_nodes if node.aggregate} == {0.1}
    assert layer("gn-relu", group_size=4).group_count(32) == 8


def test_bad_names():
    with pytest.raises(UserError, match="did you mean 'evonorm-s0'"):
        layer("evonorms0")
    with pytest.raises(UserError, match="a variant of evonorm-s0 .*did you mean 'timm'"):
        layer("evonorm-s0", "tim")
    with pytest.raises(UserError, match="did you mean 'momentum'"):
        layer("evonorm-s0", momentun=0.1)
    with pytest.raises(UserError, match="groups"):
        layer("evonorm-s0", groups=0)
