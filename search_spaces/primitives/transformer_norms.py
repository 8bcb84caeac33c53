"""Normalisations made for transformers: compressed RMSNorm, LayerNorm Scaling and SeeDNorm.

Half precision is widened to float32 and the result cast back. Training and evaluation are the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from search_spaces.common.errors import UserError
from search_spaces.primitives.norm_layout import channel_dim, divides
from search_spaces.primitives.primitive import Primitive


def wide(x: Tensor) -> Tensor:
    """Half precision as float32, in which statistics are taken."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def along(parameter: Tensor, x: Tensor, dim: int) -> Tensor:
    """A parameter [C], shaped to meet dimension `dim` of x."""
    return parameter.view(parameter.shape + (1,) * (x.dim() - 1 - dim % x.dim()))


class CRMSNorm(nn.Module):
    """x / sqrt((sum x^2 + (sum x)^2) / (C + 1) + eps) * weight: RMSNorm of x completed by -sum(x).

    The C channels are those of a zero-mean vector of C + 1 channels without its last one. weight [C] 1, or none.
    """

    def __init__(self, channels: int, eps: float = 1e-6, affine: bool = True, channel_dim: int = -1):
        super().__init__()
        self.channels, self.eps, self.channel_dim = channels, eps, channel_dim
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        y = wide(x)
        square = y.square().sum(self.channel_dim, keepdim=True) + y.sum(self.channel_dim, keepdim=True).square()
        y = y * torch.rsqrt(square / (self.channels + 1) + self.eps)
        if self.weight is not None:
            y = y * along(self.weight, x, self.channel_dim)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}, affine={self.weight is not None}, channel_dim={self.channel_dim}"


class ScaledLayerNorm(nn.Module):
    """LayerNorm(x) / sqrt(layer): LayerNorm Scaling, `layer` counted from 1.

    It stands for both normalisations of a pre-norm block, and is not to be joined with initial weights scaled by depth.
    """

    def __init__(self, channels: int, layer: int = 1, eps: float = 1e-5, channel_dim: int = -1):
        super().__init__()
        self.layer, self.channel_dim = layer, channel_dim
        self.norm = nn.LayerNorm(channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.movedim(self.channel_dim, -1)).movedim(-1, self.channel_dim)
        return y / math.sqrt(self.layer)

    def extra_repr(self) -> str:
        return f"layer={self.layer}, channel_dim={self.channel_dim}"


class SeeDNorm(nn.Module):
    """(tanh(<x, beta>) alpha + gamma) * x / sqrt(mean_C(x^2) + eps): an RMSNorm whose gain depends on the input.

    heads: the inner product is taken over C / heads channels each. Parameters [C]: alpha 1, beta 0, gamma 1, so that
    it begins as RMSNorm.
    """

    def __init__(self, channels: int, heads: int = 1, eps: float = 1e-6, channel_dim: int = -1):
        super().__init__()
        self.heads, self.eps, self.channel_dim = heads, eps, channel_dim
        self.alpha = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        dim = self.channel_dim % x.dim()
        y = wide(x)
        grouped = (y * along(self.beta, x, dim)).unflatten(dim, (self.heads, -1))
        seed = torch.tanh(grouped.sum(dim + 1, keepdim=True)).expand_as(grouped).flatten(dim, dim + 1)
        gain = seed * along(self.alpha, x, dim) + along(self.gamma, x, dim)
        return (gain * y * torch.rsqrt(y.square().mean(dim, keepdim=True) + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.alpha.numel()}, heads={self.heads}, eps={self.eps}, channel_dim={self.channel_dim}"


def crms_norm(channels: int, *, layout: str = "channels-first") -> nn.Module:
    """CRMSNorm of `channels` = d - 1 channels; `recentring.to_crms_norms` rewrites a transformer for it."""
    return CRMSNorm(channels, channel_dim=channel_dim(channels, layout))


def ln_scaling(channels: int, *, layout: str = "channels-first", layer: int = 1) -> nn.Module:
    """LayerNorm Scaling of block `layer`, counted from 1. Errors: UserError for a layer below 1."""
    if layer < 1:
        raise UserError(layer, "the index of a layer, counted from 1", "1")
    return ScaledLayerNorm(channels, layer, channel_dim=channel_dim(channels, layout))


def seednorm(channels: int, *, layout: str = "channels-first", heads: int = 1) -> nn.Module:
    """SeeDNorm with `heads` inner products. Errors: UserError unless `heads` divides the channels."""
    dim = channel_dim(channels, layout)
    return SeeDNorm(channels, divides(heads, channels, "heads"), channel_dim=dim)


PRIMITIVES: tuple[Primitive, ...] = (
    Primitive(
        "crms-norm",
        "normalisation",
        "x / sqrt((sum_C x^2 + (sum_C x)^2) / (C + 1) + eps) * weight at each position",
        "Jiang, Gu, Zhu and Pan, Pre-RMSNorm and Pre-CRMSNorm Transformers (NeurIPS 2023, arXiv 2305.14858); eps 1e-6",
        crms_norm,
        parameters="weight [C] 1",
    ),
    Primitive(
        "ln-scaling",
        "normalisation",
        "LayerNorm_C(x) / sqrt(l) in layer l = 1, 2, ...",
        "Sun et al., The Curse of Depth in Large Language Models (NeurIPS 2025, arXiv 2502.05795): LayerNorm Scaling, "
        "both normalisations of block l",
        ln_scaling,
        parameters="weight [C] 1, bias [C] 0",
    ),
    Primitive(
        "seednorm",
        "normalisation",
        "(tanh(<x, beta>) alpha + gamma) * x / sqrt(mean_C(x^2) + eps)",
        "Cai, Zhu, Liu and Min, SeeDNorm: Self-Rescaled Dynamic Normalization (2025, arXiv 2510.22777); formula and "
        "initial values as in a public Megatron port; eps 1e-6 is ours",
        seednorm,
        parameters="alpha [C] 1, beta [C] 0, gamma [C] 1",
    ),
)
