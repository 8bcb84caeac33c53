"""A LayerGraph as a Program: the same values as `search_spaces.layers.evaluate`, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kernels.nodes import FULL, C, K, N, S, Unsupported
from kernels.program import Builder, Program
from search_spaces.common.errors import UserError
from search_spaces.layers.graph import LEAVES, V0, V1, ZERO, LayerGraph, Node, X
from search_spaces.layers.ops import PARAMETERS

LAYOUTS = ("channels-first", "tokens")
AXES = {"batch": N | S, "layer": C | S, "instance": S, "group": K | S, "channel": C, "channel-group": K}
_PER_POSITION = ("channel", "channel-group")
_ACROSS_POSITIONS = ("layer", "instance", "group")


@dataclass(frozen=True)
class Statistic:
    """A batch aggregate. id: its node in the graph. name: of the program's output with its batch moment in training
    and of the program's input with its running moment in evaluation, both [C]: the mean, mean square, variance
    (`unbiased` as the graph says) or mean absolute."""

    id: int
    name: str


@dataclass(frozen=True)
class Lowered:
    """A layer's program and how to run it.

    program: inputs `x` [N, C, S], the names in `parameters` [C] and in evaluation those of `statistics` [C]; outputs
    `y` [N, C, S] and in tracking training those of `statistics` [C]. flat: every position is a sample of its own
    (x is [B * positions, C, 1]), because the layer takes statistics at each position. statistics: in the order of
    `graph.batch_aggregates()`.
    """

    program: Program
    parameters: tuple[str, ...]
    statistics: tuple[Statistic, ...]
    flat: bool


def lower(
    graph: LayerGraph,
    *,
    layout: str = "channels-first",
    training: bool = True,
    track: bool = True,
    mixed: bool = False,
) -> Lowered:
    """The program of a layer.

    training: batch aggregates take their moments from x, otherwise from inputs that hold the running ones. track:
    whether running statistics are kept; without them evaluation is training without outputs of moments. mixed: admit
    graphs that take statistics both at each position and over positions; only the reference executes their programs.
    Errors: UserError for an unknown layout, Unsupported for a graph with an operation that programs lack, and for
    mixed ones.
    """
    if layout not in LAYOUTS:
        raise UserError(layout, f"a layout: {' or '.join(LAYOUTS)}")
    kinds = {node.axes for _, node in graph.live_nodes if node.aggregate}
    flat = bool(kinds & {*_PER_POSITION}) or (layout == "tokens" and not kinds & {*_ACROSS_POSITIONS})
    if flat and (across := sorted(kinds & {*_ACROSS_POSITIONS})):
        if not mixed:
            expected = f"statistics at each position or over positions, found also {', '.join(across)}"
            raise Unsupported(", ".join(sorted(kinds & {*_PER_POSITION})), expected)
        flat = False
    builder = Builder()
    values: dict[int, int] = {}
    names = {id: f"moment_{k}" for k, id in enumerate(graph.batch_aggregates())} if track else {}
    moments: dict[str, int] = {}
    for id in graph.live:
        if id < len(LEAVES):
            values[id] = _leaf(builder, id)
            continue
        node = graph.node(id)
        if node.op in PARAMETERS:
            values[id] = builder.input(node.op, C)
            continue
        inputs = [values[i] for i in node.inputs]
        if not node.aggregate:
            values[id] = elementwise(builder, node, inputs)
        elif id in names and not training:
            values[id] = _finish(builder, node, builder.input(names[id], C))
        else:
            moment, axes = _moment(builder, node, inputs[0])
            values[id] = _finish(builder, node, moment)
            if id in names:
                if graph.unbiased and node.op == "std" and axes:
                    rest = builder("max", builder("sub", builder.numel(axes), 1.0), 1.0)
                    moment = builder("mul", moment, builder("div", builder.numel(axes), rest))
                moments[names[id]] = builder.expand(moment, C)
    out = values[graph.output]
    if graph.affine:
        out = builder("add", builder("mul", out, builder.input("weight", C)), builder.input("bias", C))
    program = builder.program({"y": builder.expand(out, FULL), **moments})
    parameters = ["weight", "bias"] * graph.affine + [LEAVES[id] for id in (V0, V1) if id in graph.live]
    parameters += graph.parameters
    return Lowered(program, tuple(parameters), tuple(Statistic(id, name) for id, name in names.items()), flat)


def _leaf(builder: Builder, id: int) -> int:
    if id == ZERO:
        return builder.const(0.0)
    return builder.input(LEAVES[id], FULL if id == X else C)


def _moment(builder: Builder, node: Node, value: int) -> tuple[int, int]:
    """(The moment of a value over the node's axes before any root, the axes that it really reduces)."""
    axes = AXES[node.axes] & builder.spaces[value]
    if node.op == "std":
        return builder.var(value, axes), axes
    if node.op != "mean":
        value = builder("square" if node.op == "rms" else "abs", value)
    return builder.mean(value, axes), axes


def _finish(builder: Builder, node: Node, moment: int) -> int:
    if node.op in ("rms", "std"):
        return builder("sqrt", _plus_eps(builder, moment, node.eps))
    return moment


def _plus_eps(builder: Builder, value: int, eps: float) -> int:
    return builder("add", value, builder.scalar(eps)) if eps else value


def elementwise(builder: Builder, node: Node, inputs: list[int]) -> int:
    """An element-wise node of a graph with its guard or clamp. Errors: Unsupported, naming the operation."""
    if node.op in _DIRECT:
        return builder(node.op, *inputs)
    if node.op not in _COMPOSED:
        raise Unsupported(node.op, "an operation that programs can express; the layer still runs by `evaluate`")
    return _COMPOSED[node.op](builder, node, inputs)


Rule = Callable[[Builder, Node, list[int]], int]
_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772  # Klambauer et al. 2017, arXiv 1706.02515


def _guarded(b: Builder, value: int, eps: float) -> int:
    return b("guard", value, b.scalar(eps)) if eps else value


def _of_size(b: Builder, node: Node, inputs: list[int]) -> int:
    """log, sqrt and rsqrt act on |a| + eps; the first two then take the sign of a."""
    size = b(node.op, _plus_eps(b, b("abs", inputs[0]), node.eps))
    return size if node.op == "rsqrt" else b("mul", b("sign", inputs[0]), size)


def _exp(b: Builder, node: Node, a: int) -> int:
    return b("exp", a if node.clamp is None else b("clamp_max", a, b.scalar(node.clamp)))


def _of_exponentials(b: Builder, node: Node, inputs: list[int]) -> int:
    """sinh and cosh, their input between -clamp and clamp."""
    a = inputs[0]
    if node.clamp is not None:
        bound = b.scalar(abs(node.clamp))
        a = b("neg", b("clamp_max", b("neg", b("clamp_max", a, bound)), bound))
    return b("mul", 0.5, b("sub" if node.op == "sinh" else "add", b("exp", a), b("exp", b("neg", a))))


def _power(b: Builder, node: Node, inputs: list[int]) -> int:
    if not node.eps:
        return b("pow", *inputs)
    return b("exp", b("mul", inputs[1], b("log", _plus_eps(b, b("abs", inputs[0]), node.eps))))


def _asinh(b: Builder, a: int) -> int:
    negative = b("lt", a, 0.0)
    size = b("where", negative, b("neg", a), a)  # |a|, with slope 1 at 0
    log = b("log", b("add", size, b("sqrt", b("add", b("square", a), 1.0))))
    return b("where", negative, b("neg", log), log)


def _sinc(b: Builder, a: int) -> int:
    zero = b("eq", a, 0.0)
    safe = b("where", zero, 1.0, a)
    return b("where", zero, 1.0, b("div", b("sin", safe), safe))


def _log_sigmoid(b: Builder, a: int) -> int:
    return b("sub", b("min", a, 0.0), b("log", b("add", 1.0, b("exp", b("neg", b("abs", a))))))


def _linear_unit(b: Builder, a: int, alpha: float, scale: float = 1.0) -> int:
    """scale a above 0, scale alpha (e^a - 1) elsewhere."""
    below = b("mul", scale * alpha, b("sub", b("exp", b("clamp_max", a, 0.0)), 1.0))
    return b("where", b("le", a, 0.0), below, b("mul", scale, a))


def _hard_sigmoid(b: Builder, a: int) -> int:
    below_one = b("clamp_max", b("add", b("mul", 0.2, a), 0.5), 1.0)
    return b("neg", b("clamp_max", b("neg", below_one), 0.0))


# Graph operations that are one operation of programs, and those that are several. A new one joins one of these tables;
# if programs lack it, also ELEMENTWISE of `program`, DERIVATIVES of `autodiff` and ELEMENTWISE of `reference`.
_DIRECT = frozenset(
    (
        *("add", "sub", "mul", "max", "min", "neg", "sigmoid", "tanh", "abs", "square", "erf", "softplus"),
        *("sin", "cos", "atan", "i0e", "i1e"),
    )
)
# Near zero, differences such as 1 - erf(a) and e^a - 1 keep the absolute error of the whole, not the relative one.
_COMPOSED: dict[str, Rule] = {
    "div": lambda b, node, args: b("div", args[0], _guarded(b, args[1], node.eps)),
    "exp": lambda b, node, args: _exp(b, node, args[0]),
    "log": _of_size,
    "sqrt": _of_size,
    "rsqrt": _of_size,
    "zeros": lambda b, node, args: b.const(0.0),
    "ones": lambda b, node, args: b.const(1.0),
    "identity": lambda b, node, args: args[0],
    "cube": lambda b, node, args: b("mul", args[0], b("square", args[0])),
    "sinh": _of_exponentials,
    "cosh": _of_exponentials,
    "expm1": lambda b, node, args: b("sub", _exp(b, node, args[0]), 1.0),
    "asinh": lambda b, node, args: _asinh(b, args[0]),
    "sinc": lambda b, node, args: _sinc(b, args[0]),
    "gaussian": lambda b, node, args: b("exp", b("neg", b("square", args[0]))),
    "erfc": lambda b, node, args: b("sub", 1.0, b("erf", args[0])),
    "logsigmoid": lambda b, node, args: _log_sigmoid(b, args[0]),
    "relu": lambda b, node, args: b("where", b("le", args[0], 0.0), 0.0, args[0]),  # slope 0 at 0, unlike max
    "elu": lambda b, node, args: _linear_unit(b, args[0], 1.0),
    "selu": lambda b, node, args: _linear_unit(b, args[0], _SELU_ALPHA, _SELU_SCALE),
    "silu": lambda b, node, args: b("mul", args[0], b("sigmoid", args[0])),
    "softsign": lambda b, node, args: b("div", args[0], b("add", b("abs", args[0]), 1.0)),
    "hardsigmoid": lambda b, node, args: _hard_sigmoid(b, args[0]),
    "reciprocal": lambda b, node, args: b("div", 1.0, _guarded(b, args[0], node.eps)),
    "logabs": lambda b, node, args: b("log", _plus_eps(b, b("abs", args[0]), node.eps)),
    "pow": _power,
}
