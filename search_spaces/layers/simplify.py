"""Rewrites of layer graphs that keep every value: the same layer with fewer nodes, in one canonical order.

All rewrites are exact in real arithmetic with the graph's own guards, so in fp64 they agree but for rounding, wherever
the graph is finite. Gradients agree too, except that at a tie or a kink (a measure-zero set) another subgradient may
be taken. No rewrite adds nodes or, but for `sub` and `l1`, operations that the graph's preset could lack.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch

from search_spaces.layers.graph import LEAVES, V0, V1, ZERO, LayerGraph, Node, X
from search_spaces.layers.ops import OPERATIONS, POINTWISE
from search_spaces.layers.patterns import FULL, NON_NEGATIVE, POSITIVE, UNKNOWN, Pattern
from search_spaces.layers.patterns import node_sign as sign_of
from search_spaces.layers.pointwise import power, unary

_ONE = Node("exp", (ZERO,))
EVEN = ("abs", "square", "rsqrt", "cos", "cosh", "sinc", "gaussian", "i0e", "logabs")  # f(-a) = f(a)
# mean_outer(mean_inner(a)) = mean_outer(a): the outer axes contain the inner ones.
_WITHIN = {
    "batch": ("batch", "instance"),
    "layer": ("layer", "instance", "group", "channel", "channel-group"),
    "group": ("group", "instance", "channel-group"),
    "instance": ("instance",),
    "channel": ("channel", "channel-group"),
    "channel-group": ("channel-group",),
}


def simplify(graph: LayerGraph) -> LayerGraph:
    """The same layer in its simplest known form: no dead nodes, equal values once, constants of zero folded.

    Idempotent; graphs that differ in dead nodes, the order of nodes or of commuting inputs come out equal. What is
    checked beyond that: `neg neg`, sums with zero, products with zero or one, `max(a, a)`, `abs` of what is provably
    non-negative, even functions of `neg` and `abs`, `a / a` of a provably positive `a`, aggregates of values that are
    already reduced, means of means, and shifts inside a standard deviation.
    """
    while True:
        builder = _Builder()
        ids = {id: id for id in range(len(LEAVES))}
        for id, node in graph.live_nodes:
            ids[id] = builder.value(replace_inputs(node, tuple(ids[i] for i in node.inputs)))
        result = _in_order(graph, builder.nodes, ids[graph.output])
        if result == graph:
            return graph
        if not builder.rewrote:
            return result
        graph = result


def replace_inputs(node: Node, inputs: tuple[int, ...]) -> Node:
    """The node on other inputs."""
    return node if inputs == node.inputs else Node(node.op, inputs, node.axes, node.eps, node.clamp)


class _Builder:
    """Makes values one after the other; equal ones once (hash-consing), simpler ones where a rewrite applies."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.rewrote = False
        self._ids: dict[Node, int] = {}
        self._patterns = [Pattern(True, FULL, True), Pattern(), Pattern(channel=FULL), Pattern(channel=FULL)]
        self._signs = [UNKNOWN, NON_NEGATIVE, UNKNOWN, UNKNOWN]
        self._constants: dict[int, float] = {ZERO: 0.0}
        self._by_constant: dict[float, int] = {0.0: ZERO}

    def value(self, node: Node) -> int:
        """The id of a value equal to `node`."""
        if len(node.inputs) == 2 and node.inputs[0] > node.inputs[1] and OPERATIONS[node.op].commutative:
            node = replace_inputs(node, (node.inputs[1], node.inputs[0]))
        known = self._ids.get(node)
        if known is not None:
            return known
        simpler = self._simpler(node)
        if simpler is None:
            id = self._add(node)
        else:
            self.rewrote = True
            id = simpler if isinstance(simpler, int) else self.value(simpler)
        self._ids[node] = id
        return id

    def _add(self, node: Node) -> int:
        if node.inputs and all(i in self._constants for i in node.inputs):
            constant = _constant(node, [self._constants[i] for i in node.inputs])
            if constant is not None:
                if constant in self._by_constant:
                    self.rewrote = True
                    return self._by_constant[constant]
                self._constants[len(LEAVES) + len(self.nodes)] = constant
                self._by_constant[constant] = len(LEAVES) + len(self.nodes)
        self.nodes.append(node)
        joined = Pattern() if node.inputs else self._patterns[V1]
        for i in node.inputs:
            joined = joined.join(self._patterns[i])
        self._patterns.append(joined.reduced(node.axes) if node.axes else joined)
        self._signs.append(sign_of(node, [self._signs[i] for i in node.inputs]))
        return len(LEAVES) + len(self.nodes) - 1

    def _node(self, id: int) -> Node | None:
        return self.nodes[id - len(LEAVES)] if id >= len(LEAVES) else None

    def _below(self, id: int, *ops: str) -> int | None:
        """The input of value `id` if that is one of `ops` (with one input)."""
        node = self._node(id)
        return node.inputs[0] if node is not None and node.op in ops else None

    def _simpler(self, node: Node) -> Node | int | None:
        """A rewrite of `node`: a value that exists, or another node; None if none applies."""
        if node.axes:
            return self._aggregate(node)
        if not node.inputs:
            return None
        return self._unary(node) if len(node.inputs) == 1 else self._binary(node, *node.inputs)

    def _unary(self, node: Node) -> Node | int | None:
        a = node.inputs[0]
        if node.op in ("identity", "zeros", "ones"):
            return a if node.op == "identity" else ZERO if node.op == "zeros" else _ONE
        if node.op == "neg":
            inner = self._node(a)
            if inner is not None and inner.op == "sub":
                return Node("sub", (inner.inputs[1], inner.inputs[0]))
            return self._below(a, "neg")
        if node.op in ("abs", "relu") and self._signs[a] >= NON_NEGATIVE:
            return a
        if node.op in EVEN:
            even = self._below(a, "neg", "abs")
            return None if even is None else replace_inputs(node, (even,))
        return None

    def _binary(self, node: Node, a: int, b: int) -> Node | int | None:
        op = node.op
        if op in ("add", "sub"):
            return self._sum(op, a, b)
        if op in ("max", "min"):
            return self._extremum(op, a, b)
        if op == "mul":
            if ZERO in (a, b):
                return ZERO
            for one, other in ((a, b), (b, a)):
                if self._constants.get(one) == 1.0:
                    return other
            if a == b:
                return Node("square", (a,))
            first, second = self._below(a, "neg"), self._below(b, "neg")
            return None if first is None or second is None else Node("mul", (first, second))
        if op == "pow":
            return None
        safe = node.eps > 0 or self._signs[b] == POSITIVE
        if a == ZERO and safe:
            return ZERO
        if node.eps:
            return None
        if a == b and safe:
            return _ONE
        return a if self._constants.get(b) == 1.0 else None

    def _sum(self, op: str, a: int, b: int) -> Node | int | None:
        minus_a, minus_b = self._below(a, "neg"), self._below(b, "neg")
        if op == "add":
            if ZERO in (a, b):
                return b if a == ZERO else a
            return ZERO if a == minus_b or b == minus_a else None
        if b == ZERO:
            return a
        if a == b:
            return ZERO
        if a == ZERO:
            return Node("neg", (b,))
        if minus_b is not None:
            return Node("sub", (minus_b, minus_a)) if minus_a is not None else Node("add", (a, minus_b))
        return None

    def _extremum(self, op: str, a: int, b: int) -> int | None:
        if a == b:
            return a
        for first, second in ((a, b), (b, a)):
            if self._signs[first] >= NON_NEGATIVE and self._not_positive(second):
                return first if op == "max" else second
            inner = self._node(second)
            if inner is not None and inner.op in ("max", "min") and first in inner.inputs:
                return second if inner.op == op else first  # absorption
        return None

    def _not_positive(self, id: int) -> bool:
        inner = self._below(id, "neg")
        return id == ZERO or (inner is not None and self._signs[inner] >= NON_NEGATIVE)

    def _aggregate(self, node: Node) -> Node | int | None:
        a = node.inputs[0]
        inner = self._node(a)
        reduced = self._reduced(a, node.axes)
        if node.op == "mean":
            if reduced:
                return a
            if inner is not None and inner.op == "mean" and inner.axes in _WITHIN[node.axes]:
                return replace_inputs(node, inner.inputs)
            return None
        if node.op == "l1" and (reduced or self._signs[a] >= NON_NEGATIVE):
            return Node("abs", (a,)) if reduced else Node("mean", (a,), node.axes)
        if node.op == "std":
            if reduced:
                return None if a == ZERO else replace_inputs(node, (ZERO,))
            if inner is not None and inner.op in ("add", "sub"):  # a shift moves no deviation
                for shift, rest in (inner.inputs, inner.inputs[::-1]):
                    if self._reduced(shift, node.axes):
                        return replace_inputs(node, (rest,))
            even = self._below(a, "neg")
        else:
            even = self._below(a, "neg", "abs")
        return None if even is None else replace_inputs(node, (even,))

    def _reduced(self, id: int, axes: str) -> bool:
        """Whether the value is constant over the axes."""
        return self._patterns[id].reduced(axes) == self._patterns[id]


