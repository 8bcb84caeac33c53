"""Gaussian moments, Hermite coefficients, signal propagation and gain against closed forms and SciPy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.polynomial import hermite_e
from scipy import integrate, stats

from search_spaces.common.errors import UserError
from search_spaces.layers.activation_space import BASELINES, activation
from search_spaces.layers.evaluate import evaluate
from search_spaces.layers.formula import parse_formula
from search_spaces.layers.gauss_hermite import (
    fixed_point,
    gain,
    hermite_class,
    hermite_coefficients,
    initialize_for,
    moments,
    normalised_hermite,
)

PI = math.pi


def integral(call, kinks=(0.0,)) -> float:
    """E[call(z)] by SciPy's adaptive quadrature, piece by piece."""
    edges = sorted({-13.0, 13.0, *kinks})
    parts = itertools.pairwise(edges)
    return sum(
        integrate.quad(lambda z: call(z) * stats.norm.pdf(z), a, b, epsabs=1e-14, epsrel=1e-13, limit=400)[0]
        for a, b in parts
    )


def number(graph):
    return lambda z: evaluate(graph, torch.tensor([[z]], dtype=torch.float64)).item()


def test_closed_forms():
    relu = moments(activation("relu"), 2.5)
    assert relu.mean == pytest.approx(math.sqrt(2.5 / (2 * PI)), abs=1e-12)
    assert relu.second == pytest.approx(1.25, abs=1e-12)
    assert relu.chi == relu.slope == pytest.approx(0.5, abs=1e-12)
    assert relu.variance == pytest.approx(1.25 - 2.5 / (2 * PI), abs=1e-12)
    square = moments(parse_formula("x^2", affine=False), 3.0)
    assert (square.mean, square.second, square.chi) == pytest.approx((3.0, 27.0, 12.0), rel=1e-12)
    exponential = moments(parse_formula("exp(x)", affine=False))
    assert exponential.mean == pytest.approx(math.exp(0.5), rel=1e-12)
    assert exponential.second == exponential.chi == pytest.approx(math.exp(2), rel=1e-12)
    erf = moments(parse_formula("erf(x)", affine=False))  # Williams 1998: 2/pi asin(2 q / (1 + 2 q))
    assert erf.second == pytest.approx(2 / PI * math.asin(2 / 3), abs=1e-13)
    assert erf.chi == pytest.approx(4 / (PI * math.sqrt(5)), abs=1e-13)


@pytest.mark.parametrize("name", BASELINES)
def test_moments_against_quadrature(name):
    graph = activation(name)
    call, found = number(graph), moments(graph)
    assert found.mean == pytest.approx(integral(call), abs=1e-10)
    assert found.second == pytest.approx(integral(lambda z: call(z) ** 2), abs=1e-10)


def test_kinks_anywhere():
    for text, kinks in {
        "hardsigmoid(x)": (-2.5, 2.5),
        "max(x, sigmoid(x))": (0.6590460684,),
        "abs(x^2 - 1)": (-1.0, 1.0),
        "max(x, 1 + 1 + 1)": (3.0,),
    }.items():
        graph = parse_formula(text, affine=False)
        assert moments(graph).second == pytest.approx(integral(lambda z, g=graph: number(g)(z) ** 2, kinks), abs=1e-9)


def test_hermite_coefficients():
    z = np.linspace(-3, 3, 7)
    for n, row in enumerate(normalised_hermite(z, 9)):
        np.testing.assert_allclose(row, hermite_e.hermeval(z, [0] * n + [1]) / math.sqrt(math.factorial(n)), atol=1e-12)
    relu = hermite_coefficients(activation("relu"), 8)
    assert relu[:3] == pytest.approx([1 / math.sqrt(2 * PI), 0.5, 1 / math.sqrt(4 * PI)], abs=1e-13)
    assert relu[[3, 5, 7]] == pytest.approx(0, abs=1e-13)
    exponential = hermite_coefficients(parse_formula("exp(x)", affine=False), 10)  # e^(1/2) / sqrt(n!)
    assert exponential == pytest.approx([math.exp(0.5) / math.sqrt(math.factorial(n)) for n in range(10)], rel=1e-11)
    sine = parse_formula("sin(x)", affine=False)
    coefficients, found = hermite_coefficients(sine, 40), moments(sine)
    assert coefficients @ coefficients == pytest.approx(found.second, abs=1e-13)
    assert (coefficients**2) @ np.arange(40) == pytest.approx(found.chi, abs=1e-12)


