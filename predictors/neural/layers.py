"""Stacked layers: S independent networks trained together, every parameter with a leading dimension of S.

Activations are [S, B, ..., d]; no value ever crosses from one member to another, and member k of a stack equals the
same network trained alone with the same generator, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Generators = Sequence[torch.Generator]


class Linear(nn.Module):
    """x [S, ..., inputs] -> [S, ..., outputs]; weight [S, inputs, outputs], bias [S, 1, outputs].

    init: `torch` (uniform within 1 / sqrt(inputs), weights and biases) or `xavier` (uniform, biases zero).
    """

    def __init__(self, stack: int, inputs: int, outputs: int, *, bias: bool = True, init: str = "torch"):
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.empty(stack, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(stack, 1, outputs)) if bias else None

    def reset(self, generators: Generators) -> None:
        inputs, outputs = self.weight.shape[1:]
        bound = inputs**-0.5 if self.init == "torch" else (6 / (inputs + outputs)) ** 0.5
        _uniform(self.weight, bound, generators)
        if self.bias is not None and self.init == "torch":
            _uniform(self.bias, bound, generators)

    def forward(self, x: Tensor) -> Tensor:
        return _affine(x, self.weight, self.bias)

    def of_sums(self, counts: Tensor, rows: Tensor) -> Tensor:
        """This layer on sums of a few distinct rows [S, C, d], which go through the weights once however often they
        occur: counts [S, ..., k C] -> [S, ..., outputs], for inputs made of k = inputs / d such sums side by side."""
        weights = self.weight.split(rows.shape[2], 1)
        return _affine(counts, torch.cat([torch.bmm(rows, weight) for weight in weights], 1), self.bias)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    result = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias, rows, weight)
    return result.view(*x.shape[:-1], -1)


class Embedding(nn.Module):
    """ids int64 [S, ...] in 0..count (`count` itself is padding) -> [S, ..., width]; Xavier-uniform rows."""

    def __init__(self, stack: int, count: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(stack, count + 1, width))

    def reset(self, generators: Generators) -> None:
        _uniform(self.weight, (6 / sum(self.weight.shape[1:])) ** 0.5, generators)

    def forward(self, ids: Tensor) -> Tensor:
        stack, rows, width = self.weight.shape
        start = torch.arange(0, stack * rows, rows, device=ids.device).view(-1, *[1] * (ids.dim() - 1))
        return F.embedding(ids + start, self.weight.view(stack * rows, width))


class LayerNorm(nn.Module):
    """Normalises the last dimension; weight and bias [S, width]."""

    def __init__(self, stack: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(stack, width))
        self.bias = nn.Parameter(torch.zeros(stack, width))

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])
        return torch.addcmul(self.bias.view(shape), F.layer_norm(x, x.shape[-1:]), self.weight.view(shape))


class PReLU(nn.Module):
    """One slope per member, .25 at the start (He, Zhang, Ren and Sun 2015)."""

    def __init__(self, stack: int):
        super().__init__()
        self.slope = nn.Parameter(torch.full((stack,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * self.slope.view(-1, *[1] * (x.dim() - 1)))


class MaskedBatchNorm(nn.Module):
    """Batch normalisation of x [S, B, n, d] over the real nodes of each member, mask float [S, B, n].

    As nn.BatchNorm1d on the real nodes alone: biased variance in training, running statistics (momentum .1, unbiased
    variance) for inference.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, stack: int, width: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(stack, 1, 1, width))
        self.bias = nn.Parameter(torch.zeros(stack, 1, 1, width))
        self.register_buffer("mean", torch.zeros(stack, 1, 1, width))
        self.register_buffer("variance", torch.ones(stack, 1, 1, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if not self.training:
            scale = self.weight * (self.variance + self.eps).rsqrt()
            return torch.addcmul(self.bias - self.mean * scale, x, scale)
        stack, width = x.shape[0], x.shape[-1]
        real = mask.reshape(stack, 1, -1).to(x.dtype)
        count = real.sum(2, keepdim=True).clamp(min=1)
        result, mean, variance = _Normalise.apply(
            x.reshape(stack, -1, width), real, count, self.weight[:, 0], self.bias[:, 0], self.eps
        )
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.mean.lerp_(mean.unsqueeze(2), self.momentum)
            self.variance.lerp_(unbiased.unsqueeze(2), self.momentum)
        return result.view_as(x)


class _Normalise(torch.autograd.Function):
    """Batch norm of rows x [S, M, d] by the mean and variance of the real ones, real [S, 1, M] (1 or 0), count
    [S, 1, 1]; gives the statistics too. Its backward takes the fewest passes over x, which decide the time."""

    @staticmethod
    def forward(ctx, x, real, count, weight, bias, eps):
        mean = torch.bmm(real, x) / count
        centred = x - mean
        variance = torch.bmm(real, centred.square()) / count
        root = (variance + eps).rsqrt()
        ctx.save_for_backward(centred, real, count, weight, root)
        ctx.mark_non_differentiable(mean, variance)
        return torch.addcmul(bias, centred, weight * root), mean, variance

    @staticmethod
    def backward(ctx, grad, *_):
        centred, real, count, weight, root = ctx.saved_tensors
        ones = torch.ones_like(real)
        total, along = torch.bmm(ones, grad), torch.bmm(ones, grad * centred)
        scale = weight * root
        shift = torch.addcmul(scale * total, centred, scale * root.square() * along)
        back = torch.addcmul(grad * scale, shift, real.transpose(1, 2) / count, value=-1)
        return back, None, None, along * root, total, None


class Dropout(nn.Module):
    """Dropout of share p whose noise each member draws from its own generator (see `use_generators`)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.generators: Generators | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.generators is None:
            raise RuntimeError("dropout in training needs generators: call use_generators first")
        kept = torch.empty_like(x)
        for member, generator in zip(kept, self.generators, strict=True):
            member.bernoulli_(1 - self.p, generator=generator)
        return x * kept.div_(1 - self.p)


def initialize(model: nn.Module, generators: Generators) -> None:
    """Draw member k's parameters from generator k, in the order of the modules."""
    for module in model.modules():
        if isinstance(module, Linear | Embedding):
            module.reset(generators)


def use_generators(model: nn.Module, generators: Generators) -> None:
    """Draw all dropout noise of member k from generator k from now on (generators of the model's device)."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.generators = generators


@torch.no_grad()
def _uniform(parameter: Tensor, bound: float, generators: Generators) -> None:
    # Drawn on the CPU whatever the device, so that a seed means the same network everywhere.
    for member, generator in zip(parameter, generators, strict=True):
        member.copy_(torch.empty(member.shape).uniform_(-bound, bound, generator=generator))
