"""The network around a NAS-Bench-101 cell: stem, three stacks of cells, classifier (figure 1 of the paper)."""

from __future__ import annotations

import functools

import torch
from torch import nn

from search_spaces.cells.operations import relu
from search_spaces.common.errors import UserError
from search_spaces.space import LayerFactory

STAGES = 3
KERNELS = {"conv3x3-bn-relu": 3, "conv1x1-bn-relu": 1}
Matrix = tuple[tuple[int, ...], ...]


def tf_batch_norm(channels: int) -> nn.Module:
    """BatchNorm2d with the benchmark's settings: eps 1e-5, and momentum .003 (.997 as TensorFlow counts it)."""
    return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.003)


def vertex_channels(matrix: Matrix, inputs: int, outputs: int) -> list[int]:
    """Channels of every vertex of a pruned cell (section 2; compute_vertex_channels of the published code).

    Vertices that feed the output share its channels, the first ones take the remainder; the others are as wide as the
    widest vertex they feed. Errors: UserError where a share would be empty.
    """
    last = len(matrix) - 1
    feeding = [v for v in range(1, last) if matrix[v][last]]
    if outputs < len(feeding):
        raise UserError(outputs, f"at least {len(feeding)} channels, one for every vertex that feeds the output")
    channels = [0] * last + [outputs]
    for position, v in enumerate(feeding):
        channels[v] = outputs // len(feeding) + (position < outputs % len(feeding))
    for v in range(last - 1, 0, -1):
        if not matrix[v][last]:
            channels[v] = max(channels[w] for w in range(v + 1, last) if matrix[v][w])
    channels[0] = inputs
    return channels


class ConvNormAct(nn.Module):
    """convolution of stride 1 without bias -> normalisation -> activation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: LayerFactory, act: LayerFactory, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = norm(outputs)
        self.act = act(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))


class CellModule(nn.Module):
    """One cell. The input enters every vertex through a 1x1 projection; inner vertices sum what they read, cut to
    their own width; the output concatenates, and adds a projection where the input feeds it."""

    def __init__(
        self, matrix: Matrix, ops: tuple[str, ...], inputs: int, outputs: int, norm: LayerFactory, act: LayerFactory
    ):
        super().__init__()
        last = len(matrix) - 1
        self.channels = vertex_channels(matrix, inputs, outputs)
        self.inner = [[w for w in range(1, v) if matrix[w][v]] for v in range(last + 1)]
        self.project = nn.ModuleDict(
            {str(v): ConvNormAct(inputs, self.channels[v], 1, norm, act) for v in range(1, last + 1) if matrix[0][v]}
        )
        self.vertices = nn.ModuleDict({str(v): _operation(ops[v], self.channels[v], norm, act) for v in range(1, last)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for v in range(1, len(self.inner) - 1):
            terms = [values[w][:, : self.channels[v]] for w in self.inner[v]]
            if str(v) in self.project:
                terms.append(self.project[str(v)](x))
            values.append(self.vertices[str(v)](functools.reduce(torch.add, terms)))
        last = str(len(self.inner) - 1)
        feeding = [values[w] for w in self.inner[-1]]
        if not feeding:
            return self.project[last](x)
        y = torch.cat(feeding, 1) if len(feeding) > 1 else feeding[0]
        return y + self.project[last](x) if last in self.project else y


class Network(nn.Module):
    """Stem, three stacks of `cells_per_stage` cells with 2x2 max-pooling between, global pooling, classifier.

    Weights start as PyTorch's layers do.
    """

    def __init__(
        self,
        matrix: Matrix,
        ops: tuple[str, ...],
        in_channels: int,
        num_classes: int,
        norm: LayerFactory | None,
        act: LayerFactory | None,
        channels: int,
        cells_per_stage: int,
        stem_stride: int,
    ):
        super().__init__()
        norm, act = norm or tf_batch_norm, act or relu
        self.stem = ConvNormAct(in_channels, channels, 3, norm, act, stem_stride)
        self.cells_per_stage = cells_per_stage
        # ceil_mode is TensorFlow's padding "same"; it matters for odd sizes only.
        self.reduce = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.cells = nn.ModuleList()
        width = channels
        for stage in range(STAGES):
            for _ in range(cells_per_stage):
                self.cells.append(CellModule(matrix, ops, width, channels * 2**stage, norm, act))
                width = channels * 2**stage
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, num_classes)

    def stages(self) -> list[str]:
        """The names of the cell modules, in order."""
        return [f"cells.{i}" for i in range(len(self.cells))]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The pooled features [N, 4 * channels] before the classifier."""
        x = self.stem(x)
        for i, cell in enumerate(self.cells):
            x = cell(self.reduce(x) if i and i % self.cells_per_stage == 0 else x)
        return self.pool(x).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.forward_features(x))


def network_cost(
    matrix: Matrix,
    ops: tuple[str, ...],
    in_channels: int,
    num_classes: int,
    input_size: int,
    channels: int,
    cells_per_stage: int,
    stem_stride: int,
) -> dict[str, int]:
    """`params`, `macs`, `live_macs`, `depth` and `paths` of `Network`, without making it."""
    size = -(-input_size // stem_stride)
    params = in_channels * channels * 9 + 2 * channels
    macs = in_channels * channels * 9 * size**2
    width = channels
    for stage in range(STAGES):
        outputs = channels * 2**stage
        size = -(-size // 2) if stage else size
        for _ in range(cells_per_stage):
            weights, norms = _cell_weights(matrix, ops, width, outputs)
            params += weights + 2 * norms
            macs += weights * size**2
            width = outputs
    params += width * num_classes + num_classes
    macs += width * num_classes
    paths, depth = _paths_and_depth(matrix, ops)
    return {
        "params": params,
        "macs": macs,
        "live_macs": macs,
        "depth": 2 + STAGES * cells_per_stage * depth,
        "paths": paths,
    }


def _operation(op: str, channels: int, norm: LayerFactory, act: LayerFactory) -> nn.Module:
    if op in KERNELS:
        return ConvNormAct(channels, channels, KERNELS[op], norm, act)
    return nn.MaxPool2d(3, stride=1, padding=1)


@functools.lru_cache(maxsize=2**12)
def _cell_weights(matrix: Matrix, ops: tuple[str, ...], inputs: int, outputs: int) -> tuple[int, int]:
    """(weights of all convolutions, channels of all normalisations) of one cell."""
    channels, last = vertex_channels(matrix, inputs, outputs), len(matrix) - 1
    projected = sum(channels[v] for v in range(1, last + 1) if matrix[0][v])
    convolutions = [(channels[v], KERNELS[ops[v]]) for v in range(1, last) if ops[v] in KERNELS]
    weights = inputs * projected + sum((width * kernel) ** 2 for width, kernel in convolutions)
    return weights, projected + sum(width for width, _ in convolutions)


def _paths_and_depth(matrix: Matrix, ops: tuple[str, ...]) -> tuple[int, int]:
    """(paths from input to output, convolutions on the longest of them, the projection included)."""
    paths, depth = [1], [0]
    for v in range(1, len(matrix)):
        sources = [w for w in range(v) if matrix[w][v]]
        paths.append(sum(paths[w] for w in sources))
        depth.append(max(depth[w] + (w == 0) for w in sources) + (ops[v] in KERNELS))
    return paths[-1], depth[-1]
