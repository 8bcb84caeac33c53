"""Layers as formulas: printed as text, and read back exactly.

`x / max(std[batch](x), v1 * x + std[instance](x))` is EvoNorm-B0. A formula says what the live nodes compute; the
layer's settings (affine, groups, momentum, ...) are arguments of `parse_formula`.

    x, v0, v1, 0, 1            the input, the channel vectors, zeros, and 1 = exp(0)
    alpha, beta, ..., zeta     further channel vectors that begin as ones (`ops.PARAMETERS`)
    a + b, a - b, a * b, -a    a - b is a + (-b), as in the paper's primitives; `sub(a, b)` is one node
    a / b, a /{eps=1e-3} b     without eps: 0 if b is provably positive, else 1e-5
    a^2, max(a, b), exp(a)     and the other element-wise operations by name
    std[group](a)              mean, rms, std and l1 with their axes
    log[eps=1e-3](a), std[group, eps=0](a), exp[clamp=30](a)    a guard that is not the operation's default
    s = std[group](x); x / s   a sub-expression with a name
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.layers.graph import CLAMPED, GUARDED, LEAVES, ZERO, LayerGraph, Node, make_node
from search_spaces.layers.ops import AXES, MOMENTS, OPERATIONS, PARAMETERS, arity
from search_spaces.layers.patterns import with_guards

SUM, PRODUCT, UNARY, ATOM = range(4)  # how tightly a printed piece holds together
ONE = make_node("exp", (ZERO,))
DEEPEST = 60  # brackets within brackets
DIVISION_EPS = 1e-5  # the guard of a division that states none and needs one


@dataclass(frozen=True, slots=True)
class Piece:
    """A printed value. negated: of `-a`, the piece `a`."""

    text: str
    level: int = ATOM
    negated: Piece | None = None


def format_formula(graph: LayerGraph) -> str:
    """The live graph as text; `parse_formula` gives back the same nodes, with equal ones merged."""
    graph = merge_equal(graph)
    guards = {id: node.eps for id, node in with_guards(graph, DIVISION_EPS).live_nodes if node.op == "div"}

    def render(id: int, node: Node, inputs: Sequence[Piece]) -> Piece:
        if not inputs:
            return Piece(node.op)
        a, b = inputs[0], inputs[-1]
        if node == ONE:
            return Piece("1")
        if node.op == "add":
            sign, b = ("-", b.negated) if b.negated else ("+", b)
            return Piece(f"{a.text} {sign} {_within(b, PRODUCT)}", SUM)
        if node.op == "mul":
            return Piece(f"{_within(a, PRODUCT)} * {_within(b, UNARY)}", PRODUCT)
        if node.op == "div":
            guard = "" if node.eps == guards[id] else f"{{eps={_number(node.eps)}}}"
            return Piece(f"{_within(a, PRODUCT)} /{guard} {_within(b, UNARY)}", PRODUCT)
        if node.op == "neg":
            return Piece(f"-{_within(a, UNARY)}", UNARY, a)
        if node.op == "square":
            return Piece(f"{_within(a, ATOM)}^2", UNARY)
        options = [node.axes] if node.axes else []
        if node.eps != make_node(node.name, node.inputs).eps:
            options.append(f"eps={_number(node.eps)}")
        if node.clamp is not None:
            options.append(f"clamp={_number(node.clamp)}")
        stated = f"[{', '.join(options)}]" if options else ""
        return Piece(f"{node.op}{stated}({', '.join(p.text for p in inputs)})")

    definitions, output = print_graph(graph, LEAVES, render, repeated=12, long=100)
    return "; ".join([*(f"{name} = {text}" for name, text in definitions), output])


def print_graph(
    graph: LayerGraph,
    leaves: Sequence[str],
    render: Callable[[int, Node, Sequence[Piece]], Piece],
    repeated: int,
    long: int,
    name_of: Callable[[str, int], str] = lambda prefix, number: prefix + (str(number) if number > 1 else ""),
) -> tuple[list[tuple[str, str]], str]:
    """(name, text) of every sub-expression that deserves a name, and the text of the output.

    Named is what is used more than once and has over `repeated` characters, or has over `long`; so the whole text is
    linear in the number of nodes.
    """
    pieces = {id: Piece("0" if id == ZERO else leaf) for id, leaf in enumerate(leaves)}
    uses = Counter(source for _, node in graph.live_nodes for source in node.inputs)
    taken: Counter[str] = Counter()
    definitions: list[tuple[str, str]] = []
    for id, node in graph.live_nodes:
        piece = render(id, node, [pieces[source] for source in node.inputs])
        if id != graph.output and len(piece.text) > (repeated if uses[id] > 1 else long):
            prefix = node.op[0] if node.aggregate else "t"
            taken[prefix] += 1
            name = name_of(prefix, taken[prefix])
            definitions.append((name, piece.text))
            piece = Piece(name)
        pieces[id] = piece
    return definitions, pieces[graph.output].text


def merge_equal(graph: LayerGraph) -> LayerGraph:
    """The live graph with equal nodes merged: the same values, fewer nodes."""
    graph = graph.compact()
    ids = {id: id for id in range(len(LEAVES))}
    merged: dict[Node, int] = {}
    for id, node in graph.live_nodes:
        node = replace(node, inputs=tuple(ids[source] for source in node.inputs))
        ids[id] = merged.setdefault(node, len(LEAVES) + len(merged))
    return replace(graph, nodes=tuple(merged), output=ids[graph.output])


def _within(piece: Piece, level: int) -> str:
    return piece.text if piece.level >= level else f"({piece.text})"


def _number(value: float) -> str:
    return re.sub(r"e([+-])0*", lambda found: "e" + found[1].strip("+"), repr(float(value)).removesuffix(".0"))


# -- reading -------------------------------------------------------------------------------------------------------


def parse_formula(text: str, **settings: Any) -> LayerGraph:
    """The graph of a formula; settings: fields of LayerGraph (affine, groups, group_size, momentum, unbiased).

    Equal sub-expressions become one node. Errors: UserError with the formula, the column (from 1) and what was found.
    """
    reader = _Reader(text)
    output = reader.formula()
    graph = LayerGraph(tuple(reader.nodes), output, **settings)
    guarded = with_guards(graph, DIVISION_EPS)
    nodes = [n if id in reader.stated else g for id, (n, g) in enumerate(zip(graph.nodes, guarded.nodes), len(LEAVES))]
    return merge_equal(replace(graph, nodes=tuple(nodes)))


_TOKEN = re.compile(r"(?P<number>(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)|\*\*|[-+*/^(){}\[\],;=]")
_FUNCTIONS = (*(name for name, operation in OPERATIONS.items() if operation.arity), *MOMENTS)
_VALUES = {"x": 0, "v0": 2, "v1": 3}


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    start: int
    kind: str = ""  # "name", "number", or "" for a sign and for the end


class _Reader:
    """Recursive descent; precedence from loose to tight: + -, * /, unary -, ^2."""

    def __init__(self, text: str):
        self.text = text
        self.tokens: list[_Token] = []
        self.at = 0
        self.depth = 0
        self.names = dict(_VALUES)
        self.nodes: list[Node] = []
        self.ids: dict[tuple[Node, bool], int] = {}
        self.stated: set[int] = set()  # divisions with an eps of their own
        if not isinstance(text, str) or not text.strip():
            raise UserError(text, "a formula such as `x * sigmoid(v1 * x) / std[group](x)`")
        start = 0
        while start < len(text):
            if text[start].isspace():
                start += 1
                continue
            found = _TOKEN.match(text, start)
            if found is None:
                self.fail("a formula of names, numbers and signs", _Token(text[start], start))
            self.tokens.append(_Token(found[0], start, found.lastgroup or ""))
            start = found.end()
        self.tokens.append(_Token("", len(text)))

    # what stands here

    @property
    def here(self) -> _Token:
        return self.tokens[self.at]

    def next(self) -> _Token:
        token = self.here
        self.at += bool(token.text)  # the end stays
        return token

    def accept(self, *signs: str) -> str:
        return self.next().text if self.here.text in signs else ""

    def expect(self, sign: str, why: str = "") -> None:
        if not self.accept(sign):
            self.fail(f"`{sign}`{why}", self.here)

    def fail(self, expected: str, token: _Token, suggestion: str | None = None) -> NoReturn:
        found = repr(token.text) if token.text else "the end"
        shown = self.text if len(self.text) <= 160 else f"...{self.text[max(0, token.start - 60) :][:120]}..."
        raise UserError(shown, f"{expected} at column {token.start + 1}, found {found}", suggestion)

    # what it means

    def add(self, node: Node, stated: bool = False) -> int:
        key = (node, stated)
        if key not in self.ids:
            self.ids[key] = len(LEAVES) + len(self.nodes)
            self.nodes.append(node)
            if stated:
                self.stated.add(self.ids[key])
        return self.ids[key]

    def formula(self) -> int:
        while True:
            is_definition = self.here.kind == "name" and self.tokens[self.at + 1].text == "="
            name = self.next() if is_definition else None
            if name is not None:
                if name.text in self.names or name.text in (*_FUNCTIONS, *PARAMETERS):
                    self.fail("a new name", name)
                self.next()
            value = self.sum()
            if name is None:
                if self.here.text:
                    self.fail("an operator or the end", self.here)
                return value
            self.names[name.text] = value
            self.expect(";", f" after the definition of {name.text}")

    def sum(self) -> int:
        value = self.product()
        while sign := self.accept("+", "-"):
            other = self.product()
            other = other if sign == "+" else self.add(make_node("neg", (other,)))
            value = self.add(make_node("add", (value, other)))
        return value

    def product(self) -> int:
        value = self.unary()
        while sign := self.accept("*", "/"):
            eps = self.options("{", "}", ("eps",)).get("eps") if sign == "/" and self.here.text == "{" else None
            op = "mul" if sign == "*" else "div"
            value = self.add(make_node(op, (value, self.unary()), eps), stated=eps is not None)
        return value

    def unary(self) -> int:
        minuses = 0
        while self.accept("-"):
            minuses += 1
        value = self.atom()
        while self.accept("^", "**"):
            if self.here.text != "2":
                self.fail("2 (the only power)", self.here)
            self.next()
            value = self.add(make_node("square", (value,)))
        for _ in range(minuses):
            value = self.add(make_node("neg", (value,)))
        return value

    def atom(self) -> int:
        token = self.next()
        if token.text == "(":
            self.enter(token)
            value = self.sum()
            self.leave()
            return value
        if token.kind == "number":
            if float(token.text) not in (0, 1):
                self.fail("0 or 1 (make other constants of them, such as 1 + 1)", token)
            return self.add(ONE) if float(token.text) else ZERO
        if token.text in _FUNCTIONS:
            return self.call(token)
        if token.text in PARAMETERS:
            return self.add(make_node(token.text, ()))
        if token.kind == "name":
            if token.text not in self.names:
                known = [*self.names, *PARAMETERS, *_FUNCTIONS]
                self.fail("a value or a function", token, nearest(token.text, known))
            return self.names[token.text]
        self.fail("a value", token)

    def call(self, function: _Token) -> int:
        op, axes = function.text, ""
        allowed = [*(["eps"] if op in GUARDED else []), *(["clamp"] if op in CLAMPED else [])]
        given: dict[str, float] = {}
        if op in MOMENTS:
            self.expect("[", f" and the axes of {op}, such as {op}[group]")
            start = self.here
            axes = self.next().text
            while start.kind == "name" and self.accept("-"):
                axes += "-" + self.next().text
            if axes not in AXES:
                self.fail(f"axes ({one_of(AXES)})", replace(start, text=axes), nearest(axes, AXES))
            if self.accept(","):
                given = self.options("", "]", allowed)
            else:
                self.expect("]")
        elif self.here.text == "[":
            given = self.options("[", "]", allowed)
        opening = self.here
        self.expect("(", f" after {op}")
        self.enter(opening)
        inputs = [self.sum()]
        while self.accept(","):
            inputs.append(self.sum())
        closing = self.here
        self.leave()
        if len(inputs) != arity(op):
            self.fail(f"{arity(op)} value{'s' * (arity(op) > 1)} of {op} instead of {len(inputs)}", closing)
        node = make_node(f"{op}-{axes}" if axes else op, inputs, given.get("eps"), given.get("clamp"))
        return self.add(node, stated=op == "div" and "eps" in given)

    def options(self, opening: str, closing: str, allowed: Sequence[str]) -> dict[str, float]:
        """`eps=1e-3, clamp=30` up to the closing bracket."""
        found: dict[str, float] = {}
        if opening:
            self.expect(opening)
        while True:
            key = self.next()
            if key.text not in allowed or key.text in found:
                self.fail(" or ".join(allowed) if allowed else "no options", key)
            self.expect("=")
            start = self.here
            minus = self.accept("-")
            number = self.next()
            value = float(minus + number.text) if number.kind == "number" else math.nan
            if not math.isfinite(value) or (key.text == "eps" and minus):
                what = "a number of at least 0" if key.text == "eps" else "a number"
                self.fail(f"{what} for {key.text}", replace(start, text=minus + number.text))
            found[key.text] = value
            if not self.accept(","):
                self.expect(closing)
                return found

    def enter(self, token: _Token) -> None:
        self.depth += 1
        if self.depth > DEEPEST:
            self.fail(f"at most {DEEPEST} brackets within brackets", token)

    def leave(self) -> None:
        self.expect(")")
        self.depth -= 1
