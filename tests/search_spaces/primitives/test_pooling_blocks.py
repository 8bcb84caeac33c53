"""Blocks with parameter-free pooling: published parameter counts, and functions written out a second time."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from search_spaces.common.errors import UserError
from search_spaces.primitives.pooling_blocks import PRIMITIVES, EffBottleneck, EffLayer, MaxBottleneck


class Bottleneck(nn.Module):
    """ResNet-50's own block, written here."""

    def __init__(self, inputs: int, outputs: int, *, width: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.short: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return torch.relu(self.body(x) + self.short(x))


def resnet50(block) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        for i in range(count):
            width, stride = 64 * 2**stage, 2 if stage and not i else 1
            layers.append(block(inputs, 4 * width, width=width, stride=stride))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


# 25,557,032 is ResNet-50's well-known count; the others are printed in the authors' README.
@pytest.mark.parametrize(
    ("block", "millions", "gmacs"),
    [(Bottleneck, 25.6, 4.1), (MaxBottleneck, 14.2, 2.2), (EffBottleneck, 17.3, 2.6)],
)
def test_resnet50_has_the_published_parameters_and_operations(block, millions, gmacs):
    with torch.device("meta"):
        net = resnet50(block)
        parameters = sum(p.numel() for p in net.parameters())
        macs = 0

        def count(module, inputs, output):
            nonlocal macs
            taps = module.weight[0].numel() if isinstance(module, nn.Conv2d) else module.in_features
            macs += output.numel() * taps

        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        assert net(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert round(parameters / 1e6, 1) == millions
    assert round(macs / 1e9, 1) == gmacs
    if block is Bottleneck:
        assert parameters == 25_557_032


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", [MaxBottleneck, EffBottleneck])
def test_bottlenecks_are_their_formula(kind, stride):
    torch.manual_seed(0)
    block, x = kind(6, 8, width=5, stride=stride).eval(), torch.randn(2, 6, 8, 8)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    w = {name: value for name, value in block.named_parameters() if value.dim() == 4}

    def norm(y, bn):
        mean, var = bn.running_mean.view(-1, 1, 1), bn.running_var.view(-1, 1, 1)
        return (y - mean) / torch.sqrt(var + 1e-5)

    y = norm(torch.einsum("oi,nihw->nohw", w["reduce.0.weight"][..., 0, 0], x), block.reduce[1]).clamp_min(0)
    if kind is MaxBottleneck or stride == 1:
        padded = F.pad(y, (1, 1, 1, 1), value=float("-inf"))
        y = padded.unfold(2, 3, stride).unfold(3, 3, stride).amax((-1, -2))
    else:
        y = y.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5))
        windows = F.pad(y, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
        y = norm(torch.einsum("oikl,nihwkl->nohw", w["exchange.1.weight"], windows), block.exchange[2]).clamp_min(0)
    y = norm(torch.einsum("oi,nihw->nohw", w["expand.0.weight"][..., 0, 0], y), block.expand[1])
    short = torch.einsum("oi,nihw->nohw", w["shortcut.0.weight"][..., 0, 0], x[:, :, ::stride, ::stride])
    torch.testing.assert_close(block(x), (y + norm(short, block.shortcut[1])).clamp_min(0), rtol=1e-5, atol=1e-5)


def test_eff_layer_is_its_formula():
    torch.manual_seed(0)
    layer, x = EffLayer(4), torch.randn(2, 9, 4)
    y = F.gelu(x @ layer.expand.weight.T + layer.expand.bias)
    cells = [(r, c) for r in range(3) for c in range(3)]
    near = [[n for n, (r, c) in enumerate(cells) if max(abs(r - i), abs(c - j)) < 2] for i, j in cells]
    pooled = torch.stack([y[:, some].amax(1) for some in near], 1)
    expected = F.gelu(pooled) @ layer.project.weight.T + layer.project.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in layer.parameters()) == 2 * 3 * 16 + 3 * 4 + 4


def test_bad_arguments():
    with pytest.raises(UserError, match="stride of 1 or 2"):
        MaxBottleneck(4, 4, stride=3)
    with pytest.raises(UserError, match="odd kernel"):
        EffLayer(4, kernel=2)
    for primitive in PRIMITIVES:
        (layout,) = primitive.layouts
        with pytest.raises(UserError, match="layout"):
            primitive.make(4, layout="tokens" if layout == "channels-first" else "channels-first")
        with pytest.raises(UserError, match="channels"):
            primitive.make(0, layout=layout)


@pytest.mark.parametrize("primitive", PRIMITIVES, ids=lambda p: p.name)
def test_entries_build_copy_save_export_and_compile(primitive):
    torch.manual_seed(0)
    (layout,) = primitive.layouts
    x = torch.randn((2, 8, 6, 6) if layout == "channels-first" else (2, 16, 8))
    block = primitive.make(8, layout=layout)
    trained = block(x)
    assert trained.shape == x.shape
    assert primitive.kind == "mixing"
    block.eval()
    y = block(x)
    assert torch.isfinite(y).all()
    other = primitive.make(8, layout=layout).eval()
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(x), y)
    assert torch.equal(copy.deepcopy(block)(x), y)
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), y)
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(block(x).float(), y, rtol=0.1, atol=0.1)
    z = x[:1].double().requires_grad_()
    assert torch.autograd.gradcheck(copy.deepcopy(block).double(), (z,))
