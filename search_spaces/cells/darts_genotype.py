"""Genotypes of DARTS: the pair of cells, its notation, its rank, and the ones that papers published."""

from __future__ import annotations

import ast
import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from search_spaces.cells.darts_network import OPERATIONS
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest

CHOOSABLE = OPERATIONS[1:]  # `none` is a candidate of the search network, never of a genotype
NODES, FIRST = 4, 2  # nodes 2 to 5; 0 and 1 are the outputs of the two preceding cells
CONCAT = tuple(range(FIRST, FIRST + NODES))
PARTS = ("normal", "reduce")
Edge = tuple[str, int]


@dataclass(frozen=True)
class Genotype:
    """Two cells as the published namedtuple writes them: eight (operation, input) pairs each, two for every node.

    Sequences of any kind are taken; the pairs of a node are sorted by input. Errors: UserError for anything outside
    the space: other operations, an input that is no earlier node, the same input twice, another concatenation.
    """

    normal: tuple[Edge, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Edge, ...]
    reduce_concat: tuple[int, ...]

    def __post_init__(self) -> None:
        for part in PARTS:
            object.__setattr__(self, part, _canonical(getattr(self, part), part))
            concat = getattr(self, f"{part}_concat")
            if not isinstance(concat, Iterable) or isinstance(concat, str) or tuple(concat) != CONCAT:
                raise UserError(
                    concat, f"{part}_concat=range(2, 6): the cell's output is the concatenation of all nodes"
                )
            object.__setattr__(self, f"{part}_concat", CONCAT)


def parse_genotype(text: str) -> Genotype:
    """The genotype that `text` spells, in any order within nodes; nothing is evaluated. Errors: UserError."""
    expected = "Genotype(normal=[...], normal_concat=range(2, 6), reduce=[...], reduce_concat=range(2, 6))"
    try:
        if "#" in text:  # a comment to the parser, trailing garbage to us
            raise SyntaxError
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(text, expected) from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "Genotype":
        raise UserError(text, expected)
    fields = list(Genotype.__dataclass_fields__)
    named = [(field, node) for field, node in zip(fields, call.args, strict=False)]
    named += [(keyword.arg or "**", keyword.value) for keyword in call.keywords]
    for field, _ in named:
        if field not in fields:
            raise UserError(field, f"a field of Genotype ({one_of(fields)})", nearest(field, fields))
    if len(call.args) > len(fields) or sorted(field for field, _ in named) != sorted(fields):
        raise UserError(text, f"each of {', '.join(fields)} once")
    return Genotype(**{field: _literal(field, node) for field, node in named})


def node_pairs(edges: tuple[Edge, ...]) -> tuple[tuple[Edge, Edge], ...]:
    """The two pairs of each node."""
    return tuple((edges[i], edges[i + 1]) for i in range(0, 2 * NODES, 2))


_INPUTS = [list(itertools.combinations(range(node), 2)) for node in CONCAT]
CELLS = math.prod(len(pairs) for pairs in _INPUTS) * len(CHOOSABLE) ** (2 * NODES)


def cell_code(edges: tuple[Edge, ...]) -> int:
    """The rank of one cell, below CELLS (most significant: node 2)."""
    code = 0
    for pairs, ((first, i), (second, j)) in zip(_INPUTS, node_pairs(edges), strict=True):
        code = code * len(pairs) + pairs.index((i, j))
        code = (code * len(CHOOSABLE) + CHOOSABLE.index(first)) * len(CHOOSABLE) + CHOOSABLE.index(second)
    return code


def cell_from_code(code: int) -> tuple[Edge, ...]:
    """The cell of rank `code`."""
    edges: list[Edge] = []
    for pairs in reversed(_INPUTS):
        code, second = divmod(code, len(CHOOSABLE))
        code, first = divmod(code, len(CHOOSABLE))
        code, pair = divmod(code, len(pairs))
        edges[:0] = [(CHOOSABLE[first], pairs[pair][0]), (CHOOSABLE[second], pairs[pair][1])]
    return tuple(edges)


def _canonical(edges: Any, part: str) -> tuple[Edge, ...]:
    """The eight pairs with the two of each node sorted by input."""
    if not isinstance(edges, Sequence) or isinstance(edges, str) or len(edges) != 2 * NODES:
        raise UserError(edges, f"{2 * NODES} pairs (operation, input) in {part}")
    for edge in edges:
        if not isinstance(edge, Sequence) or isinstance(edge, str) or len(edge) != 2:
            raise UserError(edge, f"a pair (operation, input) in {part}")
        op, source = edge
        if op not in CHOOSABLE:
            raise UserError(op, f"an operation of darts ({one_of(CHOOSABLE)})", nearest(str(op), CHOOSABLE))
        if not hasattr(source, "__index__") or isinstance(source, bool):
            raise UserError(source, f"an integer as the input of {op} in {part}")
    nodes = []
    for node in range(NODES):
        pair = sorted(
            ((op, operator.index(source)) for op, source in edges[2 * node : 2 * node + 2]), key=lambda edge: edge[::-1]
        )
        sources = [source for _, source in pair]
        if sources[0] < 0 or sources[1] >= node + FIRST:
            raise UserError(sources, f"inputs from 0 to {node + FIRST - 1} for node {node + FIRST} of {part}")
        if sources[0] == sources[1]:
            raise UserError(sources, f"two different inputs for node {node + FIRST} of {part}")
        nodes += pair
    return tuple(nodes)


def _literal(field: str, node: ast.expr) -> Any:
    """A literal or `range(a, b)`."""
    try:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
            bounds = [ast.literal_eval(argument) for argument in node.args]
            if not node.keywords and 1 <= len(bounds) <= 3:
                return tuple(range(*bounds)[: 2 * NODES])
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise UserError(field, "this field as a list, a tuple or range(2, 6)") from None


# Genotypes as the authors publish them: quark0/darts cnn/genotypes.py, yuhuixu1993/PC-DARTS genotypes.py.
DARTS_V1 = Genotype(
    normal=(
        *(("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("skip_connect", 0), ("sep_conv_3x3", 1)),
        *(("skip_connect", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("skip_connect", 2)),
    ),
    normal_concat=CONCAT,
    reduce=(
        *(("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 0)),
        *(("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("avg_pool_3x3", 0)),
    ),
    reduce_concat=CONCAT,
)
DARTS_V2 = Genotype(
    normal=(
        *(("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),
        *(("sep_conv_3x3", 1), ("skip_connect", 0), ("skip_connect", 0), ("dil_conv_3x3", 2)),
    ),
    normal_concat=CONCAT,
    reduce=(
        *(("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 1)),
        *(("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("max_pool_3x3", 1)),
    ),
    reduce_concat=CONCAT,
)
PCDARTS = Genotype(
    normal=(
        *(("sep_conv_3x3", 1), ("skip_connect", 0), ("sep_conv_3x3", 0), ("dil_conv_3x3", 1)),
        *(("sep_conv_5x5", 0), ("sep_conv_3x3", 1), ("avg_pool_3x3", 0), ("dil_conv_3x3", 1)),
    ),
    normal_concat=CONCAT,
    reduce=(
        *(("sep_conv_5x5", 1), ("max_pool_3x3", 0), ("sep_conv_5x5", 1), ("sep_conv_5x5", 2)),
        *(("sep_conv_3x3", 0), ("sep_conv_3x3", 3), ("sep_conv_3x3", 1), ("sep_conv_3x3", 2)),
    ),
    reduce_concat=CONCAT,
)
