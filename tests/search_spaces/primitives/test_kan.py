"""KAN layers against scipy's splines, numpy's polynomials and sums written out edge by edge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from torch import nn

from search_spaces.choice import find_choices, select, selected_state_dict
from search_spaces.common.errors import UserError
from search_spaces.primitives.kan import (
    AFKAN,
    BASE_ACTIVATIONS,
    COMBINATIONS,
    FAMILIES,
    EdgeKAN,
    SplineKAN,
    b_splines,
    chebyshev,
    fourier,
    radial,
    selectable_kan,
    wavelets,
)
from search_spaces.primitives.kan_single import (
    SINGLE_FUNCTIONS,
    SingleParameterActivation,
    SingleParameterKAN,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def silu(x):
    return x / (1 + np.exp(-x))


def scipy_splines(x: np.ndarray, grid: int, order: int) -> np.ndarray:
    step = 2 / grid
    knots = -1 + step * np.arange(-order, grid + order + 1)
    columns = [
        BSpline.basis_element(knots[i : i + order + 2], extrapolate=False)(x) for i in range(len(knots) - order - 1)
    ]
    return np.nan_to_num(np.stack(columns, -1))


@pytest.mark.parametrize(("grid", "order"), [(5, 3), (1, 1), (4, 2), (7, 0)])
def test_b_splines_are_scipys(grid, order):
    x = np.linspace(-3.013, 3.017, 401)
    ours = b_splines(torch.tensor(x), grid, order).numpy()
    assert ours.shape == (401, grid + order)
    np.testing.assert_allclose(ours, scipy_splines(x, grid, order), atol=1e-12)
    inside = abs(x) < 1
    np.testing.assert_allclose(ours[inside].sum(-1), 1, atol=1e-12)
    assert not ours[abs(x) > 1 + 2 * order / grid + 1e-9].any()


def test_other_bases():
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)
    expected = np.polynomial.chebyshev.chebvander(np.tanh(x.numpy()), 7)
    np.testing.assert_allclose(chebyshev(x).numpy(), expected, atol=1e-12)
    angles = x.numpy()[:, None] * np.arange(1, 5)
    np.testing.assert_allclose(fourier(x).numpy(), np.hstack([np.sin(angles), np.cos(angles)]), atol=1e-12)
    centres = -1 + 2 * np.arange(8) / 7
    u = (x.numpy()[:, None] - centres) / (2 / 7)
    np.testing.assert_allclose(radial(x).numpy(), np.exp(-(u**2)), atol=1e-12)
    np.testing.assert_allclose(wavelets(x).numpy(), (1 - u**2) * np.exp(-(u**2) / 2), atol=1e-12)
    wide = torch.linspace(-100, 100, 20001, dtype=torch.float64)
    assert np.trapezoid(wavelets(wide).numpy(), wide.numpy(), axis=0) == pytest.approx(0, abs=1e-9)  # wavelets: mean 0


def test_spline_kan_edge_by_edge():
    layer = SplineKAN(3, 2).double()
    nn.init.normal_(layer.scale)
    x = torch.randn(4, 3, dtype=torch.float64)
    base, scale, c = (p.detach().numpy() for p in (layer.base, layer.scale, layer.coefficients))
    expected = np.zeros((4, 2))
    for row in range(4):
        for j in range(2):
            for i in range(3):
                value = x[row, i].item()
                splines = scipy_splines(np.array([value]), 5, 3)[0]
                expected[row, j] += base[j, i] * silu(value) + scale[j, i] * (splines @ c[j, i])
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-12)


def test_spline_kan_starts_near_its_silu_part():
    layer = SplineKAN(64, 64)
    assert torch.equal(layer.scale, torch.ones(64, 64))
    assert layer.coefficients.std().item() == pytest.approx(0.1, rel=0.05)
    assert layer.base.abs().max() <= math.sqrt(6 / 128)  # Xavier's bound


def test_spline_kan_fits_a_sum_of_functions():
    """y = sin(pi x1) + x2^2 is in reach of one layer; a linear layer cannot."""
    x = torch.rand(512, 2) * 2 - 1
    y = torch.sin(math.pi * x[:, :1]) + x[:, 1:] ** 2
    layer = SplineKAN(2, 1)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = nn.functional.mse_loss(layer(x), y)
        value.backward()
        return value

    optimizer.step(loss)
    design = torch.cat([x, torch.ones(512, 1)], 1)
    linear = (design @ torch.linalg.lstsq(design, y).solution - y).square().mean()
    assert loss().item() < 1e-3 * linear.item()


SINGLE = {
    "sin": lambda x, k: k * np.sin(x),
    "cos": lambda x, k: k * np.cos(x),
    "arctan": lambda x, k: k * np.arctan(x),
    "relu": lambda x, k: max(k * x, 0),
    "leaky-relu": lambda x, k: max(k * x, x),
    "swish": lambda x, k: x / (1 + np.exp(-k * x)),
    "mish": lambda x, k: x * np.tanh(np.log(1 + np.exp(k * x))),
    "softplus": lambda x, k: np.log(1 + np.exp(k * x)),
    "shifted-softplus": lambda x, k: np.log(1 + np.exp(k * x)) - np.log(2),
    "hard-sigmoid": lambda x, k: min(max(k * x + 0.5, 0), 1),
    "elu": lambda x, k: x if x > 0 else k * (np.exp(x / k) - 1),
    "gelu": lambda x, k: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (k * x + 0.044715 * k**3 * x**3))),
}


def test_every_single_function_has_a_formula_here():
    assert set(SINGLE) == set(SINGLE_FUNCTIONS)


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("bias", [True, False])
def test_single_parameter_kan_edge_by_edge(name, bias):
    layer = SingleParameterKAN(3, 2, name, bias).double()
    if name == "elu":
        layer.k.data.abs_()  # the release's formula explodes for k < 0
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    k = layer.k.detach().numpy()
    assert k.shape == (2, 3 + bias)
    expected = np.zeros((2, 4, 2))
    for index in np.ndindex(2, 4):
        row = [*x[index].tolist(), *([1.0] if bias else [])]
        for j in range(2):
            expected[index][j] = sum(SINGLE[name](v, k[j, i]) for i, v in enumerate(row))
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SINGLE)
def test_single_parameter_activation_is_the_edge_function_per_channel(name):
    module = SingleParameterActivation(3, name, channel_dim=-1).double()
    assert torch.equal(module.k, torch.ones(3, dtype=torch.float64))
    module.k.data = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = [[SINGLE[name](x[r, c].item(), module.k[c].item()) for c in range(3)] for r in range(5)]
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_elu_edge_is_finite_at_and_below_k_0():
    layer = SingleParameterKAN(2, 2, "elu", bias=False)
    layer.k.data = torch.tensor([[0.0, -1e-8], [-0.5, 0.5]])
    x = torch.tensor([[-50.0, -3.0]], requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(layer.k.grad).all()
    assert y[0, 1].item() == pytest.approx(-0.5 - 0.5 * (1 - math.exp(-6)), abs=1e-6)


def af_kan_by_hand(layer: AFKAN, row: np.ndarray, act) -> np.ndarray:
    """One sample of the layer in plain numpy; quad1."""
    low, high = layer.low.detach().numpy(), layer.high.detach().numpy()
    features = (act(row[:, None] - low) * act(high - row[:, None])) ** 2
    features = (features - features.min()) / (features.max() - features.min())
    scores = features @ layer.attention.weight.detach().numpy()[0] + layer.attention.bias.item()
    scores = scores / max(layer.temperature.item(), 1)
    weights = np.exp(scores) / np.exp(scores).sum()
    reduced = (features * weights[:, None]).sum(1)
    normalised = (reduced - reduced.mean()) / np.sqrt(reduced.var() + 1e-5)
    return layer.linear.weight.detach().numpy() @ act(normalised)


def test_af_kan_by_hand_and_its_start():
    layer = AFKAN(4, 3).double()
    assert layer.low.detach().numpy() == pytest.approx(np.arange(-3, 5) / 5)
    assert (layer.high - layer.low).detach().numpy() == pytest.approx(np.full(8, 4 / 5))
    assert layer.temperature.item() == pytest.approx(2)
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = np.stack([af_kan_by_hand(layer, row, silu) for row in x.numpy()])
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("activation", BASE_ACTIVATIONS)
def test_af_kan_treats_samples_alone(combination, activation):
    """The release's scaling over the whole tensor fails this."""
    layer = AFKAN(4, 3, combination=combination, activation=activation)
    x = torch.randn(6, 4)
    together, alone = layer(x), torch.cat([layer(row[None]) for row in x])
    assert torch.isfinite(together).all()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    large = x.clone()
    large[0] *= 100
    torch.testing.assert_close(layer(large)[1:], together[1:], rtol=1e-5, atol=1e-6)


