"""Activations without parameters, point by point.

Where torch has the function its module is used. A Primitive's `make(channels, *, layout=...)` ignores both arguments
here, but checks them, so that all activations can stand at one place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.primitives.primitive import LAYOUTS, Primitive


def channel_dim(layout: str) -> int:
    """The channel dimension of a layout: 1 of [B, C, ...] or -1 of [..., C]. Errors: UserError for another name."""
    if layout not in LAYOUTS:
        raise UserError(layout, f"a layout ({one_of(LAYOUTS)})", nearest(layout, LAYOUTS))
    return 1 if layout == "channels-first" else -1


def check_channels(channels: int) -> int:
    """`channels` if it is a positive whole number. Errors: UserError."""
    if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
        raise UserError(channels, "a positive number of channels", "1")
    return channels


def plain(kind: Callable[..., nn.Module], channels: int, *, layout: str = "channels-first", **settings: Any):
    """`kind(**settings)`: the factory of a module that knows no channels. Errors: UserError for channels or layout."""
    check_channels(channels)
    channel_dim(layout)
    return kind(**settings)


def per_channel(kind: Callable[..., nn.Module], channels: int, *, layout: str = "channels-first", **settings: Any):
    """`kind(channels, channel_dim=..., **settings)`: the factory of a module with parameters per channel."""
    return kind(check_channels(channels), channel_dim=channel_dim(layout), **settings)


def lecun_normal_(module: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Draw the weights of all linear and convolution layers in `module` from N(0, 1 / fan-in), biases 0; in place.

    What self-normalising networks with `selu` start from (Klambauer et al., Self-Normalizing Neural Networks, 2017).
    They also drop units with torch.nn.AlphaDropout in place of Dropout, which keeps mean 0 and variance 1.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            fan_in = part.weight[0].numel()  # weights are [out, in / groups, ...]
            nn.init.normal_(part.weight, std=fan_in**-0.5, generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return module


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the sigmoid approximation of GELU (Hendrycks and Gimpel, 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        return quick_gelu(x)


def hard_sigmoid_keras(x: Tensor) -> Tensor:
    """clip(0.2 x + 0.5, 0, 1)."""
    return torch.clamp(0.2 * x + 0.5, 0.0, 1.0)


class HardSigmoidKeras(nn.Module):
    """clip(0.2 x + 0.5, 0, 1); torch's Hardsigmoid has slope 1/6 instead."""

    def forward(self, x: Tensor) -> Tensor:
        return hard_sigmoid_keras(x)


def hard_mish(x: Tensor) -> Tensor:
    """x * clip(x + 2, 0, 2) / 2."""
    return 0.5 * x * torch.clamp(x + 2.0, 0.0, 2.0)


class HardMish(nn.Module):
    """x * clip(x + 2, 0, 2) / 2."""

    def forward(self, x: Tensor) -> Tensor:
        return hard_mish(x)


def elish(x: Tensor) -> Tensor:
    """x * sigmoid(x) for x > 0, (exp(x) - 1) * sigmoid(x) else."""
    return torch.where(x > 0, x, torch.expm1(torch.clamp(x, max=0.0))) * torch.sigmoid(x)


class ELiSH(nn.Module):
    """x * sigmoid(x) for x > 0, (exp(x) - 1) * sigmoid(x) else."""

    def forward(self, x: Tensor) -> Tensor:
        return elish(x)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    return torch.square(F.relu(x))


class SquaredReLU(nn.Module):
    """max(x, 0)^2; float16 overflows above 255."""

    def forward(self, x: Tensor) -> Tensor:
        return squared_relu(x)


def rerelu(x: Tensor) -> Tensor:
    """max(x, 0) with the derivative of the exact GELU."""
    smooth = F.gelu(x)
    return F.relu(x).detach() + (smooth - smooth.detach())  # the bracket is exactly 0 and carries the gradient


class REReLU(nn.Module):
    """max(x, 0) forwards, the derivative of the exact GELU backwards (straight-through), so no unit dies."""

    def forward(self, x: Tensor) -> Tensor:
        return rerelu(x)


def _of_torch(name: str, formula: str, source: str, kind: type[nn.Module], function, **settings: Any) -> Primitive:
    given = partial(function, **settings) if settings else function
    return Primitive(name, "activation", formula, source, partial(plain, kind, **settings), function=given)


def _own(name: str, formula: str, source: str, kind: type[nn.Module], function: Callable[[Tensor], Tensor]):
    return Primitive(name, "activation", formula, source, partial(plain, kind), function=function)