def hermite_sum(coefficients: dict[int, float]):
    def call(x: torch.Tensor) -> torch.Tensor:
        rows = [torch.ones_like(x), x]
        for n in range(1, max(coefficients)):
            rows.append((x * rows[n] - math.sqrt(n) * rows[n - 1]) / math.sqrt(n + 1))
        return sum(c * rows[n] for n, c in coefficients.items())

    return call


def test_optimal_functions_have_their_dimension_as_exponent():
    """The functions that Radhakrishnan, Belkin and Uhler give for inputs of dimension d."""
    half = 1 / math.sqrt(2)
    optimal = {1: {7: half, 1: half}, 2: {3: half, 1: half}}
    for d in (3, 4, 10):
        optimal[d] = {3: 2 ** (-d / 4), 2: math.sqrt(1 - 2 ** (1 - d / 2)), 1: 2 ** (-d / 4)}
    for d, coefficients in optimal.items():
        found = hermite_class(hermite_sum(coefficients))
        assert (found.limit, found.first, found.last) == ("singular-kernel", 1, max(coefficients))
        assert found.exponent == pytest.approx(d, abs=1e-9)


def test_classes():
    assert hermite_class(activation("relu")).limit == "majority-vote"
    assert hermite_class(hermite_sum({2: 1.0})).limit == "nearest-neighbour"
    assert hermite_class(hermite_sum({1: 2.0})).limit == "linear"
    assert hermite_class(parse_formula("sin(x)", affine=False)).last is None
    assert hermite_class(parse_formula("cos(x)", affine=False), centre=True).first == 2
    assert hermite_class(parse_formula("x^2 + x", affine=False)).last == 2
    with pytest.raises(UserError, match="not constant"):
        hermite_class(parse_formula("ones(x)", affine=False), centre=True)


def test_fixed_points():
    q, chi = fixed_point(activation("relu"), 2.0)
    assert (q, chi) == pytest.approx((1.0, 1.0), abs=1e-10)  # He initialisation keeps any variance
    q, chi = fixed_point(activation("tanh"), 2.0, 0.1)
    call = number(activation("tanh"))
    assert q == pytest.approx(2 * integral(lambda z: call(math.sqrt(q) * z) ** 2) + 0.1, abs=1e-9)
    assert chi == pytest.approx(2 * integral(lambda z: (1 - call(math.sqrt(q) * z) ** 2) ** 2), abs=1e-9)
    assert fixed_point(activation("tanh"), 0.8) == pytest.approx((0.0, 0.8), abs=1e-8)
    with pytest.raises(UserError, match="stays finite"):
        fixed_point(activation("relu"), 3.0)


def test_gains_keep_the_variance_of_a_deep_network():
    assert gain(activation("relu")) == pytest.approx((math.sqrt(2), 0.0), abs=1e-12)
    assert gain(activation("selu"), centre=True) == pytest.approx((1.0, 0.0), abs=1e-10)  # SELU's constants
    generator = torch.Generator().manual_seed(0)
    for name in ("silu", "tanh", "softplus"):
        layers: list[torch.nn.Module] = [torch.nn.Linear(800, 800)]
        graph = activation(name)

        class Act(torch.nn.Module):
            def forward(self, x: torch.Tensor, graph=graph) -> torch.Tensor:
                return evaluate(graph, x)

        for _ in range(5):
            layers += [Act(), torch.nn.Linear(800, 800)]
        network = torch.nn.Sequential(*layers)
        scale = initialize_for(network, graph, generator)
        assert scale == pytest.approx(1 / math.sqrt(moments(graph).second), abs=1e-12)
        with torch.no_grad():
            x = torch.randn(400, 800, generator=generator)
            out = network(x)
        assert out.square().mean().item() == pytest.approx(1.0, abs=0.15)


def test_what_is_refused():
    with pytest.raises(UserError, match="finite"):
        moments(lambda x: 1 / (x - 0.4142).abs().clamp(min=0.5).sub(0.5))
    with pytest.raises(UserError, match="square is integrable"):
        moments(parse_formula("1 /{eps=0} x", affine=False))
    with pytest.raises(UserError, match="positive variance"):
        moments(activation("relu"), 0.0)
    with pytest.raises(UserError, match="aggregates"):
        moments(parse_formula("x / std[group](x)"))
    with pytest.raises(UserError, match="variance"):
        gain(parse_formula("zeros(x)", affine=False))
