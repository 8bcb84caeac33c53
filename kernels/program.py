"""Program: the intermediate form of a fused layer, its text and its hash.

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
  `sign(0)` is 0; `softplus(a)` is a above 20, as torch has it; max and min hand NaN on; `lt`, `le` and `eq` are
  conditions, which only `where(condition, a, b)` takes.

Outputs are pairs (name, node); `y` and `dx` vary over all axes, `d<parameter>` and `moment_<k>` over channels.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest

N, G, K, S = 1, 2, 4, 8
C = G | K
FULL = N | C | S
_LETTERS = {N: "N", G: "G", K: "K", S: "S"}
HEADER = "nasforge program 1"

LEAVES = ("input", "const", "scalar", "numel")
REDUCTIONS = ("sum", "var")
CONDITIONS = ("lt", "le", "eq")
COMMUTATIVE = frozenset({"add", "mul", "max", "min", "eq"})
ELEMENTWISE = {
    **dict.fromkeys(("neg", "abs", "sign", "square", "exp", "log", "sqrt", "rsqrt"), 1),
    **dict.fromkeys(("sigmoid", "tanh", "erf", "softplus"), 1),
    **dict.fromkeys(("add", "sub", "mul", "div", "max", "min", "guard", "clamp_max", *CONDITIONS), 2),
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


@dataclass(frozen=True)
class Program:
    """Nodes in topological order, all of them needed, and the named outputs. Made by a Builder or by `parse`.

    Equal programs have equal text. Errors: UserError for nodes that make no program.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        for at, node in enumerate(self.nodes):
            _check(at, node)
        names = [name for name, _ in self.outputs]
        if not names or len(set(names)) < len(names):
            raise UserError(str(names), "at least one output, no name twice")
        for name, at in self.outputs:
            if not 0 <= at < len(self.nodes):
                raise UserError(at, f"a node from 0 to {len(self.nodes) - 1} as output {name}")
        if len(self.inputs) < sum(node.op == "input" for node in self.nodes):
            raise UserError("inputs", "no input twice")
        _ = self.spaces

    @functools.cached_property
    def spaces(self) -> tuple[int, ...]:
        """The space of every node."""
        spaces: list[int] = []
        for node in self.nodes:
            spaces.append(space_of(node, [spaces[a] for a in node.args]))
        return tuple(spaces)

    @functools.cached_property
    def depths(self) -> tuple[int, ...]:
        """The longest chain of big reductions (over values that vary over S) under every node, itself included.

        A value of depth d needs d passes over x before it is known; an output of depth d is written in pass d + 1.
        """
        depths: list[int] = []
        for node in self.nodes:
            below = max((depths[a] for a in node.args), default=0)
            depths.append(below + (node.op in REDUCTIONS and bool(self.spaces[node.args[0]] & S)))
        return tuple(depths)

    @property
    def depth(self) -> int:
        """The largest depth of an output."""
        return max(self.depths[at] for _, at in self.outputs)

    @functools.cached_property
    def inputs(self) -> dict[str, int]:
        """The node of every input by name, in order."""
        return {str(node.attr): at for at, node in enumerate(self.nodes) if node.op == "input"}

    @functools.cached_property
    def scalars(self) -> tuple[float, ...]:
        """The numbers handed over at run time, in the order of their nodes."""
        return tuple(float(node.attr or 0.0) for node in self.nodes if node.op == "scalar")

    def output(self, name: str) -> int:
        """The node of an output. Errors: UserError with the nearest name."""
        found = dict(self.outputs)
        if name not in found:
            raise UserError(name, f"an output ({one_of(found)})", nearest(name, found))
        return found[name]

    # -- text and identity -------------------------------------------------------------------------------------

    def to_text(self) -> str:
        """One node or output a line; `parse` inverts it exactly."""
        return "\n".join([*self._lines(values=True), ""])

    @functools.cached_property
    def structural_hash(self) -> str:
        """SHA-256 of the text without the values of scalars: what code may be cached under; the same everywhere."""
        return hashlib.sha256("\n".join(self._lines(values=False)).encode()).hexdigest()

    def _lines(self, values: bool) -> Iterable[str]:
        yield HEADER
        for at, node in enumerate(self.nodes):
            parts = [f"%{at} = {node.op}"]
            if node.op in ("input", "numel", "expand", *REDUCTIONS):
                parts.append(axes_text(node.axes))
            if node.attr is not None and (values or node.op != "scalar"):
                parts.append(node.attr if isinstance(node.attr, str) else repr(node.attr))
            yield " ".join([*parts, *(f"%{a}" for a in node.args)])
        yield from (f"{name} = %{at}" for name, at in self.outputs)


