"""BRP-NAS: network, pair loss and wins against loops over single graphs and pairs; learning, stacks, saving."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from predictors.graphs import as_table
from predictors.neural.batch import graph_batch
from predictors.neural.layers import initialize
from predictors.neural.pair_classifier import PairClassifier, PairNetwork, pair_loss, wins
from predictors.registry import load_predictor, make_predictor
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def sampled(name, count, seed=0):
    space, rng = load_space(name), np.random.default_rng(seed)
    graphs = list(dict.fromkeys(space.graph(space.sample(rng)) for _ in range(2 * count)))[:count]
    return as_table(graphs, space.vocabulary)


@pytest.fixture(scope="module")
def cells():
    """60 graphs of NAS-Bench-101 and a quality that their structure decides."""
    table = sampled("nas-bench-101", 60)
    conv = table.vocabulary.index("conv3x3-bn-relu")
    noise = 0.01 * np.random.default_rng(1).normal(size=60)
    return table, (table.ops == conv).sum(1) + 0.3 * table.adjacency.sum((1, 2)) + noise


def make(table, **settings):
    quick = {"width": 16, "layers": 2, "epochs": 8, "device": "cpu"}
    return make_predictor("brp-nas", "nas-bench-101", table.vocabulary, **(quick | settings))


@pytest.mark.parametrize("answers", ["soft", "hard"])
def test_pair_loss_is_the_mean_cross_entropy_of_all_ordered_pairs(answers):
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(2, 5, 2)), rng.normal(size=(2, 5))
    targets[1, 3] = targets[1, 0]  # a tie
    found = pair_loss(torch.from_numpy(scores), torch.from_numpy(targets), answers)
    for k in range(2):
        terms = []
        for i in range(5):
            for j in range(5):
                if i == j:
                    continue
                # The released form: two logits (i wins, j wins) from which log-softmax takes the first.
                a, b = math.exp(targets[k, i]), math.exp(targets[k, j])
                truth = a / (a + b) if answers == "soft" else {1: 1.0, 0: 0.5, -1: 0.0}[int(np.sign(a - b))]
                said = sigmoid(scores[k, i, 0] + scores[k, j, 1])
                terms.append(-truth * math.log(said) - (1 - truth) * math.log(1 - said))
        assert found[k].item() == pytest.approx(sum(terms) / 20, rel=1e-6)


def test_wins_are_the_expected_share_of_rivals_beaten_in_both_orders(monkeypatch):
    rng = np.random.default_rng(0)
    scores, rivals = rng.normal(size=(7, 2)), rng.normal(size=(4, 2))
    expected = []
    for u, v in scores:
        asked_first = [sigmoid(u + other[1]) for other in rivals]
        asked_second = [1 - sigmoid(other[0] + v) for other in rivals]
        expected.append(sum(asked_first + asked_second) / 8)
    np.testing.assert_allclose(wins(scores, rivals), expected)
    monkeypatch.setattr("predictors.neural.pair_classifier.CHUNK", 3)
    np.testing.assert_allclose(wins(scores, rivals), expected)


@pytest.mark.parametrize("space", ["nas-bench-101", "darts"])
def test_network_equals_the_released_form_on_every_graph_alone(space):
    """Rows of features through the layers with plain matrices, global node first, no padding."""
    table = sampled(space, 8)
    parts = tuple(sorted(table.part_names))
    operations, width = len(table.vocabulary), 6
    model = PairNetwork(2, operations, 0, width=width, layers=3, dropout=0.5, parts=len(parts)).eval()
    initialize(model, [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    torch.nn.init.normal_(model.bias, generator=torch.Generator().manual_seed(2))
    scores = model(graph_batch(table.padded(table.nodes + 2), parts).stacked(2))
    state = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    for k in range(2):
        for g, graph in enumerate(table):
            n = len(graph)
            gather = np.zeros((n + 1, n + 1))
            gather[0, :] = 1
            gather[1:, 1:] = graph.adjacency + np.eye(n)
            ids = [operations + 1] + [table.vocabulary.index(op) for op in graph.ops]
            x = state["embedding.weight"][k][ids]
            if len(parts) > 1:
                x = x + state["part_embedding.weight"][k][[len(parts)] + [parts.index(part) for part in graph.parts]]
            for layer in range(3):
                if layer:
                    x = gather @ x @ state[f"weights.{layer - 1}.weight"][k] + state[f"weights.{layer - 1}.bias"][k]
                else:
                    x = gather @ x + state["bias"][k, 0]
                x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
                x = np.maximum(x * state[f"norms.{layer}.weight"][k] + state[f"norms.{layer}.bias"][k], 0)
            expected = x[0] @ state["last.weight"][k] + state["last.bias"][k, 0]
            np.testing.assert_allclose(scores[k, g].detach(), expected, atol=1e-4)


def test_predictions_are_the_shares_of_labelled_graphs_beaten(cells):
    """From the two logits of every graph, on the scale of the labelled graphs' shares."""
    table, y = cells
    labelled = table.take(np.arange(40))
    predictor = make(table).fit(labelled, y[:40], rng=np.random.default_rng(0))
    uv = predictor._model(graph_batch(table, ("cell",)).stacked(1))[0].double().numpy()
    shares = np.array([np.mean([sigmoid(u + w) + 1 - sigmoid(t + v) for t, w in uv[:40]]) / 2 for u, v in uv])
    expected = (shares - shares[:40].mean()) / shares[:40].std()
    np.testing.assert_allclose(predictor.predict(table), expected, rtol=1e-3, atol=1e-4)


