"""The further functions of activation searches: value, slope, and how they are written.

The unary and binary sets of Ramachandran, Zoph and Le (2017, arXiv 1710.05941) and of Bingham and Miikkulainen (2022,
arXiv 2006.03179) beyond what layers are made of (`ops.ELEMENTWISE`). Half precision is computed in float32 where torch
or numpy has no half-precision function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from search_spaces.layers.graph import Node

_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772  # Klambauer et al. 2017, arXiv 1706.02515


@dataclass(frozen=True)
class Pointwise:
    """A function of one tensor. slope: its derivative, half of both sides' at a kink. source: how torch writes it, with
    {a} for the input. latex: of the function, or with {a} of the whole. wide: whether half precision is lifted."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    source: str
    latex: str
    wide: bool = False


def _step(a: Tensor) -> Tensor:
    return torch.heaviside(a, a.new_full((), 0.5))


def _silu_slope(a: Tensor) -> Tensor:
    gate = torch.sigmoid(a)
    return gate * (1 + a * (1 - gate))


def _sinc_slope(a: Tensor) -> Tensor:
    safe = torch.where(a.abs() < 0.01, torch.ones_like(a), a)
    series = a * (-1 / 3 + a * a / 30 - a**4 / 840)
    return torch.where(a.abs() < 0.01, series, (safe * safe.cos() - safe.sin()) / (safe * safe))


def _i1e_slope(a: Tensor) -> Tensor:
    safe = torch.where(a.abs() < 1e-7, torch.ones_like(a), a)
    inner = torch.special.i0e(a) - torch.special.i1e(a) / safe - a.sign() * torch.special.i1e(a)
    return torch.where(a.abs() < 1e-7, 0.5 - a.abs(), inner)


def _negative_exponential(a: Tensor) -> Tensor:
    """The slope of the exponential linear unit."""
    return a.clamp(max=0).exp()


def _selu_slope(a: Tensor) -> Tensor:
    left = _SELU_ALPHA * _step(-a) + _step(a)  # the mean of both sides at 0
    return _SELU_SCALE * left * _negative_exponential(a)


UNARY: dict[str, Pointwise] = {
    "zeros": Pointwise(torch.zeros_like, torch.zeros_like, "torch.zeros_like({a})", r"0\left({a}\right)"),
    "ones": Pointwise(torch.ones_like, torch.zeros_like, "torch.ones_like({a})", r"1\left({a}\right)"),
    "identity": Pointwise(lambda a: a, torch.ones_like, "{a}", "{a}"),
    "cube": Pointwise(lambda a: a.pow(3), lambda a: 3 * a * a, "torch.pow({a}, 3)", r"\left({a}\right)^{{3}}"),
    "sin": Pointwise(torch.sin, torch.cos, "torch.sin({a})", r"\sin"),
    "cos": Pointwise(torch.cos, lambda a: -a.sin(), "torch.cos({a})", r"\cos"),
    "sinh": Pointwise(torch.sinh, torch.cosh, "torch.sinh({a})", r"\sinh"),
    "cosh": Pointwise(torch.cosh, torch.sinh, "torch.cosh({a})", r"\cosh"),
    "expm1": Pointwise(torch.expm1, torch.exp, "torch.expm1({a})", r"\mathrm{{expm1}}"),
    "asinh": Pointwise(torch.asinh, lambda a: (a * a + 1).rsqrt(), "torch.asinh({a})", r"\mathrm{{asinh}}"),
    "atan": Pointwise(torch.atan, lambda a: 1 / (a * a + 1), "torch.atan({a})", r"\arctan"),
    "sinc": Pointwise(
        lambda a: torch.sinc(a / math.pi), _sinc_slope, f"torch.sinc({{a}} / {math.pi!r})", r"\mathrm{{sinc}}"
    ),
    "gaussian": Pointwise(
        lambda a: (-a * a).exp(),
        lambda a: -2 * a * (-a * a).exp(),
        "gaussian({a})",
        r"\exp\left(-\left({a}\right)^{{2}}\right)",
    ),
    "erfc": Pointwise(
        torch.erfc, lambda a: -2 / math.pi**0.5 * (-a * a).exp(), "torch.erfc({a})", r"\mathrm{{erfc}}", wide=True
    ),
    "logsigmoid": Pointwise(
        nn.functional.logsigmoid, lambda a: torch.sigmoid(-a), "nn.functional.logsigmoid({a})", r"\ln\sigma"
    ),
    "i0e": Pointwise(
        torch.special.i0e,
        lambda a: torch.special.i1e(a) - a.sign() * torch.special.i0e(a),
        "torch.special.i0e({a})",
        r"\mathrm{{i0e}}",
        wide=True,
    ),
    "i1e": Pointwise(torch.special.i1e, _i1e_slope, "torch.special.i1e({a})", r"\mathrm{{i1e}}", wide=True),
    "relu": Pointwise(torch.relu, _step, "torch.relu({a})", r"\mathrm{{relu}}"),
    "elu": Pointwise(nn.functional.elu, _negative_exponential, "nn.functional.elu({a})", r"\mathrm{{elu}}"),
    "selu": Pointwise(
        nn.functional.selu,
        _selu_slope,
        "nn.functional.selu({a})",
        r"\mathrm{{selu}}",
    ),
    "silu": Pointwise(nn.functional.silu, _silu_slope, "nn.functional.silu({a})", r"\mathrm{{silu}}"),
    "softsign": Pointwise(
        nn.functional.softsign, lambda a: (1 + a.abs()) ** -2, "nn.functional.softsign({a})", r"\mathrm{{softsign}}"
    ),
    "hardsigmoid": Pointwise(  # Keras's, not torch's relu6(x + 3) / 6
        lambda a: (0.2 * a + 0.5).clamp(0, 1),
        lambda a: 0.2 * (_step(a + 2.5) - _step(a - 2.5)),
        "(0.2 * {a} + 0.5).clamp(0, 1)",
        r"\mathrm{{hardsigmoid}}",
    ),
}


def limited(node: Node, a: Tensor) -> Tensor:
    """The input of a node whose clamp bounds it: above, for sinh and cosh on both sides."""
    if node.clamp is None:
        return a
    return a.clamp(-abs(node.clamp), abs(node.clamp)) if node.op in ("sinh", "cosh") else a.clamp(max=node.clamp)


def guarded(b: Tensor, eps: float) -> Tensor:
    """A divisor, moved away from zero by eps."""
    return torch.where(b < 0, b - eps, b + eps) if eps else b


def unary(node: Node, a: Tensor) -> Tensor:
    """The value of a unary node of this file."""
    if node.op == "reciprocal":
        return guarded(a, node.eps).reciprocal()
    if node.op == "logabs":
        return (a.abs() + node.eps).log()
    function = UNARY[node.op]
    a = limited(node, a)
    if function.wide and a.dtype in (torch.float16, torch.bfloat16):
        return function.value(a.float()).to(a.dtype)
    return function.value(a)


def unary_slope(node: Node, a: Tensor) -> Tensor:
    """The derivative of `unary`; float32 and float64."""
    if node.op == "reciprocal":
        return -(guarded(a, node.eps).reciprocal() ** 2)
    if node.op == "logabs":
        return a.sign() / (a.abs() + node.eps)
    inside = limited(node, a)
    slope = UNARY[node.op].slope(inside)
    return slope if node.clamp is None else slope * (inside == a)


def power(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """a to the power b; with an eps (|a| + eps) to the power b, which is defined everywhere."""
    return torch.pow(a.abs() + node.eps if node.eps else a, b)
