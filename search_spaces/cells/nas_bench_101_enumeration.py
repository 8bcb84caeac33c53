"""All cells of NAS-Bench-101, one of every isomorphism class."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

CHUNK = 2**14


def all_matrices_and_labels(
    max_vertices: int, max_edges: int, operations: int
) -> Iterator[tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]]:
    """(adjacency matrix, operation index of every inner vertex) of each class, by number of vertices.

    First one matrix of every class of unlabelled graphs whose vertices all lie on paths from the first to the last;
    then its labellings, one of every orbit under the matrix's symmetries.
    """
    for vertices in range(2, max_vertices + 1):
        inner = vertices - 2
        permutations = np.array(list(itertools.permutations(range(inner))), int)
        labels = np.array(list(itertools.product(range(operations), repeat=inner)), int)
        radix = operations ** np.arange(inner - 1, -1, -1)
        for matrix in _matrices(vertices, max_edges):
            fixed = permutations[[_is_symmetry(matrix, p) for p in permutations]]
            ranks = np.stack([labels[:, p] @ radix for p in fixed], axis=1)
            smallest = ranks.min(axis=1) == labels @ radix
            rows = tuple(map(tuple, matrix.tolist()))
            for labelling in labels[smallest].tolist():
                yield rows, tuple(labelling)


def _matrices(vertices: int, max_edges: int) -> Iterator[np.ndarray]:
    """One upper triangular matrix of every unlabelled class."""
    places = list(itertools.combinations(range(vertices), 2))
    orders = [(0, *(1 + i for i in p), vertices - 1) for p in itertools.permutations(range(vertices - 2))]
    weights = np.array([[1 << (o[i] * vertices + o[j]) for o in orders] for i, j in places], np.int64)
    found: dict[int, np.ndarray] = {}
    for start in range(0, 2 ** len(places), CHUNK):
        codes = np.arange(start, min(start + CHUNK, 2 ** len(places)))
        bits = (codes[:, None] >> np.arange(len(places))) & 1
        bits = bits[bits.sum(axis=1) <= max_edges]
        adjacency = np.zeros((len(bits), vertices, vertices), np.int64)
        for place, (i, j) in enumerate(places):
            adjacency[:, i, j] = bits[:, place]
        outputs, inputs = adjacency.sum(axis=2)[:, :-1], adjacency.sum(axis=1)[:, 1:]
        full = (outputs > 0).all(axis=1) & (inputs > 0).all(axis=1)
        names = (bits[full] @ weights).min(axis=1)
        for name, matrix in zip(names.tolist(), adjacency[full], strict=True):
            found.setdefault(name, matrix)
    yield from found.values()


def _is_symmetry(matrix: np.ndarray, permutation: np.ndarray) -> bool:
    order = np.concatenate([[0], permutation + 1, [len(matrix) - 1]]).astype(int)
    return bool((matrix[np.ix_(order, order)] == matrix).all())
