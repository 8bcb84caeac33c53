"""Blocks that several image spaces are made of. `norm` and `act` are factories: channels -> module."""

from __future__ import annotations

import torch
from torch import nn

from search_spaces.space import LayerFactory


def batch_norm(channels: int) -> nn.Module:
    """BatchNorm2d with PyTorch's defaults (eps 1e-5, momentum .1)."""
    return nn.BatchNorm2d(channels)


def relu(channels: int) -> nn.Module:
    """ReLU that leaves its input alone."""
    return nn.ReLU()


class ActConvNorm(nn.Module):
    """activation -> convolution without bias -> normalisation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, norm: LayerFactory, act: LayerFactory):
        super().__init__()
        self.act = act(inputs)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = norm(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(self.act(x)))


class Zero(nn.Module):
    """The operation `none`: zeros of the input's shape, strided like a convolution."""

    def __init__(self, stride: int = 1):
        super().__init__()
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])
