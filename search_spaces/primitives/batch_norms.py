"""Normalisations with batch statistics: BatchNorm, its L1 form, with instance statistics beside it, re-parametrised."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from search_spaces.common.errors import UserError
from search_spaces.primitives.norm_layout import channel_dim
from search_spaces.primitives.primitive import Primitive


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm of tokens [..., C]: statistics over everything but the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view(x.shape)


class L1BatchNorm(nn.Module):
    """(x - mean) / (factor mean|x - mean| + eps) * weight + bias over everything but the channels.

    Evaluation uses averages of the training: running <- (1 - momentum) running + momentum batch, the deviation without
    the factor. Parameters [C]: weight 1, bias 0; running_mean 0, running_deviation 1. Computed in float32 or wider.
    """

    running_mean: Tensor
    running_deviation: Tensor

    def __init__(
        self, channels: int, eps: float = 1e-5, momentum: float = 0.1, factor: float = 1.0, channel_dim: int = 1
    ):
        super().__init__()
        self.eps, self.momentum, self.factor, self.channel_dim = eps, momentum, factor, channel_dim
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_deviation", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, self.weight.dtype)).movedim(self.channel_dim, -1)
        if self.training:
            rest = tuple(range(y.dim() - 1))
            mean = y.mean(rest)
            deviation = (y - mean).abs().mean(rest)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_deviation.lerp_(deviation.to(self.running_deviation.dtype), self.momentum)
        else:
            mean, deviation = self.running_mean, self.running_deviation
        y = (y - mean) / (self.factor * deviation + self.eps) * self.weight + self.bias
        return y.movedim(-1, self.channel_dim).to(x.dtype)

    def reset_running_stats(self) -> None:
        """The running values as they begin."""
        self.running_mean.zero_()
        self.running_deviation.fill_(1)

    def evaluation_affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), each [C]: what evaluation does to a channel."""
        scale = self.weight / (self.factor * self.running_deviation + self.eps)
        return scale, self.bias - self.running_mean * scale

    def extra_repr(self) -> str:
        settings = f"eps={self.eps}, momentum={self.momentum}, factor={self.factor:.6g}"
        return f"{self.weight.numel()}, {settings}, channel_dim={self.channel_dim}"


class IBNa(nn.Module):
    """InstanceNorm of the first floor(C * ratio) channels, BatchNorm of the others; images [B, C, H, W].

    It takes the place of the first normalisation of a residual block, in all stages but the last.
    """

    def __init__(self, channels: int, ratio: float = 0.5):
        super().__init__()
        self.channels, self.ratio = channels, ratio
        half = int(channels * ratio)
        self.split = [half, channels - half]
        self.instance_norm = nn.InstanceNorm2d(half, affine=True)
        self.batch_norm = nn.BatchNorm2d(channels - half)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x.split(self.split, 1)
        return torch.cat([self.instance_norm(first), self.batch_norm(rest)], 1)


class RepBN(nn.Module):
    """BatchNorm(x) + alpha x, alpha [1] 1: in evaluation an affine map, to be merged into the next layer."""

    def __init__(self, channels: int, channel_dim: int = -1):
        super().__init__()
        self.channel_dim = channel_dim
        self.alpha = nn.Parameter(torch.ones(1))
        self.bn = TokenBatchNorm(channels) if channel_dim == -1 else nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) + (self.alpha * x).to(x.dtype)

    def evaluation_affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), each [C]: what evaluation does to a channel."""
        mean, variance = self.bn.get_buffer("running_mean"), self.bn.get_buffer("running_var")
        scale = self.bn.weight * torch.rsqrt(variance + self.bn.eps)
        return scale + self.alpha, self.bn.bias - mean * scale


class PRepBN(nn.Module):
    """lambda LayerNorm(x) + (1 - lambda) RepBN(x), lambda falling from `start` to 0 over `steps` training batches.

    For the first `warm` training batches LayerNorm alone, and RepBN sees nothing. Evaluation is RepBN alone, whenever
    it happens. The batches left are buffers, so training resumes where it was. Channels-first: LayerNorm over the
    channels of each position.
    """

    warm_left: Tensor
    steps_left: Tensor

    def __init__(self, channels: int, steps: int = 300_000, warm: int = 0, start: float = 1.0, channel_dim: int = -1):
        super().__init__()
        self.steps, self.start, self.channel_dim = steps, start, channel_dim
        self.layer_norm = nn.LayerNorm(channels)
        self.rep_bn = RepBN(channels, channel_dim)
        self.register_buffer("warm_left", torch.tensor(warm))
        self.register_buffer("steps_left", torch.tensor(steps))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.rep_bn(x)
        layer = self.layer_norm(x.movedim(self.channel_dim, -1)).movedim(-1, self.channel_dim)
        if self.warm_left > 0:
            self.warm_left.sub_(1)
            return layer
        share = self.start * self.steps_left / self.steps
        self.steps_left.copy_((self.steps_left - 1).clamp_min(0))
        return (share * layer + (1 - share) * self.rep_bn(x)).to(x.dtype)

    def evaluation_affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), each [C]: what evaluation does to a channel."""
        return self.rep_bn.evaluation_affine()

    def extra_repr(self) -> str:
        return f"steps={self.steps}, start={self.start}, channel_dim={self.channel_dim}"


