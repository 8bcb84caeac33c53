"""Anchor networks: sizes, where layers stand, which inputs they take, initialisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nas.layers.anchors import ANCHORS, Affine, anchor, check_size, layout_of, positions
from search_spaces.common.errors import UserError
from search_spaces.layers.catalog import layer
from search_spaces.layers.module import GraphLayer


def bn_relu(channels: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


def tokens(channels: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(channels), nn.GELU())


def native(name: str):
    return tokens if layout_of(name) == "tokens" else bn_relu


# Parameters in thousands as published with the measurements that these anchors are to repeat; own choice for vit.
@pytest.mark.parametrize(("name", "thousands"), [("resnet", 20), ("mobilenetv2", 9), ("efficientnet", 12), ("vgg", 18)])
def test_parameter_counts(name, thousands):
    count = sum(p.numel() for p in anchor(name, native(name)).parameters())
    assert round(count / 1000) == thousands


def test_resnet_parameters_by_hand():
    w = 8
    convolutions = 9 * 3 * w + 9 * w * w * 2 + 9 * (w * 2 * w + 4 * w * w) + 9 * (8 * w * w + 16 * w * w)
    shortcuts = 2 * w * w + 8 * w * w
    norms = 2 * (w + w + w + 2 * w + 2 * w + 4 * w + 4 * w)
    total = convolutions + shortcuts + norms + 4 * w * 10 + 10
    assert sum(p.numel() for p in anchor("resnet", bn_relu).parameters()) == total


@pytest.mark.parametrize("name", list(ANCHORS))
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (32, 32), (8, 24)])
def test_sizes(name, height, width):
    network = anchor(name, native(name), in_channels=2, num_classes=7)
    out = network(torch.randn(2, 2, height, width))
    assert out.shape == (2, 7)
    out.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("name", list(ANCHORS))
def test_images_that_are_too_small(name):
    with pytest.raises(UserError, match=f"images of 6x8.*at least 8x8 for the anchor {name}"):
        anchor(name, native(name))(torch.randn(2, 3, 6, 8))
    with pytest.raises(UserError, match="at least 8x8"):
        check_size(name, 16, 7)


def test_patches_must_fit():
    with pytest.raises(UserError, match="images of 10x12.*sides that 4 divides"):
        anchor("vit", tokens)(torch.randn(2, 3, 10, 12))


def test_names_and_widths():
    assert isinstance(anchor("MobileNetV2", bn_relu), nn.Module)
    with pytest.raises(UserError, match="did you mean 'resnet'"):
        anchor("resnet50", bn_relu)
    with pytest.raises(UserError, match="a positive width"):
        anchor("resnet", bn_relu, width=0)


@pytest.mark.parametrize("name", list(ANCHORS))
def test_no_normalisation_or_activation_but_the_layer(name):
    """With an identity as layer the network is linear, but for gates and attention, whose inside is not the layer's."""
    network = anchor(name, lambda channels: nn.Identity())
    kinds = {type(m) for m in network.modules() if not list(m.children())}
    assert kinds <= {nn.Identity, nn.Conv2d, nn.Linear, Affine}
    if name in ("resnet", "mobilenetv2"):
        a, b = torch.randn(2, 4, 3, 8, 8)
        with torch.no_grad():
            f = network(a) + network(b) - network(torch.zeros(4, 3, 8, 8))
            assert torch.allclose(f, network(a + b), atol=1e-4)


def test_the_end_of_a_branch_is_the_callers():
    widths = []

    def last(channels):
        widths.append(channels)
        return nn.BatchNorm2d(channels)

    anchor("mobilenetv2", bn_relu, last=last)
    assert widths == [8, 16, 16, 32]
    default = anchor("mobilenetv2", bn_relu)
    assert sum(isinstance(m, Affine) for m in default.modules()) == 4


@pytest.mark.parametrize("name", list(ANCHORS))
def test_graph_layers_fit(name):
    graph = layer("evonorm-s0", group_size=4)
    network = anchor(name, lambda c: GraphLayer(graph, c, layout=layout_of(name)))
    assert network(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_weights_come_from_the_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (
        anchor("resnet", bn_relu, width=16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.blocks[1].conv1.weight, again.blocks[1].conv1.weight)
    assert not torch.equal(first.blocks[1].conv1.weight, other.blocks[1].conv1.weight)
    weight = first.blocks[2].conv2.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.05)
    loss = nn.functional.cross_entropy(first(torch.randn(64, 3, 8, 8)), torch.arange(64) % 10)
    assert loss.item() == pytest.approx(math.log(10), abs=0.1)


def test_positions_differ_and_do_not_grow():
    codes = positions(32, 4, 5)
    assert codes.shape == (20, 32)
    assert torch.cdist(codes, codes).fill_diagonal_(1.0).min() > 0.3
    assert codes.norm(dim=1).std() < 1e-5
