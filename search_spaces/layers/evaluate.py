"""What a LayerGraph means: its value in torch, in any dtype. Every executor is tested against this.

Values are kept reduced: a mean over space stays [B, C, 1, 1] and broadcasts where it is used, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from search_spaces.common.errors import UserError
from search_spaces.layers import pointwise
from search_spaces.layers.graph import LEAVES, V0, V1, ZERO, LayerGraph, Node, X
from search_spaces.layers.ops import PARAMETERS

LAYOUTS = ("channels-first", "tokens")
BatchMean = Callable[[Tensor, Sequence[int]], Tensor]


def evaluate(
    graph: LayerGraph,
    x: Tensor,
    params: Mapping[str, Tensor] | None = None,
    stats: Mapping[int, Tensor] | None = None,
    *,
    layout: str = "channels-first",
    collect: MutableMapping[int, Tensor] | None = None,
    batch_mean: BatchMean | None = None,
) -> Tensor:
    """The layer's output for `x`.

    x: [B, C, ...] or, with layout `tokens`, [B, N, C]. params: `weight`, `bias`, `v0`, `v1` and `ops.PARAMETERS` of
    shape [C]; what is missing has its initial value (1, 0, 0, 1, and ones). stats: the moment of every live batch
    aggregate by node id, [C] (mean, mean of squares, variance or mean of absolutes); without them they are taken from
    `x`, and `collect` receives them. batch_mean: how means over the batch are taken (several devices). Errors:
    UserError for a layout that does not fit.
    """
    check_layout(x, layout)
    params = params or {}
    values: dict[int, Tensor] = {X: x}
    for id in graph.live[: graph.live.index(graph.output) + 1]:
        if id == ZERO:
            values[id] = x.new_zeros([1] * x.ndim)
        elif id in (V0, V1):
            given = params.get(LEAVES[id])
            values[id] = over_channels(
                given if given is not None else x.new_full((1,), float(id == V1)), x.ndim, layout
            )
        elif id != X:
            node = graph.node(id)
            if node.op in PARAMETERS:
                given = params.get(node.op)
                values[id] = over_channels(given if given is not None else x.new_ones(1), x.ndim, layout)
                continue
            inputs = [values[i] for i in node.inputs]
            if node.aggregate:
                batch = node.axes == "batch" and node.inputs[0] in graph.depends_on_x
                known = stats.get(id) if stats is not None and batch else None
                if known is not None:
                    moment = over_channels(known, x.ndim, layout)
                else:
                    groups = graph.group_count(x.shape[channel_dim(x.ndim, layout)])
                    moment = aggregate(node, inputs[0], groups, layout, batch_mean)
                    if collect is not None and batch:
                        collect[id] = moment
                values[id] = finish(node, moment)
            else:
                values[id] = elementwise(node, inputs)
    out = values[graph.output].expand_as(x)
    if graph.affine:
        if "weight" in params:
            out = out * over_channels(params["weight"], x.ndim, layout)
        if "bias" in params:
            out = out + over_channels(params["bias"], x.ndim, layout)
    return out


def check_layout(x: Tensor, layout: str) -> None:
    """UserError unless `x` has the rank that `layout` needs, and a channel."""
    if layout not in LAYOUTS:
        raise UserError(layout, f"a layout: {' or '.join(LAYOUTS)}")
    if layout == "tokens" and x.ndim != 3:
        raise UserError(str(tuple(x.shape)), "tokens of shape [B, N, C]")
    if layout == "channels-first" and x.ndim < 2:
        raise UserError(str(tuple(x.shape)), "an input of shape [B, C, ...]")
    if x.shape[channel_dim(x.ndim, layout)] == 0:
        raise UserError(str(tuple(x.shape)), "at least one channel")


def channel_dim(ndim: int, layout: str) -> int:
    """The dimension of the channels."""
    return ndim - 1 if layout == "tokens" else 1


def over_channels(vector: Tensor, ndim: int, layout: str) -> Tensor:
    """A vector [C] (or of one number) shaped so that it broadcasts over the channels of a tensor of rank `ndim`."""
    shape = [1] * ndim
    shape[channel_dim(ndim, layout)] = -1
    return vector.reshape(shape)


def elementwise(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """The value of an element-wise node."""
    a = inputs[0]
    op, eps = node.op, node.eps
    if len(inputs) == 2:
        b = inputs[1]
        if op == "add":
            return a + b
        if op == "mul":
            return a * b
        if op == "sub":
            return a - b
        if op == "max":
            return torch.maximum(a, b)
        if op == "min":
            return torch.minimum(a, b)
        if op == "pow":
            return pointwise.power(node, a, b)
        return a / torch.where(b < 0, b - eps, b + eps) if eps else a / b  # eps stays exact in fp64
    if op == "log":
        return a.sign() * (a.abs() + eps).log()
    if op == "sqrt":
        return a.sign() * (a.abs() + eps).sqrt()
    if op == "rsqrt":
        return (a.abs() + eps).rsqrt()
    if op == "exp":
        return (a if node.clamp is None else a.clamp(max=node.clamp)).exp()
    if op == "neg":
        return -a
    return _UNARY[op](a) if op in _UNARY else pointwise.unary(node, a)


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "abs": torch.abs,
    "square": torch.square,
    "erf": torch.erf,
    "softplus": torch.nn.functional.softplus,
}


def aggregate(node: Node, value: Tensor, groups: int, layout: str, batch_mean: BatchMean | None = None) -> Tensor:
    """The moment of `value` over the node's axes, before any root: mean, mean square, variance or mean absolute."""
    channel = channel_dim(value.ndim, layout)
    space = [d for d in range(1, value.ndim) if d != channel]
    if node.axes in ("group", "channel-group") and value.shape[channel] > 1:
        folded = value.unflatten(channel, (groups, -1))  # the channels of a group stand behind the group
        dims = [channel + 1] + [d + (d > channel) for d in (space if node.axes == "group" else [])]
        moment = _moment(node.op, folded, dims, None)
        per_group = value.shape[channel] // groups
        return moment.expand(*(per_group if d == channel + 1 else -1 for d in range(folded.ndim))).flatten(
            channel, channel + 1
        )
    dims = {
        "batch": [0, *space],
        "layer": [*space, channel],
        "instance": space,
        "group": space,
        "channel": [channel],
        "channel-group": [channel],
    }[node.axes]
    return _moment(node.op, value, dims, batch_mean if node.axes == "batch" else None)


def _moment(op: str, value: Tensor, dims: Sequence[int], batch_mean: BatchMean | None) -> Tensor:
    def mean(v: Tensor) -> Tensor:
        if batch_mean is not None:
            return batch_mean(v, dims)
        return v.mean(dim=list(dims), keepdim=True) if dims else v

    if op == "mean":
        return mean(value)
    if op == "rms":
        return mean(value.square())
    if op == "l1":
        return mean(value.abs())
    return mean((value - mean(value)).square())  # two passes: no cancellation for a mean far above the deviation


def finish(node: Node, moment: Tensor) -> Tensor:
    """The aggregate's value from its moment: rms and std take the root."""
    return (moment + node.eps).sqrt() if node.op in ("rms", "std") else moment