_SELU = "l (x if x > 0 else a (exp(x) - 1)), l = 1.0507009873554805, a = 1.6732632423543772"
_SELU_SOURCE = "Klambauer et al., Self-Normalizing Neural Networks, 2017, arXiv 1706.02515; for `lecun_normal_` weights"
_GELU = "Hendrycks and Gimpel, Gaussian Error Linear Units, 2016, arXiv 1606.08415"
_HARD = "Howard et al., Searching for MobileNetV3, 2019, arXiv 1905.02244"
_AS_TORCH = "as in torch.nn."

PRIMITIVES: tuple[Primitive, ...] = (
    _of_torch("identity", "x", _AS_TORCH + "Identity", nn.Identity, torch.clone),
    _of_torch("relu", "max(x, 0)", "Nair and Hinton, Rectified Linear Units, ICML 2010", nn.ReLU, F.relu),
    _of_torch("relu6", "min(max(x, 0), 6)", _AS_TORCH + "ReLU6", nn.ReLU6, F.relu6),
    _of_torch(
        "leaky-relu", "max(x, 0) + .01 min(x, 0)", "Maas et al., ICML 2013, slope of torch", nn.LeakyReLU, F.leaky_relu
    ),
    _of_torch("elu", "x if x > 0 else exp(x) - 1", "Clevert et al., 2016, arXiv 1511.07289", nn.ELU, F.elu),
    _of_torch("celu", "max(x, 0) + min(0, exp(x) - 1), alpha 1", "Barron, 2017, arXiv 1704.07483", nn.CELU, F.celu),
    _of_torch("selu", _SELU, _SELU_SOURCE, nn.SELU, F.selu),
    _of_torch("softplus", "ln(1 + exp(x)), x above 20", _AS_TORCH + "Softplus", nn.Softplus, F.softplus),
    _of_torch("softsign", "x / (1 + |x|)", _AS_TORCH + "Softsign", nn.Softsign, F.softsign),
    _of_torch("hardtanh", "min(max(x, -1), 1)", _AS_TORCH + "Hardtanh", nn.Hardtanh, F.hardtanh),
    _of_torch("tanh", "tanh(x)", _AS_TORCH + "Tanh", nn.Tanh, torch.tanh),
    _of_torch("sigmoid", "1 / (1 + exp(-x))", _AS_TORCH + "Sigmoid", nn.Sigmoid, torch.sigmoid),
    _of_torch("logsigmoid", "-ln(1 + exp(-x))", _AS_TORCH + "LogSigmoid", nn.LogSigmoid, F.logsigmoid),
    _of_torch("gelu", "x Phi(x), Phi the normal distribution", _GELU, nn.GELU, F.gelu),
    _of_torch(
        "gelu-tanh",
        "x (1 + tanh(sqrt(2 / pi) (x + .044715 x^3))) / 2",
        _GELU,
        nn.GELU,
        F.gelu,
        approximate="tanh",
    ),
    _own("quick-gelu", "x sigmoid(1.702 x)", _GELU, QuickGELU, quick_gelu),
    _of_torch("silu", "x sigmoid(x)", "Elfwing et al., 2017, arXiv 1702.03118", nn.SiLU, F.silu),
    _of_torch("mish", "x tanh(ln(1 + exp(x)))", "Misra, Mish, 2019, arXiv 1908.08681", nn.Mish, F.mish),
    _of_torch("hardswish", "x min(max(x + 3, 0), 6) / 6", _HARD, nn.Hardswish, F.hardswish),
    _of_torch("hardsigmoid", "min(max(x + 3, 0), 6) / 6", _HARD + ", as in torch", nn.Hardsigmoid, F.hardsigmoid),
    _own(
        "hardsigmoid-keras", "min(max(.2 x + .5, 0), 1)", "Keras 2, hard_sigmoid", HardSigmoidKeras, hard_sigmoid_keras
    ),
    _own("hard-mish", "x min(max(x + 2, 0), 2) / 2", "timm 1.0, layers/activations.py, hard_mish", HardMish, hard_mish),
    _own(
        "elish",
        "sigmoid(x) (x if x > 0 else exp(x) - 1)",
        "Basirat and Roth, The Quest for the Golden Activation Function, 2018, arXiv 1808.00783 (paper: recollection)",
        ELiSH,
        elish,
    ),
    _own("squared-relu", "max(x, 0)^2", "So et al., Primer, 2021, arXiv 2109.08668", SquaredReLU, squared_relu),
    _own(
        "rerelu",
        "max(x, 0); its derivative is that of x Phi(x)",
        "Reparametrized ReLU, openreview lNCnZwcH5Z; formula as in the package ml_networks, paper not read",
        REReLU,
        rerelu,
    ),
)
