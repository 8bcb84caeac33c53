"""NATS-Bench, size search space: the channel counts of five layers around one fixed cell.

Dong, Liu, Musial and Gabrys, NATS-Bench: Benchmarking NAS Algorithms for Architecture Topology and Size,
IEEE TPAMI 2021, section 3. The network is DynamicShapeTinyNet of the authors' repository (AutoDL-Projects,
xautodl/models/shape_infers/InferTinyCellNet.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import nn

from search_spaces.cells.nas_bench_201 import EDGES, CellModule, ResidualReduction, refuse_scale
from search_spaces.cells.operations import ActConvNorm, CellNetwork, batch_norm, relu
from search_spaces.common.errors import UserError, one_of
from search_spaces.graph import OpGraph
from search_spaces.space import LayerFactory, TupleSpace

WIDTHS = tuple(range(8, 65, 8))
REDUCTIONS = (False, True, False, True, False)  # which of the five layers halve the resolution
SKIP_EDGE = EDGES.index((0, 3))  # in the fixed cell every other edge is nor_conv_3x3
Widths = tuple[int, ...]


class NatsSize(TupleSpace):
    """Channel counts of five stages around one fixed cell.

    An architecture is five counts out of 8, 16, ..., 64; 32,768 of them.

    The first count is the width of stem and first cell, the others those of reduction, cell, reduction and cell.
    The cell is |nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|
    everywhere. `build` takes `stem_stride` (1).
    """

    name = "nats-size"
    vocabulary = ("input", "output", *(str(width) for width in WIDTHS))
    sizes = (len(WIDTHS),) * len(REDUCTIONS)

    def encode(self, arch: Widths) -> str:
        """The official notation, `8:16:24:32:64`."""
        return ":".join(str(width) for width in arch)

    def decode(self, text: str) -> Widths:
        """Inverse of `encode`; UserError names the width that does not fit, and the nearest one that does."""
        parts = text.strip().split(":")
        if len(parts) != len(REDUCTIONS):
            raise UserError(text, "five channel counts such as '8:16:24:32:64'")
        for part in parts:
            if part not in self.vocabulary[2:]:
                value = int(part) if part.isascii() and part.isdigit() and len(part) < 10 else None
                nearest = None if value is None else str(min(WIDTHS, key=lambda width: abs(width - value)))
                raise UserError(part, f"a channel count ({one_of(self.vocabulary[2:])}) in {text!r}", nearest)
        return tuple(int(part) for part in parts)

    def mutate(self, arch: Widths, rng: np.random.Generator) -> Widths:
        """Another channel count in one layer, both uniform."""
        return _widths(super().mutate(_indices(arch), rng))

    def neighbors(self, arch: Widths) -> Iterator[Widths]:
        """All architectures with another channel count in one layer, in order."""
        return map(_widths, super().neighbors(_indices(arch)))

    def codes(self, archs: Sequence[Widths]) -> np.ndarray:
        """The rank in iteration order: 8:8:8:8:8 is 0, 8:8:8:8:16 is 1."""
        return super().codes([_indices(arch) for arch in archs])

    def from_code(self, code: int) -> Widths:
        """The architecture of rank `code` in iteration order."""
        return _widths(super().from_code(code))

    def __iter__(self) -> Iterator[Widths]:
        return map(_widths, super().__iter__())

    def graph(self, arch: Widths) -> OpGraph:
        """A chain of seven nodes: input, the five channel counts, output."""
        ops = ("input", *(str(width) for width in arch), "output")
        return OpGraph(ops, np.eye(len(ops), k=1, dtype=bool))

    def cost(
        self, arch: Widths, *, in_channels: int = 3, num_classes: int = 10, input_size: int = 32, stem_stride: int = 1
    ) -> dict[str, int]:
        """Exact counts for square inputs of `input_size`. `depth` counts the convolutions and the linear layer on the
        longest path, `paths` those through a cell; both are the same for all architectures."""
        size = -(-input_size // stem_stride)
        params = in_channels * arch[0] * 9 + 2 * arch[0]
        macs = in_channels * arch[0] * 9 * size**2
        inputs = arch[0]
        for width, reduction in zip(arch, REDUCTIONS, strict=True):
            if reduction:
                size = -(-size // 2)
                weights = 9 * inputs * width + 9 * width * width + inputs * width
                norms = 2
            else:
                weights = 2 * 9 * inputs * width + 3 * 9 * width * width
                norms = 5
                if inputs != width:
                    weights += inputs * width
                    norms += 1
            params += weights + norms * 2 * width
            macs += weights * size**2
            inputs = width
        params += 2 * inputs + inputs * num_classes + num_classes
        macs += inputs * num_classes
        return {"params": params, "macs": macs, "live_macs": macs, "depth": 1 + 3 * 3 + 2 * 2 + 1, "paths": 4}

    def build(
        self,
        arch: Widths,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        norm: LayerFactory | None = None,
        act: LayerFactory | None = None,
        stem_stride: int = 1,
        **unknown: Any,
    ) -> nn.Module:
        """The benchmark's network of the five widths."""
        refuse_scale(unknown, self.name, ("stem_stride",))
        return SizeNetwork(arch, in_channels, num_classes, norm or batch_norm, act or relu, stem_stride)


class SizeNetwork(CellNetwork):
    """Stem, cell, reduction, cell, reduction, cell, head."""

    def __init__(
        self,
        widths: Widths,
        in_channels: int,
        num_classes: int,
        norm: LayerFactory,
        act: LayerFactory,
        stem_stride: int,
    ):
        first, last = widths[0], widths[-1]
        stem = nn.Sequential(nn.Conv2d(in_channels, first, 3, stem_stride, padding=1, bias=False), norm(first))
        cells = [
            ResidualReduction(inputs, width, norm, act) if reduction else _cell(inputs, width, norm, act)
            for inputs, width, reduction in zip((first, *widths), widths, REDUCTIONS, strict=False)
        ]
        super().__init__(stem, cells, nn.Sequential(norm(last), act(last)), last, num_classes)


def _cell(inputs: int, outputs: int, norm: LayerFactory, act: LayerFactory) -> CellModule:
    """The fixed cell; its edges from node 0 change the width, the skip by a 1x1 convolution with normalisation."""
    edges: list[nn.Module] = []
    for edge, (source, _) in enumerate(EDGES):
        width = inputs if source == 0 else outputs
        if edge != SKIP_EDGE:
            edges.append(ActConvNorm(width, outputs, 3, 1, norm, act))
        elif width == outputs:
            edges.append(nn.Identity())
        else:
            edges.append(nn.Sequential(nn.Conv2d(width, outputs, 1, bias=False), norm(outputs)))
    return CellModule(edges)


def _indices(arch: Widths) -> tuple[int, ...]:
    return tuple(width // 8 - 1 for width in arch)


def _widths(indices: tuple[int, ...]) -> Widths:
    return tuple(WIDTHS[index] for index in indices)
