"""The values of programs: their operations, the axes over which they vary, their shapes.

A value varies over a set of axes, its space: N the batch, G the groups of channels, K the channels of a group, S the
positions of a sample. x and dy vary over all four, a channel vector over G and K. Outside a program, tensors have the
shape of their space with G and K joined into one dimension of channels: [N, C, S], [N, C], [C], [N, G], [N], [] and so
on (`shape_of`). How many groups there are is known only when a program runs.

Operations, all total on floating-point numbers, with IEEE rules for what is undefined:

* leaves: `input` (attr: name, axes: its space), `const` (attr: a number that is part of the structure), `scalar`
  (attr: a number handed over at run time, such as an eps: it changes neither structure nor hash), `numel` (the
  product of the sizes of `axes`, as a number);
* reductions over `axes`, all of which the argument has: `sum`, and `var`, the mean squared distance from the mean,
  which an executor must not take as a difference of moments;
* `expand`: the same value with `axes` as its space;
* element-wise ones, listed in ELEMENTWISE with their arities; what is not obvious: `guard(b, e)` is b - e where b < 0
  and b + e elsewhere, and its derivative by b is 1; `clamp_max(a, c)` is at most c and passes gradients where a <= c;
  `sign(0)` is 0; `softplus(a)` is a above 20, as torch has it; i0e and i1e are the modified Bessel functions of the
  first kind times e^-|a|; `pow(a, b)` of a negative a is NaN unless b is an integer; max and min hand NaN on; `lt`,
  `le` and `eq` are conditions, which only `where(condition, a, b)` takes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest

N, G, K, S = 1, 2, 4, 8
C = G | K
FULL = N | C | S
_LETTERS = {N: "N", G: "G", K: "K", S: "S"}

LEAVES = ("input", "const", "scalar", "numel")
REDUCTIONS = ("sum", "var")
CONDITIONS = ("lt", "le", "eq")
COMMUTATIVE = frozenset({"add", "mul", "max", "min", "eq"})
ELEMENTWISE = {
    **dict.fromkeys(("neg", "abs", "sign", "square", "exp", "log", "sqrt", "rsqrt"), 1),
    **dict.fromkeys(("sigmoid", "tanh", "erf", "softplus", "sin", "cos", "atan", "i0e", "i1e"), 1),
    **dict.fromkeys(("add", "sub", "mul", "div", "pow", "max", "min", "guard", "clamp_max", *CONDITIONS), 2),
    "where": 3,
}
_ARITY = {**dict.fromkeys(LEAVES, 0), **dict.fromkeys((*REDUCTIONS, "expand"), 1), **ELEMENTWISE}


class Unsupported(UserError):
    """A layer that programs cannot express, or an executor cannot run; it still runs by `evaluate`."""


@dataclass(frozen=True, slots=True)
class Node:
    """One operation: `args` are positions of earlier nodes; `axes` and `attr` as the module's text says."""

    op: str
    args: tuple[int, ...] = ()
    axes: int = 0
    attr: str | float | None = None


def axes_text(axes: int) -> str:
    """`NGKS` for all axes, `-` for none."""
    return "".join(letter for axis, letter in _LETTERS.items() if axes & axis) or "-"


def parse_axes(text: str) -> int:
    """Inverse of `axes_text`. Errors: UserError."""
    axes = sum(axis for axis, letter in _LETTERS.items() if letter in text)
    if axes_text(axes) != text:
        raise UserError(text, "axes, such as NGKS, NS or -")
    return axes


def shape_of(space: int, n: int, groups: int, per_group: int, s: int) -> tuple[int, ...]:
    """The shape of a value outside a program: G and K are one dimension, missing axes are none."""
    channels = ([groups] if space & G else []) if not space & K else [groups * per_group]
    return (*([n] if space & N else []), *channels, *([s] if space & S else []))


def space_of(node: Node, args: list[int]) -> int:
    """The space of a node from those of its arguments. Errors: UserError for axes that do not fit."""
    if node.op == "input":
        space = node.axes
    elif node.op in ("const", "scalar", "numel"):
        return 0
    elif node.op in REDUCTIONS:
        if not node.axes or node.axes & ~args[0]:
            raise UserError(axes_text(node.axes), f"axes of {node.op} among those of its value, {axes_text(args[0])}")
        space = args[0] & ~node.axes
    elif node.op == "expand":
        if args[0] & ~node.axes:
            raise UserError(axes_text(node.axes), f"at least the axes of the value, {axes_text(args[0])}")
        space = node.axes
    else:
        space = functools.reduce(int.__or__, args)
    if space & K and not space & G:
        raise UserError(axes_text(space), "no value that varies within groups but not over them")
    return space


def check_node(at: int, node: Node) -> None:
    """Errors: Unsupported for an unknown operation, UserError for arguments or an attribute that it does not take."""
    if node.op not in _ARITY:
        raise Unsupported(node.op, f"an operation of programs ({one_of(_ARITY, 40)})", nearest(node.op, _ARITY))
    if len(node.args) != _ARITY[node.op] or not all(0 <= a < at for a in node.args):
        raise UserError(f"%{at} = {node.op} {node.args}", f"{_ARITY[node.op]} earlier values")
    wants = str if node.op == "input" else float if node.op in ("const", "scalar") else type(None)
    if not isinstance(node.attr, wants):
        raise UserError(f"%{at} = {node.op} {node.attr}", f"an attribute of type {wants.__name__}")
