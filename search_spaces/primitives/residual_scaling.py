"""Residual blocks without normalisation: SkipInit, Fixup, and branches scaled by the depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from search_spaces.common.errors import UserError
from search_spaces.primitives.activations import channel_dim, check_channels
from search_spaces.primitives.placements import PointwiseLinear, check_residual
from search_spaces.primitives.primitive import Primitive

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class SkipInit(nn.Module):
    """x + alpha * f(x), alpha a trained scalar that begins at 0: the block begins as the identity.

    Errors: UserError if the branch changes the shape.
    Source: De and Smith, Batch Normalization Biases Residual Blocks Towards the Identity Function, 2020,
    arXiv 2002.10444.
    """

    def __init__(
        self,
        branch: nn.Module,
        channels: int,
        *,
        alpha: float = 0.0,
        layout: str = "channels-first",
        example: tuple[int, ...] | None = None,
    ):
        super().__init__()
        channel_dim(layout)
        check_residual(branch, channels, layout, example)
        self.branch = branch
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * self.branch(x)


class DepthScaled(nn.Module):
    """x + f(x) / L^power for one of L blocks; power 1 (the default) or 1/2.

    With 1/L the sum over all paths stays bounded as L grows: linear blocks c x give (1 + c / L)^L -> e^c.
    Errors: UserError if the branch changes the shape or `layers` is not positive.
    Source: Dherin and Munn, On residual network depth, 2025, arXiv 2510.03470.
    """

    def __init__(
        self,
        branch: nn.Module,
        channels: int,
        layers: int,
        *,
        power: float = 1.0,
        layout: str = "channels-first",
        example: tuple[int, ...] | None = None,
    ):
        super().__init__()
        channel_dim(layout)
        if layers < 1:
            raise UserError(layers, "a positive number of blocks", "1")
        check_residual(branch, channels, layout, example)
        self.branch = branch
        self.scale = float(layers) ** -power

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.branch(x)

    def extra_repr(self) -> str:
        return f"scale={self.scale:.6g}"


class ScalarBias(nn.Module):
    """x + b, b a trained scalar that begins at 0."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class ScalarScale(nn.Module):
    """s * x, s a trained scalar that begins at 1."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class Fixup(nn.Module):
    """x + branch(x), the branch made of `layers` with Fixup's scalars; initialised by `fixup_`.

    A ScalarBias stands before every layer (convolution, linear, activation), a ScalarScale after the last and, as in
    the authors' code, one more bias before the sum. Convolutions and linear layers are meant to have no biases.
    Errors: UserError without a convolution or linear layer, or if the layers change the shape.
    Source: Zhang, Dauphin and Ma, Fixup Initialization, ICLR 2019, arXiv 1901.09321, section 3; released code.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        channels: int,
        *,
        layout: str = "channels-first",
        example: tuple[int, ...] | None = None,
    ):
        super().__init__()
        channel_dim(layout)
        check_residual(nn.Sequential(*layers), channels, layout, example)
        parts = [part for layer in layers for part in (ScalarBias(), layer)]
        self.branch = nn.Sequential(*parts, ScalarScale(), ScalarBias())
        weight_layers(self)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def weight_layers(block: nn.Module) -> list[nn.Module]:
    """The convolutions and linear layers inside `block`, in order. Errors: UserError if there are none."""
    found: list[nn.Module] = [m for m in block.modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))]
    if not found:
        raise UserError(type(block).__name__, "a block with a convolution or a linear layer")
    return found


@torch.no_grad()
def fixup_(
    blocks: Iterable[nn.Module],
    classifier: nn.Linear | None = None,
    *,
    layers: int | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Fixup's initialisation of all residual blocks of a network, in place.

    layers: L, where `blocks` are not all of them. With L blocks and m weight layers in a block: the last of them 0,
    the others He normal (sqrt(2 / fan out)) times L^(-1 / (2 m - 2)); the classifier 0; layer biases 0, where there
    are any.
    Source: as Fixup; fan out as in the authors' code.
    """
    blocks = list(blocks)
    layers = len(blocks) if layers is None else layers
    for block in blocks:
        *inner, last = weight_layers(block)
        for layer in inner:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)  # type: ignore[arg-type]
            layer.weight *= layers ** (-1 / (2 * len(inner)))  # type: ignore[operator,assignment]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        for layer in (*inner, last):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    if classifier is not None:
        nn.init.zeros_(classifier.weight)
        if classifier.bias is not None:
            nn.init.zeros_(classifier.bias)


def make_skip_init(
    channels: int, *, layout: str = "channels-first", branch: nn.Module | None = None, alpha: float = 0.0
) -> nn.Module:
    """`SkipInit` around `branch`, by default one pointwise linear layer."""
    if branch is None:
        branch = PointwiseLinear(check_channels(channels), channel_dim(layout))
    return SkipInit(branch, channels, alpha=alpha, layout=layout)


def make_depth_scaled(
    channels: int,
    *,
    layout: str = "channels-first",
    branch: nn.Module | None = None,
    layers: int = 1,
    power: float = 1.0,
) -> nn.Module:
    """`DepthScaled` around `branch`, by default one pointwise linear layer."""
    if branch is None:
        branch = PointwiseLinear(check_channels(channels), channel_dim(layout))
    return DepthScaled(branch, channels, layers, power=power, layout=layout)


def make_fixup(
    channels: int,
    *,
    layout: str = "channels-first",
    branch: Sequence[nn.Module] | None = None,
    layers: int = 1,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """`Fixup` of the layers `branch`, one of `layers` blocks, initialised; by default linear, ReLU, linear."""
    if branch is None:
        dim = channel_dim(layout)
        branch = [PointwiseLinear(check_channels(channels), dim), nn.ReLU(), PointwiseLinear(channels, dim)]
    block = Fixup(branch, channels, layout=layout)
    fixup_([block], layers=layers, generator=generator)
    return block


PRIMITIVES: tuple[Primitive, ...] = (
    Primitive(
        "skip-init",
        "placement",
        "x + alpha f(x)",
        "De and Smith, 2020, arXiv 2002.10444",
        make_skip_init,
        parameters="alpha [] 0; of the branch",
    ),
    Primitive(
        "fixup",
        "placement",
        "x + s g(x) + b, a scalar bias before each layer of g; the last weight of g 0, others times L^(-1 / (2 m - 2))",
        "Zhang, Dauphin and Ma, ICLR 2019, arXiv 1901.09321, section 3; released code",
        make_fixup,
        parameters="scale [] 1, biases [] 0; of the branch",
    ),
    Primitive(
        "depth-scaled",
        "placement",
        "x + f(x) / L",
        "Dherin and Munn, On residual network depth, 2025, arXiv 2510.03470",
        make_depth_scaled,
        parameters="of the branch",
    ),
)
