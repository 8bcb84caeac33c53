"""OpGraph: an architecture as operations on the nodes of a directed acyclic graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from search_spaces.common.errors import UserError

if TYPE_CHECKING:
    import networkx
    import torch_geometric.data


@dataclass(frozen=True, eq=False)
class OpGraph:
    """Operation names on nodes in topological order, first `input`, last `output`.

    ops: n names. adjacency: bool [n, n], `adjacency[i, j]` = data flows from i to j (upper triangular).
    parts: n names, the cell of each node (one name throughout in single-cell spaces).
    """

    ops: tuple[str, ...]
    adjacency: np.ndarray
    parts: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        adjacency = np.array(self.adjacency, dtype=bool)
        n = len(self.ops)
        if adjacency.shape != (n, n):
            raise UserError(str(adjacency.shape), f"an adjacency of shape ({n}, {n}) for {n} operations")
        if np.tril(adjacency).any():
            raise UserError("adjacency", "edges from earlier to later nodes only (topological order)")
        if n < 2 or self.ops[0] != "input" or self.ops[-1] != "output":
            raise UserError(str(self.ops), "operations that begin with 'input' and end with 'output'")
        adjacency.setflags(write=False)
        object.__setattr__(self, "adjacency", adjacency)
        object.__setattr__(self, "parts", tuple(self.parts) or ("cell",) * n)

    def _identity(self) -> tuple:
        return self.ops, self.adjacency.tobytes(), self.parts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OpGraph) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __len__(self) -> int:
        return len(self.ops)

    def edges(self) -> list[tuple[int, int]]:
        """All (from, to) pairs in row order."""
        return [(int(i), int(j)) for i, j in np.argwhere(self.adjacency)]

    def to_networkx(self) -> networkx.DiGraph:
        """A DiGraph whose nodes carry `op` and `part`."""
        import networkx

        graph = networkx.DiGraph()
        for i, (op, part) in enumerate(zip(self.ops, self.parts, strict=True)):
            graph.add_node(i, op=op, part=part)
        graph.add_edges_from(self.edges())
        return graph

    def to_pyg(self, vocabulary: Sequence[str]) -> torch_geometric.data.Data:
        """Data with `x` = int64 [n] operation indices into `vocabulary` and `edge_index` [2, edges]."""
        import torch
        from torch_geometric.data import Data

        index = {op: i for i, op in enumerate(vocabulary)}
        x = torch.tensor([index[op] for op in self.ops])
        edge_index = torch.tensor(self.edges(), dtype=torch.long).reshape(-1, 2).t().contiguous()
        return Data(x=x, edge_index=edge_index, num_nodes=len(self))


def live(graph: OpGraph) -> np.ndarray:
    """bool [n]: nodes on a path from input to output that no `none` cuts; input and output are always live."""
    n = len(graph)
    carries = np.array([op != "none" for op in graph.ops])
    adjacency = graph.adjacency & carries[:, None] & carries[None, :]
    forward, backward = np.zeros(n, bool), np.zeros(n, bool)
    forward[0] = backward[-1] = True
    for j in range(n):
        forward[j] |= bool((forward & adjacency[:, j]).any())
    for i in reversed(range(n)):
        backward[i] |= bool((backward & adjacency[i]).any())
    result = forward & backward
    result[0] = result[-1] = True
    return result


def stack_graphs(graphs: Sequence[OpGraph], vocabulary: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pad graphs to one size: (ops int8 [N, n] with -1 as padding, adjacency bool [N, n, n], mask bool [N, n])."""
    index = {op: i for i, op in enumerate(vocabulary)}
    size = max((len(g) for g in graphs), default=0)
    ops = np.full((len(graphs), size), -1, np.int8)
    adjacency = np.zeros((len(graphs), size, size), bool)
    mask = np.zeros((len(graphs), size), bool)
    for row, graph in enumerate(graphs):
        n = len(graph)
        ops[row, :n] = [index[op] for op in graph.ops]
        adjacency[row, :n, :n] = graph.adjacency
        mask[row, :n] = True
    return ops, adjacency, mask