def parse(text: str) -> Program:
    """The program that `to_text` wrote. Errors: UserError naming the line that is wrong."""
    lines = text.strip().splitlines()
    if not lines or lines[0] != HEADER:
        raise UserError(lines[0][:60] if lines else "", f"a text that begins with `{HEADER}`")
    nodes: list[Node] = []
    outputs: list[tuple[str, int]] = []
    for line in lines[1:]:
        try:
            left, right = line.split(" = ")
            if not left.startswith("%"):
                outputs.append((left, int(right.removeprefix("%"))))
                continue
            op, *parts = right.split()
            if outputs or left != f"%{len(nodes)}":
                raise ValueError(f"expected %{len(nodes)}")
            args = tuple(int(part[1:]) for part in parts if part.startswith("%"))
            rest = [part for part in parts if not part.startswith("%")]
            has_axes = op in ("input", "numel", "expand", *REDUCTIONS)
            axes = parse_axes(rest.pop(0)) if has_axes else 0
            attr: str | float | None = rest.pop(0) if rest else None
            if rest:
                raise ValueError("too many words")
            nodes.append(Node(op, args, axes, float(attr) if attr and op != "input" else attr))
        except (ValueError, IndexError, KeyError) as error:
            raise UserError(line, f"a line of a program ({error})") from None
    return Program(tuple(nodes), tuple(outputs))


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


def _check(at: int, node: Node) -> None:
    if node.op not in _ARITY:
        raise Unsupported(node.op, f"an operation of programs ({one_of(_ARITY, 40)})", nearest(node.op, _ARITY))
    if len(node.args) != _ARITY[node.op] or not all(0 <= a < at for a in node.args):
        raise UserError(f"%{at} = {node.op} {node.args}", f"{_ARITY[node.op]} earlier values")
    wants = str if node.op == "input" else float if node.op in ("const", "scalar") else type(None)
    if not isinstance(node.attr, wants):
        raise UserError(f"%{at} = {node.op} {node.attr}", f"an attribute of type {wants.__name__}")


# -- making programs --------------------------------------------------------------------------------------------


