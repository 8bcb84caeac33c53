"""Blocks that several image spaces are made of. `norm` and `act` are factories: channels -> module."""

from __future__ import annotations

from collections.abc import Iterable

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


class CellNetwork(nn.Module):
    """Stem, cells one after another, a last block of `width` channels, global average pooling, linear classifier."""

    def __init__(self, stem: nn.Module, cells: Iterable[nn.Module], last: nn.Module, width: int, num_classes: int):
        super().__init__()
        self.stem = stem
        self.cells = nn.ModuleList(cells)
        self.last = last
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, num_classes)

    def stages(self) -> list[str]:
        """The names of the cell modules (reductions included), in order."""
        return [f"cells.{i}" for i in range(len(self.cells))]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The pooled features [N, width] before the classifier."""
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x)
        return self.pool(self.last(x)).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.forward_features(x))
