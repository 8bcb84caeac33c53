"""What a network costs: multiply-adds, memory of activations, time of a forward pass."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from nas.layers.cost import activation_bytes

BATCH_SIZES = (1, 64)
WARM_UP, LEAST_REPEATS, MOST_REPEATS, LEAST_SECONDS = 3, 7, 200, 0.4
# What convolutions and linear layers become; products of two activations (attention) are no MACs of a layer.
_COUNTED = (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm)


@dataclass(frozen=True)
class Timing:
    """The median time of a forward pass. mode: `eager` or `compiled`. Without a time, `reason` says why."""

    mode: str
    batch_size: int
    latency_ms: float | None
    images_per_second: float | None
    reason: str | None = None


def count_params(model: nn.Module) -> int:
    """Numbers in the parameters; shared ones count once, buffers do not."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of convolutions and linear layers for one image, counted by torch in a forward of `images`.

    torch counts two operations for a multiply-add. In the mode that the model is in.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    found = counter.get_flop_counts().get("Global", {})
    return sum(flops for operation, flops in found.items() if operation in _COUNTED) // 2 // len(images)


class _LiveBytes(TorchDispatchMode):
    """Follows the storages that operations allocate, from their first appearance until they are freed."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.sizes = known, dict[int, int]()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        if address and address not in self.known and address not in self.sizes:
            self.sizes[address] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, address).atexit = False

    def _free(self, address: int) -> None:
        self.now -= self.sizes.pop(address)


def peak_activation_bytes(model: nn.Module, images: Tensor) -> int:
    """The most bytes that a forward pass without gradients holds at one time, beyond parameters, buffers and input.

    On a GPU the peak of torch's allocator, whose blocks are multiples of 512 bytes and include work space of the
    libraries. Elsewhere the peak of live tensor storages: results of operations from when they are made until
    nothing refers to them; what an operation needs inside and frees again is not seen.
    """
    with torch.no_grad():
        if images.is_cuda:
            model(images)  # work space that stays is allocated at the first call
            torch.cuda.synchronize(images.device)
            torch.cuda.reset_peak_memory_stats(images.device)
            before = torch.cuda.memory_allocated(images.device)
            model(images)
            torch.cuda.synchronize(images.device)
            return torch.cuda.max_memory_allocated(images.device) - before
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), images)}
        with _LiveBytes(own) as live:
            model(images)
        return live.peak


def training_activation_bytes(model: nn.Module, images: Tensor) -> int:
    """What autograd keeps for the backward pass per image: the bytes that a third image adds to a batch of two.

    images: [B, C, H, W], repeated where there are fewer than three. The difference leaves out what a batch keeps
    once. The forward runs in training mode: running statistics change.
    """
    batch = images[torch.arange(3, device=images.device) % len(images)]
    return activation_bytes(model, batch) - activation_bytes(model, batch[:2].clone())


# -- time --------------------------------------------------------------------------------------------------------


def median_milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """The median time of `call` after a warm-up: 7 to 200 repeats, for at least 0.4 seconds."""

    def once() -> float:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    for _ in range(WARM_UP):
        once()
    times: list[float] = []
    while len(times) < LEAST_REPEATS or (sum(times) < LEAST_SECONDS and len(times) < MOST_REPEATS):
        times.append(once())
    return 1e3 * statistics.median(times)


@torch.no_grad()
def time_model(
    model: nn.Module, images: Tensor, *, compiled: bool = True, batch_sizes: tuple[int, ...] = BATCH_SIZES
) -> tuple[Timing, ...]:
    """A Timing for each batch size, eager and (with `compiled`) by torch.compile for exactly that size.

    images: normalised, on the model's device, repeated to fill a batch. A model that does not compile (no C++
    compiler, say), or whose compiled outputs differ, has the reason instead of a time. The time of compiling is no
    part of it. Compiling clears torch's compilation caches.
    """
    timings = []
    for mode in ("eager", "compiled")[: 1 + compiled]:
        for size in batch_sizes:
            batch = images[torch.arange(size, device=images.device) % len(images)]
            timings.append(_time(mode, model, batch))
    return tuple(timings)


def _time(mode: str, model: nn.Module, batch: Tensor) -> Timing:
    run: Callable[[Tensor], Tensor] = model
    if mode == "compiled":
        # torch compiles a few variants of one class and then runs it eagerly without a word; earlier models count.
        torch.compiler.reset()
        try:
            run = torch.compile(model, dynamic=False)
            expected, found = model(batch).float(), run(batch).float()
        except Exception as error:  # compilers raise anything
            return Timing(mode, len(batch), None, None, _reason(error))
        difference = (expected - found).abs().max().item()
        if not difference <= 1e-2 * (1 + expected.abs().max().item()):
            return Timing(mode, len(batch), None, None, f"compiled outputs differ by {difference:.3g}")
    milliseconds = median_milliseconds(lambda: run(batch), batch.device)
    return Timing(mode, len(batch), milliseconds, 1e3 * len(batch) / milliseconds)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
