"""NAS-Bench-Graph: four computing nodes on a tree, one graph operation on each.

Qin, Zhang, Wang, Zhang and Zhu, NAS-Bench-Graph: Benchmarking Graph Neural Architecture Search, NeurIPS 2022
(Datasets and Benchmarks), section 3; the integer of each architecture is that of the package `nas-bench-graph`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from search_spaces.cells.nas_bench_201 import refuse_scale
from search_spaces.cells.nas_bench_graph_network import GAT_HEADS, GraphNetwork
from search_spaces.cells.operations import batch_norm, relu
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.graph import OpGraph
from search_spaces.space import LayerFactory, SearchSpace

OPERATIONS = ("gat", "gcn", "gin", "cheb", "sage", "arma", "graph", "fc", "skip")
# The nine trees on four nodes below the input, each with the numbering that the benchmark gives it.
PATTERNS = (
    (0, 0, 0, 0),
    (0, 0, 0, 1),
    (0, 0, 1, 1),
    (0, 0, 1, 2),
    (0, 0, 1, 3),
    (0, 1, 1, 1),
    (0, 1, 1, 2),
    (0, 1, 2, 2),
    (0, 1, 2, 3),
)
# Sizes of the benchmark's networks by data set, found from its parameter counts: all are reproduced exactly but for
# 6 % of physics, whose rows average runs of different sizes.
DATASETS: dict[str, dict[str, int]] = {
    name: dict(zip(("in_features", "num_classes", "hidden", "pre_layers", "post_layers"), sizes, strict=True))
    for name, sizes in {
        "cora": (1433, 7, 256, 0, 1),
        "citeseer": (3703, 6, 256, 0, 1),
        "pubmed": (500, 3, 128, 0, 0),
        "cs": (6805, 15, 128, 1, 0),
        "physics": (8415, 5, 256, 1, 0),
        "photo": (745, 8, 128, 0, 0),
        "computers": (767, 10, 64, 1, 1),
        "arxiv": (128, 40, 128, 0, 1),
        "proteins": (8, 112, 256, 1, 1),
    }.items()
}


@dataclass(frozen=True)
class GraphArchitecture:
    """Node i + 1 applies `ops[i]` to node `links[i]`, 0 being the input; nodes that feed no other are concatenated."""

    links: tuple[int, ...]
    ops: tuple[str, ...]

    @property
    def leaves(self) -> list[int]:
        """The nodes that feed no other, counted from 1."""
        return [node for node in range(1, 5) if node not in self.links]


class NasBenchGraph(SearchSpace[GraphArchitecture]):
    """Graph networks of four nodes with one input each, one of nine operations on each node.

    Any four links with links[i] <= i and any four operations but `skip` everywhere.

    Architectures are kept as they are written. Their `key`, integer code, graph, costs and network are those of the
    normal form (`normalize`), as in the benchmark: one of nine link patterns, 26,206 architectures, over which
    `len` and `iter` run. Text: `0,1,2,1:gcn,gin,fc,cheb`, links before operations.
    """

    name = "nas-bench-graph"
    operations: ClassVar[tuple[str, ...]] = OPERATIONS
    vocabulary: tuple[str, ...] = ("input", "output", *OPERATIONS)
    data_set: ClassVar[str] = "cora"  # whose sizes are the defaults of `build` and `cost`

    def sample(self, rng: np.random.Generator) -> GraphArchitecture:
        """Uniform over the nine patterns and all operations."""
        links = PATTERNS[rng.integers(len(PATTERNS))]
        while True:
            ops = tuple(self.operations[i] for i in rng.integers(len(self.operations), size=4))
            if set(ops) != {"skip"}:
                return GraphArchitecture(links, ops)

    def neighbors(self, arch: GraphArchitecture) -> Iterator[GraphArchitecture]:
        """All architectures with another operation at one node or another link of one node."""
        for i in range(4):
            for op in self.operations:
                ops = (*arch.ops[:i], op, *arch.ops[i + 1 :])
                if op != arch.ops[i] and set(ops) != {"skip"}:
                    yield GraphArchitecture(arch.links, ops)
            for link in range(i + 1):
                if link != arch.links[i]:
                    yield GraphArchitecture((*arch.links[:i], link, *arch.links[i + 1 :]), arch.ops)

    def mutate(self, arch: GraphArchitecture, rng: np.random.Generator) -> GraphArchitecture:
        """A neighbour with another key, uniform."""
        key = self.key(arch)
        options = [other for other in self.neighbors(arch) if self.key(other) != key]
        return options[rng.integers(len(options))]

    def crossover(
        self, first: GraphArchitecture, second: GraphArchitecture, rng: np.random.Generator
    ) -> GraphArchitecture:
        """Link and operation of each node from either parent; the first parent where only `skip` would remain."""
        parents = [(first, second)[i] for i in rng.integers(2, size=4)]
        ops = tuple(parent.ops[i] for i, parent in enumerate(parents))
        if set(ops) == {"skip"}:
            return first
        return GraphArchitecture(tuple(parent.links[i] for i, parent in enumerate(parents)), ops)

    def encode(self, arch: GraphArchitecture) -> str:
        """Links, a colon, operations: `0,1,2,1:gcn,gin,fc,cheb`."""
        return ",".join(str(link) for link in arch.links) + ":" + ",".join(arch.ops)

    def decode(self, text: str) -> GraphArchitecture:
        """Inverse of `encode`; UserError names the link or operation that does not fit."""
        left, _, right = text.strip().partition(":")
        links, ops = left.split(","), tuple(right.split(","))
        if len(links) != 4 or len(ops) != 4:
            raise UserError(text, f"four links and four operations of {self.name} such as '0,1,2,1:gcn,fc,fc,skip'")
        for i, link in enumerate(links):
            if link not in {str(j) for j in range(i + 1)}:
                raise UserError(link, f"the input (0) or an earlier node, up to {i}, as link {i + 1} in {text!r}")
        for op in ops:
            if op not in self.operations:
                raise UserError(
                    op, f"an operation of {self.name} ({one_of(self.operations)})", nearest(op, self.operations)
                )
        if set(ops) == {"skip"}:
            raise UserError(text, "at least one operation other than 'skip'")
        return GraphArchitecture(tuple(int(link) for link in links), ops)

    def key(self, arch: GraphArchitecture) -> str:
        """The text of the normal form."""
        return self.encode(normalize(arch))

    def codes(self, archs: Sequence[GraphArchitecture]) -> np.ndarray:
        """The package's `valid_hash`: pattern and operations of the normal form as decimal digits."""
        return np.fromiter((_code(normalize(arch)) for arch in archs), np.int64, len(archs))

    def from_code(self, code: int) -> GraphArchitecture:
        """The normal form whose code is `code`. Errors: UserError for an integer that no architecture has."""
        text = f"{code:05d}"
        if len(text) == 5 and not set(text) - set("012345678"):
            pattern, *ops = map(int, text)
            arch = GraphArchitecture(PATTERNS[pattern], tuple(OPERATIONS[op] for op in ops))
            if set(arch.ops) <= set(self.operations) and set(arch.ops) != {"skip"} and normalize(arch) == arch:
                return arch
        raise UserError(code, f"the integer of an architecture of {self.name}")

    def graph(self, arch: GraphArchitecture) -> OpGraph:
        """Six nodes: input, the nodes of the normal form, output, which all leaves feed."""
        arch = normalize(arch)
        adjacency = np.zeros((6, 6), bool)
        for node, link in enumerate(arch.links, 1):
            adjacency[link, node] = True
        adjacency[arch.leaves, 5] = True
        return OpGraph(("input", *arch.ops, "output"), adjacency)

    def cost(self, arch: GraphArchitecture, *, nodes: int = 2708, **net: int) -> dict[str, int]:
        """Exact counts for a graph of `nodes` nodes (2,708, as Cora) and the sizes that `build` takes.

        `macs` are those of the linear maps: sums over edges multiply no weights. `paths` counts the leaves, `depth`
        the linear maps on the longest path. ARMA's parameters include the matrix of its further layers, which
        torch_geometric makes although there are none.
        """
        sizes = {**DATASETS[self.data_set], **net}
        refuse_scale({k: v for k, v in net.items() if k not in DATASETS["cora"]}, self.name, tuple(DATASETS["cora"]))
        features, classes, width = sizes["in_features"], sizes["num_classes"], sizes["hidden"]
        pre, post = sizes["pre_layers"], sizes["post_layers"]
        arch = normalize(arch)
        params, weights = 4 * 2 * width, 0
        if pre:
            params += width
            weights += features * width
            features = width
        widths, depths = [features], [pre]
        for link, op in zip(arch.links, arch.ops, strict=True):
            inputs = widths[link]
            widths.append(inputs if op == "skip" else width)
            depths.append(depths[link] + (op != "skip"))
            if op != "skip":
                weights += inputs * width * (2 if op in ("cheb", "sage", "arma", "graph") else 1)
                params += width + (2 * width if op == "gat" else 0) + (width * width if op == "arma" else 0)
        leaves = arch.leaves
        merged = width if post else classes
        weights += len(leaves) * width * merged + (width * classes if post else 0)
        params += weights + merged + (classes if post else 0)
        macs = nodes * weights
        depth = max(depths[leaf] for leaf in leaves) + 1 + post
        return {"params": params, "macs": macs, "live_macs": macs, "depth": depth, "paths": len(leaves)}

    def build(
        self,
        arch: GraphArchitecture,
        *,
        in_features: int | None = None,
        num_classes: int | None = None,
        norm: LayerFactory | None = None,
        act: LayerFactory | None = None,
        hidden: int | None = None,
        pre_layers: int | None = None,
        post_layers: int | None = None,
        dropout: float = 0.5,
        **unknown: Any,
    ) -> nn.Module:
        """The benchmark's network of the normal form: `forward(x [nodes, in_features], edge_index [2, edges])`.

        `hidden` (256) is a multiple of 4; `pre_layers` (0) and `post_layers` (1) linear maps before and behind the
        cell are 0 or 1. Defaults are the benchmark's for Cora; `build(arch, **DATASETS["arxiv"])` is another data
        set's network. `dropout` (.5) is not the benchmark's, which has another for each data set.
        """
        refuse_scale(unknown, self.name, (*DATASETS["cora"], "dropout"))
        given = (in_features, num_classes, hidden, pre_layers, post_layers)
        sizes = dict(DATASETS[self.data_set])
        sizes |= {name: value for name, value in zip(sizes, given, strict=True) if value is not None}
        if sizes["hidden"] % GAT_HEADS:
            raise UserError(sizes["hidden"], f"a multiple of {GAT_HEADS} as `hidden`")
        for name in ("pre_layers", "post_layers"):
            if sizes[name] not in (0, 1):
                raise UserError(sizes[name], f"0 or 1 as `{name}`")
        arch = normalize(arch)
        return GraphNetwork(arch.links, arch.ops, norm=norm or batch_norm, act=act or relu, dropout=dropout, **sizes)

    def __len__(self) -> int:
        return _count(self.operations)

    def __iter__(self) -> Iterator[GraphArchitecture]:
        """All normal forms, by code."""
        for links in PATTERNS:
            for ops in itertools.product(self.operations, repeat=4):
                arch = GraphArchitecture(links, ops)
                if set(ops) != {"skip"} and normalize(arch) == arch:
                    yield arch


