"""LayerNorm and RMSNorm of rows with an activation, after a residual sum: forward and backward on tiles in registers.

x [R, D] is contiguous. `*_resident` hold whole rows, BD >= D; `*_looped` walk them in pieces of BD. Every address is
written by one program. D is run time if DC is 0, else compiled in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.handwritten.activations_triton import activate, slope


@triton.jit
def forward_resident(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    R,
    D,
    eps,
    alpha,
    ACT: tl.constexpr,
    CENTRED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    DC: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    D = DC if DC else D
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    cols = tl.arange(0, BD)
    mask = (rows < R)[:, None] & (cols < D)[None, :]
    at = rows[:, None] * D + cols[None, :]
    h = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:  # the sum is rounded as it is stored, so that backward sees what forward saw
        h += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        h = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + at, h, mask=mask)
        h = h.to(tl.float32)
    if CENTRED:
        mean = tl.sum(h, 1, keep_dims=True) / D
        h = tl.where(mask, h - mean, 0.0)
        tl.store(mean_ptr + rows[:, None], mean, mask=(rows < R)[:, None])
    rstd = tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) / D + eps)
    tl.store(rstd_ptr + rows[:, None], rstd, mask=(rows < R)[:, None])
    z = h * rstd
    if WEIGHT:
        z *= tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        z += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, activate(z, alpha, ACT).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def forward_looped(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    R,
    D,
    eps,
    alpha,
    ACT: tl.constexpr,
    CENTRED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    DC: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    D = DC if DC else D
    row = tl.program_id(0).to(tl.int64)
    mean = 0.0
    m2 = 0.0
    count = 0.0
    for start in range(0, D, BD):
        cols = start + tl.arange(0, BD)
        mask = cols < D
        h = tl.load(x_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL:
            h += tl.load(residual_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
            h = h.to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + row * D + cols, h, mask=mask)
            h = h.to(tl.float32)
        if CENTRED:  # merge the piece's mean and squares about it (Chan, Golub and LeVeque, 1979)
            size = tl.minimum(D - start, BD).to(tl.float32)
            piece = tl.sum(h, 0) / size
            h = tl.where(mask, h - piece, 0.0)
            change = piece - mean
            total = count + size
            mean += change * (size / total)
            m2 += tl.sum(h * h, 0) + change * change * (count * size / total)
            count = total
        else:
            m2 += tl.sum(h * h, 0)
    rstd = tl.rsqrt(m2 / D + eps)
    if CENTRED:
        tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, D, BD):
        cols = start + tl.arange(0, BD)
        mask = cols < D
        h = tl.load(x_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL:  # the sum again: reading back what this program wrote would need a barrier
            h += tl.load(residual_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
            h = h.to(h_ptr.dtype.element_ty).to(tl.float32)
        z = (h - mean) * rstd
        if WEIGHT:
            z *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            z += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * D + cols, activate(z, alpha, ACT).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_resident(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    R,
    D,
    alpha,
    ACT: tl.constexpr,
    CENTRED: tl.constexpr,
    SUM_GRADIENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    DC: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Programs walk the rows in strides and keep their own sums of parameter gradients, [programs, D]."""
    D = DC if DC else D
    cols = tl.arange(0, BD)
    inside = cols < D
    dweight = tl.full([BD], 0.0, tl.float32)
    dbias = tl.full([BD], 0.0, tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(R, BR), tl.num_programs(0)):
        rows = (block * BR + tl.arange(0, BR)).to(tl.int64)
        mask = (rows < R)[:, None] & inside[None, :]
        at = rows[:, None] * D + cols[None, :]
        xhat = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < R, other=0.0)[:, None]
        if CENTRED:
            xhat -= tl.load(mean_ptr + rows, mask=rows < R, other=0.0)[:, None]
        xhat = tl.where(mask, xhat * rstd, 0.0)
        dz = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        # Loaded for every block: from the cache, rather than kept in registers that long rows have none of.
        weight = tl.full([BD], 1.0, tl.float32)
        bias = tl.full([BD], 0.0, tl.float32)
        if WEIGHT:
            weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        if ACT != "identity":
            dz = tl.where(mask, dz * slope(xhat * weight[None, :] + bias[None, :], alpha, ACT), 0.0)
        dweight += tl.sum(dz * xhat, 0)
        dbias += tl.sum(dz, 0)
        dz *= weight[None, :]
        dx = dz - xhat * (tl.sum(dz * xhat, 1, keep_dims=True) / D)
        if CENTRED:
            dx -= tl.sum(dz, 1, keep_dims=True) / D
        dx *= rstd
        if SUM_GRADIENT:
            dx += tl.load(dh_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * D + cols, dweight, mask=inside)
    tl.store(dbias_ptr + tl.program_id(0).to(tl.int64) * D + cols, dbias, mask=inside)


