"""What models call: normalisations with activation and residual, gated units, PolyNorm.

Each is one operator of `operators`: Triton on CUDA, eager elsewhere and for float64. While a model is exported it is
torch's own functions instead, so that other runtimes can read it. The result has the type of x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import exporting
from kernels.handwritten import operators  # registers them
from kernels.handwritten.activations import ACTIVATIONS, activation
from search_spaces.common.errors import UserError

_operators = torch.ops.nasforge


def _check(x: Tensor, dimensions: int, **parameters: tuple[Tensor | None, int]) -> None:
    if not x.is_floating_point() or x.is_quantized or x.layout != torch.strided:
        raise UserError(f"{x.dtype} {x.layout}", "a dense tensor of a floating type", "x.float()")
    if x.dim() < dimensions:
        raise UserError(list(x.shape), f"a tensor of at least {dimensions} dimensions")
    for name, (parameter, size) in parameters.items():
        if parameter is not None and tuple(parameter.shape) != (size,):
            raise UserError(f"{name} {list(parameter.shape)}", f"[{size}], one for each channel of x", f"[{size}]")


def _same_shape(name: str, other: Tensor | None, x: Tensor) -> Tensor | None:
    """`other` in the type of x. Errors: UserError for another shape."""
    if other is None:
        return None
    if other.shape != x.shape:
        raise UserError(f"{name} {list(other.shape)}", "the shape of x", str(list(x.shape)))
    return other.to(x.dtype)


def _row_norm(x, weight, bias, residual, centred, eps, act, alpha):
    act, alpha = activation(act, alpha)
    _check(x, 1, weight=(weight, x.shape[-1]), bias=(bias, x.shape[-1]))
    residual = _same_shape("residual", residual, x)
    if exporting():
        h = x if residual is None else x + residual
        if centred:
            z = F.layer_norm(h, h.shape[-1:], weight, bias, eps)
        else:
            z = F.rms_norm(h, h.shape[-1:], weight, eps)
            z = z if bias is None else z + bias
        y = ACTIVATIONS[act].forward(z, alpha).to(x.dtype)
    else:
        y, h, _, _ = _operators.row_norm(x, residual, weight, bias, centred, eps, act, alpha)
    return y if residual is None else (y, h)


def layer_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "identity",
    alpha: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """act(LayerNorm(x + residual)) over the last dimension of [..., C]; weight and bias [C].

    With a residual the sum is returned too, (y, sum), as pre-norm blocks need it. act, alpha: see `activations`.
    Errors: UserError for tensors that are not dense and floating, wrong sizes, unknown activations.
    Source: Ba, Kiros and Hinton, 2016, arXiv 1607.06450, equation 3.
    """
    return _row_norm(x, weight, bias, residual, True, eps, act, alpha)


def rms_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    act: str = "identity",
    alpha: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm_act` without the mean. Source: Zhang and Sennrich, NeurIPS 2019, arXiv 1910.07467, equation 4."""
    return _row_norm(x, weight, bias, residual, False, eps, act, alpha)


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "identity",
    alpha: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(BatchNorm(x) + residual) of [N, C, ...]; the arguments of F.batch_norm.

    In training, and where no running statistics are given, statistics are the batch's; in training the running ones
    are then updated in place, with the unbiased variance (twice if a checkpoint computes the layer again, as in torch).
    Under data parallelism they are each process's own.
    Errors: as `layer_norm_act`; UserError in training on a single value per channel, or on an empty batch.
    Source: Ioffe and Szegedy, ICML 2015, arXiv 1502.03167, algorithms 1 and 2.
    """
    act, alpha = activation(act, alpha)
    _check(x, 2, **{name: (value, x.shape[1]) for name, value in _named(weight, bias, running_mean, running_var)})
    residual = _same_shape("residual", residual, x)
    of_batch = training or running_mean is None or running_var is None
    count = x.numel() // max(x.shape[1], 1)
    if training and count <= 1:
        raise UserError(list(x.shape), "more than one value per channel in training")
    if exporting():
        z = F.batch_norm(x, running_mean, running_var, weight, bias, of_batch, momentum, eps)
        z = z if residual is None else z + residual
        return ACTIVATIONS[act].forward(z, alpha)
    given = (None, None) if of_batch else (running_mean, running_var)
    y, mean, var = _operators.plane_norm(x, residual, weight, bias, *given, 0, eps, act, alpha)
    if training and running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    return y


def _named(weight, bias, running_mean, running_var):
    names = ("weight", "bias", "running_mean", "running_var")
    return zip(names, (weight, bias, running_mean, running_var), strict=True)


def group_norm_act(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str = "identity",
    alpha: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(GroupNorm(x) + residual) of [N, C, ...]; groups = C is InstanceNorm, 1 LayerNorm of the whole sample.

    Errors: as `layer_norm_act`; UserError if groups do not divide the channels.
    Source: Wu and He, ECCV 2018, arXiv 1803.08494, equation 7.
    """
    act, alpha = activation(act, alpha)
    _check(x, 2, weight=(weight, x.shape[1]), bias=(bias, x.shape[1]))
    if groups < 1 or x.shape[1] % groups:
        fitting = max(count for count in range(1, max(groups, 1) + 1) if x.shape[1] % count == 0)
        raise UserError(groups, f"a number of groups that divides {x.shape[1]} channels", str(fitting))
    residual = _same_shape("residual", residual, x)
    if exporting():
        z = F.group_norm(x, groups, weight, bias, eps)
        z = z if residual is None else z + residual
        return ACTIVATIONS[act].forward(z, alpha)
    return _operators.plane_norm(x, residual, weight, bias, None, None, groups, eps, act, alpha)[0]


