"""Normalisations by the second moment with averages over training batches, which fold away in evaluation.

PowerNorm and UnifiedNorm have backward passes of their own. Their training steps run outside of torch.compile (a graph
break), keep statistics of one process, and count a forward pass that is repeated (checkpointing) as another batch.
Statistics are taken over everything but the channels, in float32 or wider.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from search_spaces.common.errors import UserError
from search_spaces.primitives.norm_layout import channel_dim, divides
from search_spaces.primitives.primitive import Primitive


def channels_last(x: Tensor, dim: int, like: Tensor) -> Tensor:
    """x with its channels in the last dimension, at least as wide as the parameter `like`."""
    return x.to(torch.promote_types(x.dtype, like.dtype)).movedim(dim, -1)


def mean_per_channel(x: Tensor) -> Tensor:
    """The mean over all dimensions but the last."""
    return x.mean(tuple(range(x.dim() - 1)))


class GroupScaling(nn.Module):
    """x / sqrt(mean of x^2 over the channels of a group + eps) at each position."""

    def __init__(self, groups: int = 1, eps: float = 1e-5, channel_dim: int = -1):
        super().__init__()
        self.groups, self.eps, self.channel_dim = groups, eps, channel_dim

    def forward(self, x: Tensor) -> Tensor:
        dim = self.channel_dim % x.dim()
        y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        y = y.unflatten(dim, (self.groups, -1))
        y = y / torch.sqrt(y.square().mean(dim + 1, keepdim=True) + self.eps)
        return y.flatten(dim, dim + 1).to(x.dtype)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, eps={self.eps}, channel_dim={self.channel_dim}"


class PowerGradient(torch.autograd.Function):
    """weight x / sqrt(moment + eps) + bias, [..., C], with PowerNorm's approximate gradient.

    The gradient through the moment is replaced by a running average, and the division by that of the batch's moment.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, moment: Tensor, batch: Tensor, state: tuple
    ) -> Tensor:
        gradient_average, keep, eps = state
        z = x / torch.sqrt(moment + eps)
        ctx.save_for_backward(z, weight, batch)
        ctx.gradient_average, ctx.keep, ctx.eps = gradient_average, keep, eps  # not saved: it changes in backward
        return z * weight + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        z, weight, batch = ctx.saved_tensors
        rest = tuple(range(z.dim() - 1))
        g = grad * weight - (1 - ctx.keep) * ctx.gradient_average * z
        ctx.gradient_average.add_(mean_per_channel(g * z))
        return g / torch.sqrt(batch + ctx.eps), (grad * z).sum(rest), grad.sum(rest), None, None, None


