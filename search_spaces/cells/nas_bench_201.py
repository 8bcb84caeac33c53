"""NAS-Bench-201: a cell of four nodes and six edges, one of five operations on each edge.

Dong and Yang, NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture Search, ICLR 2020, section 2.
"""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import numpy as np
import torch
from torch import nn

from search_spaces.cells.operations import ActConvNorm, CellNetwork, Zero, batch_norm, relu
from search_spaces.choice import Choice
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.graph import OpGraph
from search_spaces.space import LayerFactory, TupleSpace

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))  # the order of the official notation
NONE, SKIP, CONV_1X1, CONV_3X3, AVG_POOL = range(5)
Cell = tuple[int, ...]


class NasBench201(TupleSpace):
    """Cells of four nodes and six edges, one of five operations on each edge.

    An architecture is six indices into OPERATIONS, in the order of EDGES; 15,625 of them.

    `build` and `choices` take `channels` (16), `cells_per_stage` (5) and `stem_stride` (1).
    """

    name = "nas-bench-201"
    vocabulary = ("input", "output", *OPERATIONS)
    sizes = (len(OPERATIONS),) * len(EDGES)

    def encode(self, arch: Cell) -> str:
        """The official notation, `|nor_conv_3x3~0|+|none~0|none~1|+|...|`."""
        return "+".join(
            "|" + "|".join(f"{OPERATIONS[arch[e]]}~{i}" for e, (i, j) in enumerate(EDGES) if j == node) + "|"
            for node in (1, 2, 3)
        )

    def decode(self, text: str) -> Cell:
        """Inverse of `encode`; UserError names the operation or the place that does not fit."""
        expected = "a NAS-Bench-201 cell such as '|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|'"
        nodes = text.strip().split("+")
        found = [re.findall(r"([^|~]+)~(\d+)", node) for node in nodes]
        if [[int(i) for _, i in node] for node in found] != [[0], [0, 1], [0, 1, 2]]:
            raise UserError(text, expected)
        names = [operation for node in found for operation, _ in node]
        for operation in names:
            if operation not in OPERATIONS:
                raise UserError(
                    operation, f"an operation of {self.name} ({one_of(OPERATIONS)})", nearest(operation, OPERATIONS)
                )
        arch = tuple(OPERATIONS.index(operation) for operation in names)
        if self.encode(arch) != text.strip():
            raise UserError(text, expected, self.encode(arch))
        return arch

    @functools.cache  # noqa: B019 (at most 15,625 entries)
    def key(self, arch: Cell) -> str:
        """The benchmark's own identity: an expression with `skip_connect` contracted and `none` as zero.

        6,466 classes (appendix of the paper). It writes a cell as a tree, so it does not see which branches share
        weights, and it keeps zero terms of sums; `function_key` is exact in both.
        """
        nodes = ["0"]
        for node in (1, 2, 3):
            terms = []
            for edge, (i, j) in enumerate(EDGES):
                if j == node:
                    operation, source = arch[edge], nodes[i]
                    if operation == NONE or source == "#":
                        terms.append("#")
                    elif operation == SKIP:
                        terms.append(source)
                    else:
                        terms.append(f"({source})@{OPERATIONS[operation]}")
            nodes.append("+".join(sorted(terms)))
        return nodes[-1]

    @functools.cache  # noqa: B019
    def function_key(self, arch: Cell) -> str:
        """The function of the cell up to a renaming of its convolutions, with pooling taken as opaque.

        Zero terms and dead branches vanish; a convolution that is used twice differs from two convolutions.
        """
        live_convolutions = [e for e in range(len(EDGES)) if arch[e] in (CONV_1X1, CONV_3X3)]
        orders = itertools.permutations(range(len(live_convolutions)))
        return min(_expression(arch, dict(zip(live_convolutions, order, strict=True))) for order in orders)

    @functools.cache  # noqa: B019
    def graph(self, arch: Cell) -> OpGraph:
        """Eight nodes: input, the six edges' operations in their order, output; `none` stays a node."""
        ops = ("input", *(OPERATIONS[o] for o in arch), "output")
        return OpGraph(ops, _line_graph())

    def cost(
        self,
        arch: Cell,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        input_size: int = 32,
        channels: int = 16,
        cells_per_stage: int = 5,
        stem_stride: int = 1,
    ) -> dict[str, int]:
        """Exact counts for square inputs of `input_size`. `paths` counts the cell's live paths from input to output,
        `depth` the convolutions and linear layers on the longest one through the network."""
        size = -(-input_size // stem_stride)
        params = in_channels * channels * 9 + 2 * channels
        macs = in_channels * channels * 9 * size**2
        live_macs = macs
        paths, cell_depth = _paths_and_depth(arch)
        alive = _live_edges(arch)
        for stage in range(3):
            width = channels * 2**stage
            if stage:
                size = -(-size // 2)
                weights = (width // 2) * width * 9 + width * width * 9 + (width // 2) * width
                params += weights + 4 * width
                macs += weights * size**2
                live_macs += weights * size**2
            for edge, operation in enumerate(arch):
                if operation in (CONV_1X1, CONV_3X3):
                    weights = width * width * (9 if operation == CONV_3X3 else 1)
                    params += cells_per_stage * (weights + 2 * width)
                    macs += cells_per_stage * weights * size**2
                    live_macs += cells_per_stage * weights * size**2 * alive[edge]
        head = 4 * channels
        params += 2 * head + head * num_classes + num_classes
        macs += head * num_classes
        live_macs += head * num_classes
        depth = 1 + 3 * cells_per_stage * cell_depth + 2 * 2 + 1
        return {"params": params, "macs": macs, "live_macs": live_macs, "depth": depth, "paths": paths}

    def build(
        self,
        arch: Cell,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        norm: LayerFactory | None = None,
        act: LayerFactory | None = None,
        channels: int = 16,
        cells_per_stage: int = 5,
        stem_stride: int = 1,
        **unknown: Any,
    ) -> nn.Module:
        """The benchmark's network: stem, three stages of cells, residual blocks of stride 2 between (figure 1)."""
        norm, act = norm or batch_norm, act or relu

        def edge(index: int, width: int) -> nn.Module:
            return _operation(arch[index], width, norm, act)

        refuse_scale(unknown, self.name)
        return Network(edge, in_channels, num_classes, norm, act, channels, cells_per_stage, stem_stride)

    def choices(
        self,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        norm: LayerFactory | None = None,
        act: LayerFactory | None = None,
        channels: int = 16,
        cells_per_stage: int = 5,
        stem_stride: int = 1,
        **unknown: Any,
    ) -> nn.Module:
        """The same network with a Choice of the five operations on every edge; all cells share six labels."""
        norm, act = norm or batch_norm, act or relu

        def edge(index: int, width: int) -> nn.Module:
            operations = (_operation(o, width, norm, act) for o in range(len(OPERATIONS)))
            return Choice(operations, label=_label(index))

        refuse_scale(unknown, self.name)
        return Network(edge, in_channels, num_classes, norm, act, channels, cells_per_stage, stem_stride)

    def select(self, arch: Cell) -> dict[str, int]:
        """{label of each edge: operation index}."""
        return {_label(edge): operation for edge, operation in enumerate(arch)}


def refuse_scale(
    unknown: dict[str, Any], space: str, known: tuple[str, ...] = ("channels", "cells_per_stage", "stem_stride")
) -> None:
    """UserError for the first keyword of `build` that the space does not know."""
    for name in unknown:
        raise UserError(name, f"a scale of {space} ({one_of(known)})", nearest(name, known))


class CellModule(nn.Module):
    """Four nodes; each is the sum of its incoming edges."""

    def __init__(self, edges: list[nn.Module]):
        super().__init__()
        self.edges = nn.ModuleList(edges)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        nodes = [x]
        for node in (1, 2, 3):
            terms = [self.edges[e](nodes[i]) for e, (i, j) in enumerate(EDGES) if j == node]
            nodes.append(functools.reduce(torch.add, terms))
        return nodes[-1]


class ResidualReduction(nn.Module):
    """The residual block of stride 2 between stages; average pooling and a 1x1 convolution on its shortcut."""

    def __init__(self, inputs: int, outputs: int, norm: LayerFactory, act: LayerFactory):
        super().__init__()
        self.conv_a = ActConvNorm(inputs, outputs, 3, 2, norm, act)
        self.conv_b = ActConvNorm(outputs, outputs, 3, 1, norm, act)
        # ceil_mode matters for odd sizes only, where it matches the strided convolution.
        self.pool = nn.AvgPool2d(2, stride=2, ceil_mode=True)
        self.project = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(self.pool(x)) + self.conv_b(self.conv_a(x))


class Network(CellNetwork):
    """Stem, cells and reductions in order, head. `edge(index, channels)` makes the module of one edge of a cell."""

    def __init__(self, edge, in_channels, num_classes, norm, act, channels, cells_per_stage, stem_stride):
        cells: list[nn.Module] = []
        stem = nn.Conv2d(in_channels, channels, 3, stem_stride, padding=1, bias=False)
        first = norm(channels)
        for stage in range(3):
            width = channels * 2**stage
            if stage:
                cells.append(ResidualReduction(width // 2, width, norm, act))
            cells += [CellModule([edge(i, width) for i in range(len(EDGES))]) for _ in range(cells_per_stage)]
        last = nn.Sequential(norm(4 * channels), act(4 * channels))
        super().__init__(nn.Sequential(stem, first), cells, last, 4 * channels, num_classes)


def _operation(operation: int, channels: int, norm: LayerFactory, act: LayerFactory) -> nn.Module:
    if operation == NONE:
        return Zero()
    if operation == SKIP:
        return nn.Identity()
    if operation == AVG_POOL:
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return ActConvNorm(channels, channels, 3 if operation == CONV_3X3 else 1, 1, norm, act)


def _label(edge: int) -> str:
    i, j = EDGES[edge]
    return f"edge_{i}_{j}"


def _expression(arch: Cell, names: dict[int, int]) -> str:
    """The output node as a sum of terms, convolutions named by `names`; `` is zero."""
    nodes: list[tuple[str, ...]] = [("x",)]
    for node in (1, 2, 3):
        terms: list[str] = []
        for edge, (i, j) in enumerate(EDGES):
            if j != node or arch[edge] == NONE or not nodes[i]:
                continue
            if arch[edge] == SKIP:
                terms += nodes[i]
            else:
                terms.append(f"{'-s13p'[arch[edge]]}{names.get(edge, '')}({'+'.join(nodes[i])})")
        nodes.append(tuple(sorted(terms)))
    return "+".join(nodes[-1])


@functools.cache
def _line_graph() -> np.ndarray:
    """Adjacency of the operation-on-node form: edge (i, j) feeds every edge (j, k)."""
    adjacency = np.zeros((8, 8), bool)
    for a, (i, j) in enumerate(EDGES):
        adjacency[0, a + 1] = i == 0
        adjacency[a + 1, 7] = j == 3
        for b, (k, _) in enumerate(EDGES):
            adjacency[a + 1, b + 1] = j == k
    return adjacency


PATHS = ((3,), (0, 4), (1, 5), (0, 2, 5))  # the cell's four routes from node 0 to node 3, as edges


def _live_edges(arch: Cell) -> list[bool]:
    alive = [path for path in PATHS if all(arch[e] != NONE for e in path)]
    return [any(edge in path for path in alive) for edge in range(len(EDGES))]


def _paths_and_depth(arch: Cell) -> tuple[int, int]:
    alive = [path for path in PATHS if all(arch[e] != NONE for e in path)]
    depth = max((sum(arch[e] in (CONV_1X1, CONV_3X3) for e in path) for path in alive), default=0)
    return len(alive), depth
