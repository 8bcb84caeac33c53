"""CARL: the split against its formula, views and interventions, gradients, collapse, stacks, saving, bad input."""

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from predictors.graphs import as_table
from predictors.neural.batch import graph_batch
from predictors.neural.carl import CausalPredictor, CausalSettings
from predictors.neural.carl_network import TEMPERATURE, EdgeScore, Reversal
from predictors.neural.encoders import GraphConvolutionBlock, pooled
from predictors.neural.layers import initialize, use_generators
from predictors.neural.losses import bpr
from predictors.registry import load_predictor, make_predictor
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

SMALL = {"width": 16, "layers": 2, "epochs": 6, "device": "cpu"}
PARTS = ("cell",)


@pytest.fixture(scope="module")
def cells():
    """60 graphs of NAS-Bench-101 and a quality that their structure decides."""
    rng = np.random.default_rng(1)
    space = load_space("nas-bench-101")
    graphs = [g for g in dict.fromkeys(space.graph(space.sample(rng)) for _ in range(120)) if len(g) > 3][:60]
    table = as_table(graphs, space.vocabulary)
    conv = table.vocabulary.index("conv3x3-bn-relu")
    quality = (table.ops == conv).sum(1) + 0.3 * table.adjacency.sum((1, 2)) + 0.01 * rng.normal(size=len(table))
    return table, quality


def make(table, **settings):
    return CausalPredictor("nas-bench-101", table.vocabulary, CausalSettings(**(SMALL | settings)))


def network(table, stack=2, columns=0, **settings):
    """(network of a stack, its generators), not trained."""
    predictor = make(table, **settings)
    predictor._parts = PARTS
    model = predictor._new_model(stack, columns)
    generators = [torch.Generator().manual_seed(k) for k in range(stack)]
    initialize(model, generators)
    use_generators(model, generators)
    return model, generators


def batch_of(table, stack=2, count=8):
    return graph_batch(table.take(np.arange(count)), PARTS).stacked(stack)


def test_graph_convolution_node_by_node(cells):
    """Against the mean over a node and its weighted neighbours, one node after another."""
    batch = batch_of(cells[0], 1, 4)
    block = GraphConvolutionBlock(1, 5, 0.0, True)
    initialize(block, [torch.Generator().manual_seed(0)])
    x = torch.randn(1, 4, batch.mask.shape[2], 5) * batch.mask.unsqueeze(3)
    weights = batch.adjacency * torch.rand(batch.adjacency.shape)
    found = block(x, weights, batch.mask)
    for g in range(4):
        for i in range(int(batch.mask[0, g].sum())):
            into, out = weights[0, g, :, i], weights[0, g, i]
            before = (x[0, g, i] + sum(w * v for w, v in zip(into, x[0, g], strict=True))) / (1 + into.sum())
            after = (x[0, g, i] + sum(w * v for w, v in zip(out, x[0, g], strict=True))) / (1 + out.sum())
            expected = (torch.relu(before @ block.before.weight[0]) + torch.relu(after @ block.after.weight[0])) / 2
            torch.testing.assert_close(found[0, g, i], expected)


def test_edges_are_scored_by_two_layers_on_both_ends(cells):
    """Against one linear layer on [h_i, h_j], edge by edge."""
    batch = batch_of(cells[0])
    score = EdgeScore(2, 6)
    initialize(score, [torch.Generator().manual_seed(k) for k in range(2)])
    h = torch.randn(2, 8, batch.mask.shape[2], 6)
    found = score(h, batch.adjacency)
    assert found.shape == batch.adjacency.shape
    assert (found[batch.adjacency == 0] == 0).all()
    joined = torch.cat([score.source.weight, score.target.weight], 1)
    for s, g, i, j in batch.adjacency.nonzero()[::5].tolist():
        inner = torch.relu(torch.cat([h[s, g, i], h[s, g, j]]) @ joined[s] + score.source.bias[s, 0])
        torch.testing.assert_close(found[s, g, i, j], (inner @ score.out.weight[s] + score.out.bias[s, 0])[0])


def test_probabilities_stand_on_nodes_and_edges_only(cells):
    model, _ = network(cells[0])
    batch = batch_of(cells[0])
    h = model.encoder(batch)
    for noise in (False, True):
        nodes, edges = model.probabilities(model.scores(h, batch), batch, 0.5, noise)
        assert nodes.shape == batch.mask.shape
        assert edges.shape == batch.adjacency.shape
        assert ((nodes > 0) == (batch.mask > 0)).all()
        assert ((edges > 0) == (batch.adjacency > 0)).all()
        assert nodes.max() < 1
        assert edges.max() < 1
    calm = model.probabilities(model.scores(h, batch), batch, 0.5)
    assert torch.equal(calm[0], model.probabilities(model.scores(h, batch), batch, 0.5)[0])
    torch.testing.assert_close(calm[0], torch.sigmoid(model.node_score(h).squeeze(3) / 0.5) * batch.mask)


