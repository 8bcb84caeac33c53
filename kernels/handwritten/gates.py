"""Gated units act(gate) * value (SwiGLU, GEGLU, PowLU, ...) and PolyNorm: eager functions and launchers.

Gates take [rows, columns] each, or one [rows, 2 columns] whose first half is the gate: halves are then read and their
gradients written in place, without a copy. Bytes, with T those of the result: 3 T forward, 5 T backward, the least
there are. PolyNorm [R, D] with rows in registers: 2 T and 3 T (3 T and 5 T with a value); longer rows run eagerly.

Sources: Shazeer, GLU Variants Improve Transformer, 2020, arXiv 2002.05202, equation 5; PowLU, arXiv 2605.25704;
PolyNorm, Zhuo et al., Polynomial Composition Activations, 2024, arXiv 2411.03884.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.handwritten.activations import ACTIVATIONS
from kernels.handwritten.launch import aligned, ceil_div, kernels, mode, on_device, power_of_two, warps_for, wide

BLOCK = 1024
LONGEST_FORWARD, LONGEST_BACKWARD = 32768, 8192  # columns of a row of PolyNorm held in registers


def _halves(x: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor]:
    columns = x.shape[1] // 2
    return (x[:, :columns], x[:, columns:]) if value is None else (x, value)


def eager_gate_forward(x: Tensor, value: Tensor | None, act: str, alpha: float) -> Tensor:
    """act(gate) * value."""
    gate, value = _halves(x, value)
    return (ACTIVATIONS[act].forward(wide(gate), alpha) * wide(value)).to(x.dtype)


def eager_gate_backward(dy: Tensor, x: Tensor, value: Tensor | None, act: str, alpha: float) -> tuple[Tensor, Tensor]:
    """dgate and dvalue; the gradient of both halves and an empty tensor where they are one."""
    gate, other = _halves(x, value)
    gate, other, dy = wide(gate), wide(other), wide(dy)
    dgate = ACTIVATIONS[act].backward(dy * other, gate, alpha).to(x.dtype)
    dvalue = (dy * ACTIVATIONS[act].forward(gate, alpha)).to(x.dtype)
    if value is None:
        return torch.cat((dgate, dvalue), 1), x.new_empty(0)
    return dgate, dvalue


def gate_forward(x: Tensor, value: Tensor | None, act: str, alpha: float) -> Tensor:
    """As `eager_gate_forward`, by one kernel."""
    if mode(x) == "eager":
        return eager_gate_forward(x, value, act, alpha)
    gate, other = _halves(x, value)
    rows, columns = gate.shape
    y = x.new_empty(rows, columns)
    block = min(BLOCK, power_of_two(columns))
    with on_device(x):
        kernels("gates").gate_forward[(rows * ceil_div(columns, block),)](
            gate,
            other,
            y,
            columns,
            gate.stride(0),
            alpha,
            ACT=act,
            DC=aligned(columns),
            BLOCK=block,
            num_warps=warps_for(block),
        )
    return y


def gate_backward(dy: Tensor, x: Tensor, value: Tensor | None, act: str, alpha: float) -> tuple[Tensor, Tensor]:
    """As `eager_gate_backward`, by one kernel."""
    if mode(x) == "eager":
        return eager_gate_backward(dy, x, value, act, alpha)
    gate, other = _halves(x, value)
    rows, columns = gate.shape
    dx = torch.empty_like(x)
    dvalue = x.new_empty(0) if value is None else torch.empty_like(value)
    dgate, dother = _halves(dx, None if value is None else dvalue)
    block = min(BLOCK, power_of_two(columns))
    with on_device(x):
        kernels("gates").gate_backward[(rows * ceil_div(columns, block),)](
            dy,
            gate,
            other,
            dgate,
            dother,
            columns,
            gate.stride(0),
            alpha,
            ACT=act,
            DC=aligned(columns),
            BLOCK=block,
            num_warps=warps_for(block),
        )
    return dx, dvalue


def eager_poly_forward(
    x: Tensor, value: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """weight[0] N(x^3) + weight[1] N(x^2) + weight[2] N(x) + bias, times value; and the roots [R, 3]."""
    z, w, b = wide(x), weight.to(wide(x).dtype), bias.to(wide(x).dtype)
    powers = torch.stack((z * z * z, z * z, z), 1)
    roots = torch.rsqrt(powers.square().mean(-1) + eps)
    y = (powers * (w * roots)[:, :, None]).sum(1) + b
    return (y if value is None else y * wide(value)).to(x.dtype), roots


def eager_poly_backward(
    dy: Tensor, x: Tensor, value: Tensor | None, weight: Tensor, bias: Tensor, roots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dvalue (empty without one), and the gradients of weight and bias as one [4], wide."""
    z, g, w = wide(x), wide(dy), weight.to(roots.dtype)
    powers = torch.stack((z * z * z, z * z, z), 1)
    dvalue = x.new_empty(0)
    if value is not None:
        y = (powers * (w * roots)[:, :, None]).sum(1) + bias.to(roots.dtype)
        dvalue, g = (g * y).to(x.dtype), g * wide(value)
    sums = (g[:, None] * powers).sum(-1)
    parameters = torch.cat(((sums * roots).sum(0), g.sum()[None]))
    slopes = torch.stack((3.0 * z * z, 2.0 * z, torch.ones_like(z)), 1)
    inner = g[:, None] - powers * (roots.square() * sums / x.shape[1])[:, :, None]
    return ((w * roots)[:, :, None] * slopes * inner).sum(1).to(x.dtype), dvalue, parameters


def _poly_tile(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    rows, columns = x.shape
    width = power_of_two(columns)
    block = max(1, 1024 // width)
    tile = {"DC": aligned(columns), "BR": block, "BD": width}
    warps = warps_for(block * width, 512, 32) if width > 1024 else warps_for(block * width)
    return (ceil_div(rows, block),), {**tile, "num_warps": warps}


def poly_forward(x: Tensor, value: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `eager_poly_forward`, by one kernel."""
    if mode(x) == "eager" or power_of_two(x.shape[1]) > LONGEST_FORWARD:
        return eager_poly_forward(x, value, weight, bias, eps)
    y, roots = torch.empty_like(x), x.new_empty(x.shape[0], 3, dtype=torch.float32)
    grid, tile = _poly_tile(x)
    with on_device(x):
        kernels("gates").poly_forward[grid](
            x, x if value is None else value, weight, bias, y, roots, *x.shape, eps, VALUE=value is not None, **tile
        )
    return y, roots


def poly_backward(
    dy: Tensor, x: Tensor, value: Tensor | None, weight: Tensor, bias: Tensor, roots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `eager_poly_backward`, by one kernel and a sum."""
    if mode(x) == "eager" or power_of_two(x.shape[1]) > LONGEST_BACKWARD:
        return eager_poly_backward(dy, x, value, weight, bias, roots)
    dx, parts = torch.empty_like(x), x.new_empty(x.shape[0], 4, dtype=torch.float32)
    dvalue = x.new_empty(0) if value is None else torch.empty_like(value)
    other, dother = (x, dx) if value is None else (value, dvalue)
    grid, tile = _poly_tile(x)
    with on_device(x):
        kernels("gates").poly_backward[grid](
            dy, x, other, weight, bias, roots, dx, dother, parts, *x.shape, VALUE=value is not None, **tile
        )
    return dx, dvalue, parts.sum(0)
