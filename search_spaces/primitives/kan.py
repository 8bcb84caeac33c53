"""Kolmogorov-Arnold layers on features, [..., in] -> [..., out]: a trained function on every edge.

y_j = sum_i phi_ji(x_i) (Liu et al., KAN: Kolmogorov-Arnold Networks, 2024, arXiv 2404.19756). Here phi is a sum of
fixed basis functions with trained weights; `kan_single.py` has edges of one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.choice import Choice
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.primitives.activations import check_channels
from search_spaces.primitives.primitive import Primitive


def b_splines(x: Tensor, grid: int = 5, order: int = 3, low: float = -1.0, high: float = 1.0) -> Tensor:
    """The grid + order B-splines of degree `order` on `grid` equal intervals of [low, high]: [...] -> [..., basis].

    The knots go on evenly by `order` steps on both sides; beyond them all splines are 0, inside [low, high] they add
    up to 1. By the recursion of Cox and de Boor.
    """
    step = (high - low) / grid
    position = (x - low) / step + order  # knots at 0, 1, ..., grid + 2 order
    position = position.clamp(-1.0, grid + 2.0 * order + 1.0).unsqueeze(-1)  # 0 beyond them, and finite
    knots = torch.arange(grid + 2 * order, device=x.device, dtype=position.dtype)
    basis = ((position >= knots) & (position < knots + 1)).to(position.dtype)
    for degree in range(1, order + 1):
        count = grid + 2 * order - degree
        left, right = position - knots[:count], knots[:count] + degree + 1 - position
        basis = (left * basis[..., :-1] + right * basis[..., 1:]) / degree
    return basis


def radial(x: Tensor, count: int = 8) -> Tensor:
    """Gaussians exp(-((x - c) / h)^2) with `count` centres c on [-1, 1], h apart: [...] -> [..., count]."""
    centres = torch.linspace(-1.0, 1.0, count, device=x.device, dtype=x.dtype)
    return torch.exp(-torch.square((x.unsqueeze(-1) - centres) * ((count - 1) / 2)))


def chebyshev(x: Tensor, count: int = 8) -> Tensor:
    """Chebyshev polynomials T_0 ... T_{count - 1} of tanh(x): [...] -> [..., count]."""
    t = torch.tanh(x)
    terms = [torch.ones_like(t), t]
    for _ in range(count - 2):  # the recursion has finite gradients where cos(n arccos(t)) has none
        terms.append(2.0 * t * terms[-1] - terms[-2])
    return torch.stack(terms[:count], dim=-1)


def fourier(x: Tensor, count: int = 8) -> Tensor:
    """sin(n x) and cos(n x) for n = 1 ... count / 2: [...] -> [..., count]."""
    n = torch.arange(1, count // 2 + 1, device=x.device, dtype=x.dtype)
    angle = x.unsqueeze(-1) * n
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)


def wavelets(x: Tensor, count: int = 8) -> Tensor:
    """Mexican hats (1 - u^2) exp(-u^2 / 2), u = (x - c) / h, at `count` centres c on [-1, 1], h apart."""
    centres = torch.linspace(-1.0, 1.0, count, device=x.device, dtype=x.dtype)
    square = torch.square((x.unsqueeze(-1) - centres) * ((count - 1) / 2)).clamp(max=1e4)  # exp is 0 long before
    return (1.0 - square) * torch.exp(-0.5 * square)


def silu_basis(x: Tensor) -> Tensor:
    """The one function x * sigmoid(x): [...] -> [..., 1]."""
    return F.silu(x).unsqueeze(-1)


FAMILIES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "b-spline": (b_splines, 8),
    "rbf": (radial, 8),
    "chebyshev": (chebyshev, 8),
    "fourier": (fourier, 8),
    "wavelet": (wavelets, 8),
    "silu": (silu_basis, 1),
}  # name: (basis, number of functions)


class EdgeKAN(nn.Module):
    """Edges of one family: y_j = sum_i sum_b weight[j, i, b] * basis_b(x_i).

    family: a name of FAMILIES. weight [out, in, functions] starts at N(0, 1 / (in * functions)). Half precision is
    computed in float32. Errors: UserError for another family.
    """

    def __init__(self, inputs: int, outputs: int, family: str = "b-spline"):
        super().__init__()
        if family not in FAMILIES:
            raise UserError(family, f"a family of edges ({one_of(FAMILIES)})", nearest(family, FAMILIES))
        self.inputs, self.outputs, self.family = inputs, outputs, family
        functions = FAMILIES[family][1]
        self.weight = nn.Parameter(torch.randn(outputs, inputs, functions) * (inputs * functions) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return F.linear(FAMILIES[self.family][0](wide).flatten(-2), self.weight.flatten(1)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.outputs}, family={self.family!r}"


class NodewiseKAN(nn.Module):
    """One module [..., in] -> [..., 1] per output node, side by side: [..., in] -> [..., nodes]."""

    def __init__(self, nodes: list[nn.Module]):
        super().__init__()
        self.nodes = nn.ModuleList(nodes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([node(x) for node in self.nodes], dim=-1)


def selectable_kan(inputs: int, outputs: int, label: str = "edges", *, per_node: bool = False) -> nn.Module:
    """S-KAN's choice among families of edges: a Choice of EdgeKAN in the order of FAMILIES.

    per_node: every output node chooses for itself, labels `<label>_<node>`; otherwise one Choice, `label`.
    Source: arXiv 2408.08338, abstract: each node selects among activation spaces. Its selection rule was not
    available; selecting is left to the search.
    """
    if not per_node:
        return Choice((EdgeKAN(inputs, outputs, family) for family in FAMILIES), label)
    return NodewiseKAN(
        [Choice((EdgeKAN(inputs, 1, family) for family in FAMILIES), f"{label}_{node}") for node in range(outputs)]
    )


class SplineKAN(nn.Module):
    """Edges phi(x) = w_b silu(x) + w_s sum_b c_b B_b(x), B-splines of degree `order` on `grid` intervals of [-1, 1].

    The grid is fixed; the spline part is 0 beyond `order` steps outside it. Starts: c [out, in, grid + order] from
    N(0, .1^2), w_s [out, in] = 1, w_b [out, in] by Xavier (initial values: recollection of section 2.2).
    """

    def __init__(self, inputs: int, outputs: int, grid: int = 5, order: int = 3):
        super().__init__()
        self.inputs, self.outputs, self.grid, self.order = inputs, outputs, grid, order
        self.base = nn.Parameter(nn.init.xavier_uniform_(torch.empty(outputs, inputs)))
        self.scale = nn.Parameter(torch.ones(outputs, inputs))
        self.coefficients = nn.Parameter(0.1 * torch.randn(outputs, inputs, grid + order))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        splines = b_splines(wide, self.grid, self.order).flatten(-2)
        weight = (self.scale.unsqueeze(-1) * self.coefficients).flatten(1)
        return (F.linear(F.silu(wide), self.base) + F.linear(splines, weight)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.outputs}, grid={self.grid}, order={self.order}"


COMBINATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "quad1": lambda a, b: torch.square(a * b),
    "quad2": lambda a, b: a * b + a * a + b * b,
    "sum": lambda a, b: a + b,
    "prod": lambda a, b: a * b,
    "sum-prod": lambda a, b: a + b + a * b,
    "cubic1": lambda a, b: (a + b) * (a * a + b * b),
    "cubic2": lambda a, b: (a * b) ** 3,
}
BASE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "relu": F.relu,
    "leaky-relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "selu": F.selu,
    "tanh": torch.tanh,
}


class AFKAN(nn.Module):
    """AF-KAN: features of every input from pairs of shifted activations, reduced by attention, then a linear layer.

    a = act(x - low), b = act(high - x) for grid + order trained pairs; f = combination(a, b) scaled to [0, 1] by its
    least and greatest value PER SAMPLE (last two axes). The release scales over the whole tensor, which makes a result
    depend on the other samples of the batch, and divides by the L2 norm before, which the scaling undoes.
    Attention: softmax over the inputs of (linear(f) / max(temperature, 1)), summed over the pairs as in the release's
    global attention; LayerNorm, act, linear without bias. temperature, trained, starts at sqrt(inputs); low at
    (-order ... grid - 1) / grid, high at low + (order + 1) / grid. Half precision is computed in float32.
    Errors: UserError for an unknown combination or activation. Source: released code of All-KAN, af_kan.py.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        grid: int = 5,
        order: int = 3,
        combination: str = "quad1",
        activation: str = "silu",
    ):
        super().__init__()
        for name, known in ((combination, COMBINATIONS), (activation, BASE_ACTIVATIONS)):
            if name not in known:
                raise UserError(name, one_of(known), nearest(name, known))
        self.inputs, self.outputs, self.grid, self.order = inputs, outputs, grid, order
        self.combination, self.activation = combination, activation
        low = torch.arange(-order, grid) / grid
        self.low, self.high = nn.Parameter(low), nn.Parameter(low + (order + 1) / grid)
        self.attention = nn.Linear(grid + order, 1)
        self.temperature = nn.Parameter(torch.tensor(math.sqrt(inputs)))
        self.norm = nn.LayerNorm(inputs)
        self.linear = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        act = BASE_ACTIVATIONS[self.activation]
        wide = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).unsqueeze(-1)
        features = COMBINATIONS[self.combination](act(wide - self.low), act(self.high - wide))
        least, greatest = features.amin((-2, -1), keepdim=True), features.amax((-2, -1), keepdim=True)
        features = (features - least) / (greatest - least).clamp(min=1e-12)
        weights = torch.softmax(self.attention(features) / self.temperature.clamp(min=1.0), dim=-2)
        return self.linear(act(self.norm((features * weights).sum(-1)))).to(x.dtype)

    def extra_repr(self) -> str:
        sizes = f"{self.inputs}, {self.outputs}, grid={self.grid}, order={self.order}"
        return f"{sizes}, combination={self.combination!r}, activation={self.activation!r}"


