"""Pre-flight: how long a training will take and how much memory it needs, from two steps before it begins."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from nas.training.checkpoints import load_state_dict, snapshot
from nas.training.loop import LoopState, advance, device_of
from nas.training.recipe import Recipe

WARM_UP, TIMED = 1, 2


@dataclass(frozen=True)
class Forecast:
    """step_seconds: of one training step. seconds: of all steps that are left, evaluation not counted.

    memory_bytes: weights, gradients, optimiser, moving average and what a step keeps for its backward pass (on a GPU:
    the allocator's peak). available_bytes: what the device has left, None if it does not say.
    """

    step_seconds: float
    seconds: float
    memory_bytes: int
    available_bytes: int | None

    @property
    def fits(self) -> bool:
        """Whether the memory will probably do."""
        return self.available_bytes is None or self.memory_bytes <= self.available_bytes


def forecast(state: LoopState, recipe: Recipe, last: int, seeds: int = 1) -> Forecast:
    """Train three steps (one to warm up, two timed), and put everything back as it was.

    last: the step at which the training ends; seeds: how many trainings, this one included, are left.
    Errors: RunError if the steps run out of memory.
    """
    device = device_of(state.model)
    before = snapshot(state)
    kept = _Kept(state.model)
    watched: Any = contextlib.nullcontext()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        watched = torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor)
    try:
        with watched:
            advance(state, recipe, steps=before["step"] + WARM_UP)
        kept.alive.clear()
        wait(device)
        begin = time.perf_counter()
        advance(state, recipe, steps=before["step"] + WARM_UP + TIMED)
        wait(device)
        step_seconds = (time.perf_counter() - begin) / TIMED
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device)
        else:
            memory = _state_bytes(state) + kept.total
    finally:
        load_state_dict(state, before)
        state.optimizer.zero_grad(set_to_none=True)
    steps = last - before["step"] + (seeds - 1) * last
    return Forecast(step_seconds, step_seconds * steps, memory, available_bytes(device))


class _Kept:
    """Adds up what autograd keeps for one backward pass besides the weights, each storage once."""

    def __init__(self, model: torch.nn.Module):
        self.seen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.alive: list[torch.Tensor] = []  # so that no address is used twice
        self.total = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.alive.append(tensor)
            self.total += storage.nbytes()
        return tensor


def _state_bytes(state: LoopState) -> int:
    tensors = [*state.model.parameters(), *state.model.buffers()]
    gradients = [p for p in state.model.parameters() if p.requires_grad]
    held = [v for s in state.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    average = [] if state.average is None else [*state.average.parameters(), *state.average.buffers()]
    return sum(t.nbytes for t in (*tensors, *gradients, *held, *average))


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU, or what the system can still give on a CPU; None where it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES")
        return pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else None
    except (OSError, ValueError):
        return None
