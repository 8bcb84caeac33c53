"""Path encoding: which sequences of operations lie on the live paths of a graph, as columns of ones and zeros.

White, Neiswanger and Savani, BANANAS: Bayesian Optimization with Neural Architectures for Neural Architecture Search,
AAAI 2021, section 4.1 (one column per possible path, the short ones first, truncated).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from predictors.graphs import GraphTable

BOTH = "both"  # the part of nodes that belong to every cell
SILENT = ("input", "output", "none", "sum")  # the ends, what never lives, and what every path passes anyway
CHUNK = 4_096  # graphs at a time: their sets of paths stay in the cache
MOST_COLUMNS = 4096  # of one cell; a vocabulary with more paths than that is truncated earlier


def path_encoding(table: GraphTable, longest: int = 3, parts: Sequence[str] | None = None) -> np.ndarray:
    """bool [N, cells * C]: column p of a cell says whether a live path of it spells the p-th sequence of
    `path_columns`; longer paths leave no trace. Cells are `parts` (default: the table's) without `both`."""
    operations = path_operations(table.vocabulary)
    depth = path_depth(len(operations), longest)
    cells = [part for part in (parts or table.part_names) if part != BOTH]
    blocks = []
    for start in range(0, len(table), CHUNK):
        rows = table.take(np.arange(start, min(start + CHUNK, len(table))))
        blocks.append(np.concatenate([_cell_paths(rows, cell, len(cells) > 1, depth) for cell in cells], 1))
    return np.concatenate(blocks)


def path_columns(vocabulary: Sequence[str], longest: int = 3) -> list[tuple[str, ...]]:
    """The sequences of operations that the columns of one cell stand for, shorter ones first, `()` the first."""
    operations = path_operations(vocabulary)
    lengths = range(path_depth(len(operations), longest) + 1)
    return [path for length in lengths for path in itertools.product(operations, repeat=length)]


def path_operations(vocabulary: Sequence[str]) -> tuple[str, ...]:
    """The operations that a path spells; sums, which only join, are passed in silence."""
    return tuple(op for op in vocabulary if op not in SILENT)


def path_depth(operations: int, longest: int) -> int:
    """Operations on the longest path with a column: `longest`, or fewer where that would be over 4,096 columns."""
    depth = 0
    while depth < longest and _columns(operations, depth + 1) <= MOST_COLUMNS:
        depth += 1
    return depth


def _columns(operations: int, depth: int) -> int:
    return sum(operations**length for length in range(depth + 1))


def _cell_paths(table: GraphTable, cell: str, several: bool, depth: int) -> np.ndarray:
    """The columns of one cell, by a dynamic programme over the nodes: the set of sequences that lead to a node.

    Sequences are numbered like the nodes of a tree by levels: one more operation c of k leads from p to k p + 1 + c.
    Sets stand as [columns, N], so that every step runs along the graphs.
    """
    operations = path_operations(table.vocabulary)
    kinds, columns, inner = len(operations), _columns(len(operations), depth), _columns(len(operations), depth - 1)
    inside = (table.live() & _belongs(table, cell) if several else table.live()).T
    last = table.last()
    codes = np.array([operations.index(op) if op in operations else -1 for op in table.vocabulary] + [-1])[table.ops.T]
    reached: list[np.ndarray] = []
    result = np.zeros((columns, len(table)), bool)
    for j in range(table.nodes):
        here = np.zeros((columns, len(table)), bool)
        here[0] = j == 0
        for i, before in enumerate(reached):
            edge = table.adjacency[:, i, j] & inside[i] & inside[j]
            if edge.any():
                here |= before & edge
        result |= here & (last == j)
        longer = here & (codes[j] < 0)
        for c in range(kinds if depth else 0):
            longer[1 + c :: kinds] |= here[:inner] & (codes[j] == c)
        reached.append(longer)
    return result.T


def _belongs(table: GraphTable, cell: str) -> np.ndarray:
    wanted = [i for i, name in enumerate(table.part_names) if name in (cell, BOTH)]
    return np.isin(table.parts, wanted)
