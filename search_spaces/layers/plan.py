"""The plan of a GraphLayer: a LayerGraph as a list of tensor functions for inputs of one rank, made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from search_spaces.layers.evaluate import channel_dim, elementwise, finish
from search_spaces.layers.graph import LEAVES, V0, V1, ZERO, LayerGraph, Node, X
from search_spaces.layers.ops import PARAMETERS
from search_spaces.layers.pointwise import UNARY

BUFFERS = {"mean": "running_mean", "std": "running_var", "rms": "running_square", "l1": "running_abs"}
Moment = Callable[[Tensor], tuple[Tensor, Any]]  # value -> (moment, how many numbers each of its entries comes from)


def parameter_names(graph: LayerGraph) -> list[str]:
    """The parameters that a layer of this graph has, in the order of its state dict."""
    vectors = [LEAVES[id] for id in (V0, V1) if id in graph.live]
    return ["weight", "bias"] * graph.affine + vectors + list(graph.parameters)


def buffer_names(graph: LayerGraph) -> dict[int, str]:
    """The running statistic of every live batch aggregate, by node id."""
    names: dict[int, str] = {}
    for id in graph.batch_aggregates():
        plain = BUFFERS[graph.node(id).op]
        earlier = sum(graph.node(other).op == graph.node(id).op for other in names)
        names[id] = f"{plain}_{earlier + 1}" if earlier else plain
    return names


@dataclass(frozen=True, slots=True)
class Step:
    """One node: `run(*sources)` is its value, or with a `buffer` for running statistics the moment and its count.

    first: whether no running statistic is updated before it.
    """

    node: Node
    target: int
    sources: tuple[int, ...]
    run: Callable[..., Any]
    buffer: str = ""
    first: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps over a list of `slots` values; slot 0 is x. shape: that of a channel vector."""

    steps: tuple[Step, ...]
    vectors: tuple[tuple[int, str], ...]
    zero: int | None
    output: int
    slots: int
    channel: int
    shape: tuple[int, ...]


def make_plan(graph: LayerGraph, channels: int, rank: int, layout: str, synchronize: bool) -> Plan:
    """The steps of `graph` for inputs of `rank` dimensions. A slot is used again when its value is spent."""
    channel = channel_dim(rank, layout)
    last_use = {source: id for id, node in graph.live_nodes for source in node.inputs}
    buffers = buffer_names(graph)
    slot = {X: 0}
    vectors: list[tuple[int, str]] = []
    for id in graph.live[: graph.live.index(graph.output) + 1]:
        if id in (ZERO, V0, V1):
            slot[id] = len(slot)
            if id != ZERO:
                vectors.append((slot[id], LEAVES[id]))
    for id, node in graph.live_nodes:
        if node.op in PARAMETERS:
            slot[id] = len(slot)
            vectors.append((slot[id], node.op))
    slots = len(slot)
    free: list[int] = []
    steps: list[Step] = []
    for id, node in graph.live_nodes:
        if node.op in PARAMETERS:
            continue
        sources = tuple(slot[source] for source in node.inputs)
        free += [slot[s] for s in set(node.inputs) if last_use[s] == id and s not in (X, graph.output)]
        if free:
            slot[id] = free.pop()
        else:
            slot[id], slots = slots, slots + 1
        if node.aggregate:
            run: Callable[..., Any] = _moment(node, rank, channel, graph.group_count(channels), synchronize)
            if id not in buffers:
                run = partial(_aggregate, node, run)
        else:
            run = _elementwise(node)
        first = id in buffers and not any(step.buffer for step in steps)
        steps.append(Step(node, slot[id], sources, run, buffers.get(id, ""), first))
    shape = tuple(-1 if d == channel else 1 for d in range(rank))
    return Plan(tuple(steps), tuple(vectors), slot.get(ZERO), slot[graph.output], slots, channel, shape)


_DIRECT: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "sub": torch.sub,
    "max": torch.maximum,
    "min": torch.minimum,
    "neg": torch.neg,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "abs": torch.abs,
    "square": torch.square,
    "erf": torch.erf,
    "softplus": nn.functional.softplus,
}


def _elementwise(node: Node) -> Callable[..., Tensor]:
    if node.op in _DIRECT:
        return _DIRECT[node.op]
    if node.op == "div" and not node.eps:
        return torch.div
    if node.op == "exp" and node.clamp is None:
        return torch.exp
    if node.op in UNARY and node.clamp is None and not UNARY[node.op].wide:
        return UNARY[node.op].value
    return lambda *inputs: elementwise(node, inputs)


def _aggregate(node: Node, moment: Moment, value: Tensor) -> Tensor:
    return finish(node, moment(widened(value))[0]).to(value.dtype)


def widened(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _moment(node: Node, rank: int, channel: int, groups: int, synchronize: bool) -> Moment:
    """The moment over the node's axes of values of `rank` dimensions, kept as dimensions of size 1."""
    space = [d for d in range(1, rank) if d != channel]
    axes, op = node.axes, node.op
    if axes == "batch":
        return partial(_over, op, _batch_mean if synchronize else _local_mean, [0, *space])
    if axes in ("group", "channel-group"):
        return partial(_over_groups, op, channel, groups, space if axes == "group" else [])
    dims = {"layer": [*space, channel], "instance": space, "channel": [channel]}[axes]
    return partial(_over, op, _local_mean, dims)


def _over(op: str, mean: Callable[..., tuple[Tensor, Any]], dims: list[int], value: Tensor) -> tuple[Tensor, Any]:
    if op == "mean":
        return mean(value, dims)
    if op == "rms":
        return mean(value.square(), dims)
    if op == "l1":
        return mean(value.abs(), dims)
    # Two passes: no cancellation for a mean far above the deviation; on CPUs also faster than torch.var.
    return mean((value - mean(value, dims)[0]).square(), dims)


def _over_groups(op: str, channel: int, groups: int, space: list[int], value: Tensor) -> tuple[Tensor, Any]:
    channels = value.shape[channel]
    if channels == 1:  # already the same for all channels
        return _over(op, _local_mean, space or [channel], value)
    if channel == 1 and space:
        shape = [value.shape[0], channels, *[1] * len(space)]
        moment, count = _over(op, _local_mean, [2], value.unflatten(1, (groups, -1)).flatten(2))
        return moment.expand(-1, -1, channels // groups).reshape(shape), count
    folded = value.unflatten(channel, (groups, -1))
    moment, count = _over(op, _local_mean, [channel + 1, *(d + (d > channel) for d in space)], folded)
    sizes = [channels // groups if d == channel + 1 else -1 for d in range(folded.ndim)]
    return moment.expand(sizes).flatten(channel, channel + 1), count


def _local_mean(value: Tensor, dims: list[int]) -> tuple[Tensor, Any]:
    if not dims:
        return value, 1
    mean = value.mean(dims, keepdim=True)
    return mean, value.numel() // max(mean.numel(), 1)


def _batch_mean(value: Tensor, dims: list[int]) -> tuple[Tensor, Any]:
    """The mean over the batches of all processes, which may differ in size; gradients flow between processes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return _local_mean(value, dims)
    total = value.sum(dims, keepdim=True)
    count = value.numel() // max(total.numel(), 1)
    packed = _SumOverProcesses.apply(torch.cat([total.reshape(-1), total.new_full((1,), count)]))
    return (packed[:-1] / packed[-1]).view_as(total), packed[-1]


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is summed likewise."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _SumOverProcesses.apply(gradient)