def test_noise_is_the_concrete_distribution(cells):
    """P(p > 1/2) = sigmoid(score), whatever the temperature (Maddison, Mnih and Teh 2017, proposition 1)."""
    model, _ = network(cells[0], 1)
    scores = torch.tensor([-1.5, 0.0, 1.0]).repeat(20_000, 1)
    drawn = torch.sigmoid((scores + model._logistic(scores[None])[0]) / 0.7)
    np.testing.assert_allclose((drawn > 0.5).float().mean(0), torch.sigmoid(scores[0]), atol=0.012)


def test_a_random_split_is_a_half_everywhere(cells):
    model, _ = network(cells[0], split="random")
    batch = batch_of(cells[0])
    nodes, edges = model.probabilities(model.scores(None, batch), batch, 0.5)
    assert torch.equal(nodes, batch.mask / 2)
    assert torch.equal(edges, batch.adjacency / 2)
    nodes, _ = model.probabilities(model.scores(None, batch), batch, 0.5, noise=True)
    assert nodes[batch.mask > 0].std() > 0.1


def test_inference_is_the_mean_over_interventions_when_nothing_is_redundant(cells):
    """With p = 1 the redundant view is exactly zero, so that any intervention leaves f(z_c)."""
    model, _ = network(cells[0])
    model.eval()
    for layer in (model.node_score[2], model.edge_score.out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, 60.0)
    batch = batch_of(cells[0])
    h = model.encoder(batch)
    nodes, edges = model.probabilities(model.scores(h, batch), batch, TEMPERATURE[1])
    critical = model.view(model.critical, h, batch, nodes, edges)
    redundant = model.view(model.redundant, h, batch, batch.mask - nodes, batch.adjacency - edges)
    assert (redundant == 0).all()
    torch.testing.assert_close(
        critical, pooled(model.critical(h * batch.mask[..., None], batch.adjacency, None), batch.mask)
    )
    scores = model.intervened(critical, redundant, batch.columns, 4)
    assert scores.shape == (2, 4, 8)
    torch.testing.assert_close(scores.mean(1), model(batch))


def test_interventions_pair_each_graph_with_others_only(cells):
    """f made linear: f(c + r) - f(c) tells which graph's redundant part stands beside which critical one."""
    model, _ = network(cells[0], 1)
    model.eval()
    critical, redundant = torch.zeros(1, 8, 16), torch.zeros(1, 8, 16)
    redundant[0, :, 0] = 2.0 ** torch.arange(8)
    model.head = torch.nn.Identity()
    model.score = lambda z, columns: z[..., 0]
    scores = model.intervened(critical, redundant, torch.zeros(1, 8, 0), 5)
    partners = torch.log2(scores[0]).int()
    for i in range(8):
        assert len(set(partners[:, i].tolist()) - {i}) == 5
    assert model.intervened(critical, redundant, torch.zeros(1, 8, 0), 100).shape == (1, 7, 8)


def test_gradients_reach_both_views_and_the_split(cells):
    model, _ = network(cells[0])
    batch = batch_of(cells[0])
    targets = torch.randn(2, 8)
    model.objective(batch, targets, bpr, 0.0).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_without_interventions_and_redundancy_nothing_uses_the_redundant_view(cells):
    model, _ = network(cells[0], interventions=0, redundancy_weight=0.0)
    model.objective(batch_of(cells[0]), torch.randn(2, 8), bpr, 0.0).sum().backward()
    assert all(p.grad is None for p in (*model.redundant.parameters(), *model.redundant_head.parameters()))
    assert model.critical.before.weight.grad.abs().sum() > 0


def test_the_objective_is_the_weighted_sum_of_its_losses(cells):
    """Each weight alone adds its part, which doubles with the weight."""
    batch, targets = batch_of(cells[0]), torch.randn(2, 8)
    zero = {"intervention_weight": 0.0, "redundancy_weight": 0.0, "size_weight": 0.0}

    def value(**weights):
        model, _ = network(cells[0], head_dropout=0.0, **(zero | weights))
        return model.objective(batch, targets, bpr, 0.3)

    nothing = value()
    for name in zero:
        once, twice = value(**{name: 1.0}) - nothing, value(**{name: 2.0}) - nothing
        assert (once > 1e-6).all(), name
        torch.testing.assert_close(twice, 2 * once, rtol=1e-3, atol=1e-5)
    model, _ = network(cells[0], head_dropout=0.0, **zero)
    h = model.encoder(batch)
    temperature = 0.7 * TEMPERATURE[0] + 0.3 * TEMPERATURE[1]
    nodes, edges = model.probabilities(model.scores(h, batch), batch, temperature, noise=True)
    score = model.score(model.view(model.critical, h, batch, nodes, edges), batch.columns)
    torch.testing.assert_close(bpr(score, targets), nothing)


