"""Activations with parameters: formulas in numpy, moments, continuity, initial values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from search_spaces.common.errors import UserError
from search_spaces.primitives.activation_families import (
    PRIMITIVES,
    XIELU,
    CRReLU,
    PolyNorm,
    PolyReLU,
    PReLU,
    StarReLU,
    Swish,
)

BY_NAME = {p.name: p for p in PRIMITIVES}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def half_normal(count: int = 400001) -> tuple[np.ndarray, np.ndarray]:
    """Points of [0, 14] and the density of N(0, 1): both sides of a kink at 0 are integrated alone."""
    points = np.linspace(0, 14, count)
    return points, np.exp(-(points**2) / 2) / math.sqrt(2 * math.pi)


def test_prelu_is_torchs_on_channels_first_and_the_last_dimension_on_tokens():
    x = torch.randn(2, 5, 3, 3)
    slopes = torch.rand(5)
    ours, tokens, theirs = PReLU(5), PReLU(5, channel_dim=-1), nn.PReLU(5)
    for module in (ours, tokens, theirs):
        module.load_state_dict({"weight": slopes})
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(tokens(x.movedim(1, -1)).movedim(-1, 1), theirs(x))
    assert torch.equal(PReLU(5).weight, nn.PReLU(5).weight)  # .25
    shared = BY_NAME["prelu-shared"].make(5)
    assert shared.weight.shape == (1,)


def test_swish_beta_is_per_channel_from_silu_to_relu():
    module, x = Swish(3), torch.randn(4, 3, 6)
    torch.testing.assert_close(module(x), nn.functional.silu(x))
    module.beta.data = torch.tensor([0.0, 1.0, 1e4])
    y = module(x)
    torch.testing.assert_close(y[:, 0], x[:, 0] / 2)
    torch.testing.assert_close(y[:, 2], x[:, 2].clamp(min=0), atol=1e-4, rtol=0)


def test_star_relu_makes_a_normal_input_mean_0_variance_1():
    points, density = half_normal()
    with torch.no_grad():
        right = StarReLU().double()(torch.tensor(points)).numpy()
        left = StarReLU().double()(torch.tensor(-points)).numpy()
    mean = np.trapezoid((right + left) * density, points)
    square = np.trapezoid((right**2 + left**2) * density, points)
    assert mean == pytest.approx(0, abs=1e-6)
    assert square == pytest.approx(1, abs=1e-6)
    assert StarReLU().scale.item() == pytest.approx(0.8944, abs=5e-5)  # the paper's digits
    assert StarReLU().bias.item() == pytest.approx(-0.4472, abs=5e-5)
    assert torch.equal(StarReLU(1.0, 0.0)(torch.tensor([-1.0, 3.0])), torch.tensor([0.0, 9.0]))


def test_crrelu_starts_at_a_hundredth():
    x = np.linspace(-5, 5, 501)
    module = CRReLU()
    assert module.epsilon.item() == pytest.approx(0.01)
    assert module.epsilon.requires_grad
    expected = np.maximum(x, 0) + 0.01 * x * np.exp(-(x**2) / 2)
    np.testing.assert_allclose(module(torch.tensor(x)).detach().numpy(), expected, rtol=1e-6, atol=1e-8)


def test_xielu_follows_its_integral_and_starts_at_the_published_alphas():
    """xIELU is defined by its derivative: 2 p x + b on the right, n (exp(x) - 1) + b on the left."""
    module = XIELU().double()
    p = math.log1p(math.exp(module.alpha_p.item()))
    n = 0.5 + math.log1p(math.exp(module.alpha_n.item()))
    assert p == pytest.approx(0.8)
    assert n == pytest.approx(0.8)
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    x = x[x.abs() > 1e-3].requires_grad_()
    (derivative,) = torch.autograd.grad(module(x).sum(), x)
    expected = torch.where(x > 0, 2 * p * x + 0.5, n * torch.expm1(x) + 0.5)
    torch.testing.assert_close(derivative, expected.detach())


def test_xielu_is_continuous_at_0_up_to_its_guard():
    module = XIELU().double()
    left, zero, right = module(torch.tensor([-1e-9, 0.0, 1e-9], dtype=torch.float64)).tolist()
    assert abs(right - left) < 1e-6
    assert zero == pytest.approx(-0.8e-6, rel=1e-3)  # alpha_n times the guard
    unguarded = XIELU(eps=0.0).double()
    assert unguarded(torch.zeros(1, dtype=torch.float64)).item() == 0
    assert XIELU(initial_alpha_n=0.6)(torch.tensor(-2.0)).item() == pytest.approx(
        0.6 * (math.exp(-2) - 1 + 2) - 1, abs=1e-5
    )


def test_poly_relu_takes_the_highest_power_first():
    module = PolyReLU()
    x = torch.tensor([-2.0, 0.5, 3.0])
    torch.testing.assert_close(module(x), torch.tensor([0.0, (0.125 + 0.25 + 0.5) / 3, (27 + 9 + 3) / 3]))
    module.weight.data, module.bias.data = torch.tensor([2.0, 3.0, 5.0]), torch.tensor([7.0])
    torch.testing.assert_close(module(x), torch.tensor([7.0, 0.25 + 0.75 + 2.5 + 7, 54 + 27 + 15 + 7]))


@pytest.mark.parametrize("dim", [1, -1])
def test_poly_norm_normalises_each_power_over_the_channels(dim):
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    module = PolyNorm(dim).double()
    module.weight.data = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    a = np.moveaxis(x.numpy(), dim, -1)
    expected = np.zeros_like(a)
    for index in np.ndindex(a.shape[:-1]):
        for weight, power in zip((0.2, 0.3, 0.5), (3, 2, 1)):
            u = a[index] ** power
            expected[index] += weight * u / math.sqrt((u @ u) / len(u) + 1e-6)
    np.testing.assert_allclose(np.moveaxis(module(x).detach().numpy(), dim, -1), expected, rtol=1e-9, atol=1e-9)


def test_poly_norm_hardly_sees_the_scale_of_its_input():
    x = torch.randn(5, 8, dtype=torch.float64) * 10
    module = PolyNorm(-1).double()
    torch.testing.assert_close(module(3 * x), module(x), rtol=1e-5, atol=1e-5)


def test_xielu_refuses_alphas_that_softplus_cannot_give():
    for settings in ({"initial_alpha_p": 0.0}, {"initial_alpha_n": 0.5}):
        with pytest.raises(UserError, match="alpha"):
            XIELU(**settings)
