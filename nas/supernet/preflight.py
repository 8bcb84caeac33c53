"""Pre-flight of a search: its time and memory, from three steps that are taken back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from nas.supernet.recipe import Recipe
from nas.supernet.state import SearchState, load_state_dict, state_dict
from nas.supernet.steps import run_epoch
from nas.training.preflight import Forecast, available_bytes, wait

TIMED = 2  # or as many as the alphas move once in


def forecast(state: SearchState, recipe: Recipe, seeds: int = 1) -> Forecast:
    """Take a step to warm up and two timed ones, in which alphas move too, and put everything back as it was.

    seeds: how many searches, this one included, are left. Measurements between epochs, evolution and projection are not
    counted. Errors: UserError and RunError as `run_epoch`'s.
    """
    device, before = state.device, deepcopy(state_dict(state))
    moving = replace(recipe, alpha_warmup_epochs=0)
    timed = min(max(TIMED, recipe.alpha_every), state.batches.steps_per_epoch - 1)
    saved = SavedBytes(state.supernet)
    watched: Any = contextlib.nullcontext()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        watched = torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack)
    begin = time.perf_counter()
    try:
        with watched:
            run_epoch(state, moving, stop=state.step + 1)
        memory = _state_bytes(state) + saved.peak
        if timed and not state.failed:
            wait(device)
            begin = time.perf_counter()
            run_epoch(state, moving, stop=state.step + timed)
        wait(device)
        step_seconds = (time.perf_counter() - begin) / max(timed, 1)
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device)
    finally:
        load_state_dict(state, before)
        state.optimizer.zero_grad(set_to_none=True)
    last = recipe.epochs * state.batches.steps_per_epoch
    steps = last - state.step + (seeds - 1) * last
    return Forecast(step_seconds, step_seconds * steps, memory, available_bytes(device))


class SavedBytes:
    """Hooks for `saved_tensors_hooks`: the bytes that autograd keeps for backward besides a module's own tensors.

    Each storage counts once. now: kept at this moment; peak: the most so far.
    """

    def __init__(self, module: torch.nn.Module):
        self.own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
        self.holders: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        """The tensor, held by something that tells when it is let go."""
        return _Held(self, tensor)

    @staticmethod
    def unpack(held: _Held) -> torch.Tensor:
        """The tensor again."""
        return held.tensor

    def count(self, tensor: torch.Tensor, change: int) -> None:
        """One holder more or less of a tensor's storage."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place in self.own:
            return
        before = self.holders.get(place, 0)
        self.holders[place] = before + change
        if before == 0 or before + change == 0:
            self.now += change * storage.nbytes()
            self.peak = max(self.peak, self.now)


class _Held:
    def __init__(self, counter: SavedBytes, tensor: torch.Tensor):
        self.counter, self.tensor = counter, tensor
        counter.count(tensor, 1)

    def __del__(self) -> None:
        self.counter.count(self.tensor, -1)


def _state_bytes(state: SearchState) -> int:
    """Gradients, and all tensors that a checkpoint holds: weights, optimisers, what parts remember."""
    return sum(p.nbytes for p in state.supernet.parameters()) + _bytes(state_dict(state))


def _bytes(content: Any) -> int:
    if isinstance(content, torch.Tensor):
        return content.nbytes
    if isinstance(content, Mapping | list | tuple):
        return sum(map(_bytes, content.values() if isinstance(content, Mapping) else content))
    return 0
