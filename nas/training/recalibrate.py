"""Running statistics: estimated anew over many batches, or set aside for those of the batch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.common.errors import UserError
from search_spaces.primitives.adab2n import AdaB2N
from search_spaces.primitives.evaluation_norms import AlphaBN, UnMixTNS
from search_spaces.primitives.power_norms import PowerNorm, PowerNormV
from search_spaces.primitives.unified_norm import UnifiedNorm

# With these attributes a layer normalises by its batch, and its running values are those of the last batch.
LAST_BATCH: dict[type[nn.Module], dict[str, Any]] = {
    PowerNorm: {"keep": 0.0, "warmup": sys.maxsize},
    PowerNormV: {"keep": 0.0},
    UnifiedNorm: {"momentum": 0.0, "warmup": sys.maxsize},
    AdaB2N: {"momentum": 1.0, "kappa": 1.0},
}
IN_TRAINING = (AlphaBN, UnMixTNS)  # they call the BatchNorm they wrap in training only


def statistics_layers(model: nn.Module) -> list[Any]:
    """The modules that keep running statistics: BatchNorm, GraphLayer, whatever has `reset_running_stats()`.

    Their names begin with `running_`. Those without a buffer (BatchNorm with track_running_stats=False) are left out.
    """
    found = [m for m in model.modules() if callable(getattr(m, "reset_running_stats", None))]
    return [m for m in found if any(True for _ in m.buffers(recurse=False))]


def recalibrate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor] | Tensor]) -> int:
    """Set the running statistics to their averages over `batches`, each batch with the same weight.

    batches: images, or (images, labels) whose labels are ignored. Everything else runs as in evaluation (dropout
    off), and every layer normalises by the batch; modes, momenta and other averages (PowerNorm's gradient, counts) are
    restored, and so are the statistics of a layer that no batch reached, and all after an error. Returns the number of
    batches. Errors: UserError if there is none.
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

    def restore(layer: nn.Module, saved: _Saved) -> None:
        saved.restore(running=not (finished and calls[layer]))

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count, finished = 0, False
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_modes(model))
        saved = [_Saved(layer) for layer in layers]
        model.eval()
        for module in (*layers, *(m for m in model.modules() if isinstance(m, IN_TRAINING))):
            module.train()
        for layer, values in zip(layers, saved, strict=True):
            stack.callback(restore, layer, values)
            layer.reset_running_stats()
            stack.enter_context(_last_batch_only(layer))
            stack.callback(layer.register_forward_hook(add).remove)
        for batch in batches:
            images = batch if isinstance(batch, Tensor) else batch[0]
            model(images.to(device))
            count += 1
        for layer in layers:
            for buffer, average in zip(_running(layer), averages[layer], strict=False):
                buffer.copy_(average)
        finished = count > 0
    if count == 0:
        raise UserError("0 batches", "at least one batch to recalibrate with")
    return count


def _running(layer: nn.Module) -> list[Tensor]:
    return [value for name, value in layer.named_buffers(recurse=False) if name.startswith("running_")]


class _Saved:
    """The buffers of a layer as they were."""

    def __init__(self, layer: nn.Module):
        self.values = [(name, value, value.clone()) for name, value in layer.named_buffers(recurse=False)]

    @torch.no_grad()
    def restore(self, *, running: bool) -> None:
        """All of them, or all but the running statistics and BatchNorm's count of their batches."""
        for name, buffer, value in self.values:
            if running or not name.startswith(("running_", "num_batches_tracked")):
                buffer.copy_(value)


@contextlib.contextmanager
def _last_batch_only(layer: Any) -> Iterator[None]:
    """Running statistics are those of the last batch: with momentum 1, which a GraphLayer has in its graph."""
    if hasattr(layer, "graph"):
        changes = {"graph": replace(layer.graph, momentum=1.0)}
    else:
        changes = LAST_BATCH.get(type(layer), {"momentum": 1.0})
    before = {name: getattr(layer, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(layer, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(layer, name, value)


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
    wrapped = [m for m in model.modules() if isinstance(m, IN_TRAINING)] if batch_statistics else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_modes(model))
        model.eval()
        for module in (*layers, *wrapped):
            module.train()
        for layer in layers:
            stack.callback(_Saved(layer).restore, running=True)
            stack.enter_context(_last_batch_only(layer))
        yield
