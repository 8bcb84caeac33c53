"""Weisfeiler-Lehman colours of the nodes of many graphs, and how often each occurs in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from predictors.graphs import GraphTable

MIX = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio's bits, as in Knuth's multiplicative hashing


def node_colours(table: GraphTable, rounds: int) -> list[np.ndarray]:
    """`rounds` + 1 arrays uint64 [N, n]: a node's operation and cell, then with each round its colour together with the
    sets of colours before and behind it (Shervashidze et al., Weisfeiler-Lehman Graph Kernels, JMLR 2011, section 3,
    for directed graphs). Colours are 64-bit hashes: different ones coincide with a chance of 2^-64 alone."""
    cells = np.array([_number(name) for name in table.part_names])[table.parts]
    colours = [np.where(table.mask, _scramble(table.ops.astype(np.uint64) + cells), np.uint64(0))]
    for _ in range(rounds):
        now = colours[-1]
        spread = _scramble(now) * table.mask  # a sum of scrambled colours names the multiset
        before = np.einsum("nij,ni->nj", table.adjacency.astype(np.uint64), spread)
        behind = np.einsum("nij,nj->ni", table.adjacency.astype(np.uint64), spread)
        mixed = _scramble(now + MIX * _scramble(before + MIX * _scramble(behind)))
        colours.append(np.where(table.mask, mixed, np.uint64(0)))
    return colours


@dataclass(frozen=True)
class ColourCounts:
    """The colours that occur in a set of graphs, sorted; others are not counted."""

    colours: np.ndarray
    rounds: int

    @classmethod
    def of(cls, table: GraphTable, rounds: int) -> ColourCounts:
        """The colours of these graphs."""
        found = np.unique(np.stack(node_colours(table, rounds), 1)[np.repeat(table.mask[:, None], rounds + 1, 1)])
        return cls(found, rounds)

    def rows(self, table: GraphTable) -> np.ndarray:
        """float32 [N, colours]: how many nodes of each graph have each colour, over all rounds."""
        counts = np.zeros((len(table), len(self.colours)), np.float32)
        graph = np.broadcast_to(np.arange(len(table))[:, None], table.mask.shape)
        for colours in node_colours(table, self.rounds):
            place = np.minimum(np.searchsorted(self.colours, colours), len(self.colours) - 1)
            known = table.mask & (self.colours[place] == colours)
            np.add.at(counts, (graph[known], place[known]), 1)
        return counts


def _number(name: str) -> np.uint64:
    """A number that the name alone decides: tables number their cells each in its own way."""
    return np.uint64(int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little"))


def _scramble(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that spreads every bit (the finaliser of splitmix64; Steele et al., 2014)."""
    x = values ^ (values >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
