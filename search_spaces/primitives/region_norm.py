"""Region Normalization: the regions of a mask are standardised apart, each over batch and positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces.primitives.norm_layout import channel_dim
from search_spaces.primitives.primitive import Primitive


def standardise_region(x: Tensor, mask: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps n / |region|) inside of the region mask [B, 1, H, W] in {0, 1}, 0 outside.

    Mean and biased variance over the region's positions in the batch of n = B H W positions, in [B, C, H, W]. It equals
    a BatchNorm without affine of x mask + mean (1 - mask), times sqrt(|region| / n), hence the factor of eps. An empty
    region gives 0.
    """
    positions = mask.sum((0, 2, 3), keepdim=True).clamp_min(1)
    mean = (x * mask).sum((0, 2, 3), keepdim=True) / positions
    centred = (x - mean) * mask
    variance = centred.square().sum((0, 2, 3), keepdim=True) / positions
    return centred * torch.rsqrt(variance + eps * (mask.numel() / positions))


class RegionNormB(nn.Module):
    """RN-B: x inside and outside of a given mask standardised apart, each with an affine map of its own.

    forward(x [B, C, H, W], mask [B, 1, h, w] in {0, 1}), the mask resized to H x W by nearest. Batch statistics in
    training and evaluation. Parameters [C], all 0: gain = 1 + gain_inside, shift_inside, and the same outside.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.gain_inside = nn.Parameter(torch.zeros(channels, 1, 1))
        self.shift_inside = nn.Parameter(torch.zeros(channels, 1, 1))
        self.gain_outside = nn.Parameter(torch.zeros(channels, 1, 1))
        self.shift_outside = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mask = F.interpolate(mask.detach().to(y.dtype), x.shape[2:], mode="nearest")
        inside = standardise_region(y, mask, self.eps) * (1 + self.gain_inside) + self.shift_inside * mask
        rest = 1 - mask
        outside = standardise_region(y, rest, self.eps) * (1 + self.gain_outside) + self.shift_outside * rest
        return (inside + outside).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.gain_inside.shape[0]}, eps={self.eps}"


class RegionNormL(nn.Module):
    """RN-L: the mask is importance >= threshold, importance = sigmoid(conv7x7([mean_C(x), max_C(x)])).

    RN(x) * (1 + gain) + shift, gain and shift 7x7 convolutions of the importance; the mask passes no gradient. Batch
    statistics in training and evaluation; the convolutions begin as torch's do.
    """

    def __init__(self, channels: int, threshold: float = 0.8, eps: float = 1e-5):
        super().__init__()
        self.channels, self.threshold, self.eps = channels, threshold, eps
        self.importance = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.gain = nn.Conv2d(1, 1, 7, padding=3)
        self.shift = nn.Conv2d(1, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        summary = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
        importance = torch.sigmoid(self.importance(summary))
        mask = (importance.detach() >= self.threshold).to(y.dtype)
        y = standardise_region(y, mask, self.eps) + standardise_region(y, 1 - mask, self.eps)
        return (y * (1 + self.gain(importance)) + self.shift(importance)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, threshold={self.threshold}, eps={self.eps}"


def region_norm_b(channels: int, *, layout: str = "channels-first") -> nn.Module:
    """RN-B, called with (x, mask)."""
    channel_dim(channels, layout, ("channels-first",))
    return RegionNormB(channels)


def region_norm_l(channels: int, *, layout: str = "channels-first") -> nn.Module:
    """RN-L, which finds its mask itself."""
    channel_dim(channels, layout, ("channels-first",))
    return RegionNormL(channels)


SOURCE = "Yu et al., Region Normalization for Image Inpainting (AAAI 2020, arXiv 1911.10375) and geekyutao/RN rn.py"
PRIMITIVES: tuple[Primitive, ...] = (
    Primitive(
        "region-norm-b",
        "normalisation",
        "(x - mean_R) / sqrt(var_R + eps n / |R|) * (1 + gain_R) + shift_R in both regions R of a mask",
        f"{SOURCE}; the code adds both shifts everywhere, here each stays in its region",
        region_norm_b,
        ("channels-first",),
        parameters="gain and shift inside and outside, 4 x [C, 1, 1] 0",
        needs=("images", "mask"),
    ),
    Primitive(
        "region-norm-l",
        "normalisation",
        "RN(x, m) * (1 + gain(i)) + shift(i), m = i >= .8, i = sigmoid(conv7x7([mean_C(x), max_C(x)]))",
        SOURCE,
        region_norm_l,
        ("channels-first",),
        parameters="three 7x7 convolutions to one channel, torch's initial values",
        needs=("images",),
    ),
)
