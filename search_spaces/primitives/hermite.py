"""Activations whose infinitely wide and deep networks are optimal classifiers.

Radhakrishnan, Belkin, Uhler, Wide and Deep Neural Networks Achieve Optimality for Classification, 2022,
arXiv 2204.14126. On the unit sphere the limit is the singular kernel 1 / |x - y|^e; with e = d, the dimension of the
data, the classifier is consistent. The coefficients below are recollection of that paper; that their exponent is d was
checked numerically (`kernel_exponent`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from search_spaces.common.errors import UserError
from search_spaces.primitives.activations import plain
from search_spaces.primitives.primitive import Primitive


def hermite_polynomial(x: Tensor, degree: int) -> Tensor:
    """The normalised Hermite polynomial He_n(x) / sqrt(n!): orthonormal under N(0, 1)."""
    before, now = torch.zeros_like(x), torch.ones_like(x)
    for n in range(degree):  # sqrt(n + 1) h_{n+1} = x h_n - sqrt(n) h_{n-1}
        before, now = now, (x * now - math.sqrt(n) * before) / math.sqrt(n + 1)
    return now


def hermite_coefficients(dimension: int) -> dict[int, float]:
    """{degree: coefficient} of the activation for data of `dimension`; the squares add up to 1.

    Errors: UserError for a dimension below 1.
    """
    if not isinstance(dimension, int) or dimension < 1:
        raise UserError(dimension, "a dimension of the data from 1", "1")
    if dimension == 1:
        return {7: math.sqrt(0.5), 1: math.sqrt(0.5)}
    if dimension == 2:
        return {3: math.sqrt(0.5), 1: math.sqrt(0.5)}
    outer = 2 ** (-dimension / 4)
    return {3: outer, 2: math.sqrt(1 - 2 ** (1 - dimension / 2)), 1: outer}


def kernel_exponent(coefficients: Mapping[int, float]) -> float:
    """-2 ln(a) / ln(b), the exponent e of the limit kernel 1 / |x - y|^e of sum_n c_n h_n.

    a = c_1^2 and b = sum n c_n^2 are the slopes at 0 and 1 of the dual kernel E[f(u) f(v)] as a function of the
    correlation of u and v. Errors: UserError unless c_0 = 0, the squares add up to 1 and c_1 is neither 0 nor 1.
    """
    total = math.fsum(c * c for c in coefficients.values())
    a = coefficients.get(1, 0.0) ** 2
    if coefficients.get(0, 0.0) != 0 or abs(total - 1) > 1e-9 or not 0 < a < 1:
        raise UserError(dict(coefficients), "coefficients of mean 0 and variance 1 with some, not all, of degree 1")
    return -2 * math.log(a) / math.log(math.fsum(n * c * c for n, c in coefficients.items()))


def hermite_activation(x: Tensor, dimension: int) -> Tensor:
    """The sum of Hermite polynomials for data of `dimension`; half precision is computed in float32."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    terms = [c * hermite_polynomial(wide, n) for n, c in hermite_coefficients(dimension).items()]
    return torch.stack(terms).sum(0).to(x.dtype)


class HermiteActivation(nn.Module):
    """The sum of normalised Hermite polynomials for data of `dimension` d (1: degree 7, else degree 3).

    Mean 0 and variance 1 under N(0, 1). For data on the unit sphere and weights of variance 1 / fan-in: it grows like
    x^3 (d = 1: x^7) and overflows float16 above 60 (9).
    """

    def __init__(self, dimension: int):
        super().__init__()
        hermite_coefficients(dimension)  # refuses what is no dimension
        self.dimension = dimension

    def forward(self, x: Tensor) -> Tensor:
        return hermite_activation(x, self.dimension)

    def extra_repr(self) -> str:
        return f"dimension={self.dimension}"


_SOURCE = "Radhakrishnan et al., 2022, arXiv 2204.14126; coefficients: recollection, exponent checked numerically"


def _entry(dimension: int, formula: str) -> Primitive:
    return Primitive(
        f"hermite-{dimension}",
        "activation",
        formula,
        _SOURCE,
        partial(plain, HermiteActivation, dimension=dimension),
        function=partial(hermite_activation, dimension=dimension),
    )


PRIMITIVES: tuple[Primitive, ...] = (
    _entry(1, "(h7 + h1) / sqrt(2), h normalised Hermite polynomials"),
    _entry(2, "(h3 + h1) / sqrt(2), h normalised Hermite polynomials"),
    *(
        _entry(d, f"2^(-{d}/4) (h3 + h1) + sqrt(1 - 2^(1 - {d}/2)) h2, h normalised Hermite polynomials")
        for d in (3, 4, 10)
    ),
)
