"""Fused models on a GPU: the cases of the interpreter compiled, runs that repeat bit for bit, trainings.

python -m pytest -m gpu tests/kernels/test_gpu.py
"""

from __future__ import annotations

import copy

import pytest
import torch
from fused_models import CASES, TOLERANCES, check_layer, check_norms
from torch import nn
from torch.nn import functional as F

import kernels
from search_spaces.layers import catalog
from search_spaces.layers.module import GraphLayer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(kernels.obstacle()) or not torch.cuda.is_available(), reason="kernels need a GPU"),
]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:2])))
def test_layers(case, dtype):
    check_layer(*case, dtype=dtype, device="cuda")


@pytest.mark.parametrize("shape", [(32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7), (64, 96, 1, 1)])
@pytest.mark.parametrize("memory", ["contiguous", "channels-last"])
@pytest.mark.parametrize("name", ["evonorm-s0", "evonorm-b0", "bn-relu"])
def test_large_layers(name, shape, memory):
    check_layer(name, "channels-first", shape, memory, torch.float32, "cuda")


def test_norms_of_torch():
    check_norms("cuda")


def network(norm: str, channels: int = 16) -> nn.Module:
    """A small ResNet; norm: a layer of the catalogue, or torch's BatchNorm with ReLU."""

    def layer(width: int) -> nn.Module:
        if norm == "torch":
            return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())
        return GraphLayer(catalog.layer(norm), width)

    class Block(nn.Module):
        def __init__(self, inside: int, width: int, stride: int):
            super().__init__()
            self.first, self.second = nn.Conv2d(inside, width, 3, stride, 1), nn.Conv2d(width, width, 3, 1, 1)
            self.a, self.b = layer(width), layer(width)
            self.short = nn.Conv2d(inside, width, 1, stride)

        def forward(self, x):
            return self.b(self.second(self.a(self.first(x)))) + self.short(x)

    widths = [channels, channels, 2 * channels, 4 * channels]
    blocks = [Block(widths[i], widths[i + 1], 1 + (i > 0)) for i in range(3)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    return nn.Sequential(nn.Conv2d(3, channels, 3, 1, 1), layer(channels), *blocks, *head)


def losses(model: nn.Module, steps: int, half: bool, seed: int = 0) -> torch.Tensor:
    """Training losses on images with one of ten patterns below noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(10, 3, 32, 32, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    found = []
    for _ in range(steps):
        labels = torch.randint(10, (64,), generator=generator)
        x = (patterns[labels] + 2 * torch.randn(64, 3, 32, 32, generator=generator)).cuda()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            loss = F.cross_entropy(model(x).float(), labels.cuda())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).cpu()


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("norm", ["evonorm-s0", "evonorm-b0", "bn-relu", "torch"])
def test_fused_training_follows_eager_training(norm, half):
    torch.manual_seed(0)
    model = network(norm).cuda()
    fused = kernels.fuse(model, backend="triton")
    assert fused.count == 7
    wanted = losses(model, 200, half)
    found = losses(fused.model, 200, half)
    noise = losses(copy.deepcopy(network(norm)).cuda(), 200, half)  # other weights: what chance alone does
    assert wanted[:5].mean() > 2 * wanted[-20:].mean()
    assert (found[:10] - wanted[:10]).abs().max() < (0.1 if half else 0.02)
    spread = (noise[-50:].mean() - wanted[-50:].mean()).abs()
    assert (found[-50:].mean() - wanted[-50:].mean()).abs() <= 2 * spread + 0.05


@pytest.mark.parametrize("norm", ["evonorm-s0", "evonorm-b0", "torch"])
def test_two_runs_are_equal_bit_for_bit(norm):
    shape = (32, 64, 28, 28)
    layer = network(norm, 64)[1].cuda()
    x, dy = (torch.randn(shape, device="cuda") for _ in range(2))
    results = []
    for _ in range(2):
        fused = kernels.fuse(layer, backend="triton").model
        given = x.clone().requires_grad_()
        y = fused(given)
        y.backward(dy)
        results.append([y, given.grad, *(p.grad for p in fused.parameters()), *fused.buffers()])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("norm", ["evonorm-s0", "evonorm-b0"])
def test_compiled_as_a_whole_around_the_operator(norm):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = network(norm).cuda()
    fused = kernels.fuse(model, backend="triton").model
    x = torch.randn(4, 3, 16, 16, device="cuda")
    compiled = torch.compile(fused, fullgraph=True)
    y, wanted = compiled(x), model(x)
    torch.testing.assert_close(y, wanted, rtol=1e-2, atol=1e-2)
    y.sum().backward()
    wanted.sum().backward()
    first, second = next(fused.parameters()).grad, next(model.parameters()).grad
    assert (first - second).norm() < 0.01 * second.norm()
