"""Fused layers on a device against float64: run as a script with TRITON_INTERPRET=1, or called where a GPU is.

    TRITON_INTERPRET=1 python tests/support/fused_models.py

Tolerances are those of low precision rounding: the interpreter truncates bfloat16, a GPU rounds.
"""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor, nn

import kernels
from kernels import operators
from kernels.backend import by_kernels
from search_spaces.layers import catalog
from search_spaces.layers.module import GraphLayer

TOLERANCES = {torch.float32: 5e-6, torch.float16: 1.5e-3, torch.bfloat16: 9e-3}
CASES = (  # layer, layout, shape, memory
    ("evonorm-s0", "channels-first", (2, 8, 7, 7), "contiguous"),
    ("evonorm-s0", "channels-first", (2, 8, 4, 4), "channels-last"),
    ("evonorm-b0", "channels-first", (3, 6, 5, 3), "contiguous"),
    ("bn-silu", "channels-first", (3, 6, 4, 4), "channels-last"),
    ("bn-relu", "channels-first", (5, 7), "contiguous"),
    ("gn-relu", "channels-first", (2, 8, 3, 2, 2), "contiguous"),
    ("layer-norm-tokens", "tokens", (2, 5, 12), "contiguous"),
    ("layer-norm-tokens", "channels-first", (2, 12, 3, 3), "contiguous"),
    ("group-norm", "tokens", (2, 5, 8), "contiguous"),
    ("silu", "channels-first", (1, 3, 1, 1), "contiguous"),
)


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.4, 1.2, generator=generator)
    return model


def compare(model: nn.Module, x: Tensor, device: str, tolerance: float, expanded: bool = False) -> None:
    """A fused model's output, gradients and buffers against the same in float64, in training and evaluation."""
    exact = copy.deepcopy(model).double()
    fused = kernels.fuse(model, backend="triton").model.to(device)
    for training in (True, False):
        results = []
        for one, given in ((fused.train(training), x.to(device)), (exact.train(training), x.double())):
            given = given.clone(memory_format=torch.preserve_format).requires_grad_()
            one.zero_grad()
            y = one(given)
            assert y.dtype == given.dtype
            dy = torch.ones((), dtype=y.dtype, device=y.device).expand_as(y)
            if not expanded:
                dy = normal(tuple(y.shape), 1).to(x.dtype).to(y)
            y.backward(dy)
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in one.parameters()]
            results.append([y.detach(), given.grad, *gradients, *one.buffers()])
        largest = max(float(wanted.norm()) for wanted in results[1] if wanted.is_floating_point())
        for found, wanted in zip(*results, strict=True):
            error = (found.cpu().double() - wanted.double()).norm()
            assert error <= tolerance * wanted.double().norm() + 0.1 * tolerance * largest, (model, training, error)


def check_layer(name: str, layout: str, shape: tuple[int, ...], memory: str, dtype: torch.dtype, device: str) -> None:
    """A catalogue layer by generated kernels; no fallback is admitted."""
    channels = shape[-1] if layout == "tokens" else shape[1]
    layer = randomised(GraphLayer(catalog.layer(name, groups=2), channels, layout=layout))
    x = (normal(shape, 2) * 1.5 + 0.4).to(dtype)
    if memory == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
    assert by_kernels(x.to(device))
    operators._warn_once.cache_clear()
    compare(layer, x, device, TOLERANCES[dtype], expanded=name == "evonorm-b0")
    assert operators._warn_once.cache_info().currsize == 0, f"{name} was not run by kernels"


def check_norms(device: str) -> None:
    """torch's modules by handwritten kernels."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.LayerNorm(72)
    )
    model.append(nn.GELU())
    compare(randomised(model), normal((2, 3, 5, 5), 3).float(), device, 2e-5)


def main() -> None:
    """Everything, on the CPU."""
    for index, case in enumerate(CASES):
        check_layer(*case, dtype=tuple(TOLERANCES)[index % 3] if index > 2 else torch.float32, device="cpu")
    check_norms("cpu")
    assert "triton" in sys.modules
    print(f"{len(CASES)} layers agree")


if __name__ == "__main__":
    main()
