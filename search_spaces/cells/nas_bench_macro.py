"""NAS-Bench-Macro: eight layers in three stages, one of three blocks in each layer.

Su, Huang, Li, You, Wang, Qian, Zhang and Xu, Prioritized Architecture Sampling with Monto-Carlo Tree Search,
CVPR 2021, section 4 and the authors' repository (xiusu/NAS-Bench-Macro).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from search_spaces.cells.nas_bench_201 import refuse_scale
from search_spaces.cells.operations import CellNetwork, batch_norm, relu
from search_spaces.choice import Choice
from search_spaces.common.errors import UserError
from search_spaces.graph import OpGraph
from search_spaces.space import LayerFactory, TupleSpace

OPERATIONS = ("identity", "mb_k3_e3", "mb_k5_e6")
KERNEL_EXPANSION = {1: (3, 3), 2: (5, 6)}
STAGES = (2, 3, 3)  # layers per stage; the first of each halves the resolution and doubles the channels
HEAD_CHANNELS = 1280
Layers = tuple[int, ...]


class NasBenchMacro(TupleSpace):
    """Networks of eight layers, each an identity or one of two inverted bottlenecks.

    An architecture is eight indices into OPERATIONS, one per layer; 6,561 of them.

    `build` and `choices` take `channels` (32, of the stem) and `stem_stride` (1).
    """

    name = "nas-bench-macro"
    vocabulary = ("input", "output", *OPERATIONS)
    sizes = (len(OPERATIONS),) * sum(STAGES)

    def encode(self, arch: Layers) -> str:
        """The official notation: eight digits such as `02012100`."""
        return "".join(str(operation) for operation in arch)

    def decode(self, text: str) -> Layers:
        """Inverse of `encode`. Errors: UserError for anything but eight digits from 0 to 2."""
        digits = text.strip()
        if len(digits) != len(self.sizes) or set(digits) - set("012"):
            raise UserError(text, f"{len(self.sizes)} digits from 0 to 2 such as '02012100'")
        return tuple(int(digit) for digit in digits)

    def key(self, arch: Layers) -> str:
        """The network's identity: an identity behind the first layer of a stage does nothing, wherever it stands.

        The benchmark trained one network for all of these (3,969 in all) and files its results under each; as its
        authors do, the identities of a stage are moved to the stage's end.
        """
        text = ""
        for layers in _by_stage(arch):
            blocks = [operation for operation in layers[1:] if operation]
            text += self.encode((layers[0], *blocks)).ljust(len(layers), "0")
        return text

    def graph(self, arch: Layers) -> OpGraph:
        """A chain of ten nodes: input, the eight layers, output; `parts` names the stages."""
        ops = ("input", *(OPERATIONS[operation] for operation in arch), "output")
        stages = [f"stage_{stage}" for stage, layers in enumerate(STAGES, 1) for _ in range(layers)]
        return OpGraph(ops, np.eye(len(ops), k=1, dtype=bool), (stages[0], *stages, stages[-1]))

    def cost(
        self,
        arch: Layers,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        input_size: int = 32,
        channels: int = 32,
        stem_stride: int = 1,
    ) -> dict[str, int]:
        """Exact counts for square inputs of `input_size`; `params` and `macs` are the table's `params` and `flops`.

        `paths` counts the routes through the residual shortcuts, `depth` the layers with weights on the longest.
        """
        size = -(-input_size // stem_stride)
        params = in_channels * channels * 9 + 2 * channels
        macs = in_channels * channels * 9 * size**2
        depth, paths = 3, 1  # stem, head convolution, classifier
        width = channels
        for layers in _by_stage(arch):
            for layer, operation in enumerate(layers):
                inputs, before = width, size
                if layer == 0:
                    width, size = 2 * width, -(-size // 2)
                if operation:
                    kernel, expansion = KERNEL_EXPANSION[operation]
                    hidden = expansion * inputs
                    params += inputs * hidden + kernel**2 * hidden + hidden * width + 2 * (2 * hidden + width)
                    macs += inputs * hidden * before**2 + (kernel**2 * hidden + hidden * width) * size**2
                    depth += 3
                    paths *= 1 if layer == 0 else 2
                elif layer == 0:
                    params += inputs * width + 2 * width
                    macs += inputs * width * size**2
                    depth += 1
        params += width * HEAD_CHANNELS + 2 * HEAD_CHANNELS + HEAD_CHANNELS * num_classes + num_classes
        macs += width * HEAD_CHANNELS * size**2 + HEAD_CHANNELS * num_classes
        return {"params": params, "macs": macs, "live_macs": macs, "depth": depth, "paths": paths}

    def build(
        self,
        arch: Layers,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        norm: LayerFactory | None = None,
        act: LayerFactory | None = None,
        channels: int = 32,
        stem_stride: int = 1,
        **unknown: Any,
    ) -> nn.Module:
        """The benchmark's network: stem, eight layers, 1x1 convolution to 1,280 channels, classifier."""
        refuse_scale(unknown, self.name, ("channels", "stem_stride"))
        norm, act = norm or batch_norm, act or relu

        def layer(index: int, inputs: int, outputs: int, stride: int) -> nn.Module:
            return _operation(arch[index], inputs, outputs, stride, norm, act)

        return MacroNetwork(layer, in_channels, num_classes, norm, act, channels, stem_stride)

    def choices(
        self,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        norm: LayerFactory | None = None,
        act: LayerFactory | None = None,
        channels: int = 32,
        stem_stride: int = 1,
        **unknown: Any,
    ) -> nn.Module:
        """The same network with a Choice of the three operations in every layer."""
        refuse_scale(unknown, self.name, ("channels", "stem_stride"))
        norm, act = norm or batch_norm, act or relu

        def layer(index: int, inputs: int, outputs: int, stride: int) -> nn.Module:
            operations = (_operation(o, inputs, outputs, stride, norm, act) for o in range(len(OPERATIONS)))
            return Choice(operations, label=f"layer_{index}")

        return MacroNetwork(layer, in_channels, num_classes, norm, act, channels, stem_stride)

    def select(self, arch: Layers) -> dict[str, int]:
        """{label of each layer: operation index}."""
        return {f"layer_{index}": operation for index, operation in enumerate(arch)}


