"""Activation signs as bits of words, and counts of agreement between samples; each x is read once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack(x_ptr, words_ptr, B, U, BB: tl.constexpr, BU: tl.constexpr):
    """words [U]: bit b is set where sample b's unit is positive; BB >= B samples."""
    units = tl.program_id(0) * BU + tl.arange(0, BU)
    samples = tl.arange(0, BB)
    mask = (samples < B)[:, None] & (units < U)[None, :]
    x = tl.load(x_ptr + samples[:, None].to(tl.int64) * U + units[None, :], mask=mask, other=0.0).to(tl.float32)
    bits = (x > 0.0).to(tl.int64) << samples[:, None].to(tl.int64)
    tl.store(words_ptr + units, tl.sum(bits, 0), mask=units < U)


@triton.jit
def agreement(x_ptr, parts_ptr, B, U, share, BB: tl.constexpr, BU: tl.constexpr):
    """parts [programs, BB, BB]: the sum over a program's units of s_i s_j, s = 1 where positive, else -1.

    Sums are integers below 2^24, exact in float32.
    """
    samples = tl.arange(0, BB)
    total = tl.full([BB, BB], 0.0, tl.float32)
    start = tl.program_id(0) * share
    last = tl.minimum(start + share, U)
    for first in range(start, last, BU):
        units = first + tl.arange(0, BU)
        mask = (samples < B)[:, None] & (units < last)[None, :]
        x = tl.load(x_ptr + samples[:, None].to(tl.int64) * U + units[None, :], mask=mask, other=0.0).to(tl.float32)
        s = tl.where(mask, tl.where(x > 0.0, 1.0, -1.0), 0.0).to(tl.float16)
        total += tl.dot(s, tl.trans(s))
    at = tl.program_id(0).to(tl.int64) * BB * BB + samples[:, None] * BB + samples[None, :]
    tl.store(parts_ptr + at, total)
