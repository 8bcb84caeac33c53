"""A cell of NAS-Bench-101 and its published hash."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest

OPERATIONS = ("conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3")  # the order of the published labels 0, 1, 2
MAX_VERTICES, MAX_EDGES = 7, 9


@dataclass(frozen=True)
class Cell:
    """A cell: `matrix[i][j]` = 1 where vertex i feeds vertex j > i; `ops` from `input` to `output`.

    Nested lists and arrays are taken too. Vertices on no path from input to output are dropped.
    Errors: UserError where nothing is left or more than seven vertices or nine edges are.
    """

    matrix: tuple[tuple[int, ...], ...]
    ops: tuple[str, ...]

    def __post_init__(self) -> None:
        successors, ops = successor_masks(self.matrix), tuple(self.ops)
        _check_ops(ops, len(successors))
        kept = _kept_vertices(successors)
        if not kept:
            raise UserError(triangle_bits(self.matrix), "a cell with a path from input to output")
        edges = sum((successors[v] >> w) & 1 for v in kept for w in kept)
        if len(kept) > MAX_VERTICES:
            raise UserError(len(kept), f"at most {MAX_VERTICES} vertices on paths from input to output")
        if edges > MAX_EDGES:
            raise UserError(edges, f"at most {MAX_EDGES} edges on paths from input to output")
        matrix = tuple(tuple((successors[v] >> w) & 1 for w in kept) for v in kept)
        object.__setattr__(self, "matrix", matrix)
        object.__setattr__(self, "ops", tuple(ops[v] for v in kept))


def successor_masks(matrix: Sequence[Sequence[int]]) -> list[int]:
    """Row v as a bit mask of the vertices that v feeds. UserError unless 0/1 and strictly upper triangular."""
    rows = matrix.tolist() if isinstance(matrix, np.ndarray) else matrix
    size, successors = len(rows), []
    for v, row in enumerate(rows):
        if len(row) != size:
            raise UserError(len(row), f"a square matrix: {size} entries in row {v}")
        mask = 0
        for w, entry in enumerate(row):
            if entry:
                if entry != 1 or w <= v:
                    raise UserError(entry, f"0 at row {v}, column {w}, 0 or 1 above the diagonal (upper triangular)")
                mask |= 1 << w
        successors.append(mask)
    return successors


def _check_ops(ops: tuple[str, ...], vertices: int) -> None:
    if len(ops) != vertices or vertices < 2:
        raise UserError(
            ",".join(ops[1:-1]), f"{vertices - 2} operations between input and output for {vertices} vertices"
        )
    if ops[0] != "input" or ops[-1] != "output":
        raise UserError(str(ops), "operations that begin with 'input' and end with 'output'")
    for op in ops[1:-1]:
        if op not in OPERATIONS:
            expected = f"an operation of nas-bench-101 ({one_of(OPERATIONS)})"
            raise UserError(op, expected, nearest(str(op), OPERATIONS))


def _kept_vertices(successors: Sequence[int]) -> list[int]:
    """The vertices on paths from the first to the last; [] where there is no such path."""
    last = len(successors) - 1
    reached, useful = 1, 1 << last
    for v in range(last):
        if (reached >> v) & 1:
            reached |= successors[v]
    for v in range(last - 1, -1, -1):
        if successors[v] & useful:
            useful |= 1 << v
    kept = reached & useful
    return [v for v in range(last + 1) if (kept >> v) & 1] if kept & 1 else []


def is_valid(successors: Sequence[int]) -> bool:
    """Whether at most nine edges are left on paths from input to output, and at least one."""
    kept = _kept_vertices(successors)
    mask = sum(1 << v for v in kept)
    return bool(kept) and sum((successors[v] & mask).bit_count() for v in kept) <= MAX_EDGES


def triangle_bits(matrix: Sequence[Sequence[int]]) -> str:
    """The rows of the upper triangle as one string of 0 and 1."""
    return "".join(str(int(entry)) for v, row in enumerate(matrix) for entry in row[v + 1 :])


def graph_hash(matrix: tuple[tuple[int, ...], ...], labels: tuple[int, ...]) -> str:
    """Hexadecimal digest that does not depend on the order of the vertices (hash_module in nasbench's graph_util).

    A vertex starts as the digest of (out-degree, in-degree, label) and takes in its neighbours once per vertex.
    """
    vertices = range(len(matrix))
    columns = list(zip(*matrix, strict=True))
    sources = [[w for w in vertices if columns[v][w]] for v in vertices]
    targets = [[w for w in vertices if matrix[v][w]] for v in vertices]
    digests = [_vertex_digest(len(targets[v]), len(sources[v]), labels[v]) for v in vertices]
    for _ in vertices:
        digests = [
            _md5(
                "".join(sorted([digests[w] for w in sources[v]]))
                + "|"
                + "".join(sorted([digests[w] for w in targets[v]]))
                + "|"
                + digests[v]
            )
            for v in vertices
        ]
    return _md5(str(sorted(digests)))


@functools.lru_cache(maxsize=2**12)
def _vertex_digest(outputs: int, inputs: int, label: int) -> str:
    return _md5(str((outputs, inputs, label)))


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