@triton.jit
def backward_looped(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    R,
    D,
    alpha,
    ACT: tl.constexpr,
    CENTRED: tl.constexpr,
    SUM_GRADIENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    DC: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """One row a program, dx only; `parameter_sums` does the rest."""
    D = DC if DC else D
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    mean = 0.0
    if CENTRED:
        mean = tl.load(mean_ptr + row)
    total = tl.full([BD], 0.0, tl.float32)
    product = tl.full([BD], 0.0, tl.float32)
    for start in range(0, D, BD):
        cols = start + tl.arange(0, BD)
        mask = cols < D
        xhat = (tl.load(h_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        dz = tl.load(dy_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        weight = tl.full([BD], 1.0, tl.float32)
        bias = tl.full([BD], 0.0, tl.float32)
        if WEIGHT:
            weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        dz = tl.where(mask, dz * slope(xhat * weight + bias, alpha, ACT) * weight, 0.0)
        total += dz
        product += tl.where(mask, dz * xhat, 0.0)
    mean_dz = tl.sum(total, 0) / D
    mean_product = tl.sum(product, 0) / D
    for start in range(0, D, BD):
        cols = start + tl.arange(0, BD)
        mask = cols < D
        xhat = (tl.load(h_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        dz = tl.load(dy_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        weight = tl.full([BD], 1.0, tl.float32)
        bias = tl.full([BD], 0.0, tl.float32)
        if WEIGHT:
            weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        dx = dz * slope(xhat * weight + bias, alpha, ACT) * weight - xhat * mean_product
        if CENTRED:
            dx -= mean_dz
        dx *= rstd
        if SUM_GRADIENT:
            dx += tl.load(dh_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def parameter_sums(
    dy_ptr,
    h_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dweight_ptr,
    dbias_ptr,
    R,
    D,
    alpha,
    ACT: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    DC: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Sums over a share of the rows, [shares, D]: program (columns, share)."""
    D = DC if DC else D
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = cols < D
    share = tl.program_id(1)
    weight = tl.full([BD], 1.0, tl.float32)
    bias = tl.full([BD], 0.0, tl.float32)
    if WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.full([BR, BD], 0.0, tl.float32)
    dbias = tl.full([BR, BD], 0.0, tl.float32)
    for block in range(share, tl.cdiv(R, BR), tl.num_programs(1)):
        rows = (block * BR + tl.arange(0, BR)).to(tl.int64)
        mask = (rows < R)[:, None] & inside[None, :]
        at = rows[:, None] * D + cols[None, :]
        xhat = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if CENTRED:
            xhat -= tl.load(mean_ptr + rows, mask=rows < R, other=0.0)[:, None]
        xhat = tl.where(mask, xhat * tl.load(rstd_ptr + rows, mask=rows < R, other=0.0)[:, None], 0.0)
        dz = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dz = tl.where(mask, dz * slope(xhat * weight[None, :] + bias[None, :], alpha, ACT), 0.0)
        dweight += dz * xhat
        dbias += dz
    tl.store(dweight_ptr + share.to(tl.int64) * D + cols, tl.sum(dweight, 0), mask=inside)
    tl.store(dbias_ptr + share.to(tl.int64) * D + cols, tl.sum(dbias, 0), mask=inside)
