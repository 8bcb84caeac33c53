"""A network, batches and a proxy of a user's own, to be named on the command line."""

from __future__ import annotations

import torch
from torch import nn

from zero_cost import proxy


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 3, 8, 8, generator=generator), torch.arange(6)) for _ in range(2)]


@proxy("weight-peak", needs=("weights",), formula="max |W|", source="a test")
def weight_peak(captured):
    return max(w.abs().max() for w in captured.weights.values())
