"""Activations with trained parameters.

Parameters are float32. Half-precision inputs are computed in float32 and the result has the input's type.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.common.errors import UserError
from search_spaces.primitives.activations import per_channel, plain
from search_spaces.primitives.primitive import Primitive

STAR_SCALE, STAR_BIAS = math.sqrt(0.8), -math.sqrt(0.2)  # E relu(z)^2 = 1/2, Var relu(z)^2 = 5/4 for z of N(0, 1)


def wide(x: Tensor) -> Tensor:
    """`x`, in float32 if it has half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def along(parameter: Tensor, x: Tensor, dim: int) -> Tensor:
    """A parameter [C] shaped to broadcast along dimension `dim` of x."""
    shape = [1] * x.dim()
    shape[dim] = -1
    return parameter.view(shape)


class PReLU(nn.Module):
    """max(x, 0) + a min(x, 0) with slope a per channel along `channel_dim`; a [C] starts at .25."""

    def __init__(self, channels: int, channel_dim: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 0.25))
        self.channels, self.channel_dim = channels, channel_dim

    def forward(self, x: Tensor) -> Tensor:
        z = wide(x)
        return torch.where(z > 0, z, along(self.weight, x, self.channel_dim) * z).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, channel_dim={self.channel_dim}"


class Swish(nn.Module):
    """x * sigmoid(beta x) with beta per channel along `channel_dim`; beta [C] starts at 1, where it is SiLU."""

    def __init__(self, channels: int, channel_dim: int = 1):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(channels))
        self.channels, self.channel_dim = channels, channel_dim

    def forward(self, x: Tensor) -> Tensor:
        z = wide(x)
        return (z * torch.sigmoid(along(self.beta, x, self.channel_dim) * z)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, channel_dim={self.channel_dim}"


def star_relu(x: Tensor, scale: Tensor | float = STAR_SCALE, bias: Tensor | float = STAR_BIAS) -> Tensor:
    """scale * max(x, 0)^2 + bias."""
    return scale * torch.square(F.relu(x)) + bias


class StarReLU(nn.Module):
    """scale * max(x, 0)^2 + bias, two trained scalars.

    The defaults .8944 and -.4472 give mean 0 and variance 1 for N(0, 1) inputs; the released MetaFormer code starts
    at scale 1 and bias 0. Beyond half precision's range of squares the result is infinite: above 255 in float16.
    """

    def __init__(self, initial_scale: float = STAR_SCALE, initial_bias: float = STAR_BIAS):
        super().__init__()
        self.initial_scale, self.initial_bias = initial_scale, initial_bias
        self.scale = nn.Parameter(torch.tensor(initial_scale))
        self.bias = nn.Parameter(torch.tensor(initial_bias))

    def forward(self, x: Tensor) -> Tensor:
        return star_relu(wide(x), self.scale, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"initial_scale={self.initial_scale:.4g}, initial_bias={self.initial_bias:.4g}"


def crrelu(x: Tensor, epsilon: Tensor | float = 0.01) -> Tensor:
    """max(x, 0) + epsilon * x * exp(-x^2 / 2)."""
    return F.relu(x) + epsilon * x * torch.exp(-0.5 * torch.square(x))


class CRReLU(nn.Module):
    """max(x, 0) + epsilon * x * exp(-x^2 / 2); epsilon, a trained scalar, starts at .01."""

    def __init__(self, initial_epsilon: float = 0.01):
        super().__init__()
        self.initial_epsilon = initial_epsilon
        self.epsilon = nn.Parameter(torch.tensor(initial_epsilon))

    def forward(self, x: Tensor) -> Tensor:
        return crrelu(wide(x), self.epsilon).to(x.dtype)

    def extra_repr(self) -> str:
        return f"initial_epsilon={self.initial_epsilon}"


def xielu(
    x: Tensor,
    alpha_p: Tensor | float = 0.8,
    alpha_n: Tensor | float = 0.8,
    beta: float = 0.5,
    eps: float = -1e-6,
) -> Tensor:
    """alpha_p x^2 + beta x for x > 0, alpha_n (exp(min(x, eps)) - 1 - x) + beta x else.

    `eps` is the released code's guard; it leaves a step of alpha_n * 1e-6 at 0, and on [eps, 0] the derivative is
    beta - alpha_n where the function without guard has beta.
    """
    positive, negative = F.relu(x), torch.clamp(x, max=0.0)  # the branch not taken stays finite
    right = alpha_p * torch.square(positive)
    left = alpha_n * (torch.expm1(torch.clamp(x, max=eps)) - negative)
    return torch.where(x > 0, right, left) + beta * x


class XIELU(nn.Module):
    """xIELU with two trained scalars p and n: alpha_p = softplus(p), alpha_n = beta + softplus(n).

    Both alphas start at .8, alpha_n stays above beta, which is .5 and fixed like eps.
    Errors: UserError for initial values outside of these bounds.
    """

    def __init__(
        self,
        initial_alpha_p: float = 0.8,
        initial_alpha_n: float = 0.8,
        beta: float = 0.5,
        eps: float = -1e-6,
    ):
        super().__init__()
        if initial_alpha_p <= 0 or initial_alpha_n <= beta:
            raise UserError((initial_alpha_p, initial_alpha_n), f"alpha_p above 0 and alpha_n above beta = {beta}")
        self.initial_alpha_p, self.initial_alpha_n, self.beta, self.eps = initial_alpha_p, initial_alpha_n, beta, eps
        self.alpha_p = nn.Parameter(torch.tensor(math.log(math.expm1(initial_alpha_p))))  # before softplus
        self.alpha_n = nn.Parameter(torch.tensor(math.log(math.expm1(initial_alpha_n - beta))))

    def forward(self, x: Tensor) -> Tensor:
        alpha_p, alpha_n = F.softplus(self.alpha_p), self.beta + F.softplus(self.alpha_n)
        return xielu(wide(x), alpha_p, alpha_n, self.beta, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"alphas={self.initial_alpha_p}, {self.initial_alpha_n} at first, beta={self.beta}, eps={self.eps}"


def poly_relu(x: Tensor, weight: Tensor | tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3), bias: Tensor | float = 0.0):
    """weight[0] r^3 + weight[1] r^2 + weight[2] r + bias with r = max(x, 0)."""
    r = F.relu(x)
    return ((weight[0] * r + weight[1]) * r + weight[2]) * r + bias


class PolyReLU(nn.Module):
    """A cubic polynomial of max(x, 0); weight [3], highest power first, starts at 1/3 each, bias [1] at 0.

    The result overflows float16 above 57 and float32 above 1e13.
    """

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 1 / 3))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return poly_relu(wide(x), self.weight, self.bias).to(x.dtype)


