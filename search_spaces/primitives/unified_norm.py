"""Unified Normalization: second moments averaged over the last batches, forward and backward, without outliers.

Training steps run outside of torch.compile (a graph break), keep statistics of one process, and count a forward pass
that is repeated (checkpointing) as another batch. Statistics are taken in float32 or wider.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from search_spaces.common.errors import UserError
from search_spaces.primitives.norm_layout import channel_dim
from search_spaces.primitives.primitive import Primitive


def geometric_mean(x: Tensor) -> Tensor:
    """Over dimension 0; 0 where a value is 0."""
    return x.log().mean(0).exp()


class UnifiedGradient(torch.autograd.Function):
    """weight x / sqrt(moment + eps) + bias, [..., C], with Unified Normalization's gradient.

    ratio [C]: what the gradient is multiplied with. owner: the module, whose `backward_average` turns mean(G z) of this
    batch into what takes its place; count and skip: of this batch.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, moment: Tensor, ratio: Tensor, state: tuple
    ) -> Tensor:
        ctx.state = state
        z = x / torch.sqrt(moment + state[0].eps)
        ctx.save_for_backward(z, weight, moment, ratio)
        return z * weight + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        z, weight, moment, ratio = ctx.saved_tensors
        owner, count, skip = ctx.state
        rest = tuple(range(z.dim() - 1))
        g = grad * weight * ratio
        average = owner.backward_average((g * z).mean(rest), count, skip)
        inner = (g - average * z) / torch.sqrt(moment + owner.eps)
        return inner, (grad * z * ratio).sum(rest), grad.sum(rest), None, None, None


class UnifiedNorm(nn.Module):
    """x / sqrt(sigma2 + eps) * weight + bias, sigma2 the geometric mean of the second moments of `window` batches.

    Training, batch number t from 1: sigma2 is the batch's own moment while t <= window or t < warmup, and where the
    filter finds an outlier: from batch `warmup` on, with filter_outliers, if in any channel the arithmetic mean of the
    window exceeds the geometric by more than window * var(sqrt of the window before this batch, all channels); the
    running value then takes the batch's place in the window. running <- momentum running + (1 - momentum) sigma2.
    Backward: G = weight grad r, r = sqrt((sigma2 + eps) / (running + eps)) with the running value before this batch,
    within [1/5, 5], and 1 up to batch max(1000, warmup) and for outliers; dx = (G - e z) / sqrt(sigma2 + eps), e the
    running average of the window's mean(G z). weight's gradient carries r, bias' does not.
    Evaluation: the running value. Parameters [C]: weight 1, bias 0; running_moment 1, all else 0.
    """

    running_moment: Tensor
    gradient_average: Tensor
    recent_moments: Tensor
    recent_gradients: Tensor
    batches: Tensor
    skipped: Tensor

    def __init__(
        self,
        channels: int,
        window: int = 4,
        warmup: int = 4000,
        filter_outliers: bool = True,
        momentum: float = 0.9,
        eps: float = 1e-5,
        channel_dim: int = -1,
    ):
        super().__init__()
        self.window, self.warmup, self.filter_outliers = window, warmup, filter_outliers
        self.momentum, self.eps, self.channel_dim = momentum, eps, channel_dim
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_moment", torch.ones(channels))
        self.register_buffer("gradient_average", torch.zeros(channels))
        self.register_buffer("recent_moments", torch.zeros(window, channels))
        self.register_buffer("recent_gradients", torch.zeros(window, channels))
        self.register_buffer("batches", torch.tensor(0))
        self.register_buffer("skipped", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, self.weight.dtype)).movedim(self.channel_dim, -1)
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
            batch = x.detach().square().mean(tuple(range(x.dim() - 1)))
            spread = self.recent_moments.sqrt().var()
            self.recent_moments[count % self.window] = batch.to(self.recent_moments.dtype)
            skip = self.window == 1
            if self.filter_outliers and count >= self.warmup:
                excess = self.recent_moments.mean(0) - geometric_mean(self.recent_moments)
                if bool((excess > spread * self.window).any()):
                    self.recent_moments[count % self.window] = self.running_moment
                    self.skipped.add_(1)
                    skip = True
            alone = skip or count <= self.window or count < self.warmup
            moment = batch if alone else geometric_mean(self.recent_moments)
            ratio = torch.sqrt((moment + self.eps) / (self.running_moment + self.eps)).clamp(0.2, 5)
            if skip or count <= max(1000, self.warmup):
                ratio = torch.ones_like(ratio)
            self.running_moment.lerp_(moment.to(self.running_moment.dtype), 1 - self.momentum)
        return UnifiedGradient.apply(x, self.weight, self.bias, moment, ratio, (self, count, skip))

    def backward_average(self, gradient: Tensor, count: int, skip: bool) -> Tensor:
        """What takes the place of mean(G z) in the gradient of batch `count`."""
        self.recent_gradients[count % self.window] = self.gradient_average if skip else gradient
        alone = skip or count <= self.window or count < self.warmup
        mean = gradient if alone else self.recent_gradients.mean(0)
        self.gradient_average.lerp_(mean.to(self.gradient_average.dtype), 1 - self.momentum)
        return mean if skip else self.gradient_average.clone()

    def reset_running_stats(self) -> None:
        """Averages and windows as they begin."""
        self.running_moment.fill_(1)
        for buffer in (self.gradient_average, self.recent_moments, self.recent_gradients, self.batches, self.skipped):
            buffer.zero_()

    def evaluation_affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), each [C]: what evaluation does to a channel."""
        return self.weight / torch.sqrt(self.running_moment + self.eps), self.bias

    def extra_repr(self) -> str:
        settings = f"window={self.window}, warmup={self.warmup}, filter_outliers={self.filter_outliers}"
        return f"{self.weight.numel()}, {settings}, channel_dim={self.channel_dim}"


def unified_norm(
    channels: int,
    *,
    layout: str = "channels-first",
    window: int = 4,
    warmup: int = 4000,
    filter_outliers: bool = True,
) -> nn.Module:
    """Unified Normalization. The authors filter outliers in vision and do not in language.

    Errors: UserError unless window >= 1 and warmup >= 0.
    """
    dim = channel_dim(channels, layout)
    if window < 1 or warmup < 0:
        raise UserError((window, warmup), "a window of at least one batch and no negative warm-up")
    return UnifiedNorm(channels, window, warmup, filter_outliers, channel_dim=dim)


PRIMITIVES: tuple[Primitive, ...] = (
    Primitive(
        "unified-norm",
        "normalisation",
        "x / sqrt(sigma2 + eps) * weight + bias, sigma2 the geometric mean of mean_BHW(x^2) over the last 4 batches",
        "Yang et al., Unified Normalization for Accelerating and Stabilizing Transformers (ACM MM 2022, arXiv "
        "2208.01313) and hikvision-research/Unified-Normalization: eps 1e-5, momentum .9, warm-up 4,000",
        unified_norm,
        parameters="weight [C] 1, bias [C] 0",
        needs=("running-statistics", "batch"),
    ),
)
