"""SemiNAS: LSTM against torch.nn, reconstruction against loops, the pool and its labels; learning, stacks, saving."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from torch import nn

from predictors.graphs import as_table, concatenate
from predictors.neural.batch import graph_batch
from predictors.neural.layers import initialize
from predictors.neural.semi_supervised import EncoderDecoder, Recurrent, SemiSupervised, reconstruction_loss
from predictors.registry import load_predictor, make_predictor
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space


def sampled(name, count, seed=0):
    space, rng = load_space(name), np.random.default_rng(seed)
    graphs = list(dict.fromkeys(space.graph(space.sample(rng)) for _ in range(2 * count)))[:count]
    return as_table(graphs, space.vocabulary)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def cells():
    """100 graphs of NAS-Bench-101 and a quality that their structure decides."""
    table = sampled("nas-bench-101", 100)
    conv = table.vocabulary.index("conv3x3-bn-relu")
    noise = 0.01 * np.random.default_rng(1).normal(size=100)
    return table, (table.ops == conv).sum(1) + 0.3 * table.adjacency.sum((1, 2)) + noise


def make(table, **settings):
    quick = {"pretrain_steps": 4, "epochs": 2, "synthetic": 40, "batch": 20, "width": 12, "device": "cpu"}
    return make_predictor("semi-nas", "nas-bench-101", table.vocabulary, **(quick | settings))


@pytest.mark.parametrize("backward", [False, True])
def test_recurrent_equals_torch(backward):
    """Every sequence alone at its own length through nn.LSTM; gates stand there as in, forget, new, out."""
    width, lengths = 5, (4, 2, 3)
    model = Recurrent(2, width, backward=backward)
    initialize(model, generators(0, 1))
    x, start = torch.randn(2, 3, 4, width), torch.randn(2, 3, width)
    mask = (torch.arange(4) < torch.tensor(lengths)[:, None]).float().expand(2, 3, 4)
    states = model(x, mask, None if backward else start)
    order = [*range(width), *range(width, 2 * width), *range(3 * width, 4 * width), *range(2 * width, 3 * width)]
    for k in range(2):
        own = nn.LSTM(width, width, batch_first=True)
        own.weight_ih_l0.data = model.given.weight[k].T[order]
        own.bias_ih_l0.data, own.bias_hh_l0.data = model.given.bias[k, 0][order], torch.zeros(4 * width)
        own.weight_hh_l0.data = model.kept.weight[k].T[order]
        for b, length in enumerate(lengths):
            row = x[k, b : b + 1, :length]
            if backward:
                expected = own(row.flip(1))[0].flip(1)
            else:
                expected = own(row, (start[k, b].view(1, 1, -1), start[k, b].view(1, 1, -1)))[0]
            torch.testing.assert_close(states[k, b, :length], expected[0])


@pytest.mark.parametrize("space", ["nas-bench-101", "darts"])
def test_padding_changes_neither_scores_nor_reconstruction(space):
    table = sampled(space, 12)
    parts = tuple(sorted(table.part_names))
    model = EncoderDecoder(2, len(table.vocabulary), 0, width=8, inner=4, dropout=0.3, parts=len(parts)).eval()
    initialize(model, generators(0, 1))

    def found(some):
        batch = graph_batch(some, parts).stacked(2)
        nodes, graph = model.encode(batch)
        return model(batch), reconstruction_loss(*model.reconstruct(batch, nodes, graph), batch)

    for ours, padded in zip(found(table), found(table.padded(table.nodes + 3)), strict=True):
        torch.testing.assert_close(ours, padded, rtol=1e-4, atol=1e-5)
    each = [found(table.take(np.array([row])))[0] for row in range(12)]
    torch.testing.assert_close(torch.cat(each, 1), found(table)[0], rtol=1e-4, atol=1e-5)


def test_reconstruction_loss_is_the_mean_over_operations_and_pairs():
    table = sampled("nas-bench-101", 6)
    batch = graph_batch(table, ("cell",)).stacked(2)
    n, kinds = table.nodes, len(table.vocabulary)
    operations, edges = torch.randn(2, 6, n - 1, kinds), torch.randn(2, 6, n - 1, n)
    found = reconstruction_loss(operations, edges, batch)
    for k in range(2):
        terms = []
        for g, graph in enumerate(table):
            for j in range(1, len(graph)):
                logits = operations[k, g, j - 1].double()
                terms.append((logits.exp().sum().log() - logits[table.vocabulary.index(graph.ops[j])]).item())
                for i in range(j):
                    there = 1 / (1 + math.exp(-edges[k, g, j - 1, i].item()))
                    terms.append(-math.log(there if graph.adjacency[i, j] else 1 - there))
        assert found[k].item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_the_decoder_sees_only_the_nodes_before():
    """With encoder states and embedding given, logits of node j do not change with the tokens from j on."""
    table = sampled("nas-bench-201", 4)
    model = EncoderDecoder(1, len(table.vocabulary), 0, width=8, inner=4, dropout=0.0).eval()
    initialize(model, generators(0))
    batch = graph_batch(table, ("cell",)).stacked(1)
    nodes, graph = model.encode(batch)
    operations, edges = model.reconstruct(batch, nodes, graph)
    ops = batch.ops.clone()
    ops[:, :, 4] = (ops[:, :, 4] + 1) % len(table.vocabulary)
    other = type(batch)(ops, *(getattr(batch, f) for f in ("adjacency", "mask", "parts", "positions", "columns")))
    changed = model.reconstruct(other, nodes, graph)
    for before, after in zip((operations, edges), changed, strict=True):
        torch.testing.assert_close(after[:, :, :4], before[:, :, :4])  # of nodes 1 to 4
        assert not torch.allclose(after[:, :, 4], before[:, :, 4])


def test_the_pool_holds_new_graphs_once(cells):
    table, y = cells
    predictor = make(table, synthetic=30)
    labelled = table.take(np.arange(40))
    predictor.fit(labelled, y[:40], unlabelled=table, rng=np.random.default_rng(0))
    twice = concatenate([table, table])
    pool = predictor._pool(twice, np.random.default_rng(0))
    graphs, known = set(pool), set(labelled)
    assert len(pool) == len(graphs) == 30
    assert not graphs & known
    everything = make(table, synthetic=1000).fit(labelled, y[:40], unlabelled=table, rng=np.random.default_rng(0))
    assert set(everything._pool(twice, np.random.default_rng(0))) == set(table) - known


def test_the_predictor_labels_the_pool_and_learns_it(cells, monkeypatch):
    """Second phase: labelled graphs repeated to the size of the pool, and the pool with the first phase's scores."""
    table, y = cells
    seen = []

    def descend(model, objective, graphs, rows, targets, *rest, **settings):
        seen.append((graphs, rows, targets, model.eval()(graphs.rows(rows)).detach()))

    monkeypatch.setattr("predictors.neural.semi_supervised.descend", descend)
    predictor = make(table, members=2, synthetic=50)
    predictor.fit(table.take(np.arange(20)), y[:20], unlabelled=table, rng=np.random.default_rng(0))
    (_, rows, targets, _), (_, all_rows, all_targets, scores) = seen
    assert rows.shape == (2, 20)
    assert all_rows.shape == all_targets.shape == (2, 60 + 50)
    torch.testing.assert_close(all_rows[:, :60], rows.repeat(1, 3))
    torch.testing.assert_close(all_targets[:, :60], targets.repeat(1, 3))
    torch.testing.assert_close(all_targets[:, 60:], scores[:, 60:])  # no training between: the same network
    assert sorted(all_rows[0, 60:].tolist()) == list(range(20, 70))