def _unit_power(u: Tensor, dim: int, eps: float) -> Tensor:
    """u over its root mean square along `dim`."""
    return u * torch.rsqrt(torch.mean(torch.square(u), dim, keepdim=True) + eps)


class PolyNorm(nn.Module):
    """weight[0] N(x^3) + weight[1] N(x^2) + weight[2] N(x) + bias, N(u) = u / sqrt(mean(u^2) + eps).

    The mean runs over `channel_dim`, the hidden width of a feed-forward block, at each position alone. weight [3]
    starts at 1/3 each, bias [1] at 0. mean(x^6) overflows float32 for inputs beyond 2e6.
    """

    def __init__(self, channel_dim: int = 1, eps: float = 1e-6):
        super().__init__()
        self.channel_dim, self.eps = channel_dim, eps
        self.weight = nn.Parameter(torch.full((3,), 1 / 3))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        z = wide(x)
        powers = (z * z * z, z * z, z)
        cubic, square, linear = (_unit_power(u, self.channel_dim, self.eps) for u in powers)
        return (self.weight[0] * cubic + self.weight[1] * square + self.weight[2] * linear + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"channel_dim={self.channel_dim}, eps={self.eps}"


def _poly_norm(channels: int, channel_dim: int) -> nn.Module:
    return PolyNorm(channel_dim)


_PRELU = "He et al., Delving Deep into Rectifiers, 2015, arXiv 1502.01852"
_POLY = "Zhuo et al., Polynomial Composition Activations, 2024, arXiv 2411.03884; order of the released code PolyCom"

PRIMITIVES: tuple[Primitive, ...] = (
    Primitive(
        "prelu",
        "activation",
        "max(x, 0) + a min(x, 0)",
        _PRELU,
        partial(per_channel, PReLU),
        function=partial(F.leaky_relu, negative_slope=0.25),
        parameters="a [C] = .25",
    ),
    Primitive(
        "prelu-shared",
        "activation",
        "max(x, 0) + a min(x, 0)",
        _PRELU + ", channel-shared variant",
        partial(plain, nn.PReLU),
        function=partial(F.leaky_relu, negative_slope=0.25),
        parameters="a [1] = .25",
    ),
    Primitive(
        "swish",
        "activation",
        "x sigmoid(beta x)",
        "Ramachandran et al., Searching for Activation Functions, 2017, arXiv 1710.05941",
        partial(per_channel, Swish),
        function=F.silu,
        parameters="beta [C] = 1",
    ),
    Primitive(
        "star-relu",
        "activation",
        "s max(x, 0)^2 + b",
        "Yu et al., MetaFormer Baselines for Vision, 2022, arXiv 2210.13452; constants derived, its code has s=1 b=0",
        partial(plain, StarReLU),
        function=star_relu,
        parameters="s = sqrt(4/5), b = -sqrt(1/5), scalars",
    ),
    Primitive(
        "crrelu",
        "activation",
        "max(x, 0) + e x exp(-x^2 / 2)",
        "Sun et al., A Method on Searching Better Activation Functions, 2024, arXiv 2405.12954; e as in public ports",
        partial(plain, CRReLU),
        function=crrelu,
        parameters="e = .01, scalar",
    ),
    Primitive(
        "xielu",
        "activation",
        "p x^2 + x / 2 if x > 0 else n (exp(min(x, -1e-6)) - 1 - x) + x / 2",
        "Huang and Schlag, xIELU, 2024, arXiv 2411.13010 (authors: recollection); guard of the Apertus code",
        partial(plain, XIELU),
        function=xielu,
        parameters="p = n = .8, scalars, trained as inverse softplus of p and of n - 1/2",
    ),
    Primitive(
        "poly-relu",
        "activation",
        "w0 r^3 + w1 r^2 + w2 r + b, r = max(x, 0)",
        _POLY,
        partial(plain, PolyReLU),
        function=poly_relu,
        parameters="w [3] = 1/3, b [1] = 0",
    ),
    Primitive(
        "poly-norm",
        "activation",
        "w0 N(x^3) + w1 N(x^2) + w2 N(x) + b, N(u) = u / sqrt(mean_C(u^2) + 1e-6)",
        _POLY,
        partial(per_channel, _poly_norm),
        parameters="w [3] = 1/3, b [1] = 0",
    ),
)
