"""Candidates whose mixing weight goes into their last normalisation, so that no extra product is computed or kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nas.supernet.pooling import average_pool
from search_spaces.cells.darts_network import DepthwiseBlock, FactorizedReduce
from search_spaces.cells.operations import ActConvNorm

# Convolutions of so many channels at most are joined. Forward and backward of 1x1 and 3x3 at batch 64 together against
# one after the other: 1.3 to 1.6 times faster with 2 to 8 channels, as fast with 16, slower with 16 on 32 x 32 images.
JOINED_CHANNELS = 8


class WeightedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d times `factor`, a scalar tensor or None for 1; the product is one with its own weight and bias.

    Multiplying the output instead would keep that output for backward and pass over it three times more.
    """

    factor: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.factor is None:
            return super().forward(x)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # torch's cumulative average
            momentum = 1.0 / max(float(self.num_batches_tracked or 0), 1.0)
        own = self.training or self.running_mean is None
        tracked = not self.training or self.track_running_stats
        # In one piece: torch's CPU kernel for channels-last images reads a weight as if it were contiguous.
        weight = self.factor.to(x.dtype).expand(self.num_features).contiguous()
        return F.batch_norm(
            x,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            weight if self.weight is None else self.weight * weight,
            None if self.bias is None else self.bias * weight,
            own,
            momentum,
            self.eps,
        )

    @staticmethod
    def like(module: nn.BatchNorm2d) -> WeightedBatchNorm2d:
        """The same normalisation, with the same parameters and buffers."""
        made = WeightedBatchNorm2d(module.num_features, module.eps, module.momentum, affine=False)
        made.affine, made.track_running_stats = module.affine, module.track_running_stats
        made._parameters, made._buffers = module._parameters, module._buffers
        return made.train(module.training)


def prepare(module: nn.Module) -> nn.Module:
    """The candidate with its last BatchNorm2d made a WeightedBatchNorm2d; parameters, buffers and names stay."""
    owner, name = _last(module)
    if owner is not None and type(owner._modules[name]) is nn.BatchNorm2d:
        owner._modules[name] = WeightedBatchNorm2d.like(owner._modules[name])  # type: ignore[arg-type]
    return module