def test_selectable_kan_is_a_choice_of_all_families():
    module = selectable_kan(3, 2, "first")
    assert list(FAMILIES) == ["b-spline", "rbf", "chebyshev", "fourier", "wavelet", "silu"]
    x = torch.randn(4, 3)
    for index, family in enumerate(FAMILIES):
        select(module, {"first": index})
        plain = EdgeKAN(3, 2, family)
        plain.load_state_dict(selected_state_dict(module))
        assert torch.equal(plain(x), module(x))


def test_selectable_kan_per_node():
    module = selectable_kan(3, 2, "first", per_node=True)
    assert list(find_choices(module)) == ["first_0", "first_1"]
    x = torch.randn(4, 3)
    before = module(x)
    select(module, {"first_1": 3})
    after = module(x)
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1])


def test_selectable_kan_finds_the_family_of_a_sine():
    """Among the families, Fourier fits sin(3 x) best: least squares on the layer's own bases."""
    x = torch.linspace(-2, 2, 400, dtype=torch.float64)
    y = torch.sin(3 * x)
    errors = {}
    for family, (basis, _) in FAMILIES.items():
        design = basis(x)
        errors[family] = (design @ torch.linalg.lstsq(design, y[:, None]).solution)[:, 0].sub(y).square().mean().item()
    assert min(errors, key=errors.__getitem__) == "fourier"
    assert errors["fourier"] < 1e-20


@pytest.mark.parametrize("family", FAMILIES)
def test_edge_kan_starts_with_outputs_of_order_one(family):
    y = EdgeKAN(64, 256, family)(torch.randn(100, 64))
    assert 0.1 < y.std().item() < 1.5


def test_user_errors():
    for call in (
        lambda: EdgeKAN(2, 2, "b-splin"),
        lambda: SingleParameterKAN(2, 2, "sinn"),
        lambda: SingleParameterActivation(2, "sinn"),
        lambda: AFKAN(2, 2, combination="quad"),
        lambda: AFKAN(2, 2, activation="sil"),
    ):
        with pytest.raises(UserError, match="did you mean"):
            call()
