"""What programs simplify while they are made: constants, signs, neutral elements, and factors of sums.

Only what keeps NaN and infinities where they were: a product with 0 stays a product.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from kernels.nodes import Node, S

if TYPE_CHECKING:
    from kernels.program import Builder

_DEEPEST = 100  # levels of a product in which a sum looks for factors


def folded(builder: Builder, op: str, ids: list[int]) -> int | None:
    """A simpler value that equals `op` on values, or None."""
    numbers = [builder.constant(id) for id in ids]
    if op in _FOLD and all(number is not None for number in numbers):
        try:
            return builder.const(float(_FOLD[op](*numbers)))
        except (ArithmeticError, ValueError):  # 0 / 0, exp(1000): left to the executor
            return None
    first = builder.nodes[ids[0]]
    if op == "neg":
        return first.args[0] if first.op == "neg" else None
    if op in ("mul", "div"):  # signs move outwards, where sums swallow them
        bare = [builder.nodes[id].args[0] if builder.nodes[id].op == "neg" else id for id in ids]
        if bare != ids:
            value = builder(op, *bare)
            return value if bare[0] != ids[0] and bare[1] != ids[1] else builder("neg", value)
    if op == "where":
        return ids[1 if numbers[0] else 2] if numbers[0] is not None else ids[1] if ids[1] == ids[2] else None
    if op == "add":
        for id, number, other in zip(ids, numbers, ids[::-1], strict=True):
            if number == 0:
                return other
            if builder.nodes[id].op == "neg":
                return builder("sub", other, builder.nodes[id].args[0])
    elif op == "sub":
        second = builder.nodes[ids[1]]
        if numbers[1] == 0:
            return ids[0]
        if second.op == "neg":
            return builder("add", ids[0], second.args[0])
        if numbers[0] == 0:
            return builder("neg", ids[1])
    elif op == "div" and numbers[1] == 1:
        return ids[0]
    elif op == "mul":
        for number, other in zip(numbers, ids[::-1], strict=True):
            if number in (1, -1):
                return other if number == 1 else builder("neg", other)
            inner = builder.nodes[other]
            if number is not None and inner.op == "mul":
                for a, b in (inner.args, inner.args[::-1]):
                    if (known := builder.constant(a)) is not None:
                        return builder("mul", number * known, b)
    return None


def summed(builder: Builder, value: int, axes: int) -> int:
    """The sum over `axes`, with what does not vary over some of them in front of it: fewer and shallower sums."""
    absent = axes & ~builder.spaces[value]
    if absent:
        return builder("mul", summed(builder, value, axes & ~absent), builder.numel(absent))
    if not axes:
        return value
    lacking = _lacking(builder, value, axes, {}, _DEEPEST)
    if not lacking:
        node = builder.nodes[value]
        if node.op == "neg":
            return builder("neg", summed(builder, node.args[0], axes))
        return builder.insert(Node("sum", (value,), axes))
    common = functools.reduce(int.__and__, lacking)
    over = common or max(lacking, key=lambda axes: (axes & S, axes))
    inside, outside = _split(builder, value, over, {}, _DEEPEST)
    if inside is None or inside == value:  # the factor lies too deep
        return builder.insert(Node("sum", (value,), axes))
    total = summed(builder, inside, over)
    return summed(builder, total if outside is None else builder("mul", outside, total), axes & ~over)


def _lacking(builder: Builder, value: int, axes: int, known: dict[int, set[int]], levels: int) -> set[int]:
    """Of each factor of a value that lacks some of `axes`, which."""
    if value not in known:
        node = builder.nodes[value]
        lacks = axes & ~builder.spaces[value] if builder.constant(value) != 1 else 0  # the 1 of 1 / a stays
        if lacks == axes or node.op not in ("mul", "div", "neg") or not levels:
            known[value] = {lacks} if lacks else set()
        else:
            known[value] = set().union(*(_lacking(builder, a, axes, known, levels - 1) for a in node.args))
    return known[value]


def _split(
    builder: Builder, value: int, over: int, known: dict[int, tuple], levels: int
) -> tuple[int | None, int | None]:
    """A value as a product: (the factors that vary over some of `over`, the others); None for none of them."""
    if value in known:
        return known[value]
    node = builder.nodes[value]
    pair: tuple[int | None, int | None] = (value, None)
    if not builder.spaces[value] & over:
        pair = (None, value)
    elif node.op == "neg" and levels:
        inside, outside = _split(builder, node.args[0], over, known, levels - 1)
        pair = (inside, builder.const(-1.0) if outside is None else builder("neg", outside))
    elif node.op in ("mul", "div") and levels:
        parts = zip(*(_split(builder, a, over, known, levels - 1) for a in node.args), strict=True)
        inside, outside = (_combined(builder, node.op, *part) for part in parts)
        pair = (value if outside is None else inside, outside)  # unsplit values stay as they are
    known[value] = pair
    return pair


def _combined(builder: Builder, op: str, a: int | None, b: int | None) -> int | None:
    if b is None:
        return a
    if a is None:
        return b if op == "mul" else builder("div", 1.0, b)
    return builder(op, a, b)


_FOLD: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "max": max,
    "min": min,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
    "neg": lambda a: -a,
    "abs": abs,
    "sign": lambda a: (a > 0) - (a < 0),
    "square": lambda a: a * a,
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "rsqrt": lambda a: 1 / math.sqrt(a),
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)),
    "tanh": math.tanh,
    "erf": math.erf,
    "sin": math.sin,
    "cos": math.cos,
    "atan": math.atan,
    "softplus": lambda a: a if a > 20 else math.log1p(math.exp(a)),
}
