"""LayerNorm and RMSNorm over the last dimension, with a residual sum before and an activation after.

h = x + residual; y = act((h - mean) / sqrt(var + eps) * weight + bias), without mean for RMSNorm. Eager functions and
launchers of `rows_triton`; tensors [R, D], contiguous. Statistics are float32 (float64 for float64).

Bytes, with T those of x: forward 2 T (4 T with a residual), backward 3 T up to 8192 columns; beyond, rows are walked
in pieces, once more for each direction unless a cache still holds them, and parameter gradients read 2 T again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.handwritten.activations import ACTIVATIONS
from kernels.handwritten.launch import (
    aligned,
    ceil_div,
    kernels,
    mode,
    on_device,
    persistent_programs,
    power_of_two,
    warps_for,
    wide,
)

LARGEST_FORWARD, LARGEST_BACKWARD, PIECE = 16384, 8192, 4096


def eager_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    centred: bool,
    eps: float,
    act: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h (empty without residual), mean (empty unless centred) and 1 / sqrt(var + eps), both [R]."""
    h = x if residual is None else (wide(x) + wide(residual)).to(x.dtype)
    z = wide(h)
    mean = z.new_empty(0)
    if centred:
        mean = z.mean(-1)
        z = z - mean[:, None]
    rstd = torch.rsqrt(z.square().mean(-1) + eps)
    z = z * rstd[:, None]
    z = z if weight is None else z * weight.to(z.dtype)
    z = z if bias is None else z + bias.to(z.dtype)
    y = ACTIVATIONS[act].forward(z, alpha).to(x.dtype)
    return y, x.new_empty(0) if residual is None else h, mean, rstd


def eager_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    centred: bool,
    act: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (of the sum, so of x and residual alike), dweight and dbias [D], wide."""
    xhat = wide(h)
    xhat = (xhat - mean[:, None] if centred else xhat) * rstd[:, None]
    z = xhat if weight is None else xhat * weight.to(xhat.dtype)
    z = z if bias is None else z + bias.to(xhat.dtype)
    dz = ACTIVATIONS[act].backward(wide(dy), z, alpha)
    dweight, dbias = (dz * xhat).sum(0), dz.sum(0)
    dz = dz if weight is None else dz * weight.to(xhat.dtype)
    dx = dz - xhat * (dz * xhat).mean(-1, keepdim=True)
    dx = (dx - dz.mean(-1, keepdim=True) if centred else dx) * rstd[:, None]
    dx = dx if dh is None else dx + wide(dh)
    return dx.to(h.dtype), dweight, dbias


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    centred: bool,
    eps: float,
    act: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `eager_forward`, by one kernel where there is one for `x`."""
    if mode(x) == "eager":
        return eager_forward(x, residual, weight, bias, centred, eps, act, alpha)
    rows, columns = x.shape
    y = torch.empty_like(x)
    h = torch.empty_like(x) if residual is not None else x.new_empty(0)
    mean = x.new_empty(rows if centred else 0, dtype=torch.float32)
    rstd = x.new_empty(rows, dtype=torch.float32)
    width = power_of_two(columns)
    resident = width <= LARGEST_FORWARD
    block = max(1, 1024 // width) if resident else 1
    width = width if resident else PIECE
    source = kernels("rows")
    kernel = source.forward_resident if resident else source.forward_looped
    warps = warps_for(block * width, 512, 32) if block * width > 4096 else warps_for(block * width)
    with on_device(x):
        kernel[(ceil_div(rows, block),)](
            x,
            x if residual is None else residual,
            x if weight is None else weight,
            x if bias is None else bias,
            y,
            h if residual is not None else y,
            mean if centred else rstd,
            rstd,
            rows,
            columns,
            eps,
            alpha,
            ACT=act,
            CENTRED=centred,
            RESIDUAL=residual is not None,
            WEIGHT=weight is not None,
            BIAS=bias is not None,
            DC=aligned(columns),
            BR=block,
            BD=width,
            num_warps=warps,
        )
    return y, h, mean, rstd


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    centred: bool,
    act: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `eager_backward`: one kernel and a sum of partial parameter gradients; two and the sum for long rows."""
    if mode(h) == "eager":
        return eager_backward(dy, dh, h, weight, bias, mean, rstd, centred, act, alpha)
    rows, columns = h.shape
    source = kernels("rows")
    width = power_of_two(columns)
    resident = width <= LARGEST_BACKWARD
    block = max(1, 1024 // width) if resident else 1
    shares = min(persistent_programs(h), ceil_div(rows, block))
    dx = torch.empty_like(h)
    dweight = h.new_empty(shares, columns, dtype=torch.float32)
    dbias = torch.empty_like(dweight)
    parameters = (h if weight is None else weight, h if bias is None else bias, mean if centred else rstd, rstd)
    flags = {
        "ACT": act,
        "CENTRED": centred,
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
        "DC": aligned(columns),
    }
    with on_device(h):
        kernel = source.backward_resident if resident else source.backward_looped
        tile = block * width if resident else PIECE
        kernel[(shares if resident else rows,)](
            dy,
            h if dh is None else dh,
            h,
            *parameters,
            dx,
            dweight,
            dbias,
            rows,
            columns,
            alpha,
            SUM_GRADIENT=dh is not None,
            BR=block,
            BD=width if resident else PIECE,
            num_warps=warps_for(tile, 512) if tile > 1024 else warps_for(tile),
            **flags,
        )
        if not resident:
            source.parameter_sums[(ceil_div(columns, 128), shares)](
                dy, h, *parameters, dweight, dbias, rows, columns, alpha, BR=16, BD=128, num_warps=4, **flags
            )
    return dx, dweight.sum(0), dbias.sum(0)
