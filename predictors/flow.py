"""Flow: what runs through the live part of many graphs at once, by dynamic programmes over the node order.

Vectors run over the graphs; one Python step handles one edge of all of them, and an edge that no graph has costs
nothing. That makes the path features of 423,624 cells a matter of seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from predictors.graphs import GraphTable

FAR = 1000  # stands for "no path" among int16 distances; sums of two stay inside the type


class Flow:
    """Live nodes and edges of N graphs as vectors over the graphs.

    edges: (i, j) -> bool [N], the live edges. inner: n times bool [N], live nodes but input and output. is_last: n
    times bool [N], the output node. inside, outside: n times int16 [N], live edges into and out of a node. entering,
    leaving: as edges, the share float32 [N] of an edge among those into its target or out of its source. Results are
    lists of n vectors [N].
    """

    def __init__(self, table: GraphTable):
        self.nodes = table.nodes
        live = np.ascontiguousarray(table.live().T)
        codes = np.ascontiguousarray(table.ops.T)
        last = table.last()
        self.is_last = [last == j for j in range(self.nodes)]
        self.inner = [live[j] & ~self.is_last[j] if j else np.zeros(len(table), bool) for j in range(self.nodes)]
        dead = table.vocabulary.index("none") if "none" in table.vocabulary else -2
        carries = live & (codes != dead)
        used = table.adjacency.any(0)
        self.edges = {
            (int(i), int(j)): np.ascontiguousarray(table.adjacency[:, i, j]) & carries[i] & carries[j]
            for i, j in np.argwhere(used)
        }
        self._penalty = {pair: np.where(edge, 0, FAR).astype(np.int16) for pair, edge in self.edges.items()}
        self._forward = sorted(self.edges)  # by the source: whatever enters a node precedes what leaves it
        self._backward = sorted(self.edges, key=lambda pair: pair[1], reverse=True)
        self.inside, self.outside = self._full(0), self._full(0)
        for (i, j), edge in self.edges.items():
            self.inside[j] += edge
            self.outside[i] += edge
        one = np.float32(1)
        self.entering = {(i, j): edge / np.maximum(self.inside[j], one) for (i, j), edge in self.edges.items()}
        self.leaving = {(i, j): edge / np.maximum(self.outside[i], one) for (i, j), edge in self.edges.items()}

    def at_output(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """[N]: the value at each graph's output node."""
        return total(np.where(last, value, 0) for last, value in zip(self.is_last, values, strict=True))

    def shortest_from_input(self, within: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Edges on the shortest path from the input, over the nodes of `within` alone; FAR or more where none is."""
        distance = self._full(FAR)
        distance[0][:] = 0
        for i, j in self._forward:
            step = distance[i] + self._penalty[i, j]
            if within is not None and i > 0:
                step += self._outside(within, i)
            np.minimum(distance[j], step + 1, out=distance[j])
        return distance

    def shortest_to_output(self) -> list[np.ndarray]:
        """Edges on the shortest path to the output; FAR or more where there is none."""
        distance = [np.where(last, 0, FAR).astype(np.int16) for last in self.is_last]
        for i, j in self._backward:
            np.minimum(distance[i], distance[j] + self._penalty[i, j] + 1, out=distance[i])
        return distance

    def longest_from_input(self, weight: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Edges on the longest path from the input, or the most `weight` (of the nodes passed, the last one included);
        below 0 where there is no path."""
        distance = self._full(-FAR)
        distance[0][:] = 0
        for i, j in self._forward:
            gain = 1 if weight is None else weight[j]
            np.maximum(distance[j], distance[i] - self._penalty[i, j] + gain, out=distance[j])
        return distance

    def longest_to_output(self) -> list[np.ndarray]:
        """Edges on the longest path to the output; below 0 where there is none."""
        distance = [np.where(last, 0, -FAR).astype(np.int16) for last in self.is_last]
        for i, j in self._backward:
            np.maximum(distance[i], distance[j] - self._penalty[i, j] + 1, out=distance[i])
        return distance

    def paths_from_input(self, within: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Number of paths from the input, over the nodes of `within` alone, float32."""
        count = [np.zeros(len(self.is_last[0]), np.float32) for _ in range(self.nodes)]
        count[0][:] = 1
        for i, j in self._forward:
            edge = self.edges[i, j] if within is None or i == 0 else self.edges[i, j] & within[i]
            count[j] += count[i] * edge
        return count

    def paths_to_output(self) -> list[np.ndarray]:
        """Number of paths to the output, float32."""
        count = [last.astype(np.float32) for last in self.is_last]
        for i, j in self._backward:
            count[i] += count[j] * self.edges[i, j]
        return count

    def fewest_from_input(self, weight: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The least `weight` (of the nodes passed, the last one included) on a path; FAR or more where none is."""
        least = self._full(FAR)
        least[0][:] = 0
        for i, j in self._forward:
            np.minimum(least[j], least[i] + self._penalty[i, j] + weight[j], out=least[j])
        return least

    def walk_from_input(self, within: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Probability that a walk from the input, leaving each node by any of its edges alike, comes to the node;
        walks that leave `within` end there. float32."""
        chance = [np.zeros(len(self.is_last[0]), np.float32) for _ in range(self.nodes)]
        chance[0][:] = 1
        for i, j in self._forward:
            step = chance[i] * self.leaving[i, j]
            chance[j] += step if within is None else step * (within[j] | self.is_last[j])
        return chance

    def walk_to_output(self, within: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """The same for the walk that begins at the output and goes against the edges."""
        chance = [last.astype(np.float32) for last in self.is_last]
        for i, j in self._backward:
            step = chance[j] * self.entering[i, j]
            chance[i] += step if within is None or i == 0 else step * within[i]
        return chance

    def counted_on_walk(self, chosen: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [N] of the number of `chosen` nodes that the walk from the output passes."""
        at_node = [last.astype(np.float32) for last in self.is_last]
        first = [np.zeros_like(values) for values in at_node]
        second = [np.zeros_like(values) for values in at_node]
        for i, j in self._backward:
            share, hit = self.entering[i, j], chosen[i]
            second[i] += share * (second[j] + hit * (2 * first[j] + at_node[j]))
            first[i] += share * (first[j] + hit * at_node[j])
            at_node[i] += share * at_node[j]
        return first[0], np.sqrt(np.maximum(second[0] - first[0] ** 2, 0))

    def _full(self, value: int) -> list[np.ndarray]:
        return [np.full(len(self.is_last[0]), value, np.int16) for _ in range(self.nodes)]

    def _outside(self, within: Sequence[np.ndarray], node: int) -> np.ndarray:
        return np.where(within[node], 0, FAR).astype(np.int16)


def total(vectors: Iterable[np.ndarray]) -> np.ndarray:
    """Their sum, float32."""
    parts = iter(vectors)
    result = next(parts).astype(np.float32)
    for part in parts:
        result += part
    return result


def most(vectors: Iterable[np.ndarray]) -> np.ndarray:
    """Their maximum."""
    parts = iter(vectors)
    result = next(parts).copy()
    for part in parts:
        np.maximum(result, part, out=result)
    return result
