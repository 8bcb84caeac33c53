"""Point-wise replacements of normalisation: weight * f(alpha x + shift) + bias, no statistics at all.

Computed in float32 where the input is half precision. Training and evaluation are the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.primitives.norm_layout import channel_dim
from search_spaces.primitives.primitive import Primitive

FORMULAS = {
    "erf": "erf(u)",
    "tanh": "tanh(u)",
    "arctan": "2/pi atan(u)",
    "satursin": "sin(clip(u, -pi/2, pi/2))",
    "isru": "u / sqrt(1 + u^2)",
    "expsign": "sign(u) (1 - exp(-|u|))",
    "relsign": "u / (sqrt(1 + u^2) + 1)",
    "smoothsign": "u / (1 + |u|)",
    "cubsign": "u^3 / (1 + |u|^3)",
    "exproot": "sign(u) (1 - exp(-sqrt|u|))",
    "saturlog": "sign(u) ln(1 + |u|) / (1 + ln(1 + |u|))",
    "linear-clip": "clip(u, -1, 1)",
    "logquad-clip": "clip(sign(u) ln(1 + u^2), -1, 1)",
    "logsign-clip": "clip(sign(u) ln(1 + |u|), -1, 1)",
    "power23-clip": "clip(sign(u) |u|^(2/3), -1, 1)",
}


def pointwise(name: str, u: Tensor) -> Tensor:
    """The function called `name` of FORMULAS.

    Where squares or cubes would overflow, u is cut off beyond what changes the value (by at most 1e-12). exproot and
    power23-clip are infinitely steep at 0: below |u| = 1e-12 their gradient is 0 and their value off by at most 1e-6.
    """
    if name == "erf":
        return torch.erf(u)
    if name == "tanh":
        return torch.tanh(u)
    if name == "arctan":
        return torch.atan(u) * (2 / math.pi)
    if name == "satursin":
        return torch.sin(u.clamp(-math.pi / 2, math.pi / 2))
    if name == "isru":
        u = u.clamp(-1e18, 1e18)
        return u / torch.sqrt(1 + u * u)
    if name == "relsign":
        u = u.clamp(-1e18, 1e18)
        return u / (torch.sqrt(1 + u * u) + 1)
    if name == "smoothsign":
        return u / (1 + u.abs())
    if name == "cubsign":
        u = u.clamp(-1e4, 1e4)
        return u**3 / (1 + u.abs() ** 3)
    if name == "linear-clip":
        return u.clamp(-1, 1)
    if name == "exproot":
        return -u.sign() * torch.expm1(-u.abs().clamp_min(1e-12).sqrt())
    if name == "power23-clip":
        return u.sign() * u.abs().clamp(1e-12, 1) ** (2 / 3)
    # Of the remaining ones, sign and size are written so that the slope at 0 is that of the function, not 0.
    sign = torch.where(u < 0, -torch.ones_like(u), torch.ones_like(u))
    size = torch.where(u < 0, -u, u)
    if name == "expsign":
        return -sign * torch.expm1(-size)
    if name == "logquad-clip":
        size = size.clamp_max(2)  # ln(1 + 2^2) > 1
        return (sign * torch.log1p(size * size)).clamp(-1, 1)
    log = torch.log1p(size)
    return (sign * log).clamp(-1, 1) if name == "logsign-clip" else sign * log / (1 + log)


class PointwiseNorm(nn.Module):
    """weight * f(alpha x + shift) + bias with f of `pointwise`.

    Parameters: alpha [1] .5, shift [1] 0 (left out with shift=None, as in DyT), weight [C] 1, bias [C] 0.
    """

    def __init__(self, channels: int, name: str, alpha: float = 0.5, shift: float | None = 0.0, channel_dim: int = -1):
        super().__init__()
        self.name, self.channel_dim = name, channel_dim
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.shift = None if shift is None else nn.Parameter(torch.full((1,), shift))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        u = self.alpha * x.to(torch.promote_types(x.dtype, self.alpha.dtype))
        if self.shift is not None:
            u = u + self.shift
        shape = self.weight.shape + (1,) * (x.dim() - 1 - self.channel_dim % x.dim())
        return (pointwise(self.name, u) * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)

    def extra_repr(self) -> str:
        kind = f"{self.weight.numel()}, {self.name!r}, shift={self.shift is not None}"
        return f"{kind}, channel_dim={self.channel_dim}"


def pointwise_norm(
    channels: int,
    *,
    layout: str = "channels-first",
    function: str = "erf",
    alpha: float = 0.5,
    shift: float | None = 0.0,
) -> nn.Module:
    """A PointwiseNorm. The authors begin with alpha 1 in DiT-XL and .5 elsewhere. Errors: UserError for `function`."""
    if function not in FORMULAS:
        raise UserError(function, f"a point-wise function ({one_of(FORMULAS, 20)})", nearest(function, FORMULAS))
    return PointwiseNorm(channels, function, alpha, shift, channel_dim(channels, layout))


def _initial(name: str) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        return pointwise(name, 0.5 * x)

    return function


DERF = "Chen et al., Stronger Normalization-Free Transformers (2025, arXiv 2512.10938), zlab-princeton/Derf"
DYT = "Zhu, Chen, He, LeCun and Liu, Transformers without Normalization (CVPR 2025, arXiv 2503.10622)"


def _primitive(function: str) -> Primitive:
    return Primitive(
        "derf" if function == "erf" else f"{function}-norm",
        "normalisation",
        f"weight * f(alpha x + shift) + bias, f(u) = {FORMULAS[function]}",
        DERF if function == "erf" else f"{DERF}, ViT/other_functions",
        functools.partial(pointwise_norm, function=function),
        function=_initial(function),
        parameters="alpha [1] .5, shift [1] 0, weight [C] 1, bias [C] 0",
    )


PRIMITIVES: tuple[Primitive, ...] = (
    Primitive(
        "dyt",
        "normalisation",
        "weight * tanh(alpha x) + bias",
        DYT,
        functools.partial(pointwise_norm, function="tanh", shift=None),
        function=_initial("tanh"),
        parameters="alpha [1] .5, weight [C] 1, bias [C] 0",
    ),
    *(_primitive(name) for name in FORMULAS),
)