def times(module: nn.Module, factor: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """factor * module(*inputs). factor: a scalar tensor; gradients reach it."""
    owner, name = _last(module)
    last = None if owner is None else owner._modules[name]
    if not isinstance(last, WeightedBatchNorm2d):
        return factor * _run(module, *inputs)
    last.factor = factor
    try:
        return _run(module, *inputs)
    finally:
        last.factor = None


def products(
    modules: Sequence[nn.Module],
    factors: Sequence[torch.Tensor],
    *inputs: torch.Tensor,
    narrow: int = JOINED_CHANNELS,
) -> list[torch.Tensor]:
    """Tensors that add up to the sum of factor * module(*inputs); no more than there are modules.

    Narrow convolutions on a CPU are one convolution: torch's kernels work on blocks of channels, so few of them cost as
    much as a block, and their activation is computed once (`benchmarks.speed.speed_supernet`). narrow: with at most so
    many channels, 0 for none.
    """
    together = _joinable(modules, narrow, *inputs)
    found = [times(m, f, *inputs) for k, (m, f) in enumerate(zip(modules, factors)) if k not in together]
    if together:
        found.append(_joint([modules[k] for k in together], [factors[k] for k in together], *inputs))  # type: ignore[misc]
    return found


_PLAIN_ACTIVATIONS = (nn.ReLU, nn.Identity, nn.SiLU, nn.GELU, nn.ELU, nn.LeakyReLU, nn.Hardswish, nn.Mish, nn.Tanh)


def _joinable(modules: Sequence[nn.Module], narrow: int, *inputs: torch.Tensor) -> list[int]:
    """The places of the modules that `_joint` can compute together; none or at least two."""
    if len(inputs) != 1 or inputs[0].device.type != "cpu":
        return []
    found: list[int] = []
    for place, module in enumerate(modules):
        known = type(module) is ActConvNorm and _is_narrow(module, narrow)
        if known and (not found or _alike(module, modules[found[0]])):  # type: ignore[arg-type]
            found.append(place)
    return found if len(found) > 1 else []


def _is_narrow(module: ActConvNorm, narrow: int) -> bool:
    """Whether it is activation, convolution and normalisation as known here, without hooks, of few channels."""
    act, conv, norm = module.act, module.conv, module.norm
    return (
        type(norm) is WeightedBatchNorm2d
        and norm.momentum is not None
        and conv.out_channels <= narrow
        and type(conv) is nn.Conv2d
        and type(act) in _PLAIN_ACTIVATIONS
        and not getattr(act, "inplace", False)
        and conv.bias is None
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and all(size % 2 and padding == size // 2 for size, padding in zip(conv.kernel_size, conv.padding))
        and not any(_hooked(part) for part in (module, act, conv, norm))
    )


def _alike(module: ActConvNorm, other: ActConvNorm) -> bool:
    norms = [
        (n.eps, n.momentum, n.training, n.weight is None, n.bias is None, n.running_mean is None, n.track_running_stats)
        for n in (module.norm, other.norm)
    ]
    convs = [(c.in_channels, c.out_channels, c.stride) for c in (module.conv, other.conv)]
    same = type(module.act) is type(other.act) and module.act.extra_repr() == other.act.extra_repr()
    return same and norms[0] == norms[1] and convs[0] == convs[1]


def _joint(modules: Sequence[ActConvNorm], factors: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The sum of factor * module(x) by one convolution and one normalisation; smaller kernels get a rim of zeros."""
    first = modules[0]
    norms: list[Any] = [module.norm for module in modules]  # of the class that `_is_narrow` asks for
    height, width = (max(m.conv.kernel_size[axis] for m in modules) for axis in (0, 1))
    kernels = []
    for module in modules:
        rows, columns = ((size - own) // 2 for size, own in zip((height, width), module.conv.kernel_size))
        weight = module.conv.weight
        kernels.append(F.pad(weight, (columns, columns, rows, rows)) if rows or columns else weight)
    y = F.conv2d(first.act(x), torch.cat(kernels), None, first.conv.stride, (height // 2, width // 2))
    scale = torch.stack(list(factors)).to(y.dtype).repeat_interleave(first.conv.out_channels)
    norm = norms[0]
    tracked = not norm.training or norm.track_running_stats
    means = torch.cat([n.running_mean for n in norms]) if tracked and norm.running_mean is not None else None
    variances = torch.cat([n.running_var for n in norms]) if means is not None else None
    y = F.batch_norm(
        y,
        means,
        variances,
        scale if norm.weight is None else scale * torch.cat([n.weight for n in norms]),
        None if norm.bias is None else scale * torch.cat([n.bias for n in norms]),
        norm.training or norm.running_mean is None,
        norm.momentum,
        norm.eps,
    )
    if norm.training and means is not None and variances is not None:
        for n, mean, variance in zip(norms, means.chunk(len(norms)), variances.chunk(len(norms))):
            # As torch's own: a graph of before, which does not read them in training, still has its backward pass.
            n.running_mean.data.copy_(mean)
            n.running_var.data.copy_(variance)
    if norm.training:
        for n in norms:
            if n.num_batches_tracked is not None:
                n.num_batches_tracked.add_(1)
    return y.unflatten(1, (len(modules), -1)).sum(1)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _run(module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    hooked = _hooked(module)
    if type(module) is nn.AvgPool2d and not hooked:
        return average_pool(module, *inputs)
    if type(module) is nn.Sequential and not hooked:
        for part in module:
            inputs = (_run(part, *inputs),)
        return inputs[0]
    return module(*inputs)


def _last(module: nn.Module) -> tuple[nn.Module | None, str]:
    """The owner and the name in it of the part whose output is the module's; (None, "") where that is not known."""
    if isinstance(module, ActConvNorm | DepthwiseBlock | FactorizedReduce):
        return module, "norm"
    if type(module) is nn.Sequential and len(module):
        inner = module[-1]
        owner, name = _last(inner)
        return (owner, name) if owner is not None else (module, str(len(module) - 1))
    return None, ""
