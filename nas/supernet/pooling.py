"""Average pooling as two small matrix products, which on a CPU is several times faster than torch's own."""

from __future__ import annotations

import functools

import torch
from torch import nn


def average_pool(module: nn.AvgPool2d, x: torch.Tensor) -> torch.Tensor:
    """module(x) to rounding. On a CPU the averages along rows and along columns are products with matrices.

    A window is the product of its rows and columns, and so is the number of its elements within the image, so both ways
    of counting the padding allow it. Other devices, `ceil_mode` and `divisor_override` use torch's own.
    """
    if x.device.type != "cpu" or module.ceil_mode or module.divisor_override is not None:
        return module(x)
    sizes, strides, paddings = (_pair(v) for v in (module.kernel_size, module.stride, module.padding))
    rows, columns = (
        averages(x.shape[axis - 2], sizes[axis], strides[axis], paddings[axis], module.count_include_pad, x.dtype)
        for axis in (0, 1)
    )
    return rows @ x @ columns.T


@functools.lru_cache(maxsize=64)
def averages(
    length: int, size: int, stride: int, padding: int, include_padding: bool, dtype: torch.dtype
) -> torch.Tensor:
    """[outputs, length]: row i holds the weights with which a line of pixels is averaged to output i."""
    outputs = (length + 2 * padding - size) // stride + 1
    first = torch.arange(outputs)[:, None] * stride - padding
    place = torch.arange(length)[None, :]
    inside = ((place >= first) & (place < first + size)).to(torch.float64)
    count = size if include_padding else inside.sum(1, keepdim=True)
    return (inside / count).to(dtype)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
