"""Anchor networks: small image networks with a place for the searched layer, in the manner of Liu et al. 2020.

A factory `layer(channels)` gives what stands where a network has normalisation and activation; `last(channels)` what
stands at the linear end of a residual branch, by default a weight and a bias per channel only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from search_spaces.common.errors import UserError
from search_spaces.common.names import match

LayerFactory = Callable[[int], nn.Module]
CLASSIFIER_GAIN = 0.1


class Affine(nn.Module):
    """A weight and a bias per channel: what is left of a layer without normalisation and nonlinearity."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


@dataclass(frozen=True)
class AnchorKind:
    """A family of anchors. layout: what its layers receive. size: the smallest height and width of an input."""

    make: Callable[[LayerFactory, LayerFactory, int, int, int], nn.Module]
    layout: str
    size: int


def anchor(
    name: str,
    layer: LayerFactory,
    *,
    last: LayerFactory = Affine,
    width: int = 8,
    num_classes: int = 10,
    in_channels: int = 3,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """The anchor `resnet`, `mobilenetv2`, `efficientnet` or `vit` around a layer.

    layer: channels -> module for [B, C, H, W], for `vit` [B, N, C] (`layout_of`). last: in `mobilenetv2` and
    `efficientnet`; the others have no linear ends. width: channels of the first stage. generator: of the weights
    (`initialize`); None starts one at seed 0. Inputs from 8x8 on; smaller ones raise UserError, as does an unknown
    name.
    """
    kind = ANCHORS[match(name, ANCHORS, "an anchor")]
    for value, what in ((width, "width"), (num_classes, "number of classes"), (in_channels, "number of channels")):
        if value < 1:
            raise UserError(value, f"a positive {what}")
    with torch.random.fork_rng(devices=[]):  # torch's default initialisation, replaced below, draws from its own
        network = kind.make(layer, last, width, num_classes, in_channels)
    initialize(network, generator or torch.Generator().manual_seed(0))
    return network


def layout_of(name: str) -> str:
    """What an anchor's layers receive: `channels-first` or `tokens`."""
    return ANCHORS[match(name, ANCHORS, "an anchor")].layout


def check_size(name: str, height: int, width: int) -> None:
    """UserError if images are too small for an anchor."""
    kind = ANCHORS[match(name, ANCHORS, "an anchor")]
    _check_size(name, kind.size, height, width)


def _check_size(name: str, least: int, height: int, width: int) -> None:
    if min(height, width) < least:
        raise UserError(f"images of {height}x{width}", f"at least {least}x{least} for the anchor {name}")
    if name == "vit" and (height % PATCH or width % PATCH):
        raise UserError(f"images of {height}x{width}", f"sides that {PATCH} divides for the anchor {name}")


def initialize(network: nn.Module, generator: torch.Generator) -> None:
    """He initialisation by fan-in (2015, arXiv 1502.01852) of convolutions and linear layers, biases zero.

    The classifier gets a tenth of it, so that the first loss is near ln(classes) whatever the layer's scale.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = torch.empty_like(module.weight, device="cpu")
            nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
            with torch.no_grad():
                module.weight.copy_(weight * CLASSIFIER_GAIN if name == "classifier" else weight)
                if module.bias is not None:
                    module.bias.zero_()


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class Anchor(nn.Module):
    """stem, blocks, head, mean over space, classifier. Errors: UserError for inputs that are too small."""

    def __init__(self, name: str, stem: nn.Module, blocks: list[nn.Module], head: nn.Module, out: int, classes: int):
        super().__init__()
        self.name = name
        self.stem, self.blocks, self.head = stem, nn.Sequential(*blocks), head
        self.classifier = nn.Linear(out, classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, features] before the classifier."""
        _check_size(self.name, ANCHORS[self.name].size, x.shape[2], x.shape[3])
        return self.head(self.blocks(self.stem(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.forward_features(x))


# -- pre-activation ResNet ---------------------------------------------------------------------------------------


class PreActBlock(nn.Module):
    """layer, 3x3, layer, 3x3 beside a shortcut (He et al. 2016, arXiv 1603.05027, figure 1b)."""

    def __init__(self, inputs: int, outputs: int, stride: int, layer: LayerFactory):
        super().__init__()
        self.layer1, self.conv1 = layer(inputs), _conv(inputs, outputs, 3, stride)
        self.layer2, self.conv2 = layer(outputs), _conv(outputs, outputs, 3)
        self.shortcut = _conv(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer1(x)
        # As in the paper, a projection sees what the branch sees.
        short = x if self.shortcut is None else self.shortcut(y)
        return short + self.conv2(self.layer2(self.conv1(y)))


def _resnet(layer: LayerFactory, last: LayerFactory, width: int, classes: int, channels: int) -> nn.Module:
    """3 stages of one block with w, 2w, 4w channels."""
    widths = (width, 2 * width, 4 * width)
    blocks: list[nn.Module] = []
    inputs = width
    for stage, outputs in enumerate(widths):
        blocks.append(PreActBlock(inputs, outputs, 2 if stage else 1, layer))
        inputs = outputs
    return Anchor("resnet", _conv(channels, width, 3), blocks, layer(inputs), inputs, classes)


# -- inverted residuals ------------------------------------------------------------------------------------------


class SqueezeExcite(nn.Module):
    """Channels scaled by a gate of their means (Hu et al. 2018, arXiv 1709.01507; SiLU as in EfficientNet)."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(nn.functional.silu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise kernel, 1x1 projection with a linear end (Sandler et al. 2018, arXiv 1801.04381)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        layer: LayerFactory,
        last: LayerFactory,
        *,
        kernel: int = 3,
        expansion: int = 3,
        squeeze: bool = False,
    ):
        super().__init__()
        hidden = inputs * expansion
        parts: list[nn.Module] = [] if expansion == 1 else [_conv(inputs, hidden, 1), layer(hidden)]
        parts += [_conv(hidden, hidden, kernel, stride, groups=hidden), layer(hidden)]
        if squeeze:
            parts.append(SqueezeExcite(hidden, max(1, inputs // 4)))
        self.branch = nn.Sequential(*parts, _conv(hidden, outputs, 1), last(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.residual else self.branch(x)


def _mobilenetv2(layer: LayerFactory, last: LayerFactory, width: int, classes: int, channels: int) -> nn.Module:
    """Stem of stride 2, four inverted residuals with expansion 3, a 1x1 head."""
    w = width
    blocks: list[nn.Module] = [
        InvertedResidual(i, o, s, layer, last)
        for i, o, s in ((w, w, 1), (w, 2 * w, 2), (2 * w, 2 * w, 1), (2 * w, 4 * w, 2))
    ]
    stem = nn.Sequential(_conv(channels, w, 3, 2), layer(w))
    head = nn.Sequential(_conv(4 * w, 6 * w, 1), layer(6 * w))
    return Anchor("mobilenetv2", stem, blocks, head, 6 * w, classes)


def _efficientnet(layer: LayerFactory, last: LayerFactory, width: int, classes: int, channels: int) -> nn.Module:
    """MBConv blocks with squeeze-and-excitation and kernels 3 and 5 (Tan and Le 2019, arXiv 1905.11946, table 1)."""
    w = width
    settings = ((w, w, 1, 3, 1), (w, 2 * w, 2, 3, 3), (2 * w, 2 * w, 1, 5, 3), (2 * w, 4 * w, 2, 5, 3))
    blocks: list[nn.Module] = [
        InvertedResidual(i, o, s, layer, last, kernel=k, expansion=e, squeeze=True) for i, o, s, k, e in settings
    ]
    stem = nn.Sequential(_conv(channels, w, 3, 2), layer(w))
    head = nn.Sequential(_conv(4 * w, 8 * w, 1), layer(8 * w))
    return Anchor("efficientnet", stem, blocks, head, 8 * w, classes)


def _vgg(layer: LayerFactory, last: LayerFactory, width: int, classes: int, channels: int) -> nn.Module:
    """Five plain 3x3 convolutions, each with the layer, no residuals (after Simonyan and Zisserman, ICLR 2015)."""
    w = width
    blocks: list[nn.Module] = [
        nn.Sequential(_conv(i, o, 3, s), layer(o))
        for i, o, s in ((w, 2 * w, 2), (2 * w, 2 * w, 1), (2 * w, 4 * w, 2), (4 * w, 4 * w, 1))
    ]
    return Anchor("vgg", nn.Sequential(_conv(channels, w, 3), layer(w)), blocks, nn.Identity(), 4 * w, classes)


# -- transformer -------------------------------------------------------------------------------------------------

PATCH = 4


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2), by matrix products: it must be differentiable
    twice for the stability test, which fused attention is not."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.project = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(count, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(dim // self.heads)).softmax(-1)
        return self.project((weights @ v).transpose(1, 2).reshape(count, tokens, dim))


class TransformerBlock(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer; the perceptron has one inside as well."""

    def __init__(self, dim: int, heads: int, layer: LayerFactory):
        super().__init__()
        self.layer1, self.attention = layer(dim), Attention(dim, heads)
        self.layer2, self.expand = layer(dim), nn.Linear(dim, 2 * dim)
        self.layer3, self.reduce = layer(2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layer1(x))
        return x + self.reduce(self.layer3(self.expand(self.layer2(x))))


class VisionTransformer(nn.Module):
    """Patches of 4x4, two blocks of 4w channels, mean over tokens (Dosovitskiy et al. 2021; fixed 2-D sine-cosine
    positions as in Beyer et al. 2022, arXiv 2205.01580, which fit any input size)."""

    def __init__(self, layer: LayerFactory, width: int, classes: int, channels: int):
        super().__init__()
        dim = 4 * width
        self.patches = nn.Conv2d(channels, dim, PATCH, PATCH)
        self.blocks = nn.Sequential(*(TransformerBlock(dim, max(1, dim // 16), layer) for _ in range(2)))
        self.layer = layer(dim)
        self.classifier = nn.Linear(dim, classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, features] before the classifier."""
        _check_size("vit", ANCHORS["vit"].size, x.shape[2], x.shape[3])
        patches = self.patches(x)
        tokens = patches.flatten(2).transpose(1, 2) + positions(*patches.shape[1:]).to(patches)
        return self.layer(self.blocks(tokens)).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.forward_features(x))


def positions(dim: int, height: int, width: int) -> Tensor:
    """Sine-cosine codes [height * width, dim] of rows and columns, a quarter of `dim` for each function and axis."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4) / max(1, dim // 4 - 1))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = torch.stack([rows.flatten(), columns.flatten()])[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1).transpose(0, 1).flatten(1)


def _vit(layer: LayerFactory, last: LayerFactory, width: int, classes: int, channels: int) -> nn.Module:
    return VisionTransformer(layer, width, classes, channels)


ANCHORS: dict[str, AnchorKind] = {
    "resnet": AnchorKind(_resnet, "channels-first", 8),
    "mobilenetv2": AnchorKind(_mobilenetv2, "channels-first", 8),
    "efficientnet": AnchorKind(_efficientnet, "channels-first", 8),
    "vgg": AnchorKind(_vgg, "channels-first", 8),
    "vit": AnchorKind(_vit, "tokens", 8),
}
