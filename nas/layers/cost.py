"""What a layer costs inside an anchor: time of a training step and memory kept for the backward pass."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn


def activation_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward for one batch; parameters and buffers do not count.

    Each storage counts once. Deterministic, unlike a measurement of the allocator.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []  # holds what is saved, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    training = model.training
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images).sum()
    model.train(training)
    return sum(kept.values())


def step_milliseconds(model: nn.Module, images: Tensor, labels: Tensor, *, repeats: int = 7) -> float:
    """Median time of forward and backward for one batch, after a warm-up, on the device of `images`."""
    training = model.training
    model.train()
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        loss = nn.functional.cross_entropy(model(images), labels)
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        times.append(1e3 * (time.perf_counter() - begin))
    model.train(training)
    return statistics.median(times[2:])