def _constant(node: Node, inputs: list[float]) -> float | None:
    """The value of a node whose inputs are numbers; None where it is not finite."""
    try:
        value = _number(node, *inputs)
    except (OverflowError, ValueError, ZeroDivisionError):
        return None
    return value + 0.0 if math.isfinite(value) else None  # -0 is 0


def _number(node: Node, a: float, b: float = 0.0) -> float:
    op, eps = node.op, node.eps
    if op in POINTWISE:
        inputs = [torch.tensor(value, dtype=torch.float64) for value in (a, b)[: len(node.inputs)]]
        return (power if op == "pow" else unary)(node, *inputs).item()
    if op == "log":
        return math.copysign(math.log(abs(a) + eps), a) if a else 0.0
    if op == "sqrt":
        return math.copysign(math.sqrt(abs(a) + eps), a) if a else 0.0
    if op == "div":
        return a / (b + (-eps if b < 0 else eps))
    if op == "exp":
        return math.exp(a if node.clamp is None else min(a, node.clamp))
    if op == "std":
        return math.sqrt(eps)
    if op == "rms":
        return math.sqrt(a * a + eps)
    return {
        "add": lambda: a + b,
        "sub": lambda: a - b,
        "mul": lambda: a * b,
        "max": lambda: max(a, b),
        "min": lambda: min(a, b),
        "neg": lambda: -a,
        "sigmoid": lambda: 1 / (1 + math.exp(-a)),
        "tanh": lambda: math.tanh(a),
        "abs": lambda: abs(a),
        "square": lambda: a * a,
        "rsqrt": lambda: 1 / math.sqrt(abs(a) + eps),
        "erf": lambda: math.erf(a),
        "softplus": lambda: math.log1p(math.exp(-abs(a))) + max(a, 0.0),
        "mean": lambda: a,
        "l1": lambda: abs(a),
    }[op]()


