"""Running statistics: estimated anew over many batches, or set aside for those of the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.common.errors import UserError


def statistics_layers(model: nn.Module) -> list[Any]:
    """The modules that keep running statistics: BatchNorm, GraphLayer, whatever has `reset_running_stats()`.

    Those without a buffer (BatchNorm with track_running_stats=False) are left out.
    """
    found = [m for m in model.modules() if callable(getattr(m, "reset_running_stats", None))]
    return [m for m in found if any(True for _ in m.buffers(recurse=False))]


def recalibrate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor] | Tensor]) -> int:
    """Set the running statistics to their averages over `batches`, each batch with the same weight.

    batches: images, or (images, labels) whose labels are ignored. Everything else runs as in evaluation (dropout
    off); modes and momenta are restored. Returns the number of batches. Errors: UserError if there is none.
    """
    layers = statistics_layers(model)
    averages: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
    calls = dict.fromkeys(layers, 0)

    def add(layer: nn.Module, *ignored: Any) -> None:
        calls[layer] += 1
        current = _running(layer)
        if not averages[layer]:
            averages[layer] = [torch.zeros_like(b, dtype=torch.float64) for b in current]
        for average, value in zip(averages[layer], current, strict=True):
            average += (value - average) / calls[layer]

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_modes(model))
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.train()
            stack.enter_context(_last_batch_only(layer))
            stack.callback(layer.register_forward_hook(add).remove)
        for batch in batches:
            images = batch if isinstance(batch, Tensor) else batch[0]
            model(images.to(device))
            count += 1
        for layer in layers:
            for buffer, average in zip(_running(layer), averages[layer], strict=False):
                buffer.copy_(average)
    if count == 0:
        raise UserError("0 batches", "at least one batch to recalibrate with")
    return count


def _running(layer: nn.Module) -> list[Tensor]:
    return [b for b in layer.buffers(recurse=False) if b.is_floating_point()]


@contextlib.contextmanager
def _last_batch_only(layer: Any) -> Iterator[None]:
    """With momentum 1 running statistics are those of the last batch. A GraphLayer has its momentum in its graph."""
    if hasattr(layer, "momentum"):
        momentum, layer.momentum = layer.momentum, 1.0
        try:
            yield
        finally:
            layer.momentum = momentum
    else:
        graph, layer.graph = layer.graph, replace(layer.graph, momentum=1.0)
        try:
            yield
        finally:
            layer.graph = graph


@contextlib.contextmanager
def _modes(model: nn.Module) -> Iterator[None]:
    """Restores which modules were in training mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def evaluating(model: nn.Module, *, batch_statistics: bool = False) -> Iterator[None]:
    """The model in evaluation mode for the length of a block; modes and buffers are as before afterwards.

    batch_statistics: normalise by the statistics of each batch instead of the running ones, which stay untouched.
    """
    layers = statistics_layers(model) if batch_statistics else []
    saved = [(b, b.clone()) for layer in layers for b in layer.buffers()]
    with _modes(model):
        try:
            model.eval()
            for layer in layers:
                layer.train()
            yield
        finally:
            with torch.no_grad():
                for buffer, value in saved:
                    buffer.copy_(value)
