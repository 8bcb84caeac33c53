"""Gated units act(gate) * value and PolyNorm of rows, with or without a value: forward and backward.

Gate and value are rows of `columns` elements, `stride` apart: two tensors, or halves of one. Every address is written
by one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.handwritten.activations_triton import activate, slope


@triton.jit
def gate_forward(
    gate_ptr,
    value_ptr,
    y_ptr,
    columns,
    stride,
    alpha,
    ACT: tl.constexpr,
    DC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = DC if DC else columns
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < columns
    gate = tl.load(gate_ptr + row * stride + cols, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + row * stride + cols, mask=mask, other=0.0).to(tl.float32)
    y = activate(gate, alpha, ACT) * value
    tl.store(y_ptr + row * columns + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward(
    dy_ptr,
    gate_ptr,
    value_ptr,
    dgate_ptr,
    dvalue_ptr,
    columns,
    stride,
    alpha,
    ACT: tl.constexpr,
    DC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = DC if DC else columns
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < columns
    gate = tl.load(gate_ptr + row * stride + cols, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + row * stride + cols, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * columns + cols, mask=mask, other=0.0).to(tl.float32)
    dgate = dy * value * slope(gate, alpha, ACT)
    dvalue = dy * activate(gate, alpha, ACT)
    tl.store(dgate_ptr + row * stride + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dvalue_ptr + row * stride + cols, dvalue.to(dvalue_ptr.dtype.element_ty), mask=mask)


@triton.jit
def poly_forward(
    x_ptr,
    value_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    roots_ptr,
    R,
    D,
    eps,
    VALUE: tl.constexpr,
    DC: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Whole rows in registers; roots [R, 3] are 1 / sqrt(mean(x^2k) + eps) for k = 3, 2, 1."""
    D = DC if DC else D
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    cols = tl.arange(0, BD)[None, :]
    mask = (rows < R) & (cols < D)
    x = tl.load(x_ptr + rows * D + cols, mask=mask, other=0.0).to(tl.float32)
    square = x * x
    root1 = tl.rsqrt(tl.sum(square, 1, keep_dims=True) / D + eps)
    root2 = tl.rsqrt(tl.sum(square * square, 1, keep_dims=True) / D + eps)
    root3 = tl.rsqrt(tl.sum((square * x) * (square * x), 1, keep_dims=True) / D + eps)
    cubic = tl.load(weight_ptr).to(tl.float32) * root3
    quadratic = tl.load(weight_ptr + 1).to(tl.float32) * root2
    linear = tl.load(weight_ptr + 2).to(tl.float32) * root1
    y = ((cubic * x + quadratic) * x + linear) * x + tl.load(bias_ptr).to(tl.float32)
    if VALUE:
        y *= tl.load(value_ptr + rows * D + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows * D + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(roots_ptr + rows * 3, root3, mask=rows < R)
    tl.store(roots_ptr + rows * 3 + 1, root2, mask=rows < R)
    tl.store(roots_ptr + rows * 3 + 2, root1, mask=rows < R)


@triton.jit
def poly_backward(
    dy_ptr,
    x_ptr,
    value_ptr,
    weight_ptr,
    bias_ptr,
    roots_ptr,
    dx_ptr,
    dvalue_ptr,
    parts_ptr,
    R,
    D,
    VALUE: tl.constexpr,
    DC: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """dx, dvalue and each row's gradients of the three weights and the bias, [R, 4].

    With u = x^k, r its root and g the gradient at PolyNorm: N(u) = u r, so that
    dx += w k x^(k-1) r (g - u r^2 mean(g u)).
    """
    D = DC if DC else D
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    cols = tl.arange(0, BD)[None, :]
    mask = (rows < R) & (cols < D)
    at = rows * D + cols
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    root3 = tl.load(roots_ptr + rows * 3, mask=rows < R, other=0.0)
    root2 = tl.load(roots_ptr + rows * 3 + 1, mask=rows < R, other=0.0)
    root1 = tl.load(roots_ptr + rows * 3 + 2, mask=rows < R, other=0.0)
    w3 = tl.load(weight_ptr).to(tl.float32)
    w2 = tl.load(weight_ptr + 1).to(tl.float32)
    w1 = tl.load(weight_ptr + 2).to(tl.float32)
    if VALUE:
        y = ((w3 * root3 * x + w2 * root2) * x + w1 * root1) * x + tl.load(bias_ptr).to(tl.float32)
        tl.store(dvalue_ptr + at, (g * y).to(dvalue_ptr.dtype.element_ty), mask=mask)
        g *= tl.load(value_ptr + at, mask=mask, other=0.0).to(tl.float32)
    square = x * x
    sum3 = tl.sum(g * square * x, 1, keep_dims=True)
    sum2 = tl.sum(g * square, 1, keep_dims=True)
    sum1 = tl.sum(g * x, 1, keep_dims=True)
    dx = w1 * root1 * (g - x * (root1 * root1 * (sum1 / D)))
    dx += 2.0 * w2 * root2 * x * (g - square * (root2 * root2 * (sum2 / D)))
    dx += 3.0 * w3 * root3 * square * (g - square * x * (root3 * root3 * (sum3 / D)))
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(parts_ptr + rows * 4, sum3 * root3, mask=rows < R)
    tl.store(parts_ptr + rows * 4 + 1, sum2 * root2, mask=rows < R)
    tl.store(parts_ptr + rows * 4 + 2, sum1 * root1, mask=rows < R)
    tl.store(parts_ptr + rows * 4 + 3, tl.sum(g, 1, keep_dims=True), mask=rows < R)
