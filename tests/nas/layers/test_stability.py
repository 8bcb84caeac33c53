"""The stability test against published verdicts, finite differences, and its promise to leave the model alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nas.layers.anchors import anchor
from nas.layers.stability import stability
from search_spaces.common.errors import UserError
from search_spaces.layers.catalog import layer
from search_spaces.layers.module import GraphLayer


class Pointwise(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def factory(name: str):
    functions = {"tanh": torch.tanh, "square": torch.square, "exp": torch.exp}
    if name in functions:
        return lambda channels: Pointwise(functions[name])
    graph = layer(name)
    return lambda channels: GraphLayer(graph, channels)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)


def network(name: str, seed: int = 0) -> nn.Module:
    return anchor("resnet", factory(name), width=16, generator=torch.Generator().manual_seed(seed))


# Measured with widths 16, 32, 64, batches of eight random 3x8x8 images and rate .1 by another implementation.
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["relu", "silu", "square", "exp"])
def test_unbounded_layers_explode_within_five_steps(name, seed):
    found = stability(network(name, seed), *batch(seed), steps=5)
    assert found.reason == "unstable"
    assert not found.history[-1] <= 1e8
    assert all(value <= 1e8 for value in found.history[:-1])


@pytest.mark.parametrize("name", ["bn-relu", "gn-relu", "evonorm-b0", "evonorm-s0", "evonorm-s2", "tanh"])
def test_normalising_layers_survive_ten_steps(name):
    found = stability(network(name), *batch(), steps=10)
    assert found.reason is None
    assert found.steps == 10
    assert max(found.history) < 1e5


class Cubic(nn.Module):
    """Logits (w^3, 0) for an input of one."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))

    def forward(self, x):
        return torch.cat([x * self.w**3, x * 0], 1)


def test_the_ascent_follows_the_slope_of_the_gradient_norm():
    """Against central differences of the derivative written by hand: loss = log(1 + exp(w^3)) for the label 1."""

    def norm(w: float) -> float:
        return abs(3 * w**2 / (1 + math.exp(-(w**3))))

    w, expected = 0.7, []
    for _ in range(4):
        expected.append(norm(w))
        w += 0.1 * (norm(w + 1e-6) - norm(w - 1e-6)) / 2e-6
    found = stability(Cubic(), torch.ones(1, 1, dtype=torch.float64), torch.tensor([1]), steps=3)
    assert found.history == pytest.approx(expected, rel=1e-6)


def test_the_first_norm_is_that_of_the_gradient():
    model = network("evonorm-b0")
    images, labels = batch()
    model.train()
    nn.functional.cross_entropy(model(images), labels).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    assert stability(model, images, labels, steps=1).history[0] == pytest.approx(norm, rel=1e-4)


def test_the_model_is_left_alone():
    model = network("bn-relu").eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stability(model, *batch(), steps=2)
    assert not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_threshold_and_steps():
    found = stability(network("bn-relu"), *batch(), threshold=1e-3)
    assert found.reason == "unstable"
    assert found.steps == 0
    with pytest.raises(UserError, match="at least one step"):
        stability(network("tanh"), *batch(), steps=0)
    with pytest.raises(UserError, match="a model with parameters"):
        stability(nn.Flatten(), *batch())


def test_transformers_are_differentiable_twice():
    graph = layer("layer-norm-tokens")
    model = anchor("vit", lambda channels: GraphLayer(graph, channels, layout="tokens"))
    assert stability(model, *batch(), steps=2).steps == 2