def gated(
    x: Tensor, value: Tensor | None = None, *, act: str = "silu", alpha: float | None = None, dim: int = -1
) -> Tensor:
    """act(gate) * value: SwiGLU with `silu`, GEGLU with `gelu`, ReGLU, bilinear, PowLU with `powlu-gate`.

    x is the gate if a value of its shape is given; else its first half along `dim` is the gate, its second the value,
    and both are used in place. Errors: as `layer_norm_act`; UserError for an odd size along `dim`.
    """
    act, alpha = activation(act, alpha)
    _check(x, 1)
    value = _same_shape("value", value, x)
    dim = dim % x.dim()
    if value is None and x.shape[dim] % 2:
        raise UserError(x.shape[dim], "an even size, gate and value", str(x.shape[dim] + 1))
    if exporting():
        gate, value = x.chunk(2, dim) if value is None else (x, value)
        return ACTIVATIONS[act].forward(gate, alpha) * value
    return _operators.gated(x, value, dim, act, alpha)


def swiglu(x: Tensor, value: Tensor | None = None, *, dim: int = -1) -> Tensor:
    """silu(gate) * value; see `gated`. Source: Shazeer, 2020, arXiv 2002.05202, equation 5."""
    return gated(x, value, act="silu", dim=dim)


def powlu_glu(x: Tensor, value: Tensor | None = None, *, m: float = 3.0, dim: int = -1) -> Tensor:
    """powlu_gate(gate) * value; see `gated` and search_spaces.primitives.gates.powlu_gate."""
    return gated(x, value, act="powlu-gate", alpha=m, dim=dim)


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, *, value: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """(weight[0] N(x^3) + weight[1] N(x^2) + weight[2] N(x) + bias) * value, N(u) = u / sqrt(mean(u^2) + eps).

    The mean runs over the last dimension of x [..., C]; weight [3], bias [1]; without a value its factor is 1.
    Errors: as `layer_norm_act`. Source: Zhuo et al., 2024, arXiv 2411.03884, in the order of the released code.
    """
    _check(x, 1, weight=(weight, 3), bias=(bias, 1))
    value = _same_shape("value", value, x)
    if exporting():
        powers = torch.stack((x * x * x, x * x, x))
        powers = powers * torch.rsqrt(powers.square().mean(-1, keepdim=True) + eps)
        y = weight[0] * powers[0] + weight[1] * powers[1] + weight[2] * powers[2] + bias
        return y.to(x.dtype) if value is None else y.to(x.dtype) * value
    return _operators.poly_norm(x, value, weight, bias, eps)[0]


__all__ = [
    "batch_norm_act",
    "gated",
    "group_norm_act",
    "layer_norm_act",
    "operators",
    "poly_norm",
    "powlu_glu",
    "rms_norm_act",
    "swiglu",
]