class InvertedBottleneck(nn.Module):
    """1x1 expansion, depthwise convolution, linear 1x1 projection; a residual where the shape stays.

    Sandler et al., MobileNetV2, CVPR 2018, section 3; ReLU instead of ReLU6 as in the benchmark.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, expansion: int, stride: int, norm: LayerFactory, act: LayerFactory
    ):
        super().__init__()
        hidden = inputs * expansion
        self.expand = nn.Sequential(nn.Conv2d(inputs, hidden, 1, bias=False), norm(hidden), act(hidden))
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False), norm(hidden), act(hidden)
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), norm(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MacroNetwork(CellNetwork):
    """Stem, layers, head. `layer(index, inputs, outputs, stride)` makes the module of one layer."""

    def __init__(
        self,
        layer: Callable[[int, int, int, int], nn.Module],
        in_channels: int,
        num_classes: int,
        norm: LayerFactory,
        act: LayerFactory,
        channels: int,
        stem_stride: int,
    ):
        stem = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stem_stride, padding=1, bias=False), norm(channels), act(channels)
        )
        layers: list[nn.Module] = []
        for count in STAGES:
            layers.append(layer(len(layers), channels, 2 * channels, 2))
            channels *= 2
            layers += [layer(len(layers) + i, channels, channels, 1) for i in range(count - 1)]
        last = nn.Sequential(nn.Conv2d(channels, HEAD_CHANNELS, 1, bias=False), norm(HEAD_CHANNELS), act(HEAD_CHANNELS))
        super().__init__(stem, layers, last, HEAD_CHANNELS, num_classes)


def _operation(
    operation: int, inputs: int, outputs: int, stride: int, norm: LayerFactory, act: LayerFactory
) -> nn.Module:
    if operation:
        return InvertedBottleneck(inputs, outputs, *KERNEL_EXPANSION[operation], stride, norm, act)
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))


def _by_stage(arch: Layers) -> list[Layers]:
    return [arch[begin:end] for begin, end in itertools.pairwise(itertools.accumulate(STAGES, initial=0))]
