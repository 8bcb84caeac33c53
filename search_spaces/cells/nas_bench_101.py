"""NAS-Bench-101: cells that are directed acyclic graphs of at most seven vertices and nine edges.

Ying et al., NAS-Bench-101: Towards Reproducible Neural Architecture Search, ICML 2019, section 2. Where the paper
leaves something open, the rule is that of its published code (google-research/nasbench).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import nn

from search_spaces.cells.nas_bench_101_cell import (
    MAX_EDGES,
    MAX_VERTICES,
    OPERATIONS,
    Cell,
    graph_hash,
    is_valid,
    successor_masks,
    triangle_bits,
)
from search_spaces.cells.nas_bench_101_network import Network, network_cost
from search_spaces.cells.nas_bench_201 import refuse_scale
from search_spaces.common.errors import UserError
from search_spaces.graph import OpGraph
from search_spaces.space import LayerFactory, SearchSpace

INNER = MAX_VERTICES - 2
EDGE_PLACES = MAX_VERTICES * (MAX_VERTICES - 1) // 2
TRIES = 100


class NasBench101(SearchSpace[Cell]):
    """Cells of at most seven vertices and nine edges, one of three operations on each inner vertex.

    423,624 up to isomorphism. `build` takes `channels` (128), `cells_per_stage` (3) and `stem_stride` (1).
    """

    name = "nas-bench-101"
    vocabulary = ("input", "output", *OPERATIONS)

    def sample(self, rng: np.random.Generator) -> Cell:
        """Uniform over all (matrix, operations) of seven vertices whose pruned cell is valid.

        The published notebook's `random_spec`: a class of cells is drawn as often as it has such spellings.
        """
        while True:
            bits, labels = divmod(int(rng.integers(2**EDGE_PLACES * 3**INNER)), 3**INNER)
            successors, shift = [], EDGE_PLACES
            for v in range(MAX_VERTICES):
                width = MAX_VERTICES - 1 - v
                shift -= width
                successors.append(((bits >> shift) & ((1 << width) - 1)) << (v + 1))
            if is_valid(successors):
                ops = []
                for _ in range(INNER):
                    labels, label = divmod(labels, 3)
                    ops.append(OPERATIONS[label])
                return _cell(successors, ops)

    def mutate(self, arch: Cell, rng: np.random.Generator) -> Cell:
        """Each of 21 edges flips with probability 1/7, each of 5 operations changes with probability 1/5.

        The published notebook's `mutate_spec` at rate 1, repeated until the cell is valid and its key is another one.
        It remembers the unpruned matrix; here the missing vertices come back unconnected, at random places and with
        random operations.
        """
        while True:
            successors, ops = _padded(arch, rng)
            flips = iter((rng.random(EDGE_PLACES) < 1 / MAX_VERTICES).tolist())
            for v in range(MAX_VERTICES):
                for w in range(v + 1, MAX_VERTICES):
                    successors[v] ^= next(flips) << w
            for place in np.flatnonzero(rng.random(INNER) < 1 / INNER):
                others = [o for o in OPERATIONS if o != ops[place]]
                ops[place] = others[int(rng.integers(len(others)))]
            if is_valid(successors):
                child = _cell(successors, ops)
                if child != arch and self.key(child) != self.key(arch):
                    return child

    def crossover(self, first: Cell, second: Cell, rng: np.random.Generator) -> Cell:
        """Every edge and every operation of seven vertices from either parent with probability one half.

        Repeated until the child is valid; after 100 attempts it is a mutation of `first`.
        """
        for _ in range(TRIES):
            (left, left_ops), (right, right_ops) = _padded(first, rng), _padded(second, rng)
            masks = rng.integers(2**MAX_VERTICES, size=MAX_VERTICES).tolist()
            successors = [(a & m) | (b & ~m) for a, b, m in zip(left, right, masks, strict=True)]
            picks = rng.random(INNER) < 0.5
            if is_valid(successors):
                ops = [a if p else b for a, b, p in zip(left_ops, right_ops, picks, strict=True)]
                return _cell(successors, ops)
        return self.mutate(first, rng)

    def neighbors(self, arch: Cell) -> Iterator[Cell]:
        """Every valid cell one edit away, one of each key: an operation changed, an edge flipped, a vertex added.

        An added vertex has one edge in and one out. Without that edit a pruned cell could only shrink.
        """
        seen = {self.key(arch)}
        for successors, ops in _edits(arch):
            if is_valid(successors):
                cell = _cell(successors, ops)
                if self.key(cell) not in seen:
                    seen.add(self.key(cell))
                    yield cell

    def encode(self, arch: Cell) -> str:
        """Rows of the matrix's upper triangle as bits, a colon, the inner operations: `101:conv3x3-bn-relu`."""
        return f"{triangle_bits(arch.matrix)}:{','.join(arch.ops[1:-1])}"

    def decode(self, text: str) -> Cell:
        """Inverse of `encode`; UserError names the part that does not fit."""
        bits, colon, names = text.strip().partition(":")
        if not colon or not bits or set(bits) - {"0", "1"}:
            raise UserError(text, "bits, a colon and operations, such as '101:conv3x3-bn-relu'")
        vertices = next(n for n in range(2, len(bits) + 2) if n * (n - 1) // 2 >= len(bits))
        if vertices * (vertices - 1) // 2 != len(bits):
            raise UserError(bits, f"n (n - 1) / 2 bits for n vertices (1, 3, 6, 10, 15 or 21), not {len(bits)}")
        ops = names.split(",") if names else []
        matrix, start = [], 0
        for v in range(vertices):
            row = bits[start : start + vertices - 1 - v]
            matrix.append([0] * (v + 1) + [int(bit) for bit in row])
            start += len(row)
        cell = Cell(matrix, ("input", *ops, "output"))  # type: ignore[arg-type]
        if self.encode(cell) != text.strip():
            raise UserError(text, "a cell whose vertices all lie on paths from input to output", self.encode(cell))
        return cell

    def key(self, arch: Cell) -> str:
        """The published hash (`graph_util.hash_module`), equal for isomorphic cells and only for those."""
        return _key(arch)

    def function_key(self, arch: Cell) -> str:
        """The hash with vertices that feed the output told apart by their order.

        Channels that do not divide evenly go to the first of these vertices, so isomorphic cells can have different
        widths. Cells with equal function keys build the same network up to the names of their vertices, at any width.
        """
        return _function_key(arch)

    def codes(self, archs: Sequence[Cell]) -> np.ndarray:
        """The first 63 bits of each key: isomorphic cells share a row of a table."""
        return np.fromiter((int(self.key(a)[:16], 16) >> 1 for a in archs), np.int64, len(archs))

    def graph(self, arch: Cell) -> OpGraph:
        """The cell itself; at most seven nodes."""
        return OpGraph(arch.ops, np.array(arch.matrix, bool))

    def cost(
        self,
        arch: Cell,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        input_size: int = 32,
        channels: int = 128,
        cells_per_stage: int = 3,
        stem_stride: int = 1,
    ) -> dict[str, int]:
        """Exact counts for square inputs of `input_size`; a pruned cell has no dead parts, so `live_macs` = `macs`.

        `paths` counts the cell's paths from input to output, `depth` the convolutions and linear layers on the longest
        path through the network.
        """
        return network_cost(
            arch.matrix, arch.ops, in_channels, num_classes, input_size, channels, cells_per_stage, stem_stride
        )

    def build(
        self,
        arch: Cell,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        norm: LayerFactory | None = None,
        act: LayerFactory | None = None,
        channels: int = 128,
        cells_per_stage: int = 3,
        stem_stride: int = 1,
        **unknown: Any,
    ) -> nn.Module:
        """The benchmark's network (figure 1): stem, three stacks of cells, max-pooling and doubled width between them.

        `channels` must be at least the number of vertices that feed the output (4 suffices for every cell).
        """
        refuse_scale(unknown, self.name)
        return Network(
            arch.matrix, arch.ops, in_channels, num_classes, norm, act, channels, cells_per_stage, stem_stride
        )

    def __len__(self) -> int:
        """The number of isomorphism classes (section 2 of the paper)."""
        return 423_624

    def __iter__(self) -> Iterator[Cell]:
        """One cell of every isomorphism class, small ones first."""
        from search_spaces.cells.nas_bench_101_enumeration import all_matrices_and_labels

        for matrix, labels in all_matrices_and_labels(MAX_VERTICES, MAX_EDGES, len(OPERATIONS)):
            yield Cell(matrix, ("input", *(OPERATIONS[label] for label in labels), "output"))


def _cell(successors: Sequence[int], inner_ops: Sequence[str]) -> Cell:
    size = len(successors)
    matrix = tuple(tuple((mask >> w) & 1 for w in range(size)) for mask in successors)
    return Cell(matrix, ("input", *inner_ops, "output"))


def _padded(cell: Cell, rng: np.random.Generator) -> tuple[list[int], list[str]]:
    """(successors, inner operations) of seven vertices; those that `cell` lacks are unconnected, at random places."""
    inner = len(cell.ops) - 2
    places = sorted((rng.permutation(INNER)[:inner] + 1).tolist())
    vertices = [0, *places, MAX_VERTICES - 1]
    successors, ops = [0] * MAX_VERTICES, [OPERATIONS[i] for i in rng.integers(len(OPERATIONS), size=INNER)]
    for v, row in zip(vertices, cell.matrix, strict=True):
        successors[v] = sum(1 << w for w, edge in zip(vertices, row, strict=True) if edge)
    for place, op in zip(places, cell.ops[1:-1], strict=True):
        ops[place - 1] = op
    return successors, ops


def _edits(cell: Cell) -> Iterator[tuple[list[int], list[str]]]:
    """(successors, inner operations) of every cell one edit away, valid or not."""
    successors, ops = successor_masks(cell.matrix), list(cell.ops[1:-1])
    size = len(successors)
    for place, present in enumerate(ops):
        for op in OPERATIONS:
            if op != present:
                yield successors, [*ops[:place], op, *ops[place + 1 :]]
    for v in range(size):
        for w in range(v + 1, size):
            yield [mask ^ (1 << w) if u == v else mask for u, mask in enumerate(successors)], ops
    if size == MAX_VERTICES:
        return
    for v in range(size):
        for w in range(v + 1, size):
            # The new vertex comes right after v; later ones move up by one.
            low = (1 << (v + 1)) - 1
            moved = [(mask & low) | ((mask & ~low) << 1) for mask in successors]
            moved[v] |= 1 << (v + 1)
            moved.insert(v + 1, 1 << (w + 1))
            for op in OPERATIONS:
                yield moved, [*ops[:v], op, *ops[v:]]


@functools.lru_cache(maxsize=2**15)
def _key(cell: Cell) -> str:
    return graph_hash(cell.matrix, (-1, *map(OPERATIONS.index, cell.ops[1:-1]), -2))


@functools.lru_cache(maxsize=2**14)
def _function_key(cell: Cell) -> str:
    labels, rank = [-1], 0
    for v in range(1, len(cell.ops) - 1):
        rank += cell.matrix[v][-1]
        labels.append(OPERATIONS.index(cell.ops[v]) + len(OPERATIONS) * rank * cell.matrix[v][-1])
    return graph_hash(cell.matrix, (*labels, -2))
