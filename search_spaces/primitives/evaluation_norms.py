"""Evaluation modes of trained BatchNorms under a shift of the data: alpha-BN and UnMix-TNS, and the way back."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from search_spaces.common.errors import UserError
from search_spaces.primitives.norm_layout import channel_dim
from search_spaces.primitives.primitive import Primitive


class AlphaBN(nn.Module):
    """A BatchNorm [B, C, ...] that evaluates with (1 - alpha) running + alpha batch mean and (unbiased) variance.

    source: the BatchNorm, whose parameters and running values are shared and never changed by evaluation; training is
    that of `source`.
    """

    def __init__(self, source: _BatchNorm, alpha: float = 0.1):
        super().__init__()
        self.source, self.alpha = source, alpha

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.source(x)
        rest = [d for d in range(x.dim()) if d != 1]
        y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = y.numel() // y.shape[1]
        variance, mean = torch.var_mean(y, rest, correction=1 if count > 1 else 0)
        mean = torch.lerp(self.source.get_buffer("running_mean").to(y.dtype), mean, self.alpha)
        variance = torch.lerp(self.source.get_buffer("running_var").to(y.dtype), variance, self.alpha)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        y = (y - mean.view(shape)) * torch.rsqrt(variance + self.source.eps).view(shape)
        if self.source.weight is not None:
            y = y * self.source.weight.view(shape) + self.source.bias.view(shape)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class UnMixTNS(nn.Module):
    """A BatchNorm2d or 3d whose evaluation mixes each sample's statistics with K components that follow the data.

    p_k = softmax_k(cos(mean, mu_k) / .07); the sample is normalised with the mean of m_k = (1 - p_k) mu_k + p_k mean
    over k and the variance of that mixture; then mu_k and v_k move by `rate` times the batch mean of p_k (sample - k).
    Components begin around the running values: mu_k = mean + sqrt(c K / (K - 1)) std N(0, 1), v_k = (1 - c) var, with
    c = .5 (0 for one component). rate = 1 - (1 - momentum)^(batch_size / 64) with the momentum of `source`.
    Evaluation changes the components (buffers means, variances [K, C]), never `source`; training is that of `source`.
    A BatchNorm of inputs [B, C] has no statistics of a sample: it stays as it is.

    Source: UnMix-TNS (ICLR 2024) and its published code.
    """

    means: Tensor
    variances: Tensor

    def __init__(
        self, source: _BatchNorm, components: int = 16, batch_size: int = 64, generator: torch.Generator | None = None
    ):
        super().__init__()
        self.source = source
        mean, variance = source.get_buffer("running_mean"), source.get_buffer("running_var")
        momentum = 0.1 if source.momentum is None else source.momentum
        self.rate = 1 - (1 - momentum) ** (batch_size / 64)
        spread = 0.5 if components > 1 else 0.0
        noise = torch.randn(components, mean.numel(), generator=generator).to(mean)
        scale = math.sqrt(spread * components / (components - 1)) if components > 1 else 0.0
        self.register_buffer("means", mean + scale * variance.sqrt() * noise)
        self.register_buffer("variances", ((1 - spread) * variance).repeat(components, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training or x.dim() == 2:
            return self.source(x)
        y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        variance, mean = torch.var_mean(y.flatten(2), 2, correction=0)  # [B, C]
        direction = nn.functional.normalize(mean.detach(), dim=1)
        similarity = direction @ nn.functional.normalize(self.means.to(y.dtype), dim=1).t()
        p = torch.softmax(similarity / 0.07, 1).unsqueeze(2)  # [B, K, 1]
        towards_mean = mean.unsqueeze(1) - self.means  # [B, K, C]
        towards_variance = variance.unsqueeze(1) - self.variances
        mixed = self.means + p * towards_mean
        centre = mixed.mean(1)
        total = (self.variances + p * towards_variance).mean(1) + mixed.var(1, correction=0)
        with torch.no_grad():
            self.means = self.means + self.rate * (p * towards_mean).mean(0).to(self.means.dtype)
            self.variances = self.variances + self.rate * (p * towards_variance).mean(0).to(self.variances.dtype)
        shape = centre.shape + (1,) * (x.dim() - 2)
        y = (y - centre.view(shape)) * torch.rsqrt(total + self.source.eps).view(shape)
        if self.source.weight is not None:
            y = y * self.source.weight.view(shape[1:]) + self.source.bias.view(shape[1:])
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"components={self.means.shape[0]}, rate={self.rate:.6g}"


def replace_batch_norms(model: nn.Module, make: Callable[[_BatchNorm], nn.Module]) -> dict[str, _BatchNorm]:
    """Put `make(norm)` in the place of every BatchNorm with running statistics; returns those by name.

    Errors: UserError if there is none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not found:
        raise UserError(type(model).__name__, "a model with a BatchNorm that has running statistics")
    if "" in found:
        raise UserError(type(model).__name__, "a model that contains its BatchNorms; this one is a BatchNorm")
    for name, module in found.items():
        _put(model, name, make(module).train(module.training))
    return found


def restore_batch_norms(model: nn.Module, originals: dict[str, _BatchNorm]) -> None:
    """Put back what `replace_batch_norms` returned."""
    for name, module in originals.items():
        module.train(model.get_submodule(name).training)
        _put(model, name, module)


@contextlib.contextmanager
def alpha_bn(model: nn.Module, alpha: float = 0.1) -> Iterator[nn.Module]:
    """While it lasts, every BatchNorm of the model evaluates as AlphaBN. Errors: UserError unless 0 <= alpha <= 1."""
    if not 0 <= alpha <= 1:
        raise UserError(alpha, "a share of the batch statistics between 0 and 1")
    originals = replace_batch_norms(model, lambda norm: AlphaBN(norm, alpha))
    try:
        yield model
    finally:
        restore_batch_norms(model, originals)


@contextlib.contextmanager
def unmix_tns(
    model: nn.Module, components: int = 16, batch_size: int = 64, generator: torch.Generator | None = None
) -> Iterator[nn.Module]:
    """While it lasts, every BatchNorm of the model evaluates as UnMixTNS. Errors: UserError unless components >= 1."""
    if components < 1 or batch_size < 1:
        raise UserError((components, batch_size), "at least one component and one sample")
    originals = replace_batch_norms(model, lambda norm: UnMixTNS(norm, components, batch_size, generator))
    try:
        yield model
    finally:
        restore_batch_norms(model, originals)


def alpha_batch_norm(channels: int, *, layout: str = "channels-first", alpha: float = 0.1) -> nn.Module:
    """A new BatchNorm2d that evaluates as AlphaBN."""
    channel_dim(channels, layout, ("channels-first",))
    return AlphaBN(nn.BatchNorm2d(channels), alpha)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


PRIMITIVES: tuple[Primitive, ...] = (
    Primitive(
        "alpha-bn",
        "normalisation",
        "BatchNorm; evaluation: mean and variance (1 - alpha) running + alpha batch, alpha .1",
        "You, Li and Zhao, Test-time batch statistics calibration for covariate shift (2021, arXiv 2110.04065), as "
        "in the benchmark code of UnMix-TNS (ICLR 2024)",
        alpha_batch_norm,
        ("channels-first",),
        parameters="weight [C] 1, bias [C] 0",
        needs=("images", "running-statistics", "batch"),
    ),
)
