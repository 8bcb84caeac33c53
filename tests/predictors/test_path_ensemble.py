"""BANANAS' ensemble, and what all stacked predictors share: stacks, seeds, saving, bad input."""

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from torch import nn

from predictors.graphs import as_table
from predictors.neural.layers import initialize
from predictors.neural.members import vectors
from predictors.neural.path_ensemble import PathEnsemble, PathNetwork
from predictors.path_encoding import path_encoding
from predictors.registry import load_predictor, make_predictor
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space


@pytest.fixture(scope="module")
def cells():
    """100 graphs of NAS-Bench-201 and a quality that their paths decide."""
    space, rng = load_space("nas-bench-201"), np.random.default_rng(1)
    graphs = list(dict.fromkeys(space.graph(space.sample(rng)) for _ in range(130)))[:100]
    table = as_table(graphs, space.vocabulary)
    paths = path_encoding(table)
    return table, paths @ rng.normal(size=paths.shape[1]) + 0.01 * rng.normal(size=len(table))


def make(table, **settings):
    return make_predictor("path-mlp", "nas-bench-201", table.vocabulary, **({"epochs": 8} | settings))


def test_network_equals_plain_layers():
    """Against torch.nn with the same weights, Glorot-uniform and without biases at the start."""
    model = PathNetwork(2, 7, 5, 3)
    initialize(model, [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    rows = np.random.default_rng(0).normal(size=(2, 4, 7)).astype(np.float32)
    batch = vectors(np.zeros((8, 7)))._map(lambda field: field)
    object.__setattr__(batch, "columns", torch.from_numpy(rows))
    scores = model(batch)
    for k in range(2):
        linear = [nn.Linear(a, b) for a, b in ((7, 5), (5, 5), (5, 5), (5, 1))]
        for plain, stacked in zip(linear, [*model.hidden, model.last], strict=True):
            plain.weight.data, plain.bias.data = stacked.weight.data[k].T, stacked.bias.data[k, 0]
            assert stacked.weight[k].abs().max() <= (6 / sum(stacked.weight.shape[1:])) ** 0.5
            assert not stacked.bias.any()
        layers = [part for layer in linear[:-1] for part in (layer, nn.ReLU())]
        expected = nn.Sequential(*layers, linear[-1])(torch.from_numpy(rows[k]))[:, 0]
        torch.testing.assert_close(scores[k], expected)


def test_it_learns_what_paths_decide(cells):
    table, y = cells
    predictor = make(table, epochs=60).fit(table.take(np.arange(70)), y[:70], rng=np.random.default_rng(0))
    mean, std = predictor.predict(table.take(np.arange(70, 100)), return_std=True)
    assert kendalltau(mean, y[70:])[0] > 0.4
    assert (std > 0).all()


def test_predictions_are_mean_and_deviation_of_the_members(cells):
    table, y = cells
    predictor = make(table).fit(table.take(np.arange(60)), y[:60], rng=np.random.default_rng(4))
    raw = predictor._scores(table, np.zeros((len(table), 0)))
    own = raw[:, :60]
    scaled = (raw - own.mean(1, keepdims=True)) / own.std(1, keepdims=True)
    mean, std = predictor.predict(table, return_std=True)
    assert raw.shape == (5, 100)
    np.testing.assert_allclose(mean, scaled.mean(0), atol=1e-5)
    np.testing.assert_allclose(std, scaled.std(0, ddof=1), atol=1e-5)


def test_seeds_together_equal_one_after_another(cells):
    table, y = cells
    orders = [np.random.default_rng(seed).permutation(100)[:n] for seed, n in enumerate((40, 30, 40))]
    problems = [(table.take(order), y[order], {"proxy": y[order] ** 2}, None) for order in orders]
    together = make(table).fit_many(problems, [np.random.default_rng(seed) for seed in range(3)])
    everywhere = {"proxy": y**2}
    for seed, (graphs, labels, extra, _) in enumerate(problems):
        alone = make(table).fit(graphs, labels, extra=extra, rng=np.random.default_rng(seed))
        expected = alone.predict(table, extra=everywhere)
        np.testing.assert_allclose(together[seed].predict(table, extra=everywhere), expected, atol=2e-3)


def test_saved_weights_predict_the_same(cells, tmp_path):
    table, y = cells
    extra = {"proxy": np.linspace(0, 1, len(table)) ** 2}
    predictor = make(table).fit(table, y, extra=extra, rng=np.random.default_rng(0))
    predictor.save(tmp_path)
    again = load_predictor(tmp_path)
    assert isinstance(again, PathEnsemble)
    assert again.settings == predictor.settings
    expected = predictor.predict(table, extra=extra, return_std=True)
    np.testing.assert_allclose(again.predict(table, extra=extra, return_std=True), expected, atol=1e-6)


def test_chunks_change_nothing(cells, monkeypatch):
    table, y = cells
    predictor = make(table).fit(table, y, rng=np.random.default_rng(0))
    expected = predictor.predict(table)
    monkeypatch.setattr("predictors.neural.members.PREDICTED_AT_ONCE", 17)
    np.testing.assert_allclose(predictor.predict(table), expected, atol=1e-5)


def test_the_same_rng_gives_the_same_predictor(cells):
    table, y = cells
    first, same, other = (
        make(table).fit(table, y, rng=np.random.default_rng(seed)).predict(table) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, same)
    assert not np.allclose(first, other)


def test_both_cells_of_darts_are_read():
    space, rng = load_space("darts"), np.random.default_rng(0)
    table = as_table([space.graph(space.sample(rng)) for _ in range(20)], space.vocabulary)
    predictor = make_predictor("path-mlp", "darts", space.vocabulary, epochs=2)
    scores = predictor.fit(table, rng.normal(size=20), rng=rng).predict(table)
    assert len(np.unique(scores)) == 20


def test_bad_settings_are_named(cells):
    table, _ = cells
    for settings, expected in (({"members": 0}, "members"), ({"batch": 1}, "batch"), ({"device": "cpx"}, "cpu")):
        with pytest.raises(UserError, match=expected):
            make(table, **settings)


def test_labelled_graphs_without_different_paths_are_refused():
    """Paths of NATS-Bench's size space have five operations, more than three."""
    space, rng = load_space("nats-size"), np.random.default_rng(0)
    graphs = [space.graph(space.sample(rng)) for _ in range(10)]
    with pytest.raises(UserError, match="longest"):
        make_predictor("path-mlp", "nats-size", space.vocabulary).fit(graphs, rng.normal(size=10), rng=rng)
