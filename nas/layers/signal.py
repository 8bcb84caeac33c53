"""Signal propagation: what a layer does to variances, gradients and differences in a deep random residual network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from search_spaces.common.errors import UserError

BLOCKS = 10
LOWEST, HIGHEST = 1e-3, 1e3  # of every ratio
HIGHEST_COSINE = 0.999


@dataclass(frozen=True)
class Signal:
    """What was measured, block by block.

    variance_ratios: variance of a block's output over that of its input. branch_ratios: of its branch's output over
    that of its input. gradient_ratio: norm of the loss's gradient with respect to the first block's input over that of
    the last block's. cosine: between what two inputs have become after all blocks, about 0 before (mean over pairs, of
    deviations from each sample's mean). reason: None if the layer is kept, else `no_signal`; detail says which limit.
    """

    reason: str | None
    detail: str
    variance_ratios: tuple[float, ...]
    branch_ratios: tuple[float, ...]
    gradient_ratio: float
    cosine: float


def signal(
    layer: Callable[[int], nn.Module],
    *,
    generator: torch.Generator,
    blocks: int = BLOCKS,
    channels: int = 16,
    batch: int = 8,
    size: int = 8,
    layout: str = "channels-first",
) -> Signal:
    """Send noise through `blocks` residual blocks x + mix(layer(x)) and a gradient back.

    layer: channels -> module. mix: a 3x3 convolution (for `tokens` a linear map) with He initialisation. Inputs are
    standard normal [batch, channels, size, size], or [batch, size * size, channels]. A layer is rejected when a ratio
    leaves [1e-3, 1e3], the cosine exceeds .999, or a value is not finite. Errors: UserError for fewer than 2 blocks
    or samples.
    """
    if blocks < 2 or batch < 2:
        raise UserError(min(blocks, batch), "at least two blocks and two samples")
    x = torch.randn(batch, channels, size, size, generator=generator)
    if layout == "tokens":
        x = x.flatten(2).transpose(1, 2)
    begin = x.requires_grad_()
    states = [begin]
    variance_ratios, branch_ratios = [], []
    for _ in range(blocks):
        branch = _mix(layer(channels).train()(x), layout, generator)
        before, after = x.detach().var().item(), (x + branch).detach().var().item()
        variance_ratios.append(after / before)
        branch_ratios.append(branch.detach().var().item() / before)
        x = x + branch
        states.append(x)
        if not (math.isfinite(after) and after > 0):
            break
    found = tuple(variance_ratios), tuple(branch_ratios)
    if len(states) <= blocks:
        return Signal("no_signal", f"variance {after} after block {len(states) - 1}", *found, math.nan, math.nan)
    direction = torch.randn(x.shape, generator=generator)
    first, last = torch.autograd.grad((x * direction).sum(), [states[0], states[-2]])
    gradient_ratio = (first.norm() / last.norm()).item()
    cosine = _cosine(x.detach())
    detail = _complaint(*found, gradient_ratio, cosine)
    return Signal("no_signal" if detail else None, detail, *found, gradient_ratio, cosine)


def _mix(x: Tensor, layout: str, generator: torch.Generator) -> Tensor:
    """A fresh random convolution or linear map with He initialisation (2015, arXiv 1502.01852)."""
    channels = x.shape[-1] if layout == "tokens" else x.shape[1]
    shape = (channels, channels) if layout == "tokens" else (channels, channels, 3, 3)
    weight = nn.init.kaiming_normal_(torch.empty(shape), nonlinearity="relu", generator=generator)
    return nn.functional.linear(x, weight) if layout == "tokens" else nn.functional.conv2d(x, weight, padding=1)


def _cosine(x: Tensor) -> float:
    flat = x.flatten(1)
    flat = nn.functional.normalize(flat - flat.mean(1, keepdim=True), dim=1)
    count = len(flat)
    return ((flat @ flat.T).sum().item() - count) / (count * (count - 1))


def _complaint(
    variance_ratios: tuple[float, ...], branch_ratios: tuple[float, ...], gradient_ratio: float, cosine: float
) -> str:
    named = [(f"variance ratio of block {k + 1}", v) for k, v in enumerate(variance_ratios)]
    named += [(f"variance ratio of the branch of block {k + 1}", v) for k, v in enumerate(branch_ratios)]
    for name, value in [*named, ("gradient ratio", gradient_ratio)]:
        if not LOWEST <= value <= HIGHEST:
            return f"{name} {value:.3g} outside [{LOWEST:g}, {HIGHEST:g}]"
    return "" if cosine <= HIGHEST_COSINE else f"cosine of two inputs {cosine:.5f} above {HIGHEST_COSINE}"