def _in_order(graph: LayerGraph, nodes: list[Node], output: int) -> LayerGraph:
    """The layer with what is live of `nodes`, by height and, within a height, by operation and inputs."""
    live, stack = set(), [output]
    while stack:
        id = stack.pop()
        if id >= len(LEAVES) and id not in live:
            live.add(id)
            stack += nodes[id - len(LEAVES)].inputs
    height = dict.fromkeys((X, ZERO, V0, V1), 0)
    for id in sorted(live):
        height[id] = 1 + max((height[i] for i in nodes[id - len(LEAVES)].inputs), default=0)
    ids = {id: id for id in range(len(LEAVES))}
    ordered: list[Node] = []
    for _, level in itertools.groupby(sorted(live, key=height.__getitem__), key=height.__getitem__):
        ready = []
        for id in level:
            node = nodes[id - len(LEAVES)]
            inputs = tuple(ids[i] for i in node.inputs)
            if len(inputs) == 2 and inputs[0] > inputs[1] and OPERATIONS[node.op].commutative:
                inputs = inputs[::-1]
            clamp = math.inf if node.clamp is None else node.clamp
            ready.append(((node.op, node.axes, inputs, node.eps, clamp), id, replace_inputs(node, inputs)))
        for _, id, node in sorted(ready, key=lambda entry: entry[0]):
            ids[id] = len(LEAVES) + len(ordered)
            ordered.append(node)
    return replace(graph, nodes=tuple(ordered), output=ids[output])
