"""AQuaSurF: features against NumPy, neighbours, and a search on a synthetic landscape against random draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nas.layers.activation_search import ActivationEvaluator, FilteredActivations
from nas.layers.aquasurf import (
    BASELINES,
    AQuaSurF,
    fisher_features,
    kronecker_factors,
    output_features,
    union_distances,
)
from nas.layers.funnel import FilteredLayers
from nas.layers.search import search_layers
from nas.objectives import parse_objectives
from nas.training.recipe import Recipe
from search_spaces.common.errors import UserError
from search_spaces.layers.activation_space import activation


def test_outputs_are_those_of_the_paper():
    x = np.clip(np.random.RandomState(0).normal(size=1000), -5, 5)
    found = output_features([activation("relu"), activation("tanh")])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [np.maximum(x, 0), np.tanh(x)], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bias", [True, False])
def test_factors_of_one_sample_are_its_fisher_matrix(bias):
    """With one sample the Kronecker product is the outer product of the gradient of all weights: no approximation."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=bias)
    x = torch.randn(1, 4)
    out = layer(x)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(out, torch.tensor([1])), out, retain_graph=True)
    a, g = kronecker_factors(layer, x, gradient)
    parts = torch.autograd.grad(nn.functional.cross_entropy(out, torch.tensor([1])), list(layer.parameters()))
    whole = torch.cat([parts[0], parts[1][:, None]], 1) if bias else parts[0]
    flat = whole.T.flatten().double().numpy()  # columns first: A (x) G
    np.testing.assert_allclose(np.kron(a, g), np.outer(flat, flat), atol=1e-7)


def test_factors_of_a_convolution():
    """A 1x1 convolution on one pixel is a linear layer; larger ones against explicit patches."""
    torch.manual_seed(1)
    x, gradient = torch.randn(5, 3, 4, 4), torch.randn(5, 2, 2, 2)
    a, g = kronecker_factors(nn.Conv2d(3, 2, 3, stride=2, padding=1), x, gradient)
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    rows = [
        [*padded[b, :, i : i + 3, j : j + 3].flatten().tolist(), 1] for b in range(5) for i in (0, 2) for j in (0, 2)
    ]
    np.testing.assert_allclose(a, np.einsum("ni,nj->ij", rows, rows) / 5, rtol=1e-5)
    slopes = gradient.permute(0, 2, 3, 1).reshape(-1, 2).numpy().astype(float)
    np.testing.assert_allclose(g, slopes.T @ slopes / 20, rtol=1e-5)


def test_spectra_are_those_of_the_kronecker_product():
    torch.manual_seed(2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3))
    images, labels = torch.randn(20, 3, 2, 2), torch.randint(3, (20,))
    found = fisher_features(network, images, labels, weights_per_bin=1)
    assert len(found) == 72 + 18
    hidden = network[:2](images)
    out = network(images)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(out, labels, reduction="sum"), out)
    a, g = kronecker_factors(network[3], hidden.tanh().detach(), gradient)
    values = np.linalg.eigvalsh(np.kron(a, g))
    logs = np.clip(np.log(np.maximum(values, 1e-300)), -100, 100)
    edges = np.linspace(-100, 100, 19)
    exact = np.array([(logs <= edge).mean() for edge in edges[1:]])
    large = edges[1:] > -25  # products below rounding errors are clipped differently
    np.testing.assert_allclose(found[72:][large], exact[large], atol=1e-12)
    assert found[71] == found[-1] == 1
    with pytest.raises(UserError, match="linear layers"):
        fisher_features(nn.Sequential(nn.Flatten()), images, labels)


def test_union_of_neighbour_graphs():
    """Points on a line in one matrix, the same order in the other: near points stay near, parts can be apart."""
    line = np.abs(np.subtract.outer(np.arange(8.0), np.arange(8.0)))
    found = union_distances([line, 7 * line], 2)
    np.testing.assert_allclose(found, found.T)
    assert (np.diff(found[0]) > 0).all()
    np.testing.assert_allclose(union_distances([line], 2), found)  # units do not matter
    side = np.arange(8) < 4
    apart = line + 100.0 * (side[:, None] != side)
    assert np.isinf(union_distances([apart], 2)[0, 7])
    assert np.isfinite(union_distances([apart, line], 2)[0, 7])  # the other feature joins them


def score_of(graph) -> float:
    """A landscape: how close the function is to a leaky ReLU of our own."""
    x = np.clip(np.random.RandomState(0).normal(size=1000), -5, 5)
    return -float(np.abs(output_features([graph])[0] - np.where(x > 0, 0.9 * x, 0.1 * x)).mean())


def strategy(seed: int, **settings) -> AQuaSurF:
    space = FilteredActivations("pangaea", first=BASELINES)
    return AQuaSurF(space, parse_objectives("val_acc"), np.random.default_rng(seed), **{"pool": 80, **settings})


def test_baselines_first_then_better_than_the_order_of_the_pool():
    gained = []
    for seed in range(3):
        asked = strategy(seed)
        trials = []
        for number in range(20):
            trial = asked.ask()
            failed = number == 9
            asked.tell(trial.id, None if failed else {"val_acc": score_of(trial.arch)})
            trials.append(trial)
        names = [asked.space.readable(trial.arch) for trial in trials[:8]]
        assert names == [f"{name}(x)" for name in BASELINES]
        assert len({asked.space.key(trial.arch) for trial in trials}) == 20
        chosen = np.mean([score_of(trial.arch) for trial in trials[8:]])
        gained.append(chosen - np.mean([score_of(graph) for graph in asked.pool[8:]]))
    assert min(gained) > 0


def test_predictions_are_means_of_the_nearest():
    asked = strategy(0, regress=2)
    for _ in range(10):
        trial = asked.ask()
        asked.tell(trial.id, {"val_acc": score_of(trial.arch)})
    known = list(asked._places.values())
    outputs = output_features(asked.pool).astype(float)
    for at in (30, 50):
        order = np.argsort(np.linalg.norm(outputs[known] - outputs[at], axis=1))[:2]
        expected = np.mean([score_of(asked.pool[known[i]]) for i in order])
        assert asked.predictions([at])[0] == pytest.approx(expected)
    small = strategy(0, pool=9)
    for _ in range(9):
        small.tell(small.ask().id, {"val_acc": 1.0})
    with pytest.raises(StopIteration):
        small.ask()
    with pytest.raises(UserError, match="pool"):
        strategy(0, pool=3)


def test_search_with_fisher_spectra(tmp_path):
    evaluator = ActivationEvaluator(recipe=Recipe(steps=10, batch_size=32), signal=False, stability_steps=0)
    arguments = {"budget": 4, "strategy_settings": {"begin": 3, "pool": 8}, "out": tmp_path / "run"}

    def found():
        return search_layers(FilteredActivations(first=BASELINES[:3]), evaluator, "aquasurf", **arguments)

    first = found()
    assert len(first.records) == 4
    assert first.run.settings["strategy"] == "aquasurf"
    assert [r.arch for r in found().records] == [r.arch for r in first.records]  # resumed: nothing left to do
    with pytest.raises(UserError, match="activation functions"):
        search_layers(FilteredLayers(), evaluator, "aquasurf", budget=1)
