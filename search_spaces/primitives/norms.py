"""Normalisations whose statistics come from one sample: layer, RMS, group, instance, L1, filter response.

Half precision is widened to float32 before statistics are taken and the result is cast back; squares overflow above
1.8e19 in float32. Training and evaluation are the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from search_spaces.primitives.norm_layout import channel_dim
from search_spaces.primitives.primitive import Primitive


def wide(x: Tensor) -> Tensor:
    """Half precision as float32, in which statistics are taken."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def along(parameter: Tensor, x: Tensor, dim: int) -> Tensor:
    """A parameter [C], shaped to meet dimension `dim` of x."""
    return parameter.view(parameter.shape + (1,) * (x.dim() - 1 - dim % x.dim()))


def mean_over_positions(x: Tensor, dim: int) -> Tensor:
    """The mean over every dimension but the first (samples) and `dim` (channels); they stay with size 1."""
    positions = [d for d in range(1, x.dim()) if d != dim % x.dim()]
    return x.mean(positions, keepdim=True) if positions else x


class LayerNorm2d(nn.Module):
    """(x - mean_C) / sqrt(var_C + eps) * weight + bias at every position of [B, C, ...], biased variance.

    Parameters [C]: weight 1, bias 0.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = wide(x)
        centred = y - y.mean(1, keepdim=True)
        y = centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + self.eps)
        return (y * along(self.weight, x, 1) + along(self.bias, x, 1)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class RMSNorm(nn.Module):
    """x / sqrt(mean_C(x^2) + eps) * weight (+ bias); weight [C] 1, bias [C] 0 where asked for."""

    def __init__(self, channels: int, eps: float = 1e-6, bias: bool = False, channel_dim: int = -1):
        super().__init__()
        self.eps, self.channel_dim = eps, channel_dim
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = wide(x)
        y = y * torch.rsqrt(y.square().mean(self.channel_dim, keepdim=True) + self.eps)
        y = y * along(self.weight, x, self.channel_dim)
        if self.bias is not None:
            y = y + along(self.bias, x, self.channel_dim)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, bias={self.bias is not None}, channel_dim={self.channel_dim}"


class TokenGroupNorm(nn.GroupNorm):
    """GroupNorm of tokens [B, N, C]: statistics over all tokens and the channels of a group."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class TokenInstanceNorm(nn.InstanceNorm1d):
    """InstanceNorm of tokens [B, N, C]: statistics over the tokens of a sample, per channel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class FilterResponseNorm(nn.Module):
    """max(x / sqrt(mean_HW(x^2) + eps) * weight + bias, tau): filter response normalisation and its threshold (TLU).

    Parameters [C]: weight 1, bias 0, tau 0.
    """

    def __init__(self, channels: int, eps: float = 1e-6, channel_dim: int = 1):
        super().__init__()
        self.eps, self.channel_dim = eps, channel_dim
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.tau = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        dim = self.channel_dim
        y = wide(x)
        y = y * torch.rsqrt(mean_over_positions(y.square(), dim) + self.eps)
        y = y * along(self.weight, x, dim) + along(self.bias, x, dim)
        return torch.maximum(y, along(self.tau, x, dim)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, channel_dim={self.channel_dim}"


class L1LayerNorm(nn.Module):
    """(x - mean_C) / (factor mean_C|x - mean_C| + eps) * weight + bias at every position.

    factor 1, or sqrt(pi/2), with which it is the standard deviation of a Gaussian. Parameters [C]: weight 1, bias 0.
    """

    def __init__(self, channels: int, eps: float = 1e-5, factor: float = 1.0, channel_dim: int = -1):
        super().__init__()
        self.eps, self.factor, self.channel_dim = eps, factor, channel_dim
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        dim = self.channel_dim
        y = wide(x)
        centred = y - y.mean(dim, keepdim=True)
        y = centred / (self.factor * centred.abs().mean(dim, keepdim=True) + self.eps)
        return (y * along(self.weight, x, dim) + along(self.bias, x, dim)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, factor={self.factor:.6g}, channel_dim={self.channel_dim}"


def layer_norm(channels: int, *, layout: str = "channels-first") -> nn.Module:
    """One group over channels and positions of [B, C, ...]; torch's LayerNorm over the channels of each token."""
    return nn.GroupNorm(1, channels) if channel_dim(channels, layout) == 1 else nn.LayerNorm(channels)


def layer_norm_2d(channels: int, *, layout: str = "channels-first") -> nn.Module:
    """LayerNorm over the channels at each position of [B, C, ...]."""
    channel_dim(channels, layout, ("channels-first",))
    return LayerNorm2d(channels)


def rms_norm(channels: int, *, layout: str = "channels-first") -> nn.Module:
    """RMSNorm over the channels at each position."""
    return RMSNorm(channels, channel_dim=channel_dim(channels, layout))


