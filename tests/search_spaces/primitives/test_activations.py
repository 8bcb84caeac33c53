"""Activations without parameters: formulas in numpy, moments by quadrature, other libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import allow_timm_without_torchvision
from scipy.special import erf, expit, log1p
from torch import nn

from search_spaces.common.errors import UserError
from search_spaces.primitives.activations import PRIMITIVES, lecun_normal_

BY_NAME = {p.name: p for p in PRIMITIVES}
L, A = 1.0507009873554805, 1.6732632423543772
FORMULAS = {
    "identity": lambda x: x,
    "relu": lambda x: (x + abs(x)) / 2,
    "relu6": lambda x: np.clip(x, 0, 6),
    "leaky-relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "celu": lambda x: np.maximum(x, 0) + np.minimum(0, np.exp(np.minimum(x, 0)) - 1),
    "selu": lambda x: L * np.where(x > 0, x, A * np.expm1(x)),
    "softplus": lambda x: log1p(np.exp(x)),
    "softsign": lambda x: x / (1 + abs(x)),
    "hardtanh": lambda x: np.clip(x, -1, 1),
    "tanh": lambda x: 1 - 2 / (np.exp(2 * x) + 1),
    "sigmoid": expit,
    "logsigmoid": lambda x: -log1p(np.exp(-x)),
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "gelu-tanh": lambda x: x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick-gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "mish": lambda x: x * ((1 + np.exp(x)) ** 2 - 1) / ((1 + np.exp(x)) ** 2 + 1),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hardsigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "hardsigmoid-keras": lambda x: np.clip(x / 5 + 0.5, 0, 1),
    "hard-mish": lambda x: np.where(x > 0, x, np.where(x < -2, 0, x * x / 2 + x)),
    "elish": lambda x: np.where(x > 0, x / (1 + np.exp(-x)), (np.exp(x) - 1) / (1 + np.exp(-x))),
    "squared-relu": lambda x: np.where(x > 0, x * x, 0),
    "rerelu": lambda x: np.maximum(x, 0),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def module(name: str) -> nn.Module:
    return BY_NAME[name].make(4)


def test_every_activation_has_a_formula_here():
    assert set(FORMULAS) == set(BY_NAME)


@pytest.mark.parametrize("name", FORMULAS)
def test_values(name):
    x = np.linspace(-8, 8, 1601)
    np.testing.assert_allclose(module(name)(torch.tensor(x)).numpy(), FORMULAS[name](x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("hard-mish", "hard_mish"),
        ("hardsigmoid", "hard_sigmoid"),
        ("hardswish", "hard_swish"),
        ("mish", "mish"),
        ("quick-gelu", "quick_gelu"),
        ("silu", "swish"),
    ],
)
def test_equal_to_timm(importable, name, function):
    allow_timm_without_torchvision()
    timm = importable("timm.layers.activations")
    x = torch.randn(1000) * 3
    torch.testing.assert_close(module(name)(x), getattr(timm, function)(x), rtol=1e-6, atol=1e-6)


def test_the_two_hard_sigmoids_differ():
    x = torch.linspace(-4, 4, 801)
    torch_one, keras_one = module("hardsigmoid")(x), module("hardsigmoid-keras")(x)
    difference = (torch_one - keras_one).abs()
    assert difference.max().item() == pytest.approx(1 / 2 - 2.5 / 6, abs=1e-6)  # at |x| = 2.5: Keras is at 0 or 1
    assert x[difference.argmax()].abs().item() == pytest.approx(2.5, abs=1e-6)


def test_selu_keeps_mean_0_and_variance_1():
    half = np.linspace(0, 12, 200001)  # the kink at 0 wants a rule on each side
    density = np.exp(-(half**2) / 2) / math.sqrt(2 * math.pi)
    with torch.no_grad():
        right = module("selu")(torch.tensor(half)).numpy()
        left = module("selu")(torch.tensor(-half)).numpy()
    mean = np.trapezoid((right + left) * density, half)
    square = np.trapezoid((right**2 + left**2) * density, half)
    assert mean == pytest.approx(0, abs=1e-7)
    assert square == pytest.approx(1, abs=1e-7)


def test_lecun_normal_keeps_selu_networks_at_variance_1():
    generator = torch.Generator().manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(256, 256), nn.SELU())]
    network = lecun_normal_(nn.Sequential(*layers), generator)
    y = network(torch.randn(512, 256, generator=generator))
    assert y.mean().abs() < 0.1
    assert y.var().item() == pytest.approx(1, abs=0.2)
    convolution = lecun_normal_(nn.Conv2d(32, 64, 3, groups=4), generator)
    assert convolution.weight.std().item() == pytest.approx(1 / math.sqrt(32 / 4 * 9), rel=0.05)
    assert not convolution.bias.any()
    default = nn.Linear(256, 256)
    assert default.weight.std().item() < 0.7 / 16  # torch's own start is not that


def test_rerelu_has_the_value_of_relu_and_the_gradient_of_gelu():
    x = torch.linspace(-5, 5, 101, dtype=torch.float64, requires_grad=True)
    y = module("rerelu")(x)
    assert torch.equal(y, F.relu(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    expected = (1 + torch.erf(x / math.sqrt(2))) / 2 + x * density
    torch.testing.assert_close(gradient, expected)
    assert (gradient[:50] != 0).all()  # relu's is 0 there


def test_elish_is_continuous_and_silu_on_the_right():
    x = torch.tensor([-1e-7, 0.0, 1e-7], dtype=torch.float64)
    assert module("elish")(x).abs().max() < 1e-6
    assert module("elish")(torch.tensor(-50.0)).abs() < 1e-20  # bounded on the left


def test_lecun_leaves_other_modules_alone():
    norm = lecun_normal_(nn.BatchNorm1d(3))
    assert torch.equal(norm.weight, torch.ones(3))


def test_an_unknown_layout_names_the_nearest():
    with pytest.raises(UserError, match="channels-first"):
        BY_NAME["relu"].make(3, layout="channel-first")
