"""Candidates whose mixing weight goes into their last normalisation, so that no extra product is computed or kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nas.supernet.pooling import average_pool
from search_spaces.cells.darts_network import DepthwiseBlock, FactorizedReduce
from search_spaces.cells.operations import ActConvNorm


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


def _run(module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
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