def make_square(kind, channels: int, *, layout: str = "tokens") -> nn.Module:
    """`kind(channels, channels)` on the last dimension. Errors: UserError for another layout than tokens."""
    if layout != "tokens":
        raise UserError(layout, "the layout tokens: the layer mixes the last dimension", "tokens")
    return kind(check_channels(channels), channels)


_KAN = "Liu et al., KAN, 2024, arXiv 2404.19756, section 2.2 (edge function and initial values: recollection)"

PRIMITIVES: tuple[Primitive, ...] = (
    Primitive(
        "kan-spline",
        "mixing",
        "y_j = sum_i (w_b silu(x_i) + w_s sum_b c_b B_b(x_i))",
        _KAN,
        partial(make_square, SplineKAN),
        layouts=("tokens",),
        parameters="w_b [C, C] Xavier, w_s [C, C] = 1, c [C, C, 8] of N(0, .01)",
    ),
    Primitive(
        "af-kan",
        "mixing",
        "y = W act(LayerNorm(sum_b softmax_i(u f_i / t) f_ib)), f = (act(x - low) act(high - x))^2 scaled per sample",
        "AF-KAN, released code All-KAN; scaled per sample, the release scales over the batch",
        partial(make_square, AFKAN),
        layouts=("tokens",),
        parameters="low [8], high [8], t = sqrt(C), u [8] and its bias, LayerNorm [C], W [C, C]",
    ),
    Primitive(
        "s-kan",
        "mixing",
        "y_j = sum_ib w_jib basis_b(x_i), basis a Choice of B-spline, RBF, Chebyshev, Fourier, wavelet, SiLU",
        "S-KAN, arXiv 2408.08338 (abstract); the rule of selection is the search's, bases our choice",
        partial(make_square, selectable_kan),
        layouts=("tokens",),
        parameters="w [C, C, 8] per family (SiLU: [C, C, 1]) of N(0, 1 / (C functions))",
    ),
)
