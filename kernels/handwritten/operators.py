"""The handwritten kernels as operators `nasforge::<name>` with fake kernels and autograd formulas.

Each runs Triton on CUDA and the eager functions elsewhere, inside the operator: `torch.compile`, `torch.export`,
checkpointing and dynamic shapes see one opaque node either way. Types: out as in; parameters of any type; there is no
autocast rule, so autocast changes nothing (torch's own layer_norm and group_norm go to float32). A second derivative
raises NotImplementedError: gradient penalties use torch's own layers. Results never alias each other or an input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from kernels.handwritten import gates, planes, rows
from kernels.handwritten.launch import LARGEST_SAMPLE, is_channels_last, strides_of

_library = Library("nasforge", "FRAGMENT")
_NORM = "float eps, str act, float alpha"


def _define(schema: str, run: Callable, fake: Callable) -> None:
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    register_fake(f"nasforge::{name}", fake, lib=_library)
    if name.endswith("_backward"):
        register_autograd(f"nasforge::{name}", _no_second_derivative, lib=_library)


def _no_second_derivative(ctx, *gradients):
    raise NotImplementedError("the second derivative of a handwritten layer; use torch's own layers for it")


def _wide_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _statistics(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=_wide_type(x))


def _like(x: Tensor) -> Tensor:
    return x.new_empty_strided(x.shape, strides_of(x))


def _plain(x: Tensor) -> Tensor:
    """A contiguous result for `x`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _as(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else gradient.to(parameter.dtype)


# Norms of rows.


def _flat(x: Tensor) -> Tensor:
    return x.contiguous().view(math.prod(x.shape[:-1]), x.shape[-1])


def _row_norm(x, residual, weight, bias, centred, eps, act, alpha):
    other = None if residual is None else _flat(residual.to(x.dtype))
    y, h, mean, rstd = rows.forward(_flat(x), other, weight, bias, centred, eps, act, alpha)
    return y.view(x.shape), h if residual is None else h.view(x.shape), mean, rstd


def _row_norm_fake(x, residual, weight, bias, centred, eps, act, alpha):
    count = math.prod(x.shape[:-1])
    h = x.new_empty(0) if residual is None else _plain(x)
    return _plain(x), h, _statistics(x, count if centred else 0), _statistics(x, count)


def _row_norm_backward(dy, dh, h, weight, bias, mean, rstd, centred, act, alpha):
    dy, other = _flat(dy.to(h.dtype)), None if dh is None else _flat(dh.to(h.dtype))
    dx, dweight, dbias = rows.backward(dy, other, _flat(h), weight, bias, mean, rstd, centred, act, alpha)
    return dx.view(h.shape), dweight, dbias


def _row_norm_backward_fake(dy, dh, h, weight, bias, mean, rstd, centred, act, alpha):
    return _plain(h), _statistics(h, h.shape[-1]), _statistics(h, h.shape[-1])


_define(
    f"row_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, bool centred, {_NORM})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _row_norm,
    _row_norm_fake,
)
_define(
    "row_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " bool centred, str act, float alpha) -> (Tensor, Tensor, Tensor)",
    _row_norm_backward,
    _row_norm_backward_fake,
)


