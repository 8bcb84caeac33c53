"""GraphBatch: a GraphTable (or rows of it) as dense padded tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from predictors.graphs import GraphTable
from search_spaces.common.errors import UserError
from search_spaces.common.names import nearest


@dataclass(frozen=True, eq=False)
class GraphBatch:
    """Graphs with any leading dimensions (`...` is N for a table, S x B for a batch of a stack).

    ops: int64 [..., n], padding has the id `len(vocabulary)`. adjacency: float32 [..., n, n], [i, j] = flows from i
    to j. mask: float32 [..., n]. parts: int64 [..., n], None with a single part. positions: float32 [..., n, k] or
    None. columns: float32 [..., E], what stands beside the graphs.
    """

    ops: Tensor
    adjacency: Tensor
    mask: Tensor
    parts: Tensor | None
    positions: Tensor | None
    columns: Tensor

    def __len__(self) -> int:
        return len(self.ops)

    def _map(self, change: Callable[[Tensor], Tensor]) -> GraphBatch:
        return GraphBatch(
            change(self.ops),
            change(self.adjacency),
            change(self.mask),
            None if self.parts is None else change(self.parts),
            None if self.positions is None else change(self.positions),
            change(self.columns),
        )

    def rows(self, index: Tensor) -> GraphBatch:
        """The graphs at these rows; an index [S, B] gives a batch of a stack."""
        return self._map(lambda field: field[index])

    def to(self, device: torch.device | str) -> GraphBatch:
        """The same graphs on a device."""
        return self._map(lambda field: field.to(device))

    def stacked(self, stack: int) -> GraphBatch:
        """The same graphs for every member: [N, ...] -> [S, N, ...] without a copy."""
        return self._map(lambda field: field.expand(stack, *field.shape))


def graph_batch(
    table: GraphTable,
    parts: Sequence[str],
    *,
    positions: int = 0,
    columns: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> GraphBatch:
    """The whole table as tensors; `parts` numbers the parts, `positions` = k > 0 adds Laplacian positions.

    Errors: UserError for a part that is not among `parts`, where there are several.
    """
    ops = np.where(table.mask, table.ops, len(table.vocabulary)).astype(np.int64)
    beside = np.zeros((len(table), 0)) if columns is None else columns
    places = laplacian_positions(table.adjacency, table.mask, positions) if positions else None
    return GraphBatch(
        torch.from_numpy(ops),
        torch.from_numpy(table.adjacency.astype(np.float32)),
        torch.from_numpy(table.mask.astype(np.float32)),
        torch.from_numpy(_part_codes(table, parts)) if len(parts) > 1 else None,
        None if places is None else torch.from_numpy(places),
        torch.from_numpy(beside.astype(np.float32)),
    ).to(device)


def _part_codes(table: GraphTable, parts: Sequence[str]) -> np.ndarray:
    used = np.bincount(table.parts[table.mask], minlength=len(table.part_names)) > 0
    for name, seen in zip(table.part_names, used, strict=True):
        if seen and name not in parts:
            raise UserError(name, f"a part of the graphs it was fitted with ({', '.join(parts)})", nearest(name, parts))
    codes = np.array([parts.index(name) if name in parts else 0 for name in table.part_names], np.int64)
    return codes[table.parts]


def laplacian_positions(adjacency: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """float32 [N, n, count]: eigenvectors of the undirected normalised Laplacian I - D^-1/2 A D^-1/2, those of the
    smallest eigenvalues after the first; zero where a graph has fewer. The largest entry of each is positive.

    Dwivedi and Bresson, A Generalization of Transformer Networks to Graphs, 2021, section 2.
    """
    result = np.zeros((*mask.shape, count), np.float32)
    sizes = mask.sum(1)
    for n in np.unique(sizes):  # by the true size, so that padding cannot turn the basis of a repeated eigenvalue
        rows = np.flatnonzero(sizes == n)
        links = adjacency[rows][:, :n, :n]
        keys = np.ascontiguousarray(np.packbits(links.reshape(len(rows), -1), axis=1))
        void = keys.view(np.dtype((np.void, keys.shape[1])))[:, 0]
        _, first, group = np.unique(void, return_index=True, return_inverse=True)
        found = _eigenvectors(links[first])[:, :, 1 : 1 + count].astype(np.float32)
        result[rows, :n, : found.shape[2]] = found[group.reshape(-1)]
    return result


def _eigenvectors(links: np.ndarray) -> np.ndarray:
    both = (links | links.transpose(0, 2, 1)).astype(np.float64)
    root = 1 / np.sqrt(np.maximum(both.sum(1), 1))
    laplacian = (both.sum(1) > 0)[:, :, None] * np.eye(links.shape[1]) - both * root[:, :, None] * root[:, None, :]
    vectors = np.linalg.eigh(laplacian)[1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(1)[:, None, :], 1)
    return vectors * np.where(largest < 0, -1, 1)
