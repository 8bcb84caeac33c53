"""Counts that need no numbers: parameters, multiply-adds, depth and paths, from one pass over shapes alone."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from zero_cost.errors import NoValue
from zero_cost.network import Output, first_tensor, random_state, training
from zero_cost.watch import CONVOLUTION_CALLS, EMBEDDING_CALLS, LINEAR_CALLS, NORM_CALLS, ZERO_CALLS, Watch, argument


@dataclass(frozen=True)
class StaticCosts:
    """params: trainable scalars. macs: multiply-adds of convolutions and linear layers for one sample, biases not
    counted. live_macs: of those on a path from input to output. depth: their number on the longest such path. paths:
    how many such paths there are (0: the output does not depend on the input)."""

    params: int
    macs: int
    live_macs: int
    depth: int
    paths: int


def static_costs(model: nn.Module, inputs: torch.Tensor, output: Output = first_tensor) -> StaticCosts:
    """Counts of `model` for one sample of the shape and type of `inputs` [B, ...]; exact integers.

    The pass runs on the meta device (no arithmetic); a model that cannot do that runs on its own device. What it sees
    are calls of convolutions and linear layers, from modules or plain functions. A product with the number 0 (an
    operation `none` written so) ends a path, like a tensor of zeros.
    """
    params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tensors = [*model.parameters(), *model.buffers()]
    own = tensors[0].device if tensors else inputs.device
    try:
        counts = _trace(model, inputs, torch.device("meta"), output)
    except Exception:  # code that looks at values or makes tensors on a device of its own
        counts = _trace(model, inputs, own, output)
    return StaticCosts(params, *counts)


def _trace(model: nn.Module, inputs: torch.Tensor, device: torch.device, output: Output) -> tuple[int, int, int, int]:
    state: dict[str, torch.Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        moved = tensor.detach().to(device)
        state[name] = moved.clone() if moved.data_ptr() == tensor.data_ptr() and device.type != "meta" else moved
    calls: list[tuple[Any, int]] = []  # (autograd node or None, multiply-adds)
    sources: list[torch.Tensor] = []

    def handle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in NORM_CALLS:  # no multiply-adds, and one sample has no statistics
            return argument("input", 0, args, kwargs)
        result = func(*args, **kwargs)
        if func in CONVOLUTION_CALLS or func in LINEAR_CALLS:
            inside, weight = argument("input", 0, args, kwargs), argument("weight", 1, args, kwargs)
            transposed = "transpose" in func.__name__
            outputs = weight.shape[1] * argument("groups", 6, args, kwargs, 1) if transposed else weight.shape[0]
            # Each output channel reads numel / outputs weights; a transposed one does so once per input position.
            positions = inside.numel() // weight.shape[0] if transposed else result.numel() // outputs
            calls.append((result.grad_fn, positions * weight.numel()))
        elif func in EMBEDDING_CALLS and not inputs.is_floating_point() and not sources:
            result = result.detach().requires_grad_()
            sources.append(result)
        elif func in ZERO_CALLS and any(type(a) in (int, float) and a == 0 for a in args):
            return result.detach()
        return result

    sample = inputs[:1].detach().to(device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(training(model))
        if device.type != "meta":
            stack.enter_context(random_state(device, 0))
        if inputs.is_floating_point():
            sources.append(sample.requires_grad_())
        with Watch(handle):
            logits = output(functional_call(model, state, (sources[0] * 1 if sources else sample,)))
        macs = sum(count for _, count in calls)
        if not sources:
            raise NoValue("integer inputs without an embedding: paths are unknown")
        live, depth, paths = _longest(logits.grad_fn, sources[0], [node for node, _ in calls])
    return macs, sum(count for node, count in calls if node in live), depth, paths


def _longest(root: Any, source: torch.Tensor, counted: list[Any]) -> tuple[set[Any], int, int]:
    """(nodes on paths from the source to the root, longest path in counted nodes, number of paths)."""
    counted_nodes = set(counted)
    best: dict[Any, tuple[float, int]] = {None: (-math.inf, 0)}
    waiting = [(root, False)]
    while waiting:
        node, ready = waiting.pop()
        if node in best:
            continue
        following = [n for n, _ in node.next_functions]
        if not ready:
            waiting += [(node, True), *((n, False) for n in following if n not in best)]
        elif getattr(node, "variable", None) is source:
            best[node] = (0, 1)
        else:
            depth = max((best[n][0] for n in following), default=-math.inf)
            best[node] = (depth + (node in counted_nodes), sum(best[n][1] for n in following))
    depth, paths = best[root]
    alive = {node for node, (_, count) in best.items() if count}
    return alive, int(depth) if paths else 0, paths