def test_reversal_turns_gradients():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (Reversal.apply(x) * torch.tensor([3.0, 5.0])).sum().backward()
    assert x.grad.tolist() == [-3.0, -5.0]


@pytest.mark.parametrize("size", [0.3, 0.7])
def test_the_size_loss_keeps_nodes_and_edges_from_collapse(size, cells):
    table, y = cells
    predictor = make(table, size=size, size_weight=3.0, epochs=60, batch=60, rate=1e-2)
    nodes, edges = predictor.fit(table, y, rng=np.random.default_rng(0)).importances(table)
    assert abs(nodes[table.mask].mean() - size) < 0.1
    assert abs(edges[table.adjacency].mean() - size) < 0.1


@pytest.mark.parametrize("settings", [{}, {"interventions": 0}, {"split": "random"}, {"redundancy": "reversal"}])
def test_it_learns_a_ranking_that_structure_decides(settings, cells):
    table, y = cells
    predictor = make(table, epochs=30, rate=1e-2, batch=15, members=2, **settings)
    predictor.fit(table.take(np.arange(45)), y[:45], rng=np.random.default_rng(0))
    mean, std = predictor.predict(table.take(np.arange(45, 60)), return_std=True)
    assert kendalltau(mean, y[45:])[0] > 0.5
    assert (std > 0).all()


def test_seeds_together_equal_one_after_another(cells):
    """With noise in the split and dropout before the head, so that every generator is in play."""
    table, y = cells
    orders = [np.random.default_rng(seed).permutation(60)[:30] for seed in range(4)]
    problems = [(table.take(order), y[order], None, None) for order in orders]
    rngs = [np.random.default_rng(seed) for seed in range(4)]
    together = make(table, epochs=3).fit_many(problems, rngs)
    for seed in (0, 3):
        graphs, labels, _, _ = problems[seed]
        alone = make(table, epochs=3).fit(graphs, labels, rng=np.random.default_rng(seed))
        np.testing.assert_allclose(together[seed].predict(table), alone.predict(table), atol=2e-3)
        for ours, theirs in zip(together[seed].importances(table), alone.importances(table), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert not np.allclose(together[0].predict(table), together[3].predict(table), atol=0.05)


def test_saved_weights_predict_and_explain_the_same(cells, tmp_path):
    table, y = cells
    extra = {"proxy": np.linspace(0, 1, len(table)) ** 2}
    predictor = make(table, members=2, interventions=2).fit(table, y, extra=extra, rng=np.random.default_rng(0))
    predictor.save(tmp_path)
    again = load_predictor(tmp_path)
    assert again.settings == predictor.settings
    assert type(again) is CausalPredictor
    np.testing.assert_allclose(again.predict(table, extra=extra), predictor.predict(table, extra=extra), atol=1e-6)
    for ours, theirs in zip(again.importances(table), predictor.importances(table), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_padding_does_not_change_importances(cells):
    table, y = cells
    predictor = make(table).fit(table, y, rng=np.random.default_rng(0))
    n = table.nodes
    nodes, edges = predictor.importances(table.padded(10))
    assert (nodes[:, n:] == 0).all()
    assert (edges[:, n:] == 0).all()
    assert (edges[:, :, n:] == 0).all()
    for ours, theirs in zip((nodes[:, :n], edges[:, :n, :n]), predictor.importances(table), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "learnt"}, "'learned'"),
        ({"redundancy": "means"}, "'mean'"),
        ({"interventions": -1}, "0 interventions"),
        ({"size": 1.0}, "between 0 and 1"),
        ({"size_weight": -0.1}, "size_weight"),
        ({"intervention": 3}, "'interventions'"),
        ({"encoder": "gcm"}, "'gcn'"),
    ],
)
def test_bad_settings_are_named(settings, message, cells):
    with pytest.raises(UserError, match=message):
        make_predictor("carl", "nas-bench-101", cells[0].vocabulary, **settings)


def test_importances_of_nothing_fitted(cells):
    with pytest.raises(UserError, match="fitted"):
        make(cells[0]).importances(cells[0])
