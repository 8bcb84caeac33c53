"""Activation codes for training-free proxies: signs of [B, ...] packed into words, and agreement between samples.

They serve the proxies: NWOT needs, for every pair of samples, in how many units their signs agree, SWAP and the count
of linear regions how many different columns of signs there are. Both leave out the values, so that x is read once and
8 bytes a unit (or nothing) are written, where comparison, powers of two and sum in turn write 9 bytes an element.
The proxies of `zero_cost` stand below this package: a caller passes these functions down. No gradients.
Sources: Mellor et al., Neural Architecture Search without Training, ICML 2021 (K_H); Peng et al., SWAP-NAS, ICLR 2024.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.handwritten.launch import ceil_div, kernels, mode, on_device, persistent_programs, power_of_two, warps_for
from search_spaces.common.errors import UserError

LARGEST_WORD, LARGEST_BATCH = 64, 128
LARGEST_SHARE = 2**23  # units of one partial sum, exact in float32


def _codes(x: Tensor) -> Tensor:
    if not x.is_floating_point() or x.dim() < 2:
        raise UserError(f"{x.dtype} {list(x.shape)}", "activations [B, ...] of a floating type")
    return x.detach().flatten(1).contiguous()


def eager_sign_words(x: Tensor) -> Tensor:
    """`sign_words` of [B, U] with torch."""
    shifts = torch.arange(len(x), device=x.device)
    return ((x > 0).long() << shifts[:, None]).sum(0)


def eager_sign_agreement(x: Tensor) -> Tensor:
    """`sign_agreement` of [B, U] with torch."""
    positive = (x > 0).to(torch.float64)
    return (positive @ positive.T + (1.0 - positive) @ (1.0 - positive).T).long()


def sign_words(x: Tensor) -> Tensor:
    """int64 [U], U = elements of a sample: bit b is set where sample b is > 0. NaN and 0 count as not positive.

    Errors: UserError above 64 samples (the 64th sets the sign bit) or for x that is no [B, ...] of floats.
    """
    x = _codes(x)
    samples, units = x.shape
    if samples > LARGEST_WORD:
        raise UserError(samples, f"at most {LARGEST_WORD} samples, one bit each", str(LARGEST_WORD))
    if mode(x) == "eager":
        return eager_sign_words(x)
    words = x.new_empty(units, dtype=torch.int64)
    height = power_of_two(samples)
    width = max(1, min(power_of_two(units), 4096 // height))
    with on_device(x):
        kernels("sign_packing").pack[(ceil_div(units, width),)](
            x, words, samples, units, BB=height, BU=width, num_warps=warps_for(height * width, 512)
        )
    return words


def sign_agreement(x: Tensor) -> Tensor:
    """int64 [B, B]: in how many units two samples are both > 0 or both not.

    Exact in every floating type. By a kernel up to 128 samples. Errors: UserError for x that is no [B, ...] of floats.
    """
    x = _codes(x)
    samples, units = x.shape
    if mode(x) == "eager" or samples > LARGEST_BATCH:
        return eager_sign_agreement(x)
    height, width = max(power_of_two(samples), 16), 64
    share = ceil_div(ceil_div(units, persistent_programs(x)), width) * width
    share = min(share, LARGEST_SHARE)
    programs = ceil_div(units, share)
    parts = x.new_empty(programs, height, height, dtype=torch.float32)
    with on_device(x):
        kernels("sign_packing").agreement[(programs,)](
            x, parts, samples, units, share, BB=height, BU=width, num_warps=4
        )
    products = parts.to(torch.int64).sum(0)[:samples, :samples]
    return (products + units) // 2
