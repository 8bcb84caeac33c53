"""Where a handwritten kernel runs, on what layout, and in what tiles. Nothing here imports Triton."""

from __future__ import annotations

import contextlib
import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from kernels.backend import by_kernels

INTERPRETED_PROGRAMS = 4  # persistent programs in the interpreter, which runs them one after another
LARGEST_SAMPLE = 2**31  # offsets inside a sample are 32-bit


def mode(x: Tensor) -> str:
    """`triton` on CUDA, `interpret` on the CPU under TRITON_INTERPRET=1, `eager` otherwise.

    Eager: where no kernel runs (`kernels.backend`), for float64 and other types than float32, float16 and bfloat16, for
    empty tensors, and for 2^31 or more samples, or elements in one.
    """
    if not by_kernels(x) or x.numel() == 0:
        return "eager"
    if max(x.shape[0], x.numel() // x.shape[0]) >= LARGEST_SAMPLE:
        return "eager"
    return "triton" if x.is_cuda else "interpret"


def kernels(name: str) -> ModuleType:
    """The Triton kernels of a family, imported on first use: `kernels("rows")` is `rows_triton`."""
    return importlib.import_module(f"kernels.handwritten.{name}_triton")


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to the device of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def persistent_programs(x: Tensor) -> int:
    """How many programs fill the device twice."""
    return 2 * _processors(x.device.index) if x.is_cuda else INTERPRETED_PROGRAMS


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def warps_for(elements: int, per_warp: int = 256, most: int = 16) -> int:
    """Warps for a tile of `elements`, a power of two from 1 to `most`."""
    return min(max(power_of_two(elements) // per_warp, 1), most)


def wide(x: Tensor) -> Tensor:
    """The type of the arithmetic: float64 for float64, float32 for everything else."""
    return x if x.dtype == torch.float64 else x.float()


def is_channels_last(x: Tensor) -> bool:
    """Whether [N, C, ...] is dense with channels innermost, and not also plainly contiguous."""
    return x.dim() >= 3 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def strides_of(x: Tensor) -> tuple[int, ...]:
    """The strides that a result for `x` has: its own if it is dense in either layout, else contiguous ones."""
    if x.is_contiguous() or is_channels_last(x):
        return x.stride()
    strides, step = [], 1
    for size in reversed(x.shape):
        strides.append(step)
        step = step * size
    return tuple(reversed(strides))


def empty_as(x: Tensor) -> Tensor:
    """An uninitialised result for `x`: shape, type and layout."""
    return torch.empty_strided(x.shape, strides_of(x), dtype=x.dtype, device=x.device)


def arranged(value: Tensor, like: Tensor) -> Tensor:
    """`value` in the type and layout of a result for `like`; copied only if it has another one.

    Gradients arrive expanded, permuted and in other layouts.
    """
    strides = strides_of(like)
    if value.dtype == like.dtype and value.stride() == strides:
        return value
    result = torch.empty_strided(like.shape, strides, dtype=like.dtype, device=like.device)
    return result.copy_(value)


def aligned(size: int) -> int:
    """A size for a constexpr: 0, take it at run time, for multiples of 16, whose loads are wide anyway; else itself.

    Other sizes are compiled in: the compiler then finds the widest load that their alignment allows.
    """
    return 0 if size % 16 == 0 else size