class NasBenchGraphProteins(NasBenchGraph):
    """NAS-Bench-Graph with the five operations that fit into memory on ogbn-proteins.

    2,021 architectures, with the same integers.
    """

    name = "nas-bench-graph-proteins"
    operations = ("gcn", "sage", "arma", "fc", "skip")
    vocabulary = ("input", "output", *operations)
    data_set = "proteins"


def normalize(arch: GraphArchitecture) -> GraphArchitecture:
    """The benchmark's representative of all architectures that it takes for one.

    A skip changes nothing, so it is taken out and set before the whole tree, where it does nothing either. A skip
    that is a leaf beside other children of a computing node stays: it hands that node's output to the concatenation.
    (Raw input features have another width than the rest and are not concatenated; such a skip is taken out too.)
    Of the numberings of the resulting tree the one with a known pattern and the first operations is taken.
    """
    parents = dict(enumerate(arch.links, 1))
    ops = dict(enumerate(arch.ops, 1))
    for node in range(1, 5):  # skips inside the tree; a node's parents are settled before it
        if ops[node] == "skip" and node in parents.values():
            _remove(node, parents)
    for node in [node for node in parents if ops[node] == "skip"]:
        if parents[node] == 0 or list(parents.values()).count(parents[node]) == 1:
            _remove(node, parents)
    skips = 4 - len(parents)
    place = {0: skips, **{node: skips + i for i, node in enumerate(sorted(parents), 1)}}
    links = (*range(skips), *(place[parents[node]] for node in sorted(parents)))
    operations = ("skip",) * skips + tuple(ops[node] for node in sorted(parents))
    pattern, orders = _numberings(links)
    candidates = (tuple(operations[i] for i in order) for order in orders)
    return GraphArchitecture(pattern, min(candidates, key=lambda names: [OPERATIONS.index(name) for name in names]))


def _remove(node: int, parents: dict[int, int]) -> None:
    """Take a node out of the tree; its children become its parent's."""
    parent = parents.pop(node)
    for child, its_parent in parents.items():
        if its_parent == node:
            parents[child] = parent


@functools.cache
def _numberings(links: tuple[int, ...]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The pattern that `links` can be renumbered to, and every order of its nodes that does so."""
    found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for order in itertools.permutations(range(4)):
        number = {0: 0, **{node + 1: position + 1 for position, node in enumerate(order)}}
        renumbered = tuple(number[links[node]] for node in order)
        if renumbered in PATTERNS:
            found.setdefault(renumbered, []).append(order)
    ((pattern, orders),) = found.items()
    return pattern, orders


def _code(arch: GraphArchitecture) -> int:
    return int("".join(str(d) for d in (PATTERNS.index(arch.links), *(OPERATIONS.index(op) for op in arch.ops))))


@functools.cache
def _count(operations: tuple[str, ...]) -> int:
    trees = itertools.product(PATTERNS, itertools.product(operations, repeat=4))
    archs = (GraphArchitecture(links, ops) for links, ops in trees if set(ops) != {"skip"})
    return sum(normalize(arch) == arch for arch in archs)
