"""BatchNorm and GroupNorm of [N, C, S] with a residual and an activation after: forward and backward.

Whole groups in registers (`group_*`, grid (n, g)), or universally: sums per (n, split of S, c), a merge of them into
the statistics of channels or groups, and a pointwise pass. Element (n, c, s) is at n C S + c sc + s ss; sc and ss are
compiled in where they are 1. S is run time if SC is 0, else compiled in. Every address is written by one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.handwritten.activations_triton import activate, slope


@triton.jit
def tile_of(pid, C, S, splits, LAST: tl.constexpr, BC: tl.constexpr):
    """n, channels, split, and the strides of channels and positions."""
    blocks = tl.cdiv(C, BC)
    c = (pid % blocks) * BC + tl.arange(0, BC)
    split = (pid // blocks) % splits
    n = (pid // (blocks * splits)).to(tl.int64)
    if LAST:
        return n, c, split, 1, C
    else:
        return n, c, split, S, 1


@triton.jit
def moments(
    x_ptr,
    mean_ptr,
    m2_ptr,
    C,
    S,
    length,
    splits,
    LAST: tl.constexpr,
    SC: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    """Mean and sum of squares about it of `length` positions, [N, splits, C]; pieces merged as in Chan et al., 1979."""
    S = SC if SC else S
    n, c, split, sc, ss = tile_of(tl.program_id(0), C, S, splits, LAST, BC)
    mean = tl.full([BC], 0.0, tl.float32)
    m2 = tl.full([BC], 0.0, tl.float32)
    count = 0.0
    last = tl.minimum(split * length + length, S)
    for start in range(split * length, last, BS):
        s = start + tl.arange(0, BS)
        mask = (c < C)[:, None] & (s < last)[None, :]
        x = tl.load(x_ptr + n * C * S + (c[:, None] * sc + s[None, :] * ss), mask=mask, other=0.0).to(tl.float32)
        size = tl.minimum(last - start, BS).to(tl.float32)
        piece = tl.sum(x, 1) / size
        x = tl.where(mask, x - piece[:, None], 0.0)
        change = piece - mean
        total = count + size
        mean += change * (size / total)
        m2 += tl.sum(x * x, 1) + change * change * (count * size / total)
        count = total
    at = (n * splits + split) * C + c
    tl.store(mean_ptr + at, mean, mask=c < C)
    tl.store(m2_ptr + at, m2, mask=c < C)


@triton.jit
def items_of(rows, items, rows_per, step_row, step_in_row, inner, step_item):
    """Where the partial sums of a row (a channel, or a group of a sample) stand in [N, splits, C]."""
    start = (rows // rows_per).to(tl.int64) * step_row + (rows % rows_per) * step_in_row
    return start[None, :] + ((items // inner).to(tl.int64) * step_item + items % inner)[:, None]


@triton.jit
def merge_moments(
    part_mean_ptr,
    part_m2_ptr,
    mean_ptr,
    var_ptr,
    rows_total,
    items_total,
    rows_per,
    step_row,
    step_in_row,
    inner,
    step_item,
    S,
    length,
    splits,
    count,
    BI: tl.constexpr,
    BR: tl.constexpr,
):
    """Mean and biased variance of rows from the moments of their items, at most `length` values each."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    mean = tl.full([BI, BR], 0.0, tl.float32)
    for start in range(0, items_total, BI):
        items = start + tl.arange(0, BI)
        mask = (items < items_total)[:, None] & (rows < rows_total)[None, :]
        at = items_of(rows, items, rows_per, step_row, step_in_row, inner, step_item)
        size = tl.minimum(S - ((items // inner) % splits) * length, length).to(tl.float32)[:, None]
        mean += tl.load(part_mean_ptr + at, mask=mask, other=0.0) * (size / count)
    mean = tl.sum(mean, 0)
    m2 = tl.full([BI, BR], 0.0, tl.float32)
    for start in range(0, items_total, BI):
        items = start + tl.arange(0, BI)
        mask = (items < items_total)[:, None] & (rows < rows_total)[None, :]
        at = items_of(rows, items, rows_per, step_row, step_in_row, inner, step_item)
        size = tl.minimum(S - ((items // inner) % splits) * length, length).to(tl.float32)[:, None]
        change = tl.load(part_mean_ptr + at, mask=mask, other=0.0) - mean[None, :]
        squares = tl.load(part_m2_ptr + at, mask=mask, other=0.0) + change * change * size
        m2 += tl.where(mask, squares, 0.0)
    tl.store(mean_ptr + rows, mean, mask=rows < rows_total)
    tl.store(var_ptr + rows, tl.sum(m2, 0) / count, mask=rows < rows_total)


@triton.jit
def fold(
    a_ptr,
    b_ptr,
    weight_ptr,
    out_a_ptr,
    out_b_ptr,
    rows_total,
    items_total,
    rows_per,
    step_row,
    step_in_row,
    inner,
    step_item,
    WEIGHTED: tl.constexpr,
    BI: tl.constexpr,
    BR: tl.constexpr,
):
    """Two sums over items for every row, each item times its channel's weight if WEIGHTED."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    a = tl.full([BI, BR], 0.0, tl.float32)
    b = tl.full([BI, BR], 0.0, tl.float32)
    for start in range(0, items_total, BI):
        items = start + tl.arange(0, BI)
        mask = (items < items_total)[:, None] & (rows < rows_total)[None, :]
        at = items_of(rows, items, rows_per, step_row, step_in_row, inner, step_item)
        some_a = tl.load(a_ptr + at, mask=mask, other=0.0)
        some_b = tl.load(b_ptr + at, mask=mask, other=0.0)
        if WEIGHTED:
            channel = ((rows % rows_per) * step_in_row)[None, :] + (items % inner)[:, None]
            weight = tl.load(weight_ptr + channel, mask=mask, other=0.0).to(tl.float32)
            some_a *= weight
            some_b *= weight
        a += some_a
        b += some_b
    tl.store(out_a_ptr + rows, tl.sum(a, 0), mask=rows < rows_total)
    tl.store(out_b_ptr + rows, tl.sum(b, 0), mask=rows < rows_total)


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
