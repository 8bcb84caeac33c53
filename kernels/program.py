"""Program: the intermediate form of a fused layer, its text and its hash; Builder, which makes programs.

Outputs are pairs (name, node); `y` and `dx` vary over all axes, `d<parameter>` and `moment_<k>` over channels. What
nodes there are and what they mean stands in `nodes`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kernels import algebra
from kernels.nodes import (
    COMMUTATIVE,
    FULL,
    REDUCTIONS,
    Node,
    S,
    Unsupported,
    axes_text,
    check_node,
    parse_axes,
    space_of,
)
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest

__all__ = ["FULL", "HEADER", "Builder", "Program", "Unsupported", "parse"]
HEADER = "nasforge program 1"


@dataclass(frozen=True)
class Program:
    """Nodes in topological order, all of them needed, and the named outputs. Made by a Builder or by `parse`.

    Equal programs have equal text. Errors: UserError for nodes that make no program.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        for at, node in enumerate(self.nodes):
            check_node(at, node)
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
        folded = algebra.folded(self, op, ids)
        if folded is not None:
            return folded
        if op in COMMUTATIVE:
            ids.sort(key=lambda id: (self._digests[id], id))
        return self.insert(Node(op, tuple(ids)))

    def input(self, name: str, space: int) -> int:
        """A tensor from outside."""
        return self.insert(Node("input", (), space, name))

    def const(self, value: float) -> int:
        """A number that is part of the structure."""
        return self.insert(Node("const", (), 0, float(value) + 0.0))

    def scalar(self, value: float) -> int:
        """A number handed over at run time; equal numbers are one."""
        return self.insert(Node("scalar", (), 0, float(value) + 0.0))

    def numel(self, axes: int) -> int:
        """The product of the sizes of `axes`."""
        return self.insert(Node("numel", (), axes)) if axes else self.const(1.0)

    def expand(self, value: int, space: int) -> int:
        """The value with `space` as its space."""
        return value if self.spaces[value] == space else self.insert(Node("expand", (value,), space))

    def sum(self, value: int, axes: int) -> int:
        """The sum over `axes`; those that the value lacks multiply by their sizes."""
        return algebra.summed(self, value, axes)

    def mean(self, value: int, axes: int) -> int:
        """The mean over `axes`; those that the value lacks do not matter. Its sum keeps all factors: the mean of equal
        numbers should be that number, so that their distance from it is nothing."""
        axes &= self.spaces[value]
        total = self.insert(Node("sum", (value,), axes)) if axes else value
        return self("div", total, self.numel(axes))

    def var(self, value: int, axes: int) -> int:
        """The biased variance over `axes`; those that the value lacks do not matter. Over none it is 0, also of NaN."""
        axes &= self.spaces[value]
        return self.insert(Node("var", (value,), axes)) if axes else self.const(0.0)

    def copy(self, node: Node, args: Iterable[int]) -> int:
        """The node of another program or builder on `args`."""
        return self.insert(Node(node.op, tuple(args), node.axes, node.attr))

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

    def constant(self, value: int) -> float | None:
        """The number of a constant, None of other values."""
        node = self.nodes[value]
        return float(node.attr or 0.0) if node.op == "const" else None

    def insert(self, node: Node) -> int:
        """The value of a node as it is, without any algebra; known ones are found again."""
        id = self._known.get(node)
        if id is None:
            id = self._known[node] = len(self.nodes)
            self.spaces.append(space_of(node, [self.spaces[a] for a in node.args]))
            about = f"{node.op} {node.axes} {None if node.op == 'scalar' else node.attr!r}"
            below = b"".join(self._digests[a] for a in node.args)
            self._digests.append(hashlib.blake2b(about.encode() + below, digest_size=8).digest())
            self.nodes.append(node)
        return id
