"""Static and numeric checks: layers made to fail each, published layers that pass all, and the shares of a funnel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from search_spaces.common.errors import UserError
from search_spaces.layers.catalog import layer
from search_spaces.layers.evaluate import evaluate
from search_spaces.layers.filters import STAGES, normalizes, numeric, sample_counts, static, trivial
from search_spaces.layers.formula import parse_formula
from search_spaces.layers.ops import preset
from search_spaces.layers.space import LayerSpace

NORMALIZING = ["evonorm-b0", "evonorm-b1", "evonorm-b2", "evonorm-s0", "evonorm-s1", "evonorm-s2"]
NORMALIZING += ["bn-relu", "gn-relu", "in-relu", "ln-relu", "gn-silu", "frn-tlu"]

STATIC = {
    "v1 + exp(v0)": "ignores_input",
    "std[group](v1)": "ignores_input",
    "exp(exp(exp(exp(x))))": "non_finite",
    "mean[instance](x)": "not_full_shape",
    "std[batch](x) * v1": "not_full_shape",
    "x * 0": "not_full_shape",
    "x - x + v0": "not_full_shape",
    "tanh(mean[layer](x) + std[group](x))": "not_full_shape",
}
NUMERIC = {
    "exp(x)": "non_finite",  # at 1000
    "x / v0": "non_finite",  # in half precision, v0 begins as zero
    "1 / x": "non_finite",
    "x^2 * x^2 * x^2 * x^2 * x^2 * x^2 * x^2": "non_finite",
    "x * v0": "zero_gradient",
    "tanh(exp(x * v0)) + v0": "zero_gradient",
    "x": "trivial",
    "x * v1 + v0": "trivial",
    "x - mean[group](x)": "trivial",
    "max(x, x + exp(v1)) - v1": "trivial",
}


@pytest.mark.parametrize(("formula", "reason"), STATIC.items())
def test_static_reasons(formula, reason):
    assert static(parse_formula(formula)) == reason


@pytest.mark.parametrize(("formula", "reason"), NUMERIC.items())
def test_numeric_reasons(formula, reason):
    graph = parse_formula(formula)
    if reason != "zero_gradient":
        assert static(graph) is None
    assert numeric(graph) == reason


@pytest.mark.parametrize("name", [*NORMALIZING, "relu", "silu"])
def test_published_layers_pass(name):
    graph = layer(name)
    assert static(graph) is None
    assert numeric(graph) is None
    assert normalizes(graph) == (name in NORMALIZING)


def test_the_family_is_kept():
    assert static(layer("evonorm-b0"), preset("evonorm21")) == "family"
    assert static(layer("evonorm-b0"), preset("evonorm24")) is None
    assert static(layer("evonorm-s0"), preset("evonorm21")) is None


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("x / std[layer](x)", True),
        ("tanh(x) + std[layer](x) * 0", False),  # the statistic vanishes
        ("tanh(x) + std[layer](v1)", False),  # not of x
        ("x - mean[batch](x)", False),  # grows with x
        ("x * std[batch](x)", False),
        ("mean[batch](x) / std[batch](x)", False),  # not a layer
        ("tanh(x) * sigmoid(mean[instance](x))", True),
    ],
)
def test_what_normalizes(formula, expected):
    assert normalizes(parse_formula(formula)) is expected


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("x + v0", True),
        ("x + x * v1", True),
        ("x + tanh(x)", False),
        ("max(x, v0)", False),
        ("x / std[layer](x)", False),
    ],
)
def test_trivial_layers_are_affine(formula, expected):
    assert trivial(parse_formula(formula)) is expected


def test_what_passes_is_finite_and_trains_in_torch():
    """Survivors of all stages, asked again in fp32 on other inputs."""
    space, rng = LayerSpace(sampling="nested"), np.random.default_rng(0)
    generator = torch.Generator().manual_seed(5)
    survivors = 0
    while survivors < 25:
        graph = space.sample(rng)
        if static(graph) is not None or numeric(graph) is not None:
            continue
        survivors += 1
        for scale in (1e-3, 1.0, 1e2):
            x = (scale * torch.randn(3, 16, 7, 7, generator=generator)).requires_grad_()
            value = evaluate(graph, x)
            value.square().mean().backward()
            assert torch.isfinite(value).all()
            assert torch.isfinite(x.grad).all()
        assert x.grad.abs().max() > 0 or "sigmoid" in str(graph.nodes) or "tanh" in str(graph.nodes)


# -- the funnel --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampling", "ignored", "passed"), [("flat", 0.68, 0.11), ("nested", 0.63, 0.30)])
def test_shares_of_a_funnel_of_twenty_thousand(sampling, ignored, passed):
    """The shares that another implementation measured."""
    counts = sample_counts(LayerSpace(sampling=sampling), 20_000, ["static"], np.random.default_rng(0))
    assert abs(counts["rejected"]["ignores_input"] / 20_000 - ignored) < 0.01
    assert abs(counts["passed"] / 20_000 - passed) < 0.02
    assert counts["rejected"]["non_finite"] / 20_000 < 0.01
    assert set(counts["rejected"]) == {"ignores_input", "non_finite", "not_full_shape"}
    assert counts["passed"] + sum(counts["rejected"].values()) == counts["count"] == 20_000


def test_stages_narrow_down():
    space = LayerSpace(sampling="nested")
    found = [sample_counts(space, 1500, STAGES[:n], np.random.default_rng(1)) for n in (1, 2, 3)]
    passed = [counts["passed"] for counts in found]
    assert passed[0] > passed[1] > passed[2] > 0
    assert found[1]["rejected"]["duplicate"] == passed[0] - passed[1] == found[2]["rejected"]["duplicate"]
    assert {"zero_gradient", "trivial"} <= set(found[2]["rejected"])


def test_half_of_what_passes_at_a_glance_was_there_before():
    """Another implementation found 1,004 functions among 2,172 valid flat graphs, by rounded outputs (46 %)."""
    space, rng, keys = LayerSpace(), np.random.default_rng(2), []
    while len(keys) < 2172:
        graph = space.sample(rng)
        if static(graph) is None:
            keys.append(space.key(graph))
    assert 0.43 < len(set(keys)) / len(keys) < 0.49


def test_progress_and_bad_requests():
    seen: list[tuple[int, int | None]] = []
    sample_counts(LayerSpace(), 250, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(100, 250), (200, 250), (250, 250)]
    with pytest.raises(UserError, match="dedup"):
        sample_counts(LayerSpace(), 10, ["static", "dedupe"])
    with pytest.raises(UserError, match="positive"):
        sample_counts(LayerSpace(), 0)
