"""Blocks whose only exchange between positions is a pooling without parameters.

Han et al., Learning Features with Parameter-Free Layers, ICLR 2022, arXiv 2202.02777; blocks and widths as in the
released code (naver-ai/PfLayer).
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.cells.operations import batch_norm, relu
from search_spaces.common.errors import UserError
from search_spaces.primitives.activations import check_channels
from search_spaces.primitives.primitive import Primitive
from search_spaces.space import LayerFactory


class MaxBottleneck(nn.Module):
    """ResNet's bottleneck with a max-pooling in place of the 3 x 3 convolution, for [B, C, H, W].

    1 x 1 convolution to `width`, norm, act -> MaxPool 3 x 3 of the stride -> 1 x 1 convolution to `outputs`, norm; plus
    the input (through a strided 1 x 1 convolution and a norm where shapes differ), then act. Nothing stands between
    pooling and expansion. width: by default a quarter of the outputs. norm, act: factories, BatchNorm2d and ReLU.
    ResNet-50 with this block: 14.2M parameters instead of 25.6M. Errors: UserError unless stride is 1 or 2.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        width: int | None = None,
        stride: int = 1,
        norm: LayerFactory = batch_norm,
        act: LayerFactory = relu,
    ):
        super().__init__()
        if stride not in (1, 2):
            raise UserError(stride, "a stride of 1 or 2", "2" if stride > 2 else "1")
        width = max(1, check_channels(outputs) // 4) if width is None else check_channels(width)
        self.reduce = nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), norm(width), act(width))
        self.exchange = self.make_exchange(width, stride, norm, act)
        self.expand = nn.Sequential(nn.Conv2d(width, outputs, 1, bias=False), norm(outputs))
        if stride == 1 and inputs == outputs:
            self.shortcut: nn.Module = nn.Identity()
        else:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
        self.act = act(outputs)

    def make_exchange(self, width: int, stride: int, norm: LayerFactory, act: LayerFactory) -> nn.Module:
        """The layer between the two 1 x 1 convolutions."""
        return nn.MaxPool2d(3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.expand(self.exchange(self.reduce(x))) + self.shortcut(x))


class EffBottleneck(MaxBottleneck):
    """MaxBottleneck that keeps a convolution where it halves the resolution.

    At stride 2: AvgPool 2 x 2, 3 x 3 convolution, norm, act; at stride 1 the max-pooling. Odd sides do not fit the
    shortcut. ResNet-50 with this block: 17.3M parameters.
    """

    def make_exchange(self, width: int, stride: int, norm: LayerFactory, act: LayerFactory) -> nn.Module:
        if stride == 1:
            return nn.MaxPool2d(3, 1, padding=1)
        conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        return nn.Sequential(nn.AvgPool2d(2), conv, norm(width), act(width))


class EffLayer(nn.Module):
    """Linear C -> 3 C, GELU, max-pooling over the square grid of tokens, GELU, linear 3 C -> C; for [B, N, C].

    In place of self-attention in a ViT without class token: N must be a square. kernel: side of the pooling, odd, 3.
    expansion: 3. Dropout of the authors' code, 0 by default there, is left out.
    """

    def __init__(self, channels: int, *, expansion: int = 3, kernel: int = 3):
        super().__init__()
        if kernel % 2 == 0:
            raise UserError(kernel, "an odd kernel", str(kernel + 1))
        self.kernel = kernel
        self.expand = nn.Linear(check_channels(channels), expansion * channels)
        self.project = nn.Linear(expansion * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.expand(x))
        side = round(y.shape[1] ** 0.5)
        y = y.transpose(1, 2).unflatten(2, (side, side))
        y = F.max_pool2d(y, self.kernel, 1, self.kernel // 2)
        return self.project(F.gelu(y.flatten(2).transpose(1, 2)))

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}"


def make_bottleneck(
    kind: type[MaxBottleneck],
    channels: int,
    *,
    layout: str = "channels-first",
    norm: LayerFactory = batch_norm,
    act: LayerFactory = relu,
) -> nn.Module:
    """The block at stride 1 with as many outputs as inputs. Errors: UserError for another layout."""
    if layout != "channels-first":
        raise UserError(layout, "the layout of a block of convolutions", "channels-first")
    return kind(check_channels(channels), channels, norm=norm, act=act)


def make_eff_layer(channels: int, *, layout: str = "tokens", expansion: int = 3, kernel: int = 3) -> nn.Module:
    """`EffLayer`. Errors: UserError for another layout."""
    if layout != "tokens":
        raise UserError(layout, "the layout of a layer of tokens", "tokens")
    return EffLayer(channels, expansion=expansion, kernel=kernel)


_SOURCE = "Han et al., Learning Features with Parameter-Free Layers, ICLR 2022; released code"

PRIMITIVES: tuple[Primitive, ...] = (
    Primitive(
        "max-bottleneck",
        "mixing",
        "act(x + N(W2 maxpool3(act(N(W1 x)))))",
        _SOURCE,
        partial(make_bottleneck, MaxBottleneck),
        layouts=("channels-first",),
        parameters="W1 [C/4, C, 1, 1], W2 [C, C/4, 1, 1]; of the norms",
        needs=("images",),
    ),
    Primitive(
        "eff-bottleneck",
        "mixing",
        "max-bottleneck at stride 1; at stride 2 avgpool2, 3 x 3 convolution, N, act in place of the pooling",
        _SOURCE,
        partial(make_bottleneck, EffBottleneck),
        layouts=("channels-first",),
        parameters="W1 [C/4, C, 1, 1], W2 [C, C/4, 1, 1]; of the norms",
        needs=("images",),
    ),
    Primitive(
        "eff-layer",
        "mixing",
        "W2 gelu(maxpool3(gelu(W1 x + b1))) + b2",
        _SOURCE,
        make_eff_layer,
        layouts=("tokens",),
        parameters="W1 [3 C, C], b1 [3 C], W2 [C, 3 C], b2 [C]",
        needs=("square-grid",),
    ),
)
