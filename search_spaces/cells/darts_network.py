"""The evaluation networks of DARTS, for CIFAR and ImageNet (appendix A of the paper; published code, cnn/model.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from search_spaces.cells.operations import ActConvNorm, Zero, batch_norm, relu
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.space import LayerFactory

OPERATIONS = (
    *("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect"),
    *("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"),
)
EDGES = tuple(f"{source}_{node}" for node in range(2, 6) for source in range(node))  # as `source_node`
STEMS = ("cifar", "imagenet")
STEM_MULTIPLIER, MULTIPLIER = 3, 4
AUXILIARY = (128, 768)
# (reduction?, edge as in EDGES, channels, stride) -> the edge's module, None where there is no edge
EdgeFactory = Callable[[bool, str, int, int], "nn.Module | None"]


def make_operation(
    name: str, channels: int, stride: int, norm: LayerFactory | None = None, act: LayerFactory | None = None
) -> nn.Module:
    """The module of one operation; pooling has no normalisation after it."""
    norm, act = norm or batch_norm, act or relu
    if name == "none":
        return Zero(stride)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, norm, act)
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride, padding=1)
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
    kernel = int(name[-1])
    if name.startswith("sep_conv"):
        return nn.Sequential(
            DepthwiseBlock(channels, kernel, stride, 1, norm, act), DepthwiseBlock(channels, kernel, 1, 1, norm, act)
        )
    return DepthwiseBlock(channels, kernel, stride, 2, norm, act)


class DepthwiseBlock(nn.Module):
    """activation -> depthwise convolution -> 1x1 convolution -> normalisation."""

    def __init__(self, channels: int, kernel: int, stride: int, dilation: int, norm: LayerFactory, act: LayerFactory):
        super().__init__()
        padding = dilation * (kernel // 2)
        self.act = act(channels)
        self.depthwise = nn.Conv2d(
            channels, channels, kernel, stride, padding, dilation=dilation, groups=channels, bias=False
        )
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = norm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.pointwise(self.depthwise(self.act(x))))


class FactorizedReduce(nn.Module):
    """Halves height and width by two 1x1 convolutions of stride 2, one of them a pixel further, side by side."""

    def __init__(self, inputs: int, outputs: int, norm: LayerFactory, act: LayerFactory):
        super().__init__()
        self.act = act(inputs)
        self.conv_a = nn.Conv2d(inputs, outputs // 2, 1, stride=2, bias=False)
        self.conv_b = nn.Conv2d(inputs, outputs - outputs // 2, 1, stride=2, bias=False)
        self.norm = norm(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(x)
        # Odd sizes get a row or column of zeros, without which the shifted half would be one smaller.
        shifted = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))[:, :, 1:, 1:]
        return self.norm(torch.cat([self.conv_a(x), self.conv_b(shifted)], dim=1))


class CellModule(nn.Module):
    """Two inputs, brought to one width and size, and four nodes; each is the sum of its edges, the output all nodes."""

    def __init__(
        self,
        edge: EdgeFactory,
        inputs: tuple[int, int],
        channels: int,
        reduction: bool,
        previous_reduction: bool,
        norm: LayerFactory,
        act: LayerFactory,
    ):
        super().__init__()
        if previous_reduction:
            self.preprocess_0: nn.Module = FactorizedReduce(inputs[0], channels, norm, act)
        else:
            self.preprocess_0 = ActConvNorm(inputs[0], channels, 1, 1, norm, act)
        self.preprocess_1 = ActConvNorm(inputs[1], channels, 1, 1, norm, act)
        self.edges = nn.ModuleDict()
        for key in EDGES:
            module = edge(reduction, key, channels, 2 if reduction and int(key[0]) < 2 else 1)
            if module is not None:
                self.edges[key] = module

    def forward(self, before_last: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        states = [self.preprocess_0(before_last), self.preprocess_1(last)]
        for node in range(2, 6):
            keys = [f"{source}_{node}" for source in range(node)]
            terms = [self.edges[key](states[int(key[0])]) for key in keys if key in self.edges]
            states.append(functools.reduce(torch.add, terms))
        return torch.cat(states[2:], dim=1)


class AuxiliaryHead(nn.Module):
    """The second classifier, after the second reduction; made for maps of 8 x 8 (cifar) or 7 x 7 (imagenet)."""

    def __init__(self, inputs: int, num_classes: int, stem: str, norm: LayerFactory, act: LayerFactory):
        super().__init__()
        narrow, wide = AUXILIARY
        self.stride = 3 if stem == "cifar" else 2
        self.act = act(inputs)
        # The ImageNet head has no second normalisation: the published results were obtained without it.
        last = [norm(wide), act(wide)] if stem == "cifar" else [act(wide)]
        self.features = nn.Sequential(
            nn.Conv2d(inputs, narrow, 1, bias=False),
            norm(narrow),
            act(narrow),
            nn.Conv2d(narrow, wide, 2, bias=False),
            *last,
        )
        self.classifier = nn.Linear(wide, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(x)
        if min(x.shape[-2:]) >= 5 + self.stride:
            x = F.avg_pool2d(x, 5, self.stride, count_include_pad=False)
        else:
            x = F.adaptive_avg_pool2d(x, 2)
        return self.classifier(self.features(x).mean((2, 3)))


class Network(nn.Module):
    """Stem, cells with reductions after one and two thirds, global pooling, classifier; widths double at reductions."""

    def __init__(
        self,
        edge: EdgeFactory,
        in_channels: int,
        num_classes: int,
        norm: LayerFactory | None,
        act: LayerFactory | None,
        channels: int,
        layers: int,
        stem_stride: int,
        stem: str,
        auxiliary: bool,
    ):
        super().__init__()
        norm, act = norm or batch_norm, act or relu
        _check(channels, layers, stem)
        if stem == "cifar":
            width = STEM_MULTIPLIER * channels
            self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, stem_stride, padding=1, bias=False), norm(width))
            self.stem_last: nn.Module | None = None
        else:
            width, half = channels, channels // 2
            self.stem = nn.Sequential(
                nn.Conv2d(in_channels, half, 3, stride=2, padding=1, bias=False),
                norm(half),
                act(half),
                nn.Conv2d(half, channels, 3, stride=2, padding=1, bias=False),
                norm(channels),
            )
            self.stem_last = ActConvNorm(channels, channels, 3, 2, norm, act)
        inputs, previous_reduction = (width, width), stem == "imagenet"
        self.cells = nn.ModuleList()
        for layer in range(layers):
            reduction = layer in reductions(layers)
            channels *= 1 + reduction
            self.cells.append(CellModule(edge, inputs, channels, reduction, previous_reduction, norm, act))
            inputs, previous_reduction = (inputs[1], MULTIPLIER * channels), reduction
            if layer == 2 * layers // 3:
                self.auxiliary_head = AuxiliaryHead(inputs[1], num_classes, stem, norm, act) if auxiliary else None
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs[1], num_classes)

    def stages(self) -> list[str]:
        """The names of the cell modules, in order."""
        return [f"cells.{i}" for i in range(len(self.cells))]

    def drop_path_modules(self) -> list[str]:
        """The names of the modules that drop-path is for: every edge that is no identity."""
        return [
            f"cells.{i}.edges.{key}"
            for i, cell in enumerate(self.cells)
            for key, module in cell.edges.items()  # type: ignore[union-attr, operator]
            if not isinstance(module, nn.Identity)
        ]

    def _cell_outputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(x)
        before_last, last = x, x if self.stem_last is None else self.stem_last(x)
        outputs = []
        for cell in self.cells:
            before_last, last = last, cell(before_last, last)
            outputs.append(last)
        return outputs

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The pooled features [N, 16 * channels] before the classifier (4 * channels per reduction passed)."""
        return self.pool(self._cell_outputs(x)[-1]).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.forward_features(x))

    def forward_with_auxiliary(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits, logits of the auxiliary head), for a training loss; UserError without the head."""
        if self.auxiliary_head is None:
            raise UserError("auxiliary", "a network built with auxiliary=True")
        outputs = self._cell_outputs(x)
        logits = self.classifier(self.pool(outputs[-1]).flatten(1))
        return logits, self.auxiliary_head(outputs[2 * len(outputs) // 3])


def reductions(layers: int) -> tuple[int, int]:
    """The positions of the reduction cells (one position where there are fewer than three layers)."""
    return layers // 3, 2 * layers // 3


def _check(channels: int, layers: int, stem: str) -> None:
    if stem not in STEMS:
        raise UserError(stem, f"a stem ({one_of(STEMS)})", nearest(str(stem), STEMS))
    if channels < 2 or channels % 2:
        raise UserError(channels, "an even number of channels, at least 2")
    if layers < 1:
        raise UserError(layers, "at least one layer")


def network_cost(
    cells: tuple[Mapping[str, str], Mapping[str, str]],
    in_channels: int,
    num_classes: int,
    input_size: int,
    channels: int,
    layers: int,
    stem_stride: int,
    stem: str,
    auxiliary: bool,
) -> dict[str, int]:
    """The counts of `Network`, without making it; `cells` are the edges of the normal and the reduction cell."""
    _check(channels, layers, stem)
    params = macs = 0

    def convolution(weights: int, size: int, normalised: int) -> None:
        nonlocal params, macs
        params += weights + 2 * normalised
        macs += weights * size**2

    # (channels, size, convolutions on the longest path) of the two preceding outputs
    if stem == "cifar":
        width, size = STEM_MULTIPLIER * channels, -(-input_size // stem_stride)
        convolution(9 * in_channels * width, size, width)
        before_last = last = (width, size, 1)
    else:
        half, sizes = channels // 2, [-(-input_size // 2**i) for i in (1, 2, 3)]
        convolution(9 * in_channels * half, sizes[0], half)
        convolution(9 * half * channels, sizes[1], channels)
        convolution(9 * channels * channels, sizes[2], channels)
        before_last, last = (channels, sizes[1], 2), (channels, sizes[2], 3)
    auxiliary_width = 0
    for layer in range(layers):
        reduction = layer in reductions(layers)
        channels *= 1 + reduction
        small = -(-last[1] // 2) if reduction else last[1]
        convolution(before_last[0] * channels, last[1], channels)
        convolution(last[0] * channels, last[1], channels)
        depths = [before_last[2] + 1, last[2] + 1, 0, 0, 0, 0]
        for key, op in cells[reduction].items():
            source, node = int(key[0]), int(key[2])
            weights, norms, convolutions = _operation_cost(op, channels, reduction and source < 2)
            convolution(weights, small, norms)
            depths[node] = max(depths[node], depths[source] + convolutions)
        before_last, last = last, (MULTIPLIER * channels, small, max(depths[2:]))
        if layer == 2 * layers // 3:
            auxiliary_width = last[0]
    params += last[0] * num_classes + num_classes
    macs += last[0] * num_classes
    if auxiliary:
        narrow, wide = AUXILIARY
        params += auxiliary_width * narrow + 2 * narrow + 4 * narrow * wide + wide * num_classes + num_classes
        params += 2 * wide if stem == "cifar" else 0
    paths = sum(_paths(cell) for cell in cells)
    return {"params": params, "macs": macs, "live_macs": macs, "depth": last[2] + 1, "paths": paths}


def _operation_cost(op: str, channels: int, strided: bool) -> tuple[int, int, int]:
    """(weights, normalised channels, convolutions in a row); all convolutions work at the output's size."""
    if op == "skip_connect" and strided:
        return channels * channels, channels, 1
    if "conv" not in op:
        return 0, 0, 0
    block = channels * int(op[-1]) ** 2 + channels * channels
    return (2 * block, 2 * channels, 4) if op.startswith("sep_conv") else (block, channels, 2)


def _paths(cell: Mapping[str, str]) -> int:
    paths = [1, 1, 0, 0, 0, 0]
    for node in range(2, 6):
        paths[node] = sum(paths[source] for source in range(node) if f"{source}_{node}" in cell)
    return sum(paths[2:])