def _row_norm_setup(ctx, inputs, output):
    x, residual, weight, bias, ctx.centred, _, ctx.act, ctx.alpha = inputs
    _, h, mean, rstd = output
    ctx.residual = residual is not None
    ctx.save_for_backward(h if ctx.residual else x, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(*((mean, rstd) if ctx.residual else (h, mean, rstd)))
    ctx.set_materialize_grads(False)


def _row_norm_autograd(ctx, dy, dh, *_):
    h, weight, bias, mean, rstd = ctx.saved_tensors
    if dy is None and dh is None:
        return (None,) * 8
    dy = torch.zeros_like(h) if dy is None else dy
    dx, dweight, dbias = torch.ops.nasforge.row_norm_backward(
        dy, dh if ctx.residual else None, h, weight, bias, mean, rstd, ctx.centred, ctx.act, ctx.alpha
    )
    return dx, dx if ctx.residual else None, _as(dweight, weight), _as(dbias, bias), None, None, None, None


register_autograd("nasforge::row_norm", _row_norm_autograd, setup_context=_row_norm_setup, lib=_library)


# Norms of planes.


def _plane_norm_fake(x, residual, weight, bias, mean, var, groups, eps, act, alpha):
    count = 0 if mean is not None else x.shape[0] * groups if groups else x.shape[1]
    return _like(x), _statistics(x, count), _statistics(x, count)


def _plane_norm_backward(dy, x, residual, weight, bias, mean, var, fixed, groups, eps, act, alpha):
    residual = None if act == "identity" else residual  # its gradient is dy
    return planes.backward(dy, x, residual, weight, bias, mean, var, fixed, groups, eps, act, alpha)


def _plane_norm_backward_fake(dy, x, residual, weight, bias, mean, var, fixed, groups, eps, act, alpha):
    dresidual = x.new_empty(0) if residual is None or act == "identity" else _like(x)
    return _like(x), dresidual, _statistics(x, x.shape[1]), _statistics(x, x.shape[1])


_define(
    "plane_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, int groups,"
    f" {_NORM}) -> (Tensor, Tensor, Tensor)",
    planes.forward,
    _plane_norm_fake,
)
_define(
    "plane_norm_backward(Tensor dy, Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var,"
    f" bool fixed, int groups, {_NORM}) -> (Tensor, Tensor, Tensor, Tensor)",
    _plane_norm_backward,
    _plane_norm_backward_fake,
)


def _plane_norm_setup(ctx, inputs, output):
    x, residual, weight, bias, mean, var, ctx.groups, ctx.eps, ctx.act, ctx.alpha = inputs
    ctx.fixed = mean is not None
    kept = None if ctx.act == "identity" else residual
    found = (mean, var) if ctx.fixed else output[1:]
    ctx.save_for_backward(x, kept, weight, bias, *found)
    ctx.residual = residual is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _plane_norm_autograd(ctx, dy, *_):
    if dy is None:
        return (None,) * 10
    x, kept, weight, bias, mean, var = ctx.saved_tensors
    settings = (ctx.fixed, ctx.groups, ctx.eps, ctx.act, ctx.alpha)
    dx, dresidual, dweight, dbias = torch.ops.nasforge.plane_norm_backward(
        dy, x, kept, weight, bias, mean, var, *settings
    )
    dresidual = None if not ctx.residual else dy if kept is None else dresidual
    return dx, dresidual, _as(dweight, weight), _as(dbias, bias), None, None, None, None, None, None


register_autograd("nasforge::plane_norm", _plane_norm_autograd, setup_context=_plane_norm_setup, lib=_library)


# Gated units.


def _moved(x: Tensor, dim: int) -> bool:
    """Whether the halves along `dim` are innermost in memory although `dim` is not last."""
    return dim == 1 and is_channels_last(x)


def _packed(x: Tensor, dim: int) -> Tensor:
    """[rows, 2 columns], the gate first: a view where x is dense."""
    if _moved(x, dim):
        return x.movedim(1, -1).reshape(x.numel() // x.shape[1], x.shape[1])
    return x.contiguous().view(math.prod(x.shape[:dim]), math.prod(x.shape[dim:]))


def _half(x: Tensor, dim: int) -> list[int]:
    """The shape of one half."""
    return [size // 2 if i == dim else size for i, size in enumerate(x.shape)]


def _unpacked(flat: Tensor, shape: Sequence[int], moved: bool) -> Tensor:
    """Rows as a tensor of this shape, channels innermost if moved."""
    return flat.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if moved else flat.view(shape)


def _long_rows(x: Tensor, moved: bool) -> Tensor:
    """All of x in the order of its memory: one row, or one a sample where offsets would not fit in 32 bits."""
    rows_of_x = 1 if x.numel() < LARGEST_SAMPLE else x.shape[0]
    return (x.movedim(1, -1) if moved else x).contiguous().view(rows_of_x, x.numel() // rows_of_x)


def _gated(x, value, dim, act, alpha):
    if value is None:
        y = gates.gate_forward(_packed(x, dim), None, act, alpha)
        return _unpacked(y, _half(x, dim), _moved(x, dim))
    moved = is_channels_last(x)
    y = gates.gate_forward(_long_rows(x, moved), _long_rows(value, moved), act, alpha)
    return _unpacked(y, x.shape, moved)


def _gated_fake(x, value, dim, act, alpha):
    if value is not None:
        return _like(x)
    return _unpacked(x.new_empty(math.prod(_half(x, dim))), _half(x, dim), _moved(x, dim))


def _gated_backward(dy, x, value, dim, act, alpha):
    if value is None:
        moved, packed = _moved(x, dim), _packed(x, dim)
        dy = (dy.movedim(1, -1) if moved else dy).contiguous()
        dx, dvalue = gates.gate_backward(dy.view(packed.shape[0], packed.shape[1] // 2), packed, None, act, alpha)
        return _unpacked(dx, x.shape, moved), dvalue
    moved = is_channels_last(x)
    dy, gate, other = (_long_rows(t, moved) for t in (dy, x, value))
    dx, dvalue = gates.gate_backward(dy, gate, other, act, alpha)
    return _unpacked(dx, x.shape, moved), _unpacked(dvalue, x.shape, moved)


def _gated_backward_fake(dy, x, value, dim, act, alpha):
    return _like(x), x.new_empty(0) if value is None else _like(x)


_define("gated(Tensor x, Tensor? value, int dim, str act, float alpha) -> Tensor", _gated, _gated_fake)
_define(
    "gated_backward(Tensor dy, Tensor x, Tensor? value, int dim, str act, float alpha) -> (Tensor, Tensor)",
    _gated_backward,
    _gated_backward_fake,
)


def _gated_setup(ctx, inputs, output):
    x, value, ctx.dim, ctx.act, ctx.alpha = inputs
    ctx.save_for_backward(x, value)


def _gated_autograd(ctx, dy):
    x, value = ctx.saved_tensors
    dx, dvalue = torch.ops.nasforge.gated_backward(dy, x, value, ctx.dim, ctx.act, ctx.alpha)
    return dx, None if value is None else dvalue, None, None, None


register_autograd("nasforge::gated", _gated_autograd, setup_context=_gated_setup, lib=_library)


# PolyNorm.


def _poly_norm(x, value, weight, bias, eps):
    y, roots = gates.poly_forward(_flat(x), None if value is None else _flat(value), weight, bias, eps)
    return y.view(x.shape), roots


def _poly_norm_fake(x, value, weight, bias, eps):
    return _plain(x), _statistics(x, math.prod(x.shape[:-1]), 3)


def _poly_norm_backward(dy, x, value, weight, bias, roots):
    other = None if value is None else _flat(value)
    dx, dvalue, parameters = gates.poly_backward(_flat(dy), _flat(x), other, weight, bias, roots)
    return dx.view(x.shape), dvalue if value is None else dvalue.view(x.shape), parameters


def _poly_norm_backward_fake(dy, x, value, weight, bias, roots):
    return _plain(x), x.new_empty(0) if value is None else _plain(x), _statistics(x, 4)


_define(
    "poly_norm(Tensor x, Tensor? value, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    _poly_norm,
    _poly_norm_fake,
)
_define(
    "poly_norm_backward(Tensor dy, Tensor x, Tensor? value, Tensor weight, Tensor bias, Tensor roots)"
    " -> (Tensor, Tensor, Tensor)",
    _poly_norm_backward,
    _poly_norm_backward_fake,
)


def _poly_norm_setup(ctx, inputs, output):
    x, value, weight, bias, _ = inputs
    ctx.save_for_backward(x, value, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _poly_norm_autograd(ctx, dy, _):
    if dy is None:
        return (None,) * 5
    x, value, weight, bias, roots = ctx.saved_tensors
    dx, dvalue, parameters = torch.ops.nasforge.poly_norm_backward(dy, x, value, weight, bias, roots)
    dweight, dbias = parameters[:3].to(weight.dtype), parameters[3:].to(bias.dtype)
    return dx, None if value is None else dvalue, dweight, dbias, None


register_autograd("nasforge::poly_norm", _poly_norm_autograd, setup_context=_poly_norm_setup, lib=_library)
