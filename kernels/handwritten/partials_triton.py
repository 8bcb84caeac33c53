"""What tiles of [N, C, S] know of their channels (partials, [N, splits, C]), and partials merged into statistics.

Element (n, c, s) is at n C S + c sc + s ss, with sc or ss 1. S is run time if SC is 0, else compiled in. Every address
is written by one program.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
