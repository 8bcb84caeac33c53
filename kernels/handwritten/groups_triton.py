"""GroupNorm of [N, C, S] with a residual and an activation after, whole groups in registers: grid (n, g).

Element (n, c, s) is at n C S + c S + s, or n C S + s C + c if LAST. S is run time if SC is 0, else compiled in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.handwritten.activations_triton import activate, slope


@triton.jit
def group_forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    var_ptr,
    C,
    S,
    G,
    K,
    eps,
    alpha,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    LAST: tl.constexpr,
    SC: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    """One group of one sample in registers."""
    S = SC if SC else S
    group = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BC)
    s = tl.arange(0, BS)
    c = (group % G).to(tl.int32) * K + k
    mask = (k < K)[:, None] & (s < S)[None, :]
    at = (group // G) * C * S + (c[:, None] * S + s[None, :])
    if LAST:
        at = (group // G) * C * S + (c[:, None] + s[None, :] * C)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(x, 1), 0) / (K * S)
    x = tl.where(mask, x - mean, 0.0)
    var = tl.sum(tl.sum(x * x, 1), 0) / (K * S)
    weight = tl.load(weight_ptr + c, mask=k < K, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=k < K, other=0.0).to(tl.float32)
    z = x * tl.rsqrt(var + eps) * weight[:, None] + bias[:, None]
    if RESIDUAL:
        z += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, activate(z, alpha, ACT).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + group, mean)
    tl.store(var_ptr + group, var)


@triton.jit
def group_backward(
    dy_ptr,
    x_ptr,
    residual_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    dx_ptr,
    dresidual_ptr,
    sum_ptr,
    product_ptr,
    C,
    S,
    G,
    K,
    eps,
    alpha,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    LAST: tl.constexpr,
    SC: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    """One group of one sample in registers: dx, the residual's gradient, and sums of dz and dz xhat, [N, C]."""
    S = SC if SC else S
    group = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BC)
    s = tl.arange(0, BS)
    c = (group % G).to(tl.int32) * K + k
    mask = (k < K)[:, None] & (s < S)[None, :]
    at = (group // G) * C * S + (c[:, None] * S + s[None, :])
    if LAST:
        at = (group // G) * C * S + (c[:, None] + s[None, :] * C)
    rstd = tl.rsqrt(tl.load(var_ptr + group) + eps)
    weight = tl.load(weight_ptr + c, mask=k < K, other=0.0).to(tl.float32)
    xhat = (tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - tl.load(mean_ptr + group)) * rstd
    dz = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ACT != "identity":
        bias = tl.load(bias_ptr + c, mask=k < K, other=0.0).to(tl.float32)
        z = xhat * weight[:, None] + bias[:, None]
        if RESIDUAL:
            z += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dz *= slope(z, alpha, ACT)
        if RESIDUAL:
            tl.store(dresidual_ptr + at, dz.to(dx_ptr.dtype.element_ty), mask=mask)
    dz = tl.where(mask, dz, 0.0)
    total = tl.sum(dz, 1)
    product = tl.sum(tl.where(mask, dz * xhat, 0.0), 1)
    tl.store(sum_ptr + (group // G) * C + c, total, mask=k < K)
    tl.store(product_ptr + (group // G) * C + c, product, mask=k < K)
    mean_dz = tl.sum(total * weight, 0) / (K * S)
    mean_product = tl.sum(product * weight, 0) / (K * S)
    dx = (dz * weight[:, None] - mean_dz - xhat * mean_product) * rstd
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