def test_it_learns_what_structure_decides(cells):
    table, y = cells
    predictor = make(table, width=32, epochs=80, members=2, rate=1e-3)
    predictor.fit(table.take(np.arange(40)), y[:40], rng=np.random.default_rng(0))
    mean, std = predictor.predict(table.take(np.arange(40, 60)), return_std=True)
    assert kendalltau(mean, y[40:])[0] > 0.5
    assert (std > 0).all()


def test_seeds_together_equal_one_after_another(cells):
    """With dropout and an extra column, so that generators, batches and columns are all in play."""
    table, y = cells
    orders = [np.random.default_rng(seed).permutation(60)[:n] for seed, n in enumerate((30, 20, 30))]
    problems = [(table.take(order), y[order], {"proxy": y[order] ** 2}, None) for order in orders]
    together = make(table).fit_many(problems, [np.random.default_rng(seed) for seed in range(3)])
    everywhere = {"proxy": y**2}
    for seed, (graphs, labels, extra, _) in enumerate(problems):
        alone = make(table).fit(graphs, labels, extra=extra, rng=np.random.default_rng(seed))
        expected = alone.predict(table, extra=everywhere)
        np.testing.assert_allclose(together[seed].predict(table, extra=everywhere), expected, atol=5e-3)
    shifted = together[0].predict(table, extra={"proxy": -(y**2)})
    assert not np.allclose(shifted, together[0].predict(table, extra=everywhere), atol=0.05)


def test_saved_weights_predict_the_same(cells, tmp_path):
    table, y = cells
    predictor = make(table).fit(table.take(np.arange(40)), y[:40], rng=np.random.default_rng(0))
    predictor.save(tmp_path)
    again = load_predictor(tmp_path)
    assert isinstance(again, PairClassifier)
    assert again.settings == predictor.settings
    np.testing.assert_allclose(again.predict(table), predictor.predict(table), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"), [({"answers": "sof"}, "soft"), ({"dropout": 1.0}, "dropout"), ({"layers": 0}, "layers")]
)
def test_bad_settings_are_named(cells, settings, expected):
    with pytest.raises(UserError, match=expected):
        make(cells[0], **settings)