def batch_norm(channels: int, *, layout: str = "channels-first") -> nn.Module:
    """torch's BatchNorm (eps 1e-5, momentum .1)."""
    return nn.BatchNorm2d(channels) if channel_dim(channels, layout) == 1 else TokenBatchNorm(channels)


def l1_batch_norm(channels: int, *, layout: str = "channels-first", factor: float = 1.0) -> nn.Module:
    """BatchNorm with the mean absolute deviation, times `factor`."""
    return L1BatchNorm(channels, factor=factor, channel_dim=channel_dim(channels, layout))


def ibn_a(channels: int, *, layout: str = "channels-first") -> nn.Module:
    """IBN-a. Errors: UserError for fewer than two channels."""
    channel_dim(channels, layout, ("channels-first",))
    if channels < 2:
        raise UserError(channels, "at least two channels for the halves of IBN-a")
    return IBNa(channels)


def ibn_b(channels: int, *, layout: str = "channels-first") -> nn.Module:
    """The InstanceNorm of IBN-b. It stands after the addition of a residual block and before its ReLU, at the end of
    the first two stages' blocks, and in the place of the stem's BatchNorm; the block's BatchNorms stay.
    """
    channel_dim(channels, layout, ("channels-first",))
    return nn.InstanceNorm2d(channels, affine=True)


def rep_bn(channels: int, *, layout: str = "channels-first") -> nn.Module:
    """BatchNorm(x) + alpha x."""
    return RepBN(channels, channel_dim(channels, layout))


def prep_bn(channels: int, *, layout: str = "channels-first", steps: int = 300_000, warm: int = 0) -> nn.Module:
    """Progressive RepBN over `steps` training batches. Errors: UserError unless steps >= 1 and warm >= 0."""
    if steps < 1 or warm < 0:
        raise UserError((steps, warm), "at least one step and no negative warm-up")
    return PRepBN(channels, steps, warm, channel_dim=channel_dim(channels, layout))


AFFINE = "weight [C] 1, bias [C] 0"
IBN = "Pan, Luo, Shi and Tang, Two at Once: IBN-Net (ECCV 2018, arXiv 1807.09441) and its published code"
SLAB = "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch "
SLAB += "Normalization (Guo et al., ICML 2024, arXiv 2405.11582), xinghaochen/SLAB classification/models/prepbn.py"
L1 = "ShiftQuant (2024, arXiv 2411.10948): L1 normalisation by its abstract; the formula is inferred, the running "
L1 += "averages follow BatchNorm"
BATCH = ("images", "running-statistics", "batch")
PRIMITIVES: tuple[Primitive, ...] = (
    Primitive(
        "batch-norm",
        "normalisation",
        "(x - mean_BHW) / sqrt(var_BHW + eps) * weight + bias; evaluation: running mean and (unbiased) variance",
        "Ioffe and Szegedy, Batch Normalization (ICML 2015, arXiv 1502.03167); torch's eps 1e-5, momentum .1",
        batch_norm,
        parameters=AFFINE,
        needs=BATCH,
    ),
    Primitive(
        "l1-batch-norm",
        "normalisation",
        "(x - mean_BHW) / (mean_BHW|x - mean| + eps) * weight + bias; evaluation: running mean and deviation",
        L1,
        l1_batch_norm,
        parameters=AFFINE,
        needs=BATCH[1:],
    ),
    Primitive(
        "l1-batch-norm-scaled",
        "normalisation",
        "(x - mean_BHW) / (sqrt(pi/2) mean_BHW|x - mean| + eps) * weight + bias",
        L1 + "; the factor makes the mean absolute deviation of a Gaussian its standard deviation",
        functools.partial(l1_batch_norm, factor=math.sqrt(math.pi / 2)),
        parameters=AFFINE,
        needs=BATCH[1:],
    ),
    Primitive(
        "ibn-a",
        "normalisation",
        "InstanceNorm of the first half of the channels, BatchNorm of the rest; first norm of a residual block",
        IBN,
        ibn_a,
        ("channels-first",),
        parameters=AFFINE,
        needs=BATCH,
    ),
    Primitive(
        "ibn-b",
        "normalisation",
        "InstanceNorm after the residual addition, before the ReLU, in the first two stages and the stem",
        IBN,
        ibn_b,
        ("channels-first",),
        parameters=AFFINE,
        needs=("images",),
    ),
    Primitive(
        "rep-bn",
        "normalisation",
        "BatchNorm(x) + alpha x",
        SLAB,
        rep_bn,
        parameters="alpha [1] 1, weight [C] 1, bias [C] 0",
        needs=BATCH,
    ),
    Primitive(
        "prep-bn",
        "normalisation",
        "lambda LayerNorm_C(x) + (1 - lambda) RepBN(x), lambda from 1 to 0 over 300,000 batches; evaluation: RepBN",
        SLAB,
        prep_bn,
        parameters="LayerNorm: weight [C] 1, bias [C] 0; RepBN: alpha [1] 1, weight [C] 1, bias [C] 0",
        needs=BATCH,
    ),
)
