"""replace_norm_act: what it finds, what it leaves, and that a layer equal to the old pair leaves the function."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from search_spaces import load_space
from search_spaces.common.errors import UserError
from search_spaces.layers.catalog import layer
from search_spaces.layers.formula import format_formula
from search_spaces.layers.module import GraphLayer
from search_spaces.layers.replace import ReplacePolicy, affine_only, replace_norm_act, without_activation

BN, BN_RELU = layer("batch-norm"), layer("bn-relu")
SAME = ReplacePolicy(lone=BN, last=BN, final=BN_RELU)  # what leaves a BatchNorm-ReLU network's function as it is


class Block(nn.Module):
    """A residual block as torchvision writes it. shared: one ReLU module serves everywhere; functional: F.relu."""

    def __init__(self, inputs: int, outputs: int, stride: int, kind: str):
        super().__init__()
        self.kind = kind
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu1 = self.relu2 = nn.ReLU(inplace=True)
        if kind == "own":
            self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(0.0)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        first, second = (F.relu, F.relu) if self.kind == "functional" else (self.relu1, self.relu2)
        out = first(self.bn1(self.conv1(x)))
        out = self.dropout(self.bn2(self.conv2(out)))
        out += x if self.downsample is None else self.downsample(x)
        return second(out)


class ResNet(nn.Module):
    """Stem, two blocks, pooling."""

    def __init__(self, kind: str, branches: bool = False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Block(8, 8, 1, kind), Block(8, 16, 2, kind))
        self.fc = nn.Linear(16, 5)
        self.branches = branches

    def forward(self, x):
        if self.branches and x.sum() > 1e9:  # what torch.fx cannot follow
            return x
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class PreActivation(nn.Module):
    """BN, ReLU, convolution twice and a shortcut; BN, ReLU, dropout, pooling at the end."""

    def __init__(self):
        super().__init__()
        self.bn1, self.act1, self.conv1 = nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)
        self.bn2, self.act2, self.conv2 = nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)
        self.final, self.act = nn.BatchNorm2d(6), nn.ReLU()
        self.head = nn.Sequential(nn.Dropout(0.0), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))

    def forward(self, x):
        out = self.conv1(self.act1(self.bn1(x)))
        x = torch.add(x, self.conv2(self.act2(self.bn2(out))))
        return self.head(self.act(self.final(x)))


def found(report) -> dict[str, tuple[str, str]]:
    return {entry.norm: (entry.place, entry.action) for entry in report}


def assert_same_function(model: nn.Module, changed: nn.Module, channels: int = 3) -> None:
    """Outputs and input gradients over training steps, then evaluation with the running statistics."""
    for step in range(4):
        model.train(step < 3), changed.train(step < 3)
        x = torch.randn(4, channels, 8, 8) * (step + 1)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, expected = changed(a), model(b)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        out.square().sum().backward(), expected.square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["own", "shared", "functional"])
@pytest.mark.parametrize("rewrite", [False, True])
def test_a_layer_equal_to_the_pair_leaves_the_function(kind, rewrite):
    model = ResNet(kind)
    changed, report = replace_norm_act(copy.deepcopy(model), BN_RELU, policy=SAME, rewrite=rewrite)
    assert_same_function(model, changed)
    removable = 1 if kind != "own" and not rewrite else 3
    assert sum(entry.action == "layer" for entry in report) == removable
    left = [m for m in changed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(left) == 3 - removable
    layers = [m for m in changed.modules() if isinstance(m, GraphLayer)]
    assert len(layers) == len(report) - len(left) == sum(entry.replaced for entry in report)


def test_residual_blocks_end_in_an_affine():
    model, report = replace_norm_act(ResNet("own"), layer("evonorm-s0"), policy=ReplacePolicy(zero_init_last=True))
    assert found(report) == {
        "stem.1": ("pair", "layer"),
        "blocks.0.bn1": ("pair", "layer"),
        "blocks.0.bn2": ("last", "affine"),
        "blocks.1.bn1": ("pair", "layer"),
        "blocks.1.bn2": ("last", "affine"),
        "blocks.1.downsample.1": ("last", "affine"),
    }
    assert isinstance(model.stem[2], nn.Identity)
    assert isinstance(model.blocks[0].relu1, nn.Identity)
    assert isinstance(model.blocks[0].relu2, nn.ReLU)
    last = model.blocks[0].bn2
    assert not last.weight.any()
    assert last.graph.nodes == ()
    x = torch.randn(2, 8, 4, 4)
    assert not last(x).any()
    assert model.blocks[0].bn1.weight.all()


def test_functions_and_shared_modules_are_reported():
    for kind, reason in (("functional", "a call of relu, which is no module"), ("shared", "relu1 has 1 other use")):
        model = ResNet(kind)
        _, report = replace_norm_act(model, layer("evonorm-s0"))
        by_name = {entry.norm: entry for entry in report}
        assert not by_name["blocks.0.bn1"].replaced
        assert reason in by_name["blocks.0.bn1"].reason
        assert reason in str(by_name["blocks.0.bn1"])
        assert isinstance(model.blocks[0].bn1, nn.BatchNorm2d)
        assert isinstance(model.stem[1], GraphLayer)


def test_final_norm_by_policy():
    places = {"bn1": ("pair", "layer"), "bn2": ("pair", "layer"), "final": ("final", "layer")}
    assert found(replace_norm_act(PreActivation(), layer("evonorm-b0"))[1]) == places
    model, report = replace_norm_act(PreActivation(), layer("evonorm-b0"), policy=ReplacePolicy(final="keep"))
    assert found(report) == {**places, "final": ("final", "keep")}
    assert isinstance(model.final, nn.BatchNorm2d)
    assert isinstance(model.act, nn.ReLU)
    model, _ = replace_norm_act(PreActivation(), layer("evonorm-s0"), policy=ReplacePolicy(final="norm-only"))
    assert isinstance(model.act, nn.ReLU)
    assert format_formula(model.final.graph) == "x / std[group](x)"
    reference = PreActivation()
    changed, _ = replace_norm_act(copy.deepcopy(reference), BN_RELU)
    assert_same_function(reference, changed, channels=6)


def test_parts_of_a_model_that_cannot_be_traced():
    model = ResNet("own", branches=True)
    changed, report = replace_norm_act(copy.deepcopy(model), BN_RELU, policy=SAME)
    assert all(entry.replaced and entry.found_by == "trace" for entry in report)
    ends = dict.fromkeys(("blocks.0.bn2", "blocks.1.bn2", "blocks.1.downsample.1"), ("last", "own"))
    assert found(report) == found(replace_norm_act(ResNet("own"), BN_RELU)[1]) | ends
    assert_same_function(model, changed)
    with pytest.raises(UserError, match="a model that torch.fx can trace"):
        replace_norm_act(model, BN_RELU, rewrite=True)


def test_order_is_trusted_in_sequences_only():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x):
            x = self.norm(self.conv(x))
            return self.act(x) if x.sum() < 1e9 else x

    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), Branching(), nn.BatchNorm2d(4))
    changed, report = replace_norm_act(copy.deepcopy(model), BN_RELU)
    assert [(e.norm, e.action, e.found_by) for e in report] == [
        ("0", "layer", "order"),
        ("2.norm", "keep", "order"),
        ("3", "keep", "order"),
    ]
    assert "in Branching cannot be traced" in report[1].reason
    assert_same_function(model, changed)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), Branching(), nn.BatchNorm2d(4))
    changed, report = replace_norm_act(copy.deepcopy(model), BN_RELU, policy=ReplacePolicy(trust_order=True))
    assert [e.action for e in report] == ["layer", "layer", "keep"]
    assert_same_function(model, changed)
    shared = nn.ReLU()
    twice = nn.ModuleList([nn.Sequential(nn.BatchNorm2d(3), shared), nn.Sequential(nn.BatchNorm2d(3), shared)])
    _, report = replace_norm_act(twice, BN_RELU)  # a list has no forward
    assert [e.reason for e in report] == [f"its activation {i}.1 is registered under several names" for i in (0, 1)]


@pytest.mark.parametrize("name", ["nas-bench-201", "darts", "nas-bench-101", "nas-bench-macro"])
def test_our_own_networks(name):
    space = load_space(name)
    rng = np.random.default_rng(2)
    small = {"channels": 4, "cells_per_stage": 1} if name != "darts" else {"channels": 4, "layers": 3}
    if name == "nas-bench-macro":
        small = {"channels": 4}
    network = space.build(space.sample(rng), **small)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    changed, report = replace_norm_act(network, layer("evonorm-s0"), policy=ReplacePolicy(lone="norm-only"))
    assert len(report) == norms
    assert all(entry.found_by == "trace" and entry.replaced for entry in report)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in changed.modules())
    out = changed(torch.randn(2, 3, 16, 16))
    out = out[0] if isinstance(out, tuple) else out
    assert out.isfinite().all()
    out.sum().backward()


def test_device_dtype_and_mode_stay():
    model = ResNet("own").double().eval()
    replace_norm_act(model, layer("evonorm-b0"))
    assert {t.dtype for t in (*model.parameters(), *model.buffers())} == {torch.float64}
    assert not any(m.training for m in model.modules() if isinstance(m, GraphLayer))
    with torch.device("meta"):
        model = ResNet("own")
    replace_norm_act(model, layer("evonorm-b0"))
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}


def test_other_normalisations_and_their_layouts():
    model = nn.Sequential(
        nn.Conv1d(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.InstanceNorm1d(8), nn.ELU(),
        nn.LayerNorm((8, 6)), nn.GELU(), nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.RMSNorm(12), nn.Dropout(),
    )  # fmt: skip
    changed, report = replace_norm_act(model, layer("gn-silu"))
    assert [(e.norm, e.act, e.channels, e.action) for e in report] == [
        ("1", "2", 8, "layer"),
        ("3", "4", 8, "layer"),
        ("5", "6", 8, "layer"),
        ("8", "9", 12, "layer"),
        ("10", "", 12, "keep"),
    ]
    assert (changed[8].layout, changed[5].layout) == ("tokens", "channels-first")
    assert changed(torch.randn(2, 4, 8)).shape == (2, 8, 12)


def test_layer_norm_of_images_takes_channels_first():
    class LayerNorm2d(nn.LayerNorm):  # as torchvision's
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    changed, _ = replace_norm_act(nn.Sequential(LayerNorm2d(6), nn.ReLU()), layer("evonorm-s0"))
    assert changed[0].layout == "channels-first"
    assert changed(torch.randn(2, 6, 3, 3)).shape == (2, 6, 3, 3)


def test_factories_patterns_and_activations_of_ones_own():
    class Swish(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x)

    class Fused(nn.BatchNorm2d):  # as timm's BatchNormAct2d
        def __init__(self, channels):
            super().__init__(channels)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(super().forward(x))

    def model() -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm2d(4), Swish(), Fused(4), nn.BatchNorm2d(4), nn.ReLU())

    _, report = replace_norm_act(model(), lambda channels: nn.PReLU(channels))
    assert [e.action for e in report] == ["keep", "layer", "layer"]
    policy = ReplacePolicy(activations=(Swish,), keep=("[23]",))
    changed, report = replace_norm_act(model(), lambda channels: nn.PReLU(channels), policy=policy)
    assert [e.action for e in report] == ["layer", "keep", "keep"]
    assert [type(m) for m in changed[:3]] == [nn.PReLU, nn.Identity, Fused]
    reference = model()
    changed, _ = replace_norm_act(copy.deepcopy(reference), BN_RELU)
    assert_same_function(reference, changed, channels=4)


def test_an_activation_under_two_names_leaves_under_both():
    class TwoNames(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.act1 = self.act2 = nn.ReLU()

        def forward(self, x):
            return self.act2(self.norm2(self.act1(self.norm1(x)) - 0.5))

    model = TwoNames()
    changed, report = replace_norm_act(copy.deepcopy(model), BN_RELU)
    assert [entry.action for entry in report] == ["layer", "layer"]
    assert not any(isinstance(m, nn.ReLU) for m in changed.modules())
    assert_same_function(model, changed)


def test_modules_called_twice_and_never():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act, self.idle = nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.act(self.norm(self.norm(x)))

    _, report = replace_norm_act(Twice(), BN_RELU)
    assert [(e.norm, e.replaced, e.reason) for e in report] == [
        ("norm", False, "called 2 times"),
        ("idle", False, "never called"),
    ]
    _, report = replace_norm_act(nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU()), BN_RELU)
    assert "not known before the first input" in report[0].reason
    _, report = replace_norm_act(nn.BatchNorm2d(3), BN_RELU)
    assert report[0].reason == "it is the model itself"


def test_errors_leave_the_model_alone():
    with pytest.raises(UserError, match="a model with a normalisation"):
        replace_norm_act(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), BN_RELU)
    with pytest.raises(UserError, match="did you mean 'affine'"):
        ReplacePolicy(last="afine")
    model = ResNet("own")
    for source in (layer("evonorm-b0"), lambda channels: nn.ReLU()):
        with pytest.raises(UserError, match="'norm-only'.*'affine'"):
            replace_norm_act(model, source, policy=ReplacePolicy(last="norm-only"))
    assert not any(isinstance(m, GraphLayer) for m in model.modules())


def test_normalisation_inside_a_layer():
    """timm's `a` variants without their activation, and plain normalisations."""
    expected = {
        "evonorm-s0a": "x / std[group, eps=0.001](x)",
        "evonorm-s2": "x / rms[group](x)",
        "frn-tlu": "x / rms[instance, eps=1e-06](x)",
        "gn-silu": "(x - mean[group](x)) / std[group](x)",
        "bn-relu": "(x - mean[batch](x)) / std[batch](x)",
    }
    for name, formula in expected.items():
        normalise = without_activation(layer(name))
        assert format_formula(normalise).replace("1e-3", "0.001").replace("1e-6", "1e-06") == formula
        assert normalise.groups == layer(name).groups
        assert normalise.unbiased == layer(name).unbiased
    for name in ("evonorm-b1", "silu", "relu"):
        with pytest.raises(UserError, match="one rms or std"):
            without_activation(layer(name))
    assert affine_only().nodes == ()
