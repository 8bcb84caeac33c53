r"""Layers as LaTeX mathematics, in the notation of the EvoNorm paper; matplotlib's mathtext reads it too.

\mu, s and r are the mean, the centred and the uncentred second moment over b,w,h (batch and space), w,h,c (a sample),
w,h (a channel of a sample) or w,h,c/g (a group); the index c alone means the channels of one position. \ln_\pm(a) is
sign(a) ln|a| and \sqrt[\pm]{a} is sign(a) sqrt|a|. Eps and guards are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from search_spaces.layers.formula import ATOM, ONE, PRODUCT, SUM, UNARY, Piece, merge_equal, print_graph
from search_spaces.layers.graph import LayerGraph, Node
from search_spaces.layers.patterns import UNKNOWN, signs
from search_spaces.layers.pointwise import UNARY as POINTWISE

_INDICES = {
    "batch": "b,w,h",
    "layer": "w,h,c",
    "instance": "w,h",
    "group": "w,h,c/g",
    "channel": "c",
    "channel-group": "c/g",
}
_FUNCTIONS = {
    "mean": r"\mu",
    "rms": "r",
    "std": "s",
    "l1": r"\ell",
    "sigmoid": r"\sigma",
    "tanh": r"\tanh",
    "exp": r"\exp",
    "log": r"\ln_{\pm}",
    "max": r"\max",
    "min": r"\min",
}


def format_latex(graph: LayerGraph) -> str:
    """The live graph as LaTeX mathematics, definitions of repeated parts first; without dollar signs."""
    graph = merge_equal(graph)
    sign = signs(graph)

    def render(id: int, node: Node, inputs: Sequence[Piece]) -> Piece:
        if not inputs:
            return Piece(rf"\{node.op}")
        a, b = inputs[0], inputs[-1]
        if node == ONE:
            return Piece("1")
        if node.op in ("add", "sub"):
            minus = node.op == "sub" or b.negated is not None
            b = b.negated if node.op == "add" and b.negated else b
            return Piece(f"{a.text} {'-' if minus else '+'} {_behind(b, PRODUCT)}", SUM)
        if node.op == "mul":
            return Piece(rf"{_within(a, PRODUCT)} \, {_behind(b, UNARY)}", PRODUCT)
        if node.op == "div":
            return Piece(rf"\frac{{{a.text}}}{{{b.text}}}", UNARY)
        if node.op == "neg":
            return Piece(f"-{_behind(a, UNARY)}", UNARY, a)
        if node.op == "square":
            return Piece(f"{_within(a, ATOM)}^{{2}}", UNARY)
        magnitude = rf"\left|{a.text}\right|"
        if node.op == "abs":
            return Piece(magnitude)
        signed = sign[node.inputs[0]] == UNKNOWN
        if node.op == "sqrt":
            root = r"\sqrt[\pm]" if signed else r"\sqrt"
            return Piece(f"{root}{{{a.text}}}", UNARY)
        if node.op == "rsqrt":
            return Piece(rf"\frac{{1}}{{\sqrt{{{magnitude if signed else a.text}}}}}", UNARY)
        if node.op == "reciprocal":
            return Piece(rf"\frac{{1}}{{{a.text}}}", UNARY)
        if node.op == "logabs":
            return Piece(rf"\ln{magnitude}", UNARY)
        if node.op == "pow":
            base = magnitude if node.eps and sign[node.inputs[0]] == UNKNOWN else _within(a, ATOM)
            return Piece(rf"{{{base}}}^{{{b.text}}}", UNARY)
        if node.op in POINTWISE:
            written = POINTWISE[node.op].latex
            if written == "{a}":
                return a
            whole = written if "{a}" in written else written + r"\left({a}\right)"
            return Piece(whole.format(a=a.text))
        function = _FUNCTIONS.get(node.op, rf"\mathrm{{{node.op}}}")
        index = f"_{{{_INDICES[node.axes]}}}" if node.axes else ""
        return Piece(rf"{function}{index}\left({', '.join(p.text for p in inputs)}\right)")

    definitions, output = print_graph(
        graph,
        ("x", "0", "v_{0}", "v_{1}"),
        render,
        repeated=24,
        long=300,
        name_of=lambda prefix, number: f"{prefix}_{{{number}}}" if number > 1 else prefix,
    )
    return r",\quad ".join([*(f"{name} = {text}" for name, text in definitions), output])


def _within(piece: Piece, level: int) -> str:
    return piece.text if piece.level >= level else rf"\left({piece.text}\right)"


def _behind(piece: Piece, level: int) -> str:
    """Like `_within`, behind a sign: what begins with a minus stands in brackets."""
    return rf"\left({piece.text}\right)" if piece.text.startswith("-") else _within(piece, level)