def group_norm(channels: int, *, layout: str = "channels-first") -> nn.Module:
    """GroupNorm with as many groups as possible up to 32."""
    dim = channel_dim(channels, layout)
    groups = max(count for count in range(1, 33) if channels % count == 0)
    return nn.GroupNorm(groups, channels) if dim == 1 else TokenGroupNorm(groups, channels)


def instance_norm(channels: int, *, layout: str = "channels-first") -> nn.Module:
    """InstanceNorm with scale and shift; in training it needs more than one position."""
    dim = channel_dim(channels, layout)
    return nn.InstanceNorm2d(channels, affine=True) if dim == 1 else TokenInstanceNorm(channels, affine=True)


def frn_tlu(channels: int, *, layout: str = "channels-first") -> nn.Module:
    """Filter response normalisation with its thresholded linear unit; no activation follows it."""
    return FilterResponseNorm(channels, channel_dim=channel_dim(channels, layout))


def l1_layer_norm(channels: int, *, layout: str = "channels-first") -> nn.Module:
    """LayerNorm at each position with the mean absolute deviation."""
    return L1LayerNorm(channels, channel_dim=channel_dim(channels, layout))


def l1_layer_norm_scaled(channels: int, *, layout: str = "channels-first") -> nn.Module:
    """`l1_layer_norm` with the deviation times sqrt(pi/2)."""
    return L1LayerNorm(channels, factor=math.sqrt(math.pi / 2), channel_dim=channel_dim(channels, layout))


AFFINE = "weight [C] 1, bias [C] 0"
SHIFTQUANT = "ShiftQuant (2024, arXiv 2411.10948): L1 normalisation by its abstract; the formula is inferred"
PRIMITIVES: tuple[Primitive, ...] = (
    Primitive(
        "layer-norm",
        "normalisation",
        "(x - mean) / sqrt(var + eps) * weight + bias; over C and positions of [B, C, ...], over C of a token",
        "Ba, Kiros and Hinton, Layer Normalization (2016, arXiv 1607.06450); for images as GroupNorm with one group "
        "(Wu and He, ECCV 2018); torch's eps 1e-5",
        layer_norm,
        parameters=AFFINE,
    ),
    Primitive(
        "layer-norm-2d",
        "normalisation",
        "(x - mean_C) / sqrt(var_C + eps) * weight + bias at each position",
        "Ba, Kiros and Hinton (2016, arXiv 1607.06450), over channels as in timm's LayerNorm2d; eps 1e-5",
        layer_norm_2d,
        ("channels-first",),
        parameters=AFFINE,
    ),
    Primitive(
        "rms-norm",
        "normalisation",
        "x / sqrt(mean_C(x^2) + eps) * weight at each position",
        "Zhang and Sennrich, Root Mean Square Layer Normalization (NeurIPS 2019, arXiv 1910.07467); eps 1e-6",
        rms_norm,
        parameters="weight [C] 1",
    ),
    Primitive(
        "group-norm",
        "normalisation",
        "(x - mean) / sqrt(var + eps) * weight + bias over positions and the channels of a group, up to 32 groups",
        "Wu and He, Group Normalization (ECCV 2018, arXiv 1803.08494): 32 groups; torch's eps 1e-5",
        group_norm,
        parameters=AFFINE,
    ),
    Primitive(
        "instance-norm",
        "normalisation",
        "(x - mean_HW) / sqrt(var_HW + eps) * weight + bias",
        "Ulyanov, Vedaldi and Lempitsky, Instance Normalization (2016, arXiv 1607.08022); torch's eps 1e-5, affine",
        instance_norm,
        parameters=AFFINE,
        needs=("images",),
    ),
    Primitive(
        "frn-tlu",
        "normalisation",
        "max(x / sqrt(mean_HW(x^2) + eps) * weight + bias, tau)",
        "Singh and Krishnan, Filter Response Normalization Layer (CVPR 2020, arXiv 1911.09737); eps 1e-6 of the paper "
        "(timm's FilterResponseNormTlu2d has 1e-5)",
        frn_tlu,
        parameters="weight [C] 1, bias [C] 0, tau [C] 0",
    ),
    Primitive(
        "l1-layer-norm",
        "normalisation",
        "(x - mean_C) / (mean_C|x - mean_C| + eps) * weight + bias at each position",
        SHIFTQUANT,
        l1_layer_norm,
        parameters=AFFINE,
    ),
    Primitive(
        "l1-layer-norm-scaled",
        "normalisation",
        "(x - mean_C) / (sqrt(pi/2) mean_C|x - mean_C| + eps) * weight + bias at each position",
        SHIFTQUANT + "; the factor makes the mean absolute deviation of a Gaussian its standard deviation",
        l1_layer_norm_scaled,
        parameters=AFFINE,
    ),
)