class Builder:
    """Makes values one after the other, equal ones once; `builder("mul", a, b)` is an element-wise operation.

    Values are positions in `nodes`; numbers among the arguments become constants. Arguments of commuting operations
    are sorted, constants folded, and additions of 0, products with 1 and double negations dropped. A product with 0
    stays, because it hands NaN and infinities on. What does not vary over some summed axes leaves the sum over these,
    so that reductions stay shallow and are shared.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.spaces: list[int] = []
        self._digests: list[bytes] = []
        self._known: dict[Node, int] = {}

    def __call__(self, op: str, *args: int | float) -> int:
        """An element-wise operation on values (int) and constants (float)."""
        ids = [self.const(a) if isinstance(a, float) else a for a in args]
        folded = self._fold(op, ids)
        if folded is not None:
            return folded
        if op in COMMUTATIVE:
            ids.sort(key=lambda id: (self._digests[id], id))
        return self._add(Node(op, tuple(ids)))

    def input(self, name: str, space: int) -> int:
        """A tensor from outside."""
        return self._add(Node("input", (), space, name))

    def const(self, value: float) -> int:
        """A number that is part of the structure."""
        return self._add(Node("const", (), 0, float(value) + 0.0))

    def scalar(self, value: float) -> int:
        """A number handed over at run time; equal numbers are one."""
        return self._add(Node("scalar", (), 0, float(value) + 0.0))

    def numel(self, axes: int) -> int:
        """The product of the sizes of `axes`."""
        return self._add(Node("numel", (), axes)) if axes else self.const(1.0)

    def expand(self, value: int, space: int) -> int:
        """The value with `space` as its space."""
        return value if self.spaces[value] == space else self._add(Node("expand", (value,), space))

    def sum(self, value: int, axes: int) -> int:
        """The sum over `axes`; those that the value lacks multiply by their sizes."""
        absent = axes & ~self.spaces[value]
        if absent:
            return self("mul", self.sum(value, axes & ~absent), self.numel(absent))
        if not axes:
            return value
        lacking = self._lacking(value, axes, {}, _DEEPEST)
        if not lacking and self.nodes[value].op == "neg":
            return self("neg", self.sum(self.nodes[value].args[0], axes))
        if not lacking:
            return self._add(Node("sum", (value,), axes))
        common = functools.reduce(int.__and__, lacking)
        over = common or max(lacking, key=lambda axes: (axes & S, axes))
        inside, outside = self._split(value, over, {}, _DEEPEST)
        if inside is None or inside == value:  # the factor lies too deep
            return self._add(Node("sum", (value,), axes))
        total = self.sum(inside, over)
        return self.sum(total if outside is None else self("mul", outside, total), axes & ~over)

    def _lacking(self, value: int, axes: int, known: dict[int, set[int]], levels: int) -> set[int]:
        """Of each factor of a value that lacks some of `axes`, which."""
        if value not in known:
            node = self.nodes[value]
            lacks = axes & ~self.spaces[value] if self._number(value) != 1 else 0  # the 1 of 1 / a stays
            if lacks == axes or node.op not in ("mul", "div", "neg") or not levels:
                known[value] = {lacks} if lacks else set()
            else:
                known[value] = set().union(*(self._lacking(a, axes, known, levels - 1) for a in node.args))
        return known[value]

    def _split(self, value: int, over: int, known: dict[int, tuple], levels: int) -> tuple[int | None, int | None]:
        """A value as a product: (the factors that vary over some of `over`, the others); None for none of them."""
        if value in known:
            return known[value]
        node = self.nodes[value]
        pair: tuple[int | None, int | None] = (value, None)
        if not self.spaces[value] & over:
            pair = (None, value)
        elif node.op == "neg" and levels:
            inside, outside = self._split(node.args[0], over, known, levels - 1)
            pair = (inside, self.const(-1.0) if outside is None else self("neg", outside))
        elif node.op in ("mul", "div") and levels:
            parts = zip(*(self._split(a, over, known, levels - 1) for a in node.args), strict=True)
            inside, outside = (self._combined(node.op, *part) for part in parts)
            pair = (value if outside is None else inside, outside)  # unsplit values stay as they are
        known[value] = pair
        return pair

    def _combined(self, op: str, a: int | None, b: int | None) -> int | None:
        if b is None:
            return a
        if a is None:
            return b if op == "mul" else self("div", 1.0, b)
        return self(op, a, b)

    def mean(self, value: int, axes: int) -> int:
        """The mean over `axes`; those that the value lacks do not matter. Its sum keeps all factors: the mean of equal
        numbers should be that number, so that their distance from it is nothing."""
        axes &= self.spaces[value]
        total = self._add(Node("sum", (value,), axes)) if axes else value
        return self("div", total, self.numel(axes))

    def var(self, value: int, axes: int) -> int:
        """The biased variance over `axes`; those that the value lacks do not matter. Over none it is 0, also of NaN."""
        axes &= self.spaces[value]
        return self._add(Node("var", (value,), axes)) if axes else self.const(0.0)

    def copy(self, node: Node, args: Iterable[int]) -> int:
        """The node of another program or builder on `args`."""
        return self._add(Node(node.op, tuple(args), node.axes, node.attr))

    def program(self, outputs: Mapping[str, int]) -> Program:
        """The program of these outputs: nodes by first use, depth first."""
        place: dict[int, int] = {}
        nodes: list[Node] = []
        stack = list(outputs.values())[::-1]
        while stack:
            id = stack[-1]
            waiting = [] if id in place else [a for a in self.nodes[id].args if a not in place]
            if waiting:
                stack += reversed(waiting)
                continue
            stack.pop()
            if id not in place:
                node = self.nodes[id]
                place[id] = len(nodes)
                nodes.append(Node(node.op, tuple(place[a] for a in node.args), node.axes, node.attr))
        return Program(tuple(nodes), tuple((name, place[id]) for name, id in outputs.items()))

    def _add(self, node: Node) -> int:
        id = self._known.get(node)
        if id is None:
            id = self._known[node] = len(self.nodes)
            self.spaces.append(space_of(node, [self.spaces[a] for a in node.args]))
            about = f"{node.op} {node.axes} {None if node.op == 'scalar' else node.attr!r}"
            below = b"".join(self._digests[a] for a in node.args)
            self._digests.append(hashlib.blake2b(about.encode() + below, digest_size=8).digest())
            self.nodes.append(node)
        return id

    def _number(self, id: int) -> float | None:
        node = self.nodes[id]
        return float(node.attr or 0.0) if node.op == "const" else None

    def _fold(self, op: str, ids: list[int]) -> int | None:
        numbers = [self._number(id) for id in ids]
        if op in _FOLD and all(number is not None for number in numbers):
            try:
                return self.const(float(_FOLD[op](*numbers)))
            except (ArithmeticError, ValueError):  # 0 / 0, exp(1000): left to the executor
                return None
        first = self.nodes[ids[0]]
        if op == "neg":
            return first.args[0] if first.op == "neg" else None
        if op in ("mul", "div"):  # signs move outwards, where sums swallow them
            bare = [self.nodes[id].args[0] if self.nodes[id].op == "neg" else id for id in ids]
            if bare != ids:
                value = self(op, *bare)
                return value if bare[0] != ids[0] and bare[1] != ids[1] else self("neg", value)
        if op == "where":
            return ids[1 if numbers[0] else 2] if numbers[0] is not None else ids[1] if ids[1] == ids[2] else None
        if op == "add":
            for id, number, other in zip(ids, numbers, ids[::-1], strict=True):
                if number == 0:
                    return other
                if self.nodes[id].op == "neg":
                    return self("sub", other, self.nodes[id].args[0])
        elif op == "sub":
            second = self.nodes[ids[1]]
            if numbers[1] == 0:
                return ids[0]
            if second.op == "neg":
                return self("add", ids[0], second.args[0])
            if numbers[0] == 0:
                return self("neg", ids[1])
        elif op == "div" and numbers[1] == 1:
            return ids[0]
        elif op == "mul":
            for number, other in zip(numbers, ids[::-1], strict=True):
                if number in (1, -1):
                    return other if number == 1 else self("neg", other)
                inner = self.nodes[other]
                if number is not None and inner.op == "mul":
                    for a, b in (inner.args, inner.args[::-1]):
                        if (known := self._number(a)) is not None:
                            return self("mul", number * known, b)
        return None


_DEEPEST = 100  # levels of a product in which a sum looks for factors
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
    "softplus": lambda a: a if a > 20 else math.log1p(math.exp(a)),
}
