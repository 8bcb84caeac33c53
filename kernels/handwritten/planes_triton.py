"""BatchNorm and GroupNorm of [N, C, S] with a residual and an activation after, from statistics in memory.

Forward, a pointwise pass over the statistics that `partials_triton` merged; backward, sums per (n, split of S, c), and
once they are merged a pointwise pass. Addresses as in `partials_triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.handwritten.activations_triton import activate, slope
from kernels.handwritten.partials_triton import tile_of


@triton.jit
def scale_of(n, c, C, G, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, BATCH: tl.constexpr):
    """Mean, 1 / std, weight, bias and the index of the statistics, for channels c of sample n."""
    at = c.to(tl.int64)
    if not BATCH:
        at = n * G + c // (C // G)
    mean = tl.load(mean_ptr + at, mask=c < C, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.load(var_ptr + at, mask=c < C, other=1.0).to(tl.float32) + eps)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return mean, rstd, weight, bias, at


@triton.jit
def apply(
    x_ptr,
    residual_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    C,
    S,
    G,
    length,
    splits,
    eps,
    alpha,
    ACT: tl.constexpr,
    BATCH: tl.constexpr,
    RESIDUAL: tl.constexpr,
    LAST: tl.constexpr,
    SC: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    """Backwards through the programs: the end of x may still be in the cache."""
    S = SC if SC else S
    n, c, split, sc, ss = tile_of(tl.num_programs(0) - 1 - tl.program_id(0), C, S, splits, LAST, BC)
    mean, rstd, weight, bias, _ = scale_of(n, c, C, G, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, BATCH)
    last = tl.minimum(split * length + length, S)
    for start in range(split * length, last, BS):
        s = start + tl.arange(0, BS)
        mask = (c < C)[:, None] & (s < last)[None, :]
        at = n * C * S + (c[:, None] * sc + s[None, :] * ss)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        z = (x - mean[:, None]) * rstd[:, None] * weight[:, None] + bias[:, None]
        if RESIDUAL:
            z += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, activate(z, alpha, ACT).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def grad_sums(
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
    length,
    splits,
    eps,
    alpha,
    ACT: tl.constexpr,
    BATCH: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FIXED: tl.constexpr,
    LAST: tl.constexpr,
    SC: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    """Sums of dz and of dz xhat, [N, splits, C]; dx and the residual's gradient too if the statistics are FIXED."""
    S = SC if SC else S
    n, c, split, sc, ss = tile_of(tl.program_id(0), C, S, splits, LAST, BC)
    mean, rstd, weight, bias, _ = scale_of(n, c, C, G, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, BATCH)
    total = tl.full([BC], 0.0, tl.float32)
    product = tl.full([BC], 0.0, tl.float32)
    last = tl.minimum(split * length + length, S)
    for start in range(split * length, last, BS):
        s = start + tl.arange(0, BS)
        mask = (c < C)[:, None] & (s < last)[None, :]
        at = n * C * S + (c[:, None] * sc + s[None, :] * ss)
        xhat = (tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        dz = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if ACT != "identity":
            z = xhat * weight[:, None] + bias[:, None]
            if RESIDUAL:
                z += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
            dz *= slope(z, alpha, ACT)
        if FIXED:
            tl.store(dx_ptr + at, (dz * (rstd * weight)[:, None]).to(dx_ptr.dtype.element_ty), mask=mask)
            if RESIDUAL:
                tl.store(dresidual_ptr + at, dz.to(dx_ptr.dtype.element_ty), mask=mask)
        dz = tl.where(mask, dz, 0.0)
        total += tl.sum(dz, 1)
        product += tl.sum(tl.where(mask, dz * xhat, 0.0), 1)
    part = (n * splits + split) * C + c
    tl.store(sum_ptr + part, total, mask=c < C)
    tl.store(product_ptr + part, product, mask=c < C)


@triton.jit
def grad_apply(
    dy_ptr,
    x_ptr,
    residual_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    product_ptr,
    dx_ptr,
    dresidual_ptr,
    C,
    S,
    G,
    length,
    splits,
    count,
    eps,
    alpha,
    ACT: tl.constexpr,
    BATCH: tl.constexpr,
    RESIDUAL: tl.constexpr,
    LAST: tl.constexpr,
    SC: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    """dx from the sums of dz and dz xhat over what shares the statistics; groups' sums are weighted already."""
    S = SC if SC else S
    n, c, split, sc, ss = tile_of(tl.num_programs(0) - 1 - tl.program_id(0), C, S, splits, LAST, BC)
    mean, rstd, weight, bias, statistic = scale_of(n, c, C, G, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, BATCH)
    mean_dz = tl.load(sum_ptr + statistic, mask=c < C, other=0.0) / count
    mean_product = tl.load(product_ptr + statistic, mask=c < C, other=0.0) / count
    if BATCH:
        mean_dz *= weight
        mean_product *= weight
    last = tl.minimum(split * length + length, S)
    for start in range(split * length, last, BS):
        s = start + tl.arange(0, BS)
        mask = (c < C)[:, None] & (s < last)[None, :]
        at = n * C * S + (c[:, None] * sc + s[None, :] * ss)
        xhat = (tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        dz = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if ACT != "identity":
            z = xhat * weight[:, None] + bias[:, None]
            if RESIDUAL:
                z += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
            dz *= slope(z, alpha, ACT)
            if RESIDUAL:
                tl.store(dresidual_ptr + at, dz.to(dx_ptr.dtype.element_ty), mask=mask)
        dx = (dz * weight[:, None] - mean_dz[:, None] - xhat * mean_product[:, None]) * rstd[:, None]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
