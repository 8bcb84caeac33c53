"""ParZC: Bayesian layers against the moments of their formula, the mixer against torch.nn; learning, draws, saving."""

import logging

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from torch import nn

from predictors.graphs import as_table
from predictors.neural.layers import initialize
from predictors.neural.members import vectors
from predictors.neural.parzc import BayesianLinear, MixerNetwork, Parzc, signed_logarithm
from predictors.registry import load_predictor, make_predictor
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space


@pytest.fixture(scope="module")
def cells():
    """80 graphs of NAS-Bench-201, a quality, and proxies of it over many powers of ten."""
    space, rng = load_space("nas-bench-201"), np.random.default_rng(0)
    graphs = list(dict.fromkeys(space.graph(space.sample(rng)) for _ in range(100)))[:80]
    y = rng.normal(size=80)
    proxies = {
        "synflow": np.exp(20 + 8 * y + rng.normal(size=80)),
        "snip": np.exp(3 * y + rng.normal(size=80)),
        "jacov": -np.exp(2 - y + rng.normal(size=80)),
    }
    return as_table(graphs, space.vocabulary), y, proxies


def make(table, **settings):
    quick = {"width": 16, "blocks": 2, "patches": 4, "patch": 4, "epochs": 10, "device": "cpu"}
    return make_predictor("parzc", "nas-bench-201", table.vocabulary, **(quick | settings))


def some(proxies, rows):
    return {name: values[rows] for name, values in proxies.items()}


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_bayesian_layer_has_the_mean_and_variance_of_its_formula():
    """y = x W + b with W ~ N(mu, softplus(rho)^2) is normal with mean x mu + b and variance x^2 softplus(rho)^2."""
    layer = BayesianLinear(2, 3, 2)
    initialize(layer, generators(0, 1))
    layer.rho.data.normal_(generator=generators(2)[0])
    layer.generators = generators(3, 4)
    x = torch.randn(2, 1, 3, generator=generators(5)[0])
    with torch.no_grad():
        drawn = torch.stack([layer(x) for _ in range(4000)]).double().numpy()[:, :, 0]
    mean = np.einsum("ki,kio->ko", x[:, 0].numpy(), layer.weight.detach().numpy()) + layer.bias[:, 0].detach().numpy()
    spread = np.log1p(np.exp(layer.rho.detach().numpy()))
    deviation = np.sqrt(np.einsum("ki,kio->ko", x[:, 0].numpy() ** 2, spread**2))
    np.testing.assert_allclose(drawn.mean(0), mean, atol=5 * deviation.max() / 4000**0.5)
    np.testing.assert_allclose(drawn.std(0), deviation, rtol=5 / 8000**0.5)
    assert abs(np.corrcoef(drawn[:, 0, 0], drawn[:, 1, 0])[0, 1]) < 0.08  # members draw apart


def test_gradients_reach_mean_and_spread():
    """d/d rho of the output for a given draw e: x e sigmoid(rho), by finite differences."""
    layer = BayesianLinear(1, 2, 1).double()
    layer.weight.data.fill_(0.5)
    layer.rho.data = torch.tensor([[[-1.0], [0.7]]], dtype=torch.float64)
    layer.noise = torch.tensor([[[1.5], [-0.3]]], dtype=torch.float64)
    x = torch.tensor([[[2.0, -1.0]]], dtype=torch.float64)
    layer(x).sum().backward()
    found = layer.rho.grad.flatten().tolist()
    for i in range(2):
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                layer.rho[0, i, 0] += step
                ends.append(layer(x).item())
                layer.rho[0, i, 0] -= step
        assert found[i] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)
    np.testing.assert_allclose(layer.weight.grad.flatten(), x.flatten())


def test_a_layer_without_generators_says_so():
    with pytest.raises(RuntimeError, match="generators"):
        BayesianLinear(1, 2, 2)(torch.zeros(1, 1, 2))


def test_mixer_equals_plain_layers():
    """Patch by patch through torch.nn with the weights of one draw."""
    patches, patch, width = 3, 4, 6
    model = MixerNetwork(2, 5, patches=patches, patch=patch, width=width, blocks=2, dropout=0.3).eval()
    initialize(model, generators(0, 1))
    for seed, layer in enumerate(model.bayesian()):
        layer.noise = torch.randn(layer.weight.shape, generator=generators(7 + seed)[0])
        layer.rho.data.fill_(0.2)
    rows = np.random.default_rng(0).normal(size=(6, 5))
    scores = model(vectors(rows).stacked(2))

    def plain(layer, k):
        weight = layer.weight[k]
        if isinstance(layer, BayesianLinear):
            weight = weight + nn.functional.softplus(layer.rho[k]) * layer.noise[k]
        own = nn.Linear(*weight.shape)
        own.weight.data, own.bias.data = weight.T, layer.bias[k, 0]
        return own

    for k in range(2):
        forwards = [
            nn.Sequential(nn.LayerNorm(width), plain(block.inner, k), nn.GELU(), plain(block.outer, k))
            for block in model.blocks
        ]
        assert [part[1].out_features for part in forwards] == [24, 3, 24, 3]
        for row, score in zip(torch.from_numpy(rows).float(), scores[k], strict=True):
            wide, each = plain(model.first, k)(row), []
            for p in range(patches):
                x = plain(model.embed, k)(wide[p * patch : (p + 1) * patch])
                for part in forwards:
                    x = x + part(x)
                each.append(nn.LayerNorm(width)(x))
            expected = plain(model.last, k)(torch.stack(each).mean(0))[0]
            torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-5)


