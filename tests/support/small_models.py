"""Models of a user, for the commands that take `package.module:factory`."""

from __future__ import annotations

from torch import nn


def plain() -> nn.Module:
    """Two normalisation-activation pairs and a normalisation with no activation behind it."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3),
        nn.GroupNorm(4, 12),
        nn.SiLU(),
        nn.Conv2d(12, 4, 1),
        nn.BatchNorm2d(4),
        nn.Flatten(),
    )
