"""The DARTS space: a normal and a reduction cell, four nodes each, two operations into every node.

Liu, Simonyan and Yang, DARTS: Differentiable Architecture Search, ICLR 2019, sections 2.1 and 3.1 and the published
code (quark0/darts). NAS-Bench-301 measures this space.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import nn

from search_spaces.cells.darts_genotype import (
    CELLS,
    CHOOSABLE,
    CONCAT,
    DARTS_V1,
    DARTS_V2,
    FIRST,
    NODES,
    PARTS,
    PCDARTS,
    Edge,
    Genotype,
    cell_code,
    cell_from_code,
    node_pairs,
    parse_genotype,
)
from search_spaces.cells.darts_network import EDGES, OPERATIONS, Network, make_operation, network_cost
from search_spaces.cells.nas_bench_201 import refuse_scale
from search_spaces.choice import Choice
from search_spaces.graph import OpGraph
from search_spaces.space import LayerFactory, SearchSpace

__all__ = ["DARTS_V1", "DARTS_V2", "PCDARTS", "Darts", "Genotype"]

SCALE = ("channels", "layers", "stem_stride", "stem", "auxiliary")


class Darts(SearchSpace[Genotype]):
    """A normal and a reduction cell of four nodes with two inputs each, one of seven operations on each edge.

    `size` (1.08e18) genotypes. `build` and `choices` take `channels` (36), `layers` (20), `stem_stride` (1) and `stem`.

    `stem` is "cifar", or "imagenet" for the stem of three strided convolutions (with which `stem_stride` is unused;
    the paper has 48 channels and 14 layers there).
    """

    name = "darts"
    vocabulary = ("input", "output", *OPERATIONS, "c_k-2", "c_k-1", "sum")

    @property
    def size(self) -> int:
        """The number of genotypes, about 1.08e18: too many to enumerate."""
        return CELLS**2

    def from_code(self, code: int) -> Genotype:
        """The genotype whose `codes` entry is `code`."""
        reduce, normal = divmod(code, CELLS)
        return Genotype(cell_from_code(normal), CONCAT, cell_from_code(reduce), CONCAT)

    def codes(self, archs: Sequence[Genotype]) -> np.ndarray:
        """int64 [N]: the rank of each genotype, below `size`."""
        return np.array([cell_code(a.normal) + CELLS * cell_code(a.reduce) for a in archs], np.int64)

    def sample(self, rng: np.random.Generator) -> Genotype:
        """Uniform over all genotypes."""
        return self.from_code(int(rng.integers(self.size)))

    def mutate(self, arch: Genotype, rng: np.random.Generator) -> Genotype:
        """Another operation, or with probability one half another input, at one of 16 places.

        The two mutations of regularised evolution (Real et al., AAAI 2019). The first node has no other
        input to choose; there it is the operation.
        """
        part, place = PARTS[int(rng.integers(2))], int(rng.integers(2 * NODES))
        op, source = getattr(arch, part)[place]
        inputs = _free_inputs(getattr(arch, part), place)
        if inputs and rng.random() < 0.5:
            source = inputs[int(rng.integers(len(inputs)))]
        else:
            others = [o for o in CHOOSABLE if o != op]
            op = others[int(rng.integers(len(others)))]
        return _replaced(arch, part, place, (op, source))

    def crossover(self, first: Genotype, second: Genotype, rng: np.random.Generator) -> Genotype:
        """Uniform crossover of nodes: both pairs of each of the eight nodes from either parent."""
        cells = []
        for part in PARTS:
            pick = rng.random(NODES) < 0.5
            nodes = zip(node_pairs(getattr(first, part)), node_pairs(getattr(second, part)), pick, strict=True)
            cells.append(tuple(edge for a, b, p in nodes for edge in (a if p else b)))
        return Genotype(cells[0], CONCAT, cells[1], CONCAT)

    def neighbors(self, arch: Genotype) -> Iterator[Genotype]:
        """The 120 genotypes with another operation or another input at one place."""
        for part, place in itertools.product(PARTS, range(2 * NODES)):
            op, source = getattr(arch, part)[place]
            for other in CHOOSABLE:
                if other != op:
                    yield _replaced(arch, part, place, (other, source))
            for other_source in _free_inputs(getattr(arch, part), place):
                yield _replaced(arch, part, place, (op, other_source))

    def encode(self, arch: Genotype) -> str:
        """The published notation, `Genotype(normal=[('sep_conv_3x3', 0), ...], normal_concat=range(2, 6), ...)`."""
        return (
            f"Genotype(normal={list(arch.normal)}, normal_concat=range(2, 6), "
            f"reduce={list(arch.reduce)}, reduce_concat=range(2, 6))"
        )

    def decode(self, text: str) -> Genotype:
        """Inverse of `encode`; the pairs of a node may come in either order, concatenations as lists.

        Nothing is evaluated. Errors: UserError names the part that does not fit.
        """
        return parse_genotype(text)

    def graph(self, arch: Genotype) -> OpGraph:
        """Both cells side by side between `input` and `output`: 30 nodes.

        A cell is its two inputs `c_k-2` and `c_k-1`, then for every node its two operations, by input, and their
        `sum`; the output concatenates the sums. `parts` are "normal" and "reduce", "both" for input and output.
        """
        ops, parts, edges = ["input"], ["both"], []
        for part in PARTS:
            states = []
            for marker in ("c_k-2", "c_k-1"):
                edges.append((0, len(ops)))
                states.append(len(ops))
                ops.append(marker)
            for node in node_pairs(getattr(arch, part)):
                total = len(ops) + len(node)
                for op, source in node:
                    edges += [(states[source], len(ops)), (len(ops), total)]
                    ops.append(op)
                ops.append("sum")
                states.append(total)
            edges += [(state, -1) for state in states[FIRST:]]
            parts += [part] * (len(ops) - len(parts))
        adjacency = np.zeros((len(ops) + 1, len(ops) + 1), bool)
        adjacency[tuple(np.array(edges).T)] = True
        return OpGraph((*ops, "output"), adjacency, (*parts, "both"))

    def cost(
        self,
        arch: Genotype,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        input_size: int = 32,
        channels: int = 36,
        layers: int = 20,
        stem_stride: int = 1,
        stem: str = "cifar",
        auxiliary: bool = False,
    ) -> dict[str, int]:
        """Exact counts for square inputs of `input_size`; every part is live, so `live_macs` = `macs`.

        `params` includes the auxiliary head where there is one, `macs` and `depth` never do. `paths` counts the paths
        from the inputs to the outputs of both cells, `depth` the convolutions and linear layers on the longest path
        through the network.
        """
        cells = (_keyed(arch.normal), _keyed(arch.reduce))
        return network_cost(cells, in_channels, num_classes, input_size, channels, layers, stem_stride, stem, auxiliary)

    def build(
        self,
        arch: Genotype,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        norm: LayerFactory | None = None,
        act: LayerFactory | None = None,
        channels: int = 36,
        layers: int = 20,
        stem_stride: int = 1,
        stem: str = "cifar",
        auxiliary: bool = False,
        **unknown: Any,
    ) -> nn.Module:
        """The paper's evaluation network (appendix A); drop-path is left to training code.

        `channels` must be even. With `auxiliary` it has the auxiliary head, used by `forward_with_auxiliary` alone.
        """
        refuse_scale(unknown, self.name, SCALE)
        cells = (_keyed(arch.normal), _keyed(arch.reduce))

        def edge(reduction: bool, key: str, width: int, stride: int) -> nn.Module | None:
            op = cells[reduction].get(key)
            return None if op is None else make_operation(op, width, stride, norm, act)

        return Network(edge, in_channels, num_classes, norm, act, channels, layers, stem_stride, stem, auxiliary)

    def choices(
        self,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        norm: LayerFactory | None = None,
        act: LayerFactory | None = None,
        channels: int = 36,
        layers: int = 20,
        stem_stride: int = 1,
        stem: str = "cifar",
        auxiliary: bool = False,
        **unknown: Any,
    ) -> nn.Module:
        """The same network with a Choice of all eight operations on each of the 14 edges of every cell.

        Cells of one kind share labels. An edge that a genotype lacks is the candidate `none`, so `select` turns it
        into `build` and `selected_state_dict` loads there. The operations are those of evaluation: no normalisation
        after pooling, affine ones elsewhere.
        """
        refuse_scale(unknown, self.name, SCALE)

        def edge(reduction: bool, key: str, width: int, stride: int) -> nn.Module:
            candidates = (make_operation(op, width, stride, norm, act) for op in OPERATIONS)
            return Choice(candidates, label=f"{PARTS[reduction]}_{key}")

        return Network(edge, in_channels, num_classes, norm, act, channels, layers, stem_stride, stem, auxiliary)

    def select(self, arch: Genotype) -> dict[str, int]:
        """{label of each of the 28 edges: operation index, 0 (`none`) where the genotype has no edge}."""
        return {
            f"{part}_{key}": OPERATIONS.index(_keyed(getattr(arch, part)).get(key, "none"))
            for part in PARTS
            for key in EDGES
        }


def _keyed(edges: tuple[Edge, ...]) -> dict[str, str]:
    """{`source_node`: operation}."""
    return {f"{source}_{place // 2 + FIRST}": op for place, (op, source) in enumerate(edges)}


def _free_inputs(edges: tuple[Edge, ...], place: int) -> list[int]:
    taken = (edges[place][1], edges[place ^ 1][1])
    return [source for source in range(place // 2 + FIRST) if source not in taken]


def _replaced(arch: Genotype, part: str, place: int, edge: Edge) -> Genotype:
    cells = {name: getattr(arch, name) for name in PARTS}
    cells[part] = (*cells[part][:place], edge, *cells[part][place + 1 :])
    return Genotype(cells["normal"], CONCAT, cells["reduce"], CONCAT)
