"""Hermite activations: orthonormality and kernel exponents by quadrature of the functions themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from search_spaces.common.errors import UserError
from search_spaces.primitives.hermite import (
    HermiteActivation,
    hermite_activation,
    hermite_coefficients,
    hermite_polynomial,
    kernel_exponent,
)

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(40)
WEIGHTS = WEIGHTS / WEIGHTS.sum()  # expectations under N(0, 1), exact for polynomials up to degree 79
DIMENSIONS = [1, 2, 3, 4, 10]


def test_polynomials_are_the_first_ones_and_orthonormal():
    x = torch.tensor(NODES)
    torch.testing.assert_close(hermite_polynomial(x, 1), x)
    torch.testing.assert_close(hermite_polynomial(x, 2), (x**2 - 1) / math.sqrt(2))
    torch.testing.assert_close(hermite_polynomial(x, 3), (x**3 - 3 * x) / math.sqrt(6))
    values = np.stack([hermite_polynomial(x, n).numpy() for n in range(9)])
    np.testing.assert_allclose((values * WEIGHTS) @ values.T, np.eye(9), atol=1e-10)


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_exponent_is_the_dimension_by_quadrature(dimension):
    """Slopes of the dual kernel at correlations 0 and 1: E[f']^2 and E[f'^2] (Stein)."""
    x = torch.tensor(NODES, requires_grad=True)
    y = HermiteActivation(dimension)(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    y, slope = y.detach().numpy(), slope.numpy()
    assert WEIGHTS @ y == pytest.approx(0, abs=1e-12)
    assert WEIGHTS @ y**2 == pytest.approx(1, abs=1e-12)
    a, b = (WEIGHTS @ slope) ** 2, WEIGHTS @ slope**2
    assert -2 * math.log(a) / math.log(b) == pytest.approx(dimension, abs=1e-9)
    assert kernel_exponent(hermite_coefficients(dimension)) == pytest.approx(dimension, abs=1e-9)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_dual_kernel_slopes_by_two_dimensional_quadrature(dimension):
    """E[f(u) f(v)] of correlated u, v is the power series sum c_n^2 rho^n."""
    u, w = np.meshgrid(NODES, NODES, indexing="ij")
    for rho in (0.0, 0.3, -0.7, 0.95):
        v = rho * u + math.sqrt(1 - rho**2) * w
        values = hermite_activation(torch.tensor(u), dimension) * hermite_activation(torch.tensor(v), dimension)
        expected = sum(c * c * rho**n for n, c in hermite_coefficients(dimension).items())
        assert WEIGHTS @ values.numpy() @ WEIGHTS == pytest.approx(expected, abs=1e-9)


def test_exponents_of_other_coefficients_and_user_errors():
    assert kernel_exponent({1: math.sqrt(0.5), 2: math.sqrt(0.5)}) == pytest.approx(2 * math.log(2) / math.log(1.5))
    for wrong in ({0: 1.0}, {1: 1.0}, {1: 0.5, 2: 0.5}, {2: 1.0}):
        with pytest.raises(UserError):
            kernel_exponent(wrong)
    for dimension in (0, -1, 1.5):
        with pytest.raises(UserError):
            HermiteActivation(dimension)
