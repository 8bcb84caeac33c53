"""Normalisations and activations by their command-line names: channels -> module, for inputs [N, C, H, W].

A factory that needs no channel count still takes it, so that all of them can stand at the same place.
"""

from __future__ import annotations

from torch import nn

from search_spaces.cells.operations import batch_norm, relu
from search_spaces.common.names import match
from search_spaces.space import LayerFactory


def group_norm(channels: int) -> nn.Module:
    """GroupNorm with as many groups as possible up to 32 (Wu and He, Group Normalization, ECCV 2018: 32 groups)."""
    groups = max(count for count in range(1, 33) if channels % count == 0)
    return nn.GroupNorm(groups, channels)


def layer_norm(channels: int) -> nn.Module:
    """One group: mean and variance over channels and positions of a sample, scale and shift per channel."""
    return nn.GroupNorm(1, channels)


def instance_norm(channels: int) -> nn.Module:
    """InstanceNorm2d with scale and shift; needs more than one position per channel."""
    return nn.InstanceNorm2d(channels, affine=True)


def identity(channels: int) -> nn.Module:
    """The input itself."""
    return nn.Identity()


def silu(channels: int) -> nn.Module:
    """x * sigmoid(x)."""
    return nn.SiLU()


def gelu(channels: int) -> nn.Module:
    """x * Phi(x), exact."""
    return nn.GELU()


def leaky_relu(channels: int) -> nn.Module:
    """max(x, .01 x)."""
    return nn.LeakyReLU()


def hardswish(channels: int) -> nn.Module:
    """x * relu6(x + 3) / 6."""
    return nn.Hardswish()


NORMS: dict[str, LayerFactory] = {
    "batch-norm": batch_norm,
    "group-norm": group_norm,
    "layer-norm": layer_norm,
    "instance-norm": instance_norm,
    "identity": identity,
}
ACTIVATIONS: dict[str, LayerFactory] = {
    "relu": relu,
    "silu": silu,
    "gelu": gelu,
    "leaky-relu": leaky_relu,
    "hardswish": hardswish,
    "identity": identity,
}


def norm_factory(name: str) -> LayerFactory:
    """The normalisation called `name`. Errors: UserError with the nearest name."""
    return NORMS[match(name, NORMS, "a normalisation")]


def act_factory(name: str) -> LayerFactory:
    """The activation called `name`. Errors: UserError with the nearest name."""
    return ACTIVATIONS[match(name, ACTIVATIONS, "an activation")]
