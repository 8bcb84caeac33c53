"""Single-parameter KANs: every edge is a fixed function f(x, k) of one trained number k.

Source: SKAN, arXiv 2410.14951; functions, initial values and bias input as in the released code (skan, All-KAN).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.primitives.activations import per_channel
from search_spaces.primitives.kan import make_square
from search_spaces.primitives.primitive import Primitive


def elu_edge(x: Tensor, k: Tensor) -> Tensor:
    """x for x > 0, |k| (exp(x / |k|) - 1) else, |k| at least .001.

    The release has k for |k|: the same for k > 0, but exploding for k < 0 and undefined at 0.
    """
    width = torch.clamp(torch.abs(k), min=1e-3)
    return torch.where(x > 0, x, width * torch.expm1(torch.clamp(x, max=0.0) / width))


def gelu_edge(x: Tensor, k: Tensor) -> Tensor:
    """x (1 + tanh(sqrt(2 / pi) (k x + .044715 (k x)^3))) / 2."""
    u = torch.clamp(k * x, -10.0, 10.0)  # tanh is 1 long before; its gradient must not become 0 * infinity
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * u * (1.0 + 0.044715 * u * u)))


SINGLE_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sin": lambda x, k: k * torch.sin(x),
    "cos": lambda x, k: k * torch.cos(x),
    "arctan": lambda x, k: k * torch.atan(x),
    "relu": lambda x, k: F.relu(k * x),
    "leaky-relu": lambda x, k: torch.maximum(k * x, x.expand_as(k * x)),
    "swish": lambda x, k: x * torch.sigmoid(k * x),
    "mish": lambda x, k: x * torch.tanh(F.softplus(k * x)),
    "softplus": lambda x, k: F.softplus(k * x),
    "shifted-softplus": lambda x, k: F.softplus(k * x) - math.log(2),
    "hard-sigmoid": lambda x, k: torch.clamp(k * x + 0.5, 0.0, 1.0),
    "elu": elu_edge,
    "gelu": gelu_edge,
}
_FORMULAS = {
    "sin": "k sin(x)",
    "cos": "k cos(x)",
    "arctan": "k arctan(x)",
    "relu": "max(k x, 0)",
    "leaky-relu": "max(k x, x)",
    "swish": "x / (1 + exp(-k x))",
    "mish": "x tanh(ln(1 + exp(k x)))",
    "softplus": "ln(1 + exp(k x))",
    "shifted-softplus": "ln(1 + exp(k x)) - ln 2",
    "hard-sigmoid": "min(max(k x + 1/2, 0), 1)",
    "elu": "x if x > 0 else |k| (exp(x / |k|) - 1)",
    "gelu": "x (1 + tanh(sqrt(2 / pi) (k x + .044715 (k x)^3))) / 2",
}


def _check_function(name: str) -> str:
    if name not in SINGLE_FUNCTIONS:
        raise UserError(name, f"an edge function ({one_of(SINGLE_FUNCTIONS)})", nearest(name, SINGLE_FUNCTIONS))
    return name


class SingleParameterKAN(nn.Module):
    """y_j = sum_i f(x_i, k_ji) with a constant input 1 beside the others if `bias`: [..., in] -> [..., out].

    function: a name of SINGLE_FUNCTIONS. k [out, in + 1] starts uniform on +-1 / sqrt(in + 1). The sum holds
    [..., out, in] values in memory. Half precision is computed in float32. Errors: UserError for another function.
    """

    def __init__(self, inputs: int, outputs: int, function: str = "shifted-softplus", bias: bool = True):
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.function, self.bias = _check_function(function), bias
        bound = (inputs + bias) ** -0.5  # kaiming_uniform_ with a = sqrt(5)
        self.k = nn.Parameter(torch.empty(outputs, inputs + bias).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if self.bias:
            wide = F.pad(wide, (0, 1), value=1.0)
        return SINGLE_FUNCTIONS[self.function](wide.unsqueeze(-2), self.k).sum(-1).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.outputs}, function={self.function!r}, bias={self.bias}"


class SingleParameterActivation(nn.Module):
    """f(x, k) point by point with k per channel along `channel_dim`; k [C] starts at 1 (our choice).

    function: a name of SINGLE_FUNCTIONS. Half precision is computed in float32. Errors: UserError for another one.
    """

    def __init__(self, channels: int, function: str = "shifted-softplus", channel_dim: int = 1):
        super().__init__()
        self.channels, self.function, self.channel_dim = channels, _check_function(function), channel_dim
        self.k = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        shape = [1] * x.dim()
        shape[self.channel_dim] = -1
        return SINGLE_FUNCTIONS[self.function](wide, self.k.view(shape)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, function={self.function!r}, channel_dim={self.channel_dim}"


def single_function(x: Tensor, function: str = "shifted-softplus") -> Tensor:
    """f(x, 1)."""
    return SINGLE_FUNCTIONS[_check_function(function)](x, torch.ones((), dtype=x.dtype, device=x.device))


_SOURCE = "SKAN, arXiv 2410.14951, functions of the released code"

PRIMITIVES: tuple[Primitive, ...] = (
    *(
        Primitive(
            f"skan-{name}",
            "activation",
            formula,
            _SOURCE + "; as an activation per channel: ours",
            partial(per_channel, SingleParameterActivation, function=name),
            function=partial(single_function, function=name),
            parameters="k [C] = 1",
        )
        for name, formula in _FORMULAS.items()
    ),
    Primitive(
        "skan",
        "mixing",
        "y_j = sum_i ln(1 + exp(k_ji x_i)) - ln 2, x with a constant 1",
        _SOURCE,
        partial(make_square, SingleParameterKAN),
        layouts=("tokens",),
        parameters="k [C, C + 1] uniform on +-1 / sqrt(C + 1)",
    ),
)
