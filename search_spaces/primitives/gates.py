"""Gated linear units, [.., 2 C] -> [.., C], the feed-forward block around them, and PowLU as a gate and as a scalar.

Except in `glu`, the first half of the channels is the gate and the second the value.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.primitives.activations import channel_dim, check_channels, plain
from search_spaces.primitives.primitive import Primitive


def powlu_gate(z: Tensor, m: float = 3.0) -> Tensor:
    """z^(m / (sqrt(z) + 1)) * sigmoid(z) for z > 0, z * sigmoid(z) else.

    Half precision is computed in float32. At 0 the slope is 1/2 from the left and, for m > 1, 0 from the right.
    """
    wide = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    safe = torch.clamp(wide, min=torch.finfo(wide.dtype).tiny)  # the branch not taken must have finite gradients
    power = torch.exp(m * torch.log(safe) / (torch.sqrt(safe) + 1.0))
    return (torch.where(wide > 0, power, wide) * torch.sigmoid(wide)).to(z.dtype)


def powlu(x: Tensor, m: float = 3.0) -> Tensor:
    """x * powlu_gate(x): x^(1 + m / (sqrt(x) + 1)) * sigmoid(x) for x > 0, x^2 * sigmoid(x) else."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide * powlu_gate(wide, m)).to(x.dtype)


class PowLU(nn.Module):
    """x * powlu_gate(x), continuously differentiable; strictly increasing on x > 0 for 0 < m < 10."""

    def __init__(self, m: float = 3.0):
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return powlu(x, self.m)

    def extra_repr(self) -> str:
        return f"m={self.m}"


class Bilinear(nn.Module):
    """gate * value."""

    def __init__(self, dim: int = -1):
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        gate, value = torch.chunk(x, 2, self.dim)
        return gate * value

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class ReGLU(nn.Module):
    """max(gate, 0) * value."""

    def __init__(self, dim: int = -1):
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        gate, value = torch.chunk(x, 2, self.dim)
        return F.relu(gate) * value

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class GEGLU(nn.Module):
    """gate * Phi(gate) * value, with the exact GELU."""

    def __init__(self, dim: int = -1):
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        gate, value = torch.chunk(x, 2, self.dim)
        return F.gelu(gate) * value

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class SwiGLU(nn.Module):
    """gate * sigmoid(gate) * value."""

    def __init__(self, dim: int = -1):
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        gate, value = torch.chunk(x, 2, self.dim)
        return F.silu(gate) * value

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class SwiGLUClip(nn.Module):
    """g * sigmoid(a g) * (v + 1), g = min(gate, limit), v = value clipped to [-limit, limit].

    The gpt-oss code takes gate and value from alternating channels; here they are halves.
    """

    def __init__(self, dim: int = -1, limit: float = 7.0, a: float = 1.702):
        super().__init__()
        self.dim, self.limit, self.a = dim, limit, a

    def forward(self, x: Tensor) -> Tensor:
        gate, value = torch.chunk(x, 2, self.dim)
        gate = torch.clamp(gate, max=self.limit)
        return gate * torch.sigmoid(self.a * gate) * (torch.clamp(value, -self.limit, self.limit) + 1.0)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, limit={self.limit}, a={self.a}"


class PowLUGLU(nn.Module):
    """powlu_gate(gate) * value."""

    def __init__(self, dim: int = -1, m: float = 3.0):
        super().__init__()
        self.dim, self.m = dim, m

    def forward(self, x: Tensor) -> Tensor:
        gate, value = torch.chunk(x, 2, self.dim)
        return powlu_gate(gate, self.m) * value

    def extra_repr(self) -> str:
        return f"dim={self.dim}, m={self.m}"


GATES: dict[str, type[nn.Module]] = {
    "glu": nn.GLU,
    "bilinear": Bilinear,
    "reglu": ReGLU,
    "geglu": GEGLU,
    "swiglu": SwiGLU,
    "swiglu-clip": SwiGLUClip,
    "powlu-glu": PowLUGLU,
}


def gated_width(channels: int, multiple_of: int = 1) -> int:
    """The hidden width of a gated block with the weights of a plain one of 4 C hidden units.

    A plain block has 2 * C * 4 C = 8 C^2 weights, a gated one 3 * C * H, so H = ceil(8 C / 3 / multiple_of) *
    multiple_of with 8 C / 3 rounded down first: with multiple_of 1 never more weights than 8 C^2 and less than 3 C
    fewer. Biases are not counted. Source: Shazeer, GLU Variants Improve Transformer, 2020 (two thirds of the units).
    """
    if multiple_of < 1:
        raise UserError(multiple_of, "a positive multiple", "1")
    return math.ceil(max(8 * channels // 3, 1) / multiple_of) * multiple_of


class GatedFeedForward(nn.Module):
    """Linear C -> 2 H, gate, linear H -> C, on [..., C].

    hidden: H, by default `gated_width(channels, multiple_of)`. gate: a name of GATES. bias: of both linear layers,
    off as in the paper. Errors: UserError for an unknown gate or a width that is not positive.
    Source: Shazeer, GLU Variants Improve Transformer, 2020, arXiv 2002.05202.
    """

    def __init__(
        self,
        channels: int,
        hidden: int | None = None,
        gate: str = "swiglu",
        *,
        multiple_of: int = 1,
        bias: bool = False,
    ):
        super().__init__()
        if gate not in GATES:
            raise UserError(gate, f"a gate ({one_of(GATES)})", nearest(gate, GATES))
        hidden = gated_width(check_channels(channels), multiple_of) if hidden is None else check_channels(hidden)
        self.gate_and_value = nn.Linear(channels, 2 * hidden, bias=bias)
        self.gate = GATES[gate](dim=-1)
        self.project = nn.Linear(hidden, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.gate(self.gate_and_value(x)))


def make_gate(kind: type[nn.Module], channels: int, *, layout: str = "channels-first") -> nn.Module:
    """The gate for inputs of `channels` channels. Errors: UserError for an odd number or an unknown layout."""
    if check_channels(channels) % 2:
        raise UserError(channels, "an even number of channels, gate and value", str(channels + 1))
    return kind(dim=channel_dim(layout))


_POWLU = "Jiang et al., PowLU, 2026, arXiv 2605.25704; formula as in two independent public ports"
_SHAZEER = "Shazeer, GLU Variants Improve Transformer, 2020, arXiv 2002.05202"
_FORMULAS = {
    "glu": ("a sigmoid(b), the gate b second", "Dauphin et al., 2016, arXiv 1612.08083, as in torch.nn.GLU"),
    "bilinear": ("a b", _SHAZEER),
    "reglu": ("max(a, 0) b", _SHAZEER),
    "geglu": ("a Phi(a) b", _SHAZEER),
    "swiglu": ("a sigmoid(a) b", _SHAZEER),
    "swiglu-clip": (
        "g sigmoid(1.702 g) (v + 1), g = min(a, 7), v = min(max(b, -7), 7)",
        "OpenAI, gpt-oss, 2025, released code; halves in place of alternating channels",
    ),
    "powlu-glu": ("f(a) b, f(a) = sigmoid(a) (a^(3 / (sqrt(a) + 1)) if a > 0 else a)", _POWLU),
}

PRIMITIVES: tuple[Primitive, ...] = (
    *(Primitive(name, "gate", *_FORMULAS[name], make=partial(make_gate, kind)) for name, kind in GATES.items()),
    Primitive(
        "powlu",
        "activation",
        "x sigmoid(x) (x^(3 / (sqrt(x) + 1)) if x > 0 else x)",
        _POWLU,
        partial(plain, PowLU),
        function=powlu,
    ),
)
