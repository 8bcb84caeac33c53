"""Where the normalisation of a residual block stands: one formula, seven placements.

y = after(skip * x + between(f(gain * before(x)))), where `before`, `between` and `after` are a normalisation or
nothing. A transformer layer has two such blocks, attention and feed-forward; `layer` and `layers` count transformer
layers, so both blocks of a layer are given the same number.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from search_spaces.common.errors import UserError
from search_spaces.common.names import match
from search_spaces.primitives.activations import channel_dim, check_channels
from search_spaces.primitives.norms import LayerNorm2d
from search_spaces.primitives.primitive import Primitive

PLACEMENTS: dict[str, tuple[bool, bool, bool]] = {  # a normalisation before f, between f and the sum, after the sum
    "pre": (True, False, False),
    "post": (False, False, True),
    "sandwich": (True, True, False),
    "peri": (True, True, False),
    "deepnorm": (False, False, True),
    "layer-norm-scaling": (True, False, False),
}
NAMES = (*PLACEMENTS, "mix-ln")


def deepnorm_alpha(layers: int) -> float:
    """(2 L)^(1/4), the factor of the skip connection in encoders or decoders of L layers."""
    return (2 * layers) ** 0.25


def deepnorm_beta(layers: int) -> float:
    """(8 L)^(-1/4), the gain of the initialisation in encoders or decoders of L layers."""
    return (8 * layers) ** -0.25


@torch.no_grad()
def deepnorm_init_(
    scaled: Iterable[nn.Module],
    plain: Iterable[nn.Module] = (),
    *,
    layers: int,
    generator: torch.Generator | None = None,
) -> None:
    """Xavier normal weights, of gain beta for `scaled` and 1 for `plain`; biases stay as they are.

    scaled: value and output projections and both feed-forward layers; plain: query and key projections.
    Source: Wang et al., DeepNet: Scaling Transformers to 1,000 Layers, 2022, arXiv 2203.00555.
    """
    for modules, gain in ((scaled, deepnorm_beta(layers)), (plain, 1.0)):
        for module in modules:
            nn.init.xavier_normal_(module.weight, gain, generator)  # type: ignore[arg-type]


def mix_ln_posts(layers: int, share: float = 0.25) -> int:
    """How many layers, counted from the input, Mix-LN gives the placement `post`: floor(share * layers)."""
    return math.floor(share * layers + 1e-9)  # .1 * 30 is below 3 in binary


def check_residual(branch: nn.Module, channels: int, layout: str, example: tuple[int, ...] | None = None) -> None:
    """Run a copy of `branch` on zeros and compare shapes.

    example: the shape of an input; by default one of [2, C, 8, 8], [2, C, 16], [2, C, 4, 4, 4], [2, C] or, for
    tokens, [2, 16, C], [2, C] that the branch takes. Errors: UserError if the output has another shape, so that
    there is no residual, or if the branch takes none of these inputs.
    """
    spaces = ((16,), ()) if layout == "tokens" else ((8, 8), (16,), (4, 4, 4), ())
    shapes = [(2, *space, channels) if layout == "tokens" else (2, channels, *space) for space in spaces]
    copied = copy.deepcopy(branch).eval()
    first = next(iter(copied.parameters()), torch.zeros(()))
    for shape in [example] if example is not None else shapes:
        try:
            with torch.no_grad():
                found = tuple(copied(torch.zeros(shape, dtype=first.dtype, device=first.device)).shape)
        except (RuntimeError, ValueError, IndexError, NotImplementedError):
            continue  # another number of space dimensions
        if found != tuple(shape):
            raise UserError(
                type(branch).__name__,
                f"a branch that keeps the shape {list(shape)}, this one gives {list(found)}: a placement on a block "
                "without residual",
            )
        return
    raise UserError(
        type(branch).__name__,
        f"a branch for inputs of {channels} channels in layout {layout}, or an `example` shape that it takes",
    )


class PointwiseLinear(nn.Linear):
    """A linear layer over dimension `channel_dim`, the same at every position."""

    def __init__(self, channels: int, channel_dim: int = 1):
        super().__init__(channels, channels)
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(self.channel_dim, -1)).movedim(-1, self.channel_dim)


def layer_norm(channels: int, layout: str) -> nn.Module:
    """LayerNorm over the channels at every position, eps 1e-5, in either layout."""
    return nn.LayerNorm(channels) if channel_dim(layout) == -1 else LayerNorm2d(channels)


class Residual(nn.Module):
    """`branch` with a skip connection and normalisation at the place that `placement` names.

    pre: x + f(N(x)). post: N(x + f(x)). sandwich, peri: x + N(f(N(x))). deepnorm: N((2 L)^(1/4) x + f(x)), for weights
    made by `deepnorm_init_`. layer-norm-scaling: x + f(N(x) / sqrt(l)), without scaled initialisation. mix-ln: post in
    the first floor(share * L) layers, pre in the others.

    norm: factory channels -> module, called once per normalisation; by default LayerNorm over the channels. layer: l,
    from 1; layers: L. share: of Mix-LN. example: see `check_residual`. Needs no more than the branch needs.
    Errors: UserError for an unknown placement or layout, a layer outside 1..L and a branch that changes the shape.
    """

    def __init__(
        self,
        branch: nn.Module,
        channels: int,
        placement: str = "pre",
        *,
        norm: Callable[[int], nn.Module] | None = None,
        layer: int = 1,
        layers: int = 1,
        layout: str = "channels-first",
        share: float = 0.25,
        example: tuple[int, ...] | None = None,
    ):
        super().__init__()
        channel_dim(layout)
        placement = match(placement, NAMES, "a placement")
        if not 1 <= layer <= layers:
            raise UserError(layer, f"a layer from 1 to {layers}", str(min(max(layer, 1), max(layers, 1))))
        check_residual(branch, channels, layout, example)
        self.placement = placement
        if placement == "mix-ln":
            self.placement = "post" if layer <= mix_ln_posts(layers, share) else "pre"
        before, between, after = PLACEMENTS[self.placement]
        make = norm if norm is not None else partial(layer_norm, layout=layout)
        self.skip = deepnorm_alpha(layers) if self.placement == "deepnorm" else 1.0
        self.gain = layer**-0.5 if self.placement == "layer-norm-scaling" else 1.0
        self.before = make(channels) if before else nn.Identity()
        self.branch = branch
        self.between = make(channels) if between else nn.Identity()
        self.after = make(channels) if after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        y = self.between(self.branch(y if self.gain == 1 else self.gain * y))
        return self.after((x if self.skip == 1 else self.skip * x) + y)

    def extra_repr(self) -> str:
        return f"placement={self.placement!r}, skip={self.skip:.6g}, gain={self.gain:.6g}"


def make_residual(
    placement: str,
    channels: int,
    *,
    layout: str = "channels-first",
    branch: nn.Module | None = None,
    norm: Callable[[int], nn.Module] | None = None,
    layer: int = 1,
    layers: int = 1,
) -> nn.Module:
    """`Residual` around `branch`, by default one pointwise linear layer. Errors: UserError, as Residual has them."""
    if branch is None:
        branch = PointwiseLinear(check_channels(channels), channel_dim(layout))
    return Residual(branch, channels, placement, norm=norm, layer=layer, layers=layers, layout=layout)


_SOURCES = {
    "pre": (
        "x + f(N(x))",
        "Xiong et al., On Layer Normalization in the Transformer Architecture, 2020, arXiv 2002.04745",
    ),
    "post": ("N(x + f(x))", "Vaswani et al., Attention Is All You Need, 2017, arXiv 1706.03762, section 3.1"),
    "sandwich": ("x + N(f(N(x)))", "Ding et al., CogView, 2021; formula as in the released code of Mix-LN"),
    "peri": (
        "x + N(f(N(x))); the network also normalises its embeddings and its last output",
        "Kim et al., Peri-LN, 2025, arXiv 2502.02732; the block is that of sandwich",
    ),
    "deepnorm": ("N((2 L)^(1/4) x + f(x))", "Wang et al., DeepNet, 2022, arXiv 2203.00555"),
    "layer-norm-scaling": (
        "x + f(N(x) / sqrt(l)), l the layer from 1",
        "Sun et al., The Curse of Depth in Large Language Models, 2025, arXiv 2502.05795, section 4",
    ),
    "mix-ln": (
        "N(x + f(x)) in the first floor(L / 4) of L layers, x + f(N(x)) in the others",
        "Li et al., Mix-LN, 2024, arXiv 2412.13795; the share as in the released scripts",
    ),
}

PRIMITIVES: tuple[Primitive, ...] = tuple(
    Primitive(
        name, "placement", *_SOURCES[name], make=partial(make_residual, name), parameters="of branch and normalisation"
    )
    for name in NAMES
)
