"""What a primitive costs: trained numbers, time of forward and backward, memory kept between them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nas.layers.cost import activation_bytes
from search_spaces.common.errors import UserError
from search_spaces.primitives.primitive import Primitive
from search_spaces.primitives.registry import primitive

SHAPE = (64, 64, 16, 16)  # samples, channels, rows, columns; tokens are [64, 256, 64]
CHANNELS = 64


@dataclass(frozen=True)
class PrimitiveCost:
    """Of one batch of SHAPE; `reference` was measured in turns with it. Milliseconds, bytes, and their ratios."""

    reference: str
    milliseconds: float
    reference_milliseconds: float
    saved_bytes: int
    reference_saved_bytes: int

    @property
    def relative_time(self) -> float:
        """In times of the reference."""
        return self.milliseconds / self.reference_milliseconds

    @property
    def relative_memory(self) -> float:
        """In times of the reference."""
        return self.saved_bytes / self.reference_saved_bytes


def trained_numbers(found: Primitive, channels: int = CHANNELS) -> int:
    """How many numbers are trained for `channels` channels; of a placement those beside the branch."""
    with torch.device("meta"):
        module = found.make(channels, layout=found.layouts[0])
    count = sum(p.numel() for p in module.parameters())
    if found.kind == "placement":
        count -= sum(p.numel() for p in module.get_submodule("branch").parameters())
    return count


def reference_of(found: Primitive) -> str:
    """What a primitive is compared with: ReLU for activations and gates, BatchNorm for everything else."""
    return "relu" if found.kind in ("activation", "gate") else "batch-norm"


def measure_cost(
    found: Primitive, *, shape: tuple[int, int, int, int] = SHAPE, repeats: int = 9, device: str = "cpu"
) -> PrimitiveCost:
    """Median time of forward and backward in training, in turns with the reference, and what autograd keeps.

    A gate gets twice the channels. Errors: UserError for fewer than one repeat.
    """
    if repeats < 1:
        raise UserError(repeats, "at least one repeat", "1")
    reference = primitive(reference_of(found))
    pair = [_prepare(each, shape, device) for each in (found, reference)]
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 2):  # the first two warm up
        for (module, x), measured in zip(pair, times, strict=True):
            measured.append(_milliseconds(module, x))
    own, other = (statistics.median(measured[2:]) for measured in times)
    saved, other_saved = (activation_bytes(module, x) for module, x in pair)
    return PrimitiveCost(reference.name, own, other, saved, other_saved)


def _prepare(found: Primitive, shape: tuple[int, int, int, int], device: str) -> tuple[nn.Module, Tensor]:
    samples, channels, rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    made = found.make(channels, layout=found.layouts[0])
    width = 2 * channels if found.kind == "gate" else channels
    size = (samples, width, rows, columns) if found.layouts[0] == "channels-first" else (samples, rows * columns, width)
    x = torch.randn(size, generator=generator)
    if "mask" in found.needs:
        made = _WithMask(made, (torch.rand((samples, 1, rows, columns), generator=generator) < 0.5).float())
    return made.train().to(device), x.to(device).requires_grad_()


class _WithMask(nn.Module):
    mask: Tensor

    def __init__(self, inner: Callable[[Tensor, Tensor], Tensor], mask: Tensor):
        super().__init__()
        self.inner = inner
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, self.mask)


def _milliseconds(module: nn.Module, x: Tensor) -> float:
    def wait() -> None:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    wait()
    begin = time.perf_counter()
    out = module(x)
    torch.autograd.grad(out, [x, *module.parameters()], torch.ones_like(out), allow_unused=True)
    wait()
    return 1e3 * (time.perf_counter() - begin)