class PowerNorm(nn.Module):
    """x' / sqrt(psi + eps) * weight + bias, x' = GroupScaling(x), psi a running mean of x'^2 per channel.

    Training: in the first `warmup` batches psi is that of the batch and the running value its cumulative mean,
    afterwards the running value before this batch; after each batch running <- keep running + (1 - keep) batch, during
    warm-up too, as in the published code. Backward as in PowerGradient, with nu <- nu + mean((G - (1-keep) nu z) z).
    Evaluation: the running value. Parameters [C]: weight 1, bias 0; buffers running_moment 1, gradient_average 0.
    """

    running_moment: Tensor
    gradient_average: Tensor
    batches: Tensor

    def __init__(
        self,
        channels: int,
        groups: int = 1,
        warmup: int = 10_000,
        keep: float = 0.9,
        eps: float = 1e-5,
        channel_dim: int = -1,
    ):
        super().__init__()
        self.groups, self.warmup, self.keep, self.eps, self.channel_dim = groups, warmup, keep, eps, channel_dim
        self.scaling = GroupScaling(groups, eps, channel_dim)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_moment", torch.ones(channels))
        self.register_buffer("gradient_average", torch.zeros(channels))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        y = channels_last(self.scaling(x), self.channel_dim, self.weight)
        if self.training:
            y = self.train_step(y)
        else:
            y = y / torch.sqrt(self.running_moment + self.eps) * self.weight + self.bias
        return y.movedim(-1, self.channel_dim).to(x.dtype)

    @torch.compiler.disable
    def train_step(self, x: Tensor) -> Tensor:
        """The training rule on [..., C]."""
        with torch.no_grad():
            count = int(self.batches.add_(1))
            batch = mean_per_channel(x.detach().square())
            moment = batch if count <= self.warmup else self.running_moment.clone()
            if count < self.warmup:
                self.running_moment.copy_(self.running_moment * ((count - 1) / count) + batch / count)
            self.running_moment.copy_(self.keep * self.running_moment + (1 - self.keep) * batch)
        state = (self.gradient_average, self.keep, self.eps)
        return PowerGradient.apply(x, self.weight, self.bias, moment, batch, state)

    def reset_running_stats(self) -> None:
        """The averages as they begin."""
        self.running_moment.fill_(1)
        self.gradient_average.zero_()
        self.batches.zero_()

    def evaluation_affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), each [C]: what evaluation does to a channel after GroupScaling."""
        return self.weight / torch.sqrt(self.running_moment + self.eps), self.bias

    def extra_repr(self) -> str:
        settings = f"warmup={self.warmup}, keep={self.keep}, eps={self.eps}"
        return f"{self.weight.numel()}, {settings}, channel_dim={self.channel_dim}"


class PowerNormV(nn.Module):
    """PowerNorm without running statistics in training: the batch's second moment and its exact gradient.

    Evaluation: running <- keep running + (1 - keep) batch. Parameters [C]: weight 1, bias 0.
    """

    running_moment: Tensor

    def __init__(self, channels: int, groups: int = 1, keep: float = 0.9, eps: float = 1e-5, channel_dim: int = -1):
        super().__init__()
        self.groups, self.keep, self.eps, self.channel_dim = groups, keep, eps, channel_dim
        self.scaling = GroupScaling(groups, eps, channel_dim)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_moment", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = channels_last(self.scaling(x), self.channel_dim, self.weight)
        moment = mean_per_channel(y.square()) if self.training else self.running_moment
        if self.training:
            with torch.no_grad():
                self.running_moment.lerp_(moment.to(self.running_moment.dtype), 1 - self.keep)
        y = y / torch.sqrt(moment + self.eps) * self.weight + self.bias
        return y.movedim(-1, self.channel_dim).to(x.dtype)

    def reset_running_stats(self) -> None:
        """The running value as it begins."""
        self.running_moment.fill_(1)

    def evaluation_affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), each [C]: what evaluation does to a channel after GroupScaling."""
        return self.weight / torch.sqrt(self.running_moment + self.eps), self.bias

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, keep={self.keep}, eps={self.eps}, channel_dim={self.channel_dim}"


def power_norm(channels: int, *, layout: str = "channels-first", groups: int = 1, warmup: int = 10_000) -> nn.Module:
    """PowerNorm. Errors: UserError unless `groups` divides the channels and warmup >= 0."""
    dim = channel_dim(channels, layout)
    if warmup < 0:
        raise UserError(warmup, "a number of warm-up batches, 0 or more")
    return PowerNorm(channels, divides(groups, channels, "groups"), warmup, channel_dim=dim)


def power_norm_v(channels: int, *, layout: str = "channels-first", groups: int = 1) -> nn.Module:
    """PN-V. Errors: UserError unless `groups` divides the channels."""
    dim = channel_dim(channels, layout)
    return PowerNormV(channels, divides(groups, channels, "groups"), channel_dim=dim)


POWER = "Shen et al., PowerNorm: Rethinking Batch Normalization in Transformers (ICML 2020, arXiv 2003.07845)"
PRIMITIVES: tuple[Primitive, ...] = (
    Primitive(
        "power-norm",
        "normalisation",
        "x' / sqrt(psi + eps) * weight + bias, x' = x / sqrt(mean_C(x^2) + eps), psi the running mean of x'^2",
        f"{POWER} and sIncerass/powernorm mask_powernorm.py: eps 1e-5, averages .9, warm-up 10,000, one group",
        power_norm,
        parameters="weight [C] 1, bias [C] 0",
        needs=("running-statistics", "batch"),
    ),
    Primitive(
        "power-norm-v",
        "normalisation",
        "x' / sqrt(mean_BHW(x'^2) + eps) * weight + bias, x' = x / sqrt(mean_C(x^2) + eps)",
        f"{POWER}: PN-V; that evaluation uses a running mean and that the scaling by group stays is recollection",
        power_norm_v,
        parameters="weight [C] 1, bias [C] 0",
        needs=("running-statistics", "batch"),
    ),
)
