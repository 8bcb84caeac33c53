"""The activations that handwritten kernels fuse: forward and derivative with torch's own operations.

`alpha` is the activation's one setting: the slope of leaky-relu (torch's default .01), the scale of elu (1), the m of
powlu-gate (3); the others have none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import canonical, nearest
from search_spaces.primitives.gates import powlu_gate

_aten = torch.ops.aten
_LEAST = 1e-30  # below it a power is nothing, and its logarithm is still finite


def _powlu_gate_backward(dy: Tensor, z: Tensor, m: float) -> Tensor:
    safe = torch.clamp(z, min=_LEAST)
    root = torch.sqrt(safe)
    growth = m * (1.0 / (safe * (root + 1.0)) - torch.log(safe) / (2.0 * root * torch.square(root + 1.0)))
    s = torch.sigmoid(z)
    power = torch.exp(m * torch.log(safe) / (root + 1.0))
    return dy * torch.where(z > 0, power * s * (growth + (1.0 - s)), s * (1.0 + z * (1.0 - s)))


@dataclass(frozen=True)
class Activation:
    """forward(z, alpha), backward(dy, z, alpha) = dy * derivative at z, and alpha's default."""

    forward: Callable[[Tensor, float], Tensor]
    backward: Callable[[Tensor, Tensor, float], Tensor]
    alpha: float = 0.0


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda z, a: z, lambda dy, z, a: dy),
    "relu": Activation(lambda z, a: F.relu(z), lambda dy, z, a: _aten.threshold_backward(dy, z, 0.0)),
    "relu6": Activation(lambda z, a: F.relu6(z), lambda dy, z, a: _aten.hardtanh_backward(dy, z, 0.0, 6.0)),
    "leaky-relu": Activation(
        lambda z, a: F.leaky_relu(z, a), lambda dy, z, a: _aten.leaky_relu_backward(dy, z, a, False), 0.01
    ),
    "elu": Activation(lambda z, a: F.elu(z, a), lambda dy, z, a: _aten.elu_backward(dy, a, 1.0, 1.0, False, z), 1.0),
    "sigmoid": Activation(lambda z, a: torch.sigmoid(z), lambda dy, z, a: _aten.sigmoid_backward(dy, torch.sigmoid(z))),
    "tanh": Activation(lambda z, a: torch.tanh(z), lambda dy, z, a: _aten.tanh_backward(dy, torch.tanh(z))),
    "silu": Activation(lambda z, a: F.silu(z), lambda dy, z, a: _aten.silu_backward(dy, z)),
    "gelu": Activation(lambda z, a: F.gelu(z), lambda dy, z, a: _aten.gelu_backward(dy, z)),
    "gelu-tanh": Activation(
        lambda z, a: F.gelu(z, approximate="tanh"),
        lambda dy, z, a: _aten.gelu_backward(dy, z, approximate="tanh"),
    ),
    "hardswish": Activation(lambda z, a: F.hardswish(z), lambda dy, z, a: _aten.hardswish_backward(dy, z)),
    "mish": Activation(lambda z, a: F.mish(z), lambda dy, z, a: _aten.mish_backward(dy, z)),
    "powlu-gate": Activation(powlu_gate, _powlu_gate_backward, 3.0),
}


def activation(name: str, alpha: float | None) -> tuple[str, float]:
    """The canonical name and its setting. Errors: UserError for an unknown name."""
    known = canonical(name)
    if known not in ACTIVATIONS:
        raise UserError(name, f"an activation ({one_of(ACTIVATIONS, 20)})", nearest(name, ACTIVATIONS))
    return known, ACTIVATIONS[known].alpha if alpha is None else float(alpha)