def test_it_learns_what_structure_decides(cells):
    table, y = cells
    predictor = make(table, pretrain_steps=80, epochs=6, width=32, members=2, batch=50)
    predictor.fit(table.take(np.arange(60)), y[:60], unlabelled=table, rng=np.random.default_rng(0))
    mean, std = predictor.predict(table.take(np.arange(60, 100)), return_std=True)
    assert kendalltau(mean, y[60:])[0] > 0.4
    assert (std > 0).all()


def test_seeds_together_equal_one_after_another(cells):
    table, y = cells
    orders = [np.random.default_rng(seed).permutation(100)[:n] for seed, n in enumerate((30, 20, 30))]
    problems = [(table.take(order), y[order], {"proxy": y[order] ** 2}, table) for order in orders]
    together = make(table).fit_many(problems, [np.random.default_rng(seed) for seed in range(3)])
    everywhere = {"proxy": y**2}
    for seed, (graphs, labels, extra, pool) in enumerate(problems):
        alone = make(table).fit(graphs, labels, extra=extra, unlabelled=pool, rng=np.random.default_rng(seed))
        expected = alone.predict(table, extra=everywhere)
        np.testing.assert_allclose(together[seed].predict(table, extra=everywhere), expected, atol=5e-3)


def test_saved_weights_predict_the_same(cells, tmp_path):
    table, y = cells
    predictor = make(table).fit(table.take(np.arange(30)), y[:30], unlabelled=table, rng=np.random.default_rng(0))
    predictor.save(tmp_path)
    again = load_predictor(tmp_path)
    assert isinstance(again, SemiSupervised)
    assert again.settings == predictor.settings
    np.testing.assert_allclose(again.predict(table), predictor.predict(table), atol=1e-5)


def test_progress_counts_both_phases(cells):
    table, y = cells
    seen = []
    predictor = make(table)
    predictor.progress = lambda done, total: seen.append((done, total))
    predictor.fit(table.take(np.arange(40)), y[:40], unlabelled=table, rng=np.random.default_rng(0))
    assert seen == [(k, 4) for k in range(1, 5)]  # 4 steps of two a pass are two epochs, then two more


def test_without_further_graphs_it_is_refused(cells):
    table, y = cells
    assert make(table).needs_unlabelled
    for pool, expected in ((None, "no unlabelled graphs"), (table.take(np.arange(9)), "all labelled")):
        with pytest.raises(UserError, match=expected):
            make(table).fit(table.take(np.arange(9)), y[:9], unlabelled=pool, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"trade_off": 0.0}, "trade_off"), ({"synthetic": 0}, "synthetic"), ({"batch": 1}, "batch")],
)
def test_bad_settings_are_named(cells, settings, expected):
    with pytest.raises(UserError, match=expected):
        make(cells[0], **settings)