def test_it_learns_from_proxies_alone(cells):
    table, y, proxies = cells
    train, rest = np.arange(50), np.arange(50, 80)
    predictor = make(table, epochs=30).fit(table.take(train), y[:50], extra=some(proxies, train), rng=rng(0))
    mean, std = predictor.predict(table.take(rest), extra=some(proxies, rest), return_std=True)
    assert kendalltau(mean, y[50:])[0] > 0.6
    assert (std > 0).all()
    same_graph = table.take(np.zeros(30, int))  # the graphs do not count
    np.testing.assert_allclose(predictor.predict(same_graph, extra=some(proxies, rest)), mean, atol=1e-5)


def rng(seed):
    return np.random.default_rng(seed)


def test_predictions_are_mean_and_deviation_over_draws_and_members(cells):
    table, y, proxies = cells
    predictor = make(table, members=2, draws=3).fit(table, y, extra=proxies, rng=rng(0))
    raw = predictor._scores(table, predictor._standardized(np.stack(list(proxies.values()), 1)))
    assert raw.shape == (6, 80)
    assert len(np.unique(raw[:, 0])) == 6
    scaled = (raw - raw.mean(1, keepdims=True)) / raw.std(1, keepdims=True)
    mean, std = predictor.predict(table, extra=proxies, return_std=True)
    np.testing.assert_allclose(mean, scaled.mean(0), atol=1e-5)
    np.testing.assert_allclose(std, scaled.std(0, ddof=1), atol=1e-5)


def test_a_fitted_predictor_always_takes_the_same_draws(cells, tmp_path, monkeypatch):
    table, y, proxies = cells
    predictor = make(table).fit(table, y, extra=proxies, rng=rng(0))
    expected = predictor.predict(table, extra=proxies)
    np.testing.assert_array_equal(predictor.predict(table, extra=proxies), expected)
    predictor.save(tmp_path)
    again = load_predictor(tmp_path)
    assert isinstance(again, Parzc)
    np.testing.assert_allclose(again.predict(table, extra=proxies), expected, atol=1e-5)
    monkeypatch.setattr("predictors.neural.members.PREDICTED_AT_ONCE", 17)
    np.testing.assert_allclose(predictor.predict(table, extra=proxies), expected, atol=1e-5)


def test_seeds_together_equal_one_after_another(cells):
    table, y, proxies = cells
    orders = [rng(seed).permutation(80)[:n] for seed, n in enumerate((40, 30, 40))]
    problems = [(table.take(order), y[order], some(proxies, order), None) for order in orders]
    together = make(table).fit_many(problems, [rng(seed) for seed in range(3)])
    for seed, (graphs, labels, extra, _) in enumerate(problems):
        alone = make(table).fit(graphs, labels, extra=extra, rng=rng(seed))
        expected = alone.predict(table, extra=proxies)
        np.testing.assert_allclose(together[seed].predict(table, extra=proxies), expected, atol=5e-3)


def test_signed_logarithm():
    values = np.array([-np.expm1(3.0), 0.0, np.expm1(50.0)])
    np.testing.assert_allclose(signed_logarithm(values), [-3, 0, 50])


def test_without_proxies_path_features_stand_in_and_this_is_said(cells, caplog, tmp_path):
    table, _, _ = cells
    y = (table.ops == table.vocabulary.index("nor_conv_3x3")).sum(1) + 0.01 * rng(1).normal(size=80)
    with caplog.at_level(logging.WARNING, "nasforge.predictors"):
        predictor = make(table, epochs=20).fit(table.take(np.arange(60)), y[:60], rng=rng(0))
    assert "no proxies" in caplog.text
    found = predictor.predict(table)
    assert kendalltau(found[60:], y[60:])[0] > 0.3
    predictor.save(tmp_path)
    np.testing.assert_allclose(load_predictor(tmp_path).predict(table), found, atol=1e-5)


def test_proxies_that_say_nothing_are_refused(cells):
    table, y, _ = cells
    with pytest.raises(UserError, match="at least one proxy"):
        make(table).fit(table, y, extra={"synflow": np.ones(80)}, rng=rng(0))


@pytest.mark.parametrize(
    ("settings", "expected"), [({"draws": 0}, "draws"), ({"loss": "mze"}, "mse"), ({"dropout": -0.1}, "dropout")]
)
def test_bad_settings_are_named(cells, settings, expected):
    with pytest.raises(UserError, match=expected):
        make(cells[0], **settings)
