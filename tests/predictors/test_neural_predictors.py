"""Neural predictors: stacks equal separate trainings, learning, early stop, saving, bad input."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from predictors.graphs import as_table
from predictors.neural.cap import Gin, GraphTransformer, NnFormer, TwoDirection
from predictors.registry import load_predictor, make_predictor
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

SMALL = {"width": 16, "layers": 2, "epochs": 6}
SCRATCH = (Gin, TwoDirection, NnFormer, GraphTransformer)


@pytest.fixture(scope="module")
def cells():
    """60 graphs of NAS-Bench-101 and a quality that their structure decides."""
    rng = np.random.default_rng(1)
    space = load_space("nas-bench-101")
    graphs = list(dict.fromkeys(space.graph(space.sample(rng)) for _ in range(90)))[:60]
    table = as_table(graphs, space.vocabulary)
    conv = table.vocabulary.index("conv3x3-bn-relu")
    quality = (table.ops == conv).sum(1) + 0.3 * table.adjacency.sum((1, 2)) + 0.01 * rng.normal(size=len(table))
    return table, quality


def make(kind, table, **settings):
    return kind("nas-bench-101", table.vocabulary, kind.Settings(**(SMALL | settings)))


@pytest.mark.parametrize("kind", SCRATCH)
def test_ten_seeds_together_equal_one_after_another(kind, cells):
    """With dropout in blocks and head, so that generators, norms and batches are all in play."""
    table, y = cells
    rngs = lambda: [np.random.default_rng(seed) for seed in range(10)]  # noqa: E731
    orders = [np.random.default_rng(seed).permutation(60)[:30] for seed in range(10)]
    problems = [(table.take(order), y[order], None, None) for order in orders]
    empty = make(kind, table, dropout=0.1, epochs=3, device="cpu")
    together = empty.fit_many(problems, rngs())
    for predictor, (graphs, labels, _, _), rng in list(zip(together, problems, rngs(), strict=True))[::3]:
        alone = make(kind, table, dropout=0.1, epochs=3, device="cpu").fit(graphs, labels, rng=rng)
        np.testing.assert_allclose(predictor.predict(table), alone.predict(table), atol=2e-3)
    assert not np.allclose(together[0].predict(table), together[3].predict(table), atol=0.05)


def test_problems_of_different_sizes_train_in_stacks_of_their_own(cells):
    table, y = cells
    problems = [(table.take(np.arange(n)), y[:n], None, None) for n in (20, 30, 20)]
    fitted = make(TwoDirection, table).fit_many(problems, [np.random.default_rng(k) for k in range(3)])
    for k, (graphs, labels, _, _) in enumerate(problems):
        alone = make(TwoDirection, table).fit(graphs, labels, rng=np.random.default_rng(k))
        np.testing.assert_allclose(fitted[k].predict(table), alone.predict(table), atol=2e-3)


@pytest.mark.parametrize("kind", SCRATCH)
def test_it_learns_a_ranking_that_structure_decides(kind, cells):
    table, y = cells
    predictor = make(kind, table, epochs=30, rate=5e-3, members=2)
    predictor.fit(table.take(np.arange(45)), y[:45], rng=np.random.default_rng(0))
    mean, std = predictor.predict(table.take(np.arange(45, 60)), return_std=True)
    assert kendalltau(mean, y[45:])[0] > 0.5
    assert (std > 0).all()


def test_one_member_knows_no_deviation(cells):
    table, y = cells
    predictor = make(Gin, table).fit(table, y, rng=np.random.default_rng(0))
    assert np.isnan(predictor.predict(table, return_std=True)[1]).all()


def test_the_mean_of_members_is_predicted(cells):
    """Against single members with the same seeds, put on one scale by their scores of the labelled graphs."""
    table, y = cells
    ensemble = make(Gin, table, members=3).fit(table, y, rng=np.random.default_rng(4))
    raw = ensemble._member_predictions(table, np.zeros((len(table), 0)))
    scaled = (raw - raw.mean(1, keepdims=True)) / raw.std(1, keepdims=True)
    mean, std = ensemble.predict(table, return_std=True)
    np.testing.assert_allclose(mean, scaled.mean(0), atol=1e-5)
    np.testing.assert_allclose(std, scaled.std(0, ddof=1), atol=1e-5)


@pytest.mark.parametrize("kind", SCRATCH)
def test_saved_weights_predict_the_same(kind, cells, tmp_path):
    table, y = cells
    extra = {"proxy": np.linspace(0, 1, len(table)) ** 2}
    predictor = make(kind, table, members=2).fit(table, y, extra=extra, rng=np.random.default_rng(0))
    predictor.save(tmp_path)
    again = load_predictor(tmp_path)
    assert again.settings == predictor.settings
    expected = predictor.predict(table, extra=extra, return_std=True)
    np.testing.assert_allclose(again.predict(table, extra=extra, return_std=True), expected, atol=1e-6)
    again.save(tmp_path / "again")


def test_the_same_rng_gives_the_same_predictor(cells):
    table, y = cells
    first, same, other = (
        make(TwoDirection, table).fit(table, y, rng=np.random.default_rng(seed)).predict(table) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, same)
    assert not np.allclose(first, other)


def test_chunks_and_padding_do_not_change_predictions(cells, monkeypatch):
    from predictors.neural import predictor as module
    from predictors.neural import training

    table, y = cells
    predictor = make(GraphTransformer, table).fit(table, y, rng=np.random.default_rng(0))
    expected = predictor.predict(table)
    monkeypatch.setattr(module, "PREDICTED_AT_ONCE", 17)
    monkeypatch.setattr(training, "CHUNK", 5)
    np.testing.assert_allclose(predictor.predict(table.padded(10)), expected, atol=1e-4)
    np.testing.assert_allclose(predictor.predict([table[3]]), expected[3:4], atol=1e-4)


def test_extra_columns_reach_the_head(cells):
    table, _ = cells
    rng = np.random.default_rng(3)
    noise = rng.normal(size=len(table))  # nothing but the column tells it
    predictor = make(TwoDirection, table, epochs=30, rate=5e-3)
    predictor.fit(table.take(np.arange(45)), noise[:45], extra={"told": noise[:45]}, rng=rng)
    held = table.take(np.arange(45, 60))
    assert kendalltau(predictor.predict(held, extra={"told": noise[45:]}), noise[45:])[0] > 0.5


def test_both_cells_of_darts_are_told_apart():
    rng = np.random.default_rng(0)
    space = load_space("darts")
    archs = [space.sample(rng) for _ in range(40)]
    table = as_table([space.graph(a) for a in archs], space.vocabulary)
    assert len(table.part_names) > 1
    skip = table.vocabulary.index("skip_connect")
    normal = table.part_names.index("normal")
    y = ((table.ops == skip) & (table.parts == normal)).sum(1) - ((table.ops == skip) & (table.parts != normal)).sum(1)
    predictor = TwoDirection("darts", table.vocabulary, TwoDirection.Settings(**(SMALL | {"epochs": 30, "rate": 5e-3})))
    predictor.fit(table.take(np.arange(30)), y[:30] + 1e-3 * rng.normal(size=30), rng=rng)
    assert kendalltau(predictor.predict(table.take(np.arange(30, 40))), y[30:])[0] > 0.4


def test_early_stop_keeps_the_best_epoch_of_each_member(cells):
    """A member that stops early ends with what it has alone."""
    table, _ = cells
    settings = {"early_stop": 0.3, "patience": 2, "epochs": 40, "device": "cpu"}
    problems = [(table, np.random.default_rng(seed).normal(size=60), None, None) for seed in range(3)]
    together = make(Gin, table, **settings).fit_many(problems, [np.random.default_rng(s) for s in range(3)])
    epochs = []
    for seed, predictor in enumerate(together):
        alone = make(Gin, table, **settings)
        alone.progress = lambda done, total: epochs.append(done)
        alone.fit(table, problems[seed][1], rng=np.random.default_rng(seed))
        np.testing.assert_allclose(predictor.predict(table), alone.predict(table), atol=2e-2)  # trained in fp32
    assert max(epochs) < 40


def test_moving_average_of_the_weights(cells):
    """With a decay of almost one the weights hardly leave where they began."""
    table, y = cells
    start = make(TwoDirection, table, rate=1e-12).fit(table, y, rng=np.random.default_rng(0))
    still = make(TwoDirection, table, average=0.999999).fit(table, y, rng=np.random.default_rng(0))
    moved = make(TwoDirection, table).fit(table, y, rng=np.random.default_rng(0))
    weight = lambda p: p._model.head[0].weight  # noqa: E731
    assert (weight(still) - weight(start)).abs().max() < 1e-4 < (weight(moved) - weight(start)).abs().max()


def test_progress_is_told(cells):
    table, y = cells
    seen = []
    predictor = make(Gin, table)
    predictor.progress = lambda done, total: seen.append((done, total))
    predictor.fit(table, y, rng=np.random.default_rng(0))
    assert seen == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "two-directions"}, "two-direction"),
        ({"loss": "bprr"}, "'bpr'"),
        ({"mode": "partly"}, "partial"),
        ({"pretraining": "feature"}, "'features'"),
        ({"members": 0}, "at least 1"),
        ({"batch": 1}, "at least 2"),
        ({"dropout": 1.0}, "below 1"),
        ({"device": "tpu"}, "device"),
        ({"epoch": 3}, "'epochs'"),
    ],
)
def test_bad_settings_are_named(settings, message, cells):
    with pytest.raises(UserError, match=message):
        make_predictor("two-direction", "nas-bench-101", cells[0].vocabulary, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(cells):
    with pytest.raises(UserError, match="no GPU"):
        make(Gin, cells[0], device="cuda").fit(*cells, rng=np.random.default_rng(0))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SCRATCH)
def test_a_gpu_trains_the_same_networks(kind, cells):
    table, y = cells
    ours, theirs = (
        make(kind, table, device=device, epochs=3, head_dropout=0.0).fit(table, y, rng=np.random.default_rng(0))
        for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(ours.predict(table), theirs.predict(table), atol=0.05)
    assert dataclasses.asdict(ours.settings) != dataclasses.asdict(theirs.settings)
