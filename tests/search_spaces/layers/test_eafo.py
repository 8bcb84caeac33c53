"""EAFO's correction against the entropy itself, its stationary functions, and CRReLU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from search_spaces.common.errors import UserError
from search_spaces.layers.activation_space import activation
from search_spaces.layers.eafo import corrected, correction, gaussian_density, sampled_density

X = torch.linspace(-4, 4, 161, dtype=torch.float64)


def shape_of(values: torch.Tensor) -> torch.Tensor:
    return values / values.abs().max()


def test_relu_under_a_gaussian_gives_crrelu():
    found = correction(activation("relu"), X)
    torch.testing.assert_close(shape_of(found), -shape_of(X * torch.exp(-X * X / 2)), rtol=0, atol=1e-3)
    improved = corrected(activation("relu"), -0.01 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(improved(X), X.clamp(min=0) + 0.01 * X * torch.exp(-X * X / 2), rtol=0, atol=1e-9)


def test_relu_under_samples_gives_nearly_crrelu():
    """The samples' density is wider by the kernels: a normal with variance 1 + width^2."""
    samples = torch.from_numpy(stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000))
    width = 0.1
    x = X[X.abs() <= 3]  # further out there are hardly any samples
    found = correction(activation("relu"), x, sampled_density(samples, width))
    variance = 1 + width**2
    torch.testing.assert_close(shape_of(found), -shape_of(x * torch.exp(-x * x / (2 * variance))), rtol=0, atol=1e-3)
    assert sampled_density(samples)(torch.zeros(1, dtype=torch.float64)).item() == pytest.approx(0.3989, abs=0.01)


def test_distribution_functions_are_stationary():
    """The worst function: uniform outputs have the largest entropy, no step changes it."""
    normal = correction(lambda x: torch.special.ndtr(x), X)
    assert normal.abs().max() < 1e-12

    def logistic(x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x) * torch.sigmoid(-x)

    assert correction(activation("sigmoid"), X, logistic).abs().max() < 1e-12
    assert correction(activation("sigmoid"), X).abs().max() > 0.01


def entropy(call, slope) -> float:
    """H of f(z) = H(z) + E[ln f'(z)], z standard normal."""
    expected = integrate.quad(lambda z: math.log(slope(z)) * stats.norm.pdf(z), -9, 9, epsabs=1e-12)[0]
    return 0.5 * math.log(2 * math.pi * math.e) + expected


def test_the_step_lowers_the_entropy_as_the_gradient_says():
    """f + e c: the derivative of the entropy at e = 0 is that of E[ln f'], here by differences."""
    call = activation("softplus")

    def slopes(strength: float):
        function = corrected_smooth(strength)

        def slope(z: float) -> float:
            x = torch.tensor([z], dtype=torch.float64, requires_grad=True)
            return torch.autograd.grad(function(x).sum(), x)[0].item()

        return slope

    def corrected_smooth(strength: float):
        def function(x: torch.Tensor) -> torch.Tensor:  # softplus'' / softplus' = sigmoid(-x)
            direction = -x * gaussian_density(x) - gaussian_density(x) * torch.sigmoid(-x)
            return torch.nn.functional.softplus(x) + strength * direction

        return function

    x = torch.linspace(-3, 3, 31, dtype=torch.float64)
    torch.testing.assert_close(corrected(call, 0.3)(x), corrected_smooth(0.3)(x))
    lower, same, higher = (entropy(None, slopes(e)) for e in (0.05, 0.0, -0.05))
    assert lower < same < higher
    # dH/de = -integral of c^2 / f' (first variation along the direction itself)
    gradient = integrate.quad(
        lambda z: float(correction(call, torch.tensor([z]))[0]) ** 2 / (1 / (1 + math.exp(-z))), -9, 9, epsabs=1e-12
    )[0]
    h = 1e-3
    measured = (entropy(None, slopes(h)) - entropy(None, slopes(-h))) / (2 * h)
    assert measured == pytest.approx(-gradient, rel=1e-3)


def test_what_is_refused():
    with pytest.raises(UserError, match="does not decrease"):
        correction(lambda x: torch.cos(x), X)
    with pytest.raises(UserError, match="different samples"):
        sampled_density(torch.ones(4))
    with pytest.raises(UserError, match="bandwidth"):
        sampled_density(torch.arange(4.0), 0.0)
