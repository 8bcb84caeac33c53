"""The value of a LayerGraph in numpy, with its derivative in one direction: small, fast, and without autograd.

Forward-mode differentiation: every value is a pair (value, change along the direction), the change None where it is
zero for certain. Values have the shape [B, C, S], space flattened, and stay reduced as in `evaluate`. Filters and
fingerprints ask thousands of graphs a second for a few hundred numbers each, where a tape of tensors would cost most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from search_spaces.layers.graph import V0, V1, ZERO, LayerGraph, Node, X
from search_spaces.layers.ops import PARAMETERS

Array = np.ndarray
Dual = tuple[Array, Array | None]
_ERF_SLOPE = 2 / np.pi**0.5


@dataclass(frozen=True, eq=False)
class Probe:
    """What a layer is evaluated on: x [B, C, S], v0 and v1 [C], a direction of the same shapes (None = none), and how
    many groups the channels fall into, whatever the graph says (so that few channels show what groups do). vectors:
    the further parameters with their change; what is missing is one and stays."""

    x: Array
    v0: Array
    v1: Array
    groups: int
    dx: Array | None = None
    dv0: Array | None = None
    dv1: Array | None = None
    vectors: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)


def random_probe(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    *,
    groups: int,
    scale: float = 1.0,
    offset: float = 0.0,
    direction: bool = False,
    dtype: type = np.float64,
) -> Probe:
    """x = scale * N(0, 1) + offset, v0 and v1 as a layer begins (0 and 1), and a normal direction of x if asked."""
    x: Array = (rng.standard_normal(shape) * scale + offset).astype(dtype)
    dx: Array | None = rng.standard_normal(shape).astype(dtype) if direction else None
    return Probe(x, np.zeros(shape[1], dtype), np.ones(shape[1], dtype), groups, dx)


def evaluate_dual(graph: LayerGraph, probe: Probe) -> Dual:
    """(value, derivative along the probe's direction) of the graph's output before weight and bias.

    Both broadcast to the shape of x; batch aggregates are taken from x. Aggregates of half-precision values are
    computed in single precision and rounded, as autocast does. Warnings of numpy are the caller's business.
    """
    values: dict[int, Dual] = {X: (probe.x, probe.dx), ZERO: (np.zeros((1, 1, 1), probe.x.dtype), None)}
    values[V0] = _over_channels(probe.v0, probe.dv0)
    values[V1] = _over_channels(probe.v1, probe.dv1)
    for id in graph.live:
        if id > V1:
            node = graph.node(id)
            if node.op in PARAMETERS:
                values[id] = _over_channels(*probe.vectors.get(node.op, (np.ones(1, probe.x.dtype), None)))
                continue
            a, da = values[node.inputs[0]]
            if node.axes:
                values[id] = _aggregate(node, a, da, probe.groups)
            elif len(node.inputs) == 2:
                values[id] = _BINARY[node.op](node, a, da, *values[node.inputs[1]])
            else:
                values[id] = _UNARY.get(node.op, _pointwise)(node, a, da)
    return values[graph.output]


def _over_channels(vector: Array, change: Array | None) -> Dual:
    return vector[None, :, None], None if change is None else change[None, :, None]


# -- element-wise ------------------------------------------------------------------------------------------------


def _times(slope: Array | float, change: Array | None) -> Array | None:
    return None if change is None else slope * change


def _plus(first: Array | None, second: Array | None) -> Array | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _negated(change: Array | None) -> Array | None:
    return None if change is None else -change


def _choose(first_wins: Array, tie: Array, da: Array | None, db: Array | None) -> Array | None:
    """The winner's change; half of each at a tie, as torch does."""
    if da is None and db is None:
        return None
    chosen = np.where(first_wins, 0.0 if da is None else da, 0.0 if db is None else db)
    if tie.any():
        half = (0.0 if da is None else da / 2) + (0.0 if db is None else db / 2)
        chosen = np.where(tie, half, chosen)
    return chosen


def _div(node: Node, a: Array, da: Array | None, b: Array, db: Array | None) -> Dual:
    if node.eps:
        b = b + np.where(b < 0, -node.eps, node.eps).astype(b.dtype)
    value = a / b
    return value, _plus(_times(1 / b, da), _times(-value / b, db))


def _mul(node: Node, a: Array, da: Array | None, b: Array, db: Array | None) -> Dual:
    return a * b, _plus(_times(b, da), _times(a, db))


def _pow(node: Node, a: Array, da: Array | None, b: Array, db: Array | None) -> Dual:
    base, sign = (np.abs(a) + a.dtype.type(node.eps), np.sign(a)) if node.eps else (a, np.ones_like(a))
    value = np.power(base, b)
    along_a = None if da is None else b * np.power(base, b - 1) * sign * da
    return value, _plus(along_a, None if db is None else value * np.log(base) * db)


_BINARY: dict[str, Callable[[Node, Array, Array | None, Array, Array | None], Dual]] = {
    "add": lambda node, a, da, b, db: (a + b, _plus(da, db)),
    "sub": lambda node, a, da, b, db: (a - b, _plus(da, _negated(db))),
    "mul": _mul,
    "div": _div,
    "max": lambda node, a, da, b, db: (np.maximum(a, b), _choose(a > b, a == b, da, db)),
    "pow": _pow,
    "min": lambda node, a, da, b, db: (np.minimum(a, b), _choose(a < b, a == b, da, db)),
}


def _sigmoid(a: Array) -> Array:
    return 1 / (1 + np.exp(-a))


def _unary_sigmoid(node: Node, a: Array, da: Array | None) -> Dual:
    value = _sigmoid(a)
    return value, _times(value * (1 - value), da)


def _unary_tanh(node: Node, a: Array, da: Array | None) -> Dual:
    value = np.tanh(a)
    return value, _times(1 - value * value, da)


def _unary_exp(node: Node, a: Array, da: Array | None) -> Dual:
    if node.clamp is None:
        value = np.exp(a)
        return value, _times(value, da)
    value = np.exp(np.minimum(a, node.clamp))
    return value, _times(value * (a <= node.clamp), da)


def _unary_log(node: Node, a: Array, da: Array | None) -> Dual:
    size, sign = np.abs(a) + node.eps, np.sign(a)
    return sign * np.log(size), None if da is None else da * (sign * sign / size)


def _unary_sqrt(node: Node, a: Array, da: Array | None) -> Dual:
    root, sign = np.sqrt(np.abs(a) + node.eps), np.sign(a)
    return sign * root, None if da is None else da * (sign * sign / (2 * root))


def _unary_rsqrt(node: Node, a: Array, da: Array | None) -> Dual:
    size = np.abs(a) + node.eps
    value = 1 / np.sqrt(size)
    return value, None if da is None else da * (-0.5 * value / size * np.sign(a))


def _unary_erf(node: Node, a: Array, da: Array | None) -> Dual:
    import torch  # numpy has no erf

    value = torch.from_numpy(np.ascontiguousarray(a)).erf().numpy()
    return value, _times(_ERF_SLOPE * np.exp(-a * a), da)


def _pointwise(node: Node, a: Array, da: Array | None) -> Dual:
    """The functions that torch has and numpy lacks; half precision in single, rounded."""
    import torch

    from search_spaces.layers.pointwise import unary, unary_slope

    wide = torch.from_numpy(np.ascontiguousarray(a, np.float64 if a.dtype == np.float64 else np.float32))
    value = unary(node, wide).numpy().astype(a.dtype)
    return value, None if da is None else unary_slope(node, wide).numpy().astype(a.dtype) * da


_UNARY: dict[str, Callable[[Node, Array, Array | None], Dual]] = {
    "neg": lambda node, a, da: (-a, _negated(da)),
    "abs": lambda node, a, da: (np.abs(a), None if da is None else da * np.sign(a)),
    "square": lambda node, a, da: (a * a, _times(2 * a, da)),
    "sigmoid": _unary_sigmoid,
    "tanh": _unary_tanh,
    "exp": _unary_exp,
    "log": _unary_log,
    "sqrt": _unary_sqrt,
    "rsqrt": _unary_rsqrt,
    "erf": _unary_erf,
    "softplus": lambda node, a, da: (np.logaddexp(a, 0), None if da is None else da * _sigmoid(a)),
}


# -- aggregates --------------------------------------------------------------------------------------------------

_DIMS: dict[str, tuple[int, ...]] = {
    "batch": (0, 2),
    "layer": (1, 2),
    "instance": (2,),
    "group": (2,),
    "channel": (1,),
    "channel-group": (),
}


def _mean(a: Array, axes: str, groups: int) -> Array:
    """The mean over the axes, spread again over the channels of a group."""
    if axes in ("group", "channel-group") and a.shape[1] > 1:
        batch, channels, space = a.shape
        folded = a.reshape(batch, groups, channels // groups, space)
        dims: tuple[int, ...] = (2, 3) if axes == "group" else (2,)
        size = channels // groups * (space if axes == "group" else 1)
        return np.repeat(np.add.reduce(folded, dims) / size, channels // groups, 1).reshape(batch, channels, -1)
    dims = _DIMS[axes]
    size = 1
    for dim in dims:
        size *= a.shape[dim]
    return np.add.reduce(a, dims, keepdims=True) / size if size > 1 else a


def _aggregate(node: Node, a: Array, da: Array | None, groups: int) -> Dual:
    half = a.dtype == np.float16
    if half:
        a, da = a.astype(np.float32), None if da is None else da.astype(np.float32)
    value, change = _moment(node, a, da, groups)
    if half:
        value, change = value.astype(np.float16), None if change is None else change.astype(np.float16)
    return value, change


def _moment(node: Node, a: Array, da: Array | None, groups: int) -> Dual:
    if node.op == "mean":
        return _mean(a, node.axes, groups), None if da is None else _mean(da, node.axes, groups)
    if node.op == "l1":
        return _mean(np.abs(a), node.axes, groups), None if da is None else _mean(np.sign(a) * da, node.axes, groups)
    if node.op == "std":
        a = a - _mean(a, node.axes, groups)
    value = np.sqrt(_mean(a * a, node.axes, groups) + node.eps)
    # The change of the mean inside a deviation drops out: deviations have mean zero.
    return value, None if da is None else _mean(a * da, node.axes, groups) / value
