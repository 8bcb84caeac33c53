"""GraphTable: many small OpGraphs as arrays, the form in which every predictor computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from search_spaces.common.errors import UserError
from search_spaces.common.names import nearest
from search_spaces.graph import OpGraph, stack_graphs

MOST_NODES = 64  # all methods are dense in the nodes; cells have 7 to 30


@dataclass(frozen=True, eq=False)
class GraphTable(Sequence[OpGraph]):
    """A sequence of OpGraphs over one vocabulary, padded to one size n; taking rows copies, nothing is shared.

    ops: int8 [N, n], indices into `vocabulary`, -1 where there is no node. adjacency: bool [N, n, n]. mask: bool
    [N, n], True for nodes; nodes stand in topological order, the first `input`, the last real one `output`.
    parts: int8 [N, n], indices into `part_names`, the cell that a node belongs to.
    """

    vocabulary: tuple[str, ...]
    ops: np.ndarray
    adjacency: np.ndarray
    mask: np.ndarray
    parts: np.ndarray
    part_names: tuple[str, ...] = ("cell",)

    def __len__(self) -> int:
        return len(self.ops)

    @property
    def nodes(self) -> int:
        """n, the padded number of nodes."""
        return self.ops.shape[1]

    @overload
    def __getitem__(self, index: int) -> OpGraph: ...
    @overload
    def __getitem__(self, index: slice) -> GraphTable: ...
    def __getitem__(self, index: int | slice) -> OpGraph | GraphTable:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        n = int(self.mask[index].sum())
        ops = tuple(self.vocabulary[i] for i in self.ops[index, :n])
        parts = tuple(self.part_names[i] for i in self.parts[index, :n])
        return OpGraph(ops, self.adjacency[index, :n, :n], parts)

    def __iter__(self) -> Iterator[OpGraph]:
        return (self[i] for i in range(len(self)))

    def take(self, rows: np.ndarray) -> GraphTable:
        """The graphs of these rows (indices or a mask), in this order."""
        return GraphTable(
            self.vocabulary, self.ops[rows], self.adjacency[rows], self.mask[rows], self.parts[rows], self.part_names
        )

    def padded(self, nodes: int) -> GraphTable:
        """The same graphs with room for `nodes` nodes."""
        more = nodes - self.nodes
        if more <= 0:
            return self
        wide = ((0, 0), (0, more))
        return GraphTable(
            self.vocabulary,
            np.pad(self.ops, wide, constant_values=-1),
            np.pad(self.adjacency, (*wide, (0, more))),
            np.pad(self.mask, wide),
            np.pad(self.parts, wide),
            self.part_names,
        )

    def identities(self) -> np.ndarray:
        """int64 [N]: equal for equal graphs (same operations on the same numbered nodes, edges and parts) only."""
        rows = np.concatenate(
            [
                self.ops.astype(np.uint8),
                self.parts.astype(np.uint8),
                np.packbits(self.adjacency.reshape(len(self), -1), 1),
            ],
            axis=1,
        )
        void = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1])))[:, 0]
        return np.unique(void, return_inverse=True)[1].astype(np.int64).reshape(len(self))

    def last(self) -> np.ndarray:
        """int64 [N]: the number of the output node."""
        return self.nodes - 1 - self.mask[:, ::-1].argmax(1)

    def live(self) -> np.ndarray:
        """bool [N, n]: nodes on a path from input to output that no `none` cuts; see `search_spaces.graph.live`."""
        carries = self.mask & (self.ops != self._code("none"))
        last = self.last()
        forward, backward = np.zeros_like(self.mask), np.zeros_like(self.mask)
        forward[:, 0] = True
        backward[np.arange(len(self)), last] = True
        ends = forward | backward
        for j in range(1, self.nodes):
            forward[:, j] |= (forward[:, :j] & self.adjacency[:, :j, j]).any(1) & carries[:, j]
        for i in reversed(range(self.nodes - 1)):
            backward[:, i] |= (backward[:, i + 1 :] & self.adjacency[:, i, i + 1 :]).any(1) & carries[:, i]
        return (forward & backward) | ends

    def _code(self, op: str) -> int:
        return self.vocabulary.index(op) if op in self.vocabulary else -2


def as_table(graphs: Sequence[OpGraph], vocabulary: Sequence[str]) -> GraphTable:
    """`graphs` as a GraphTable over `vocabulary`; a GraphTable over the same vocabulary passes through.

    Errors: UserError for no graphs, an operation outside the vocabulary, or more than 64 nodes.
    """
    if len(graphs) == 0:
        raise UserError(0, "at least one graph")
    vocabulary = tuple(vocabulary)
    if isinstance(graphs, GraphTable):
        if graphs.vocabulary == vocabulary:
            return graphs
        _known({op for op, used in zip(graphs.vocabulary, _used(graphs), strict=True) if used}, vocabulary)
        recode = np.array(
            [vocabulary.index(op) if op in vocabulary else -1 for op in graphs.vocabulary] + [-1], np.int8
        )
        return GraphTable(
            vocabulary, recode[graphs.ops], graphs.adjacency, graphs.mask, graphs.parts, graphs.part_names
        )
    _known({op for graph in graphs for op in graph.ops}, vocabulary)
    largest = max(len(graph) for graph in graphs)
    if largest > MOST_NODES:
        raise UserError(largest, f"graphs of at most {MOST_NODES} nodes")
    names = tuple(dict.fromkeys(part for graph in graphs for part in graph.parts))
    ops, adjacency, mask = stack_graphs(graphs, vocabulary)
    parts = np.zeros(ops.shape, np.int8)
    if len(names) > 1:
        number = {name: i for i, name in enumerate(names)}
        for row, graph in enumerate(graphs):
            parts[row, : len(graph)] = [number[part] for part in graph.parts]
    return GraphTable(vocabulary, ops, adjacency, mask, parts, names)


def concatenate(tables: Sequence[GraphTable]) -> GraphTable:
    """One table of the graphs of several over the same vocabulary, in order."""
    nodes = max(table.nodes for table in tables)
    names = tuple(dict.fromkeys(name for table in tables for name in table.part_names))
    wide = [table.padded(nodes) for table in tables]
    recode = [np.array([names.index(name) for name in table.part_names], np.int8) for table in tables]
    return GraphTable(
        tables[0].vocabulary,
        np.concatenate([t.ops for t in wide]),
        np.concatenate([t.adjacency for t in wide]),
        np.concatenate([t.mask for t in wide]),
        np.concatenate([code[t.parts] for code, t in zip(recode, wide, strict=True)]),
        names,
    )


def _used(table: GraphTable) -> np.ndarray:
    return np.bincount(table.ops[table.mask], minlength=len(table.vocabulary)) > 0


def _known(ops: set[str], vocabulary: Sequence[str]) -> None:
    for op in sorted(ops - set(vocabulary)):
        raise UserError(
            op, f"an operation of the predictor's vocabulary ({', '.join(vocabulary)})", nearest(op, vocabulary)
        )
