"""Pre-training: the tasks against networkx and by what they must learn, files, cache, fine-tuning modes."""

import json

import networkx
import numpy as np
import pytest
import torch

from predictors.graphs import as_table
from predictors.neural import pretraining
from predictors.neural.batch import graph_batch
from predictors.neural.cap import Cap, FeatureDistilled, Gmae
from predictors.neural.tasks import neighbourhoods
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

SMALL = {"width": 16, "layers": 2, "epochs": 4, "pretrain_steps": 3, "pretrain_batch": 32}


@pytest.fixture(scope="module")
def pool():
    rng = np.random.default_rng(2)
    space = load_space("nas-bench-101")
    return as_table([space.graph(space.sample(rng)) for _ in range(200)], space.vocabulary)


@pytest.fixture(autouse=True)
def _fresh_home(tmp_path, monkeypatch):
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path / "home"))


def make(kind, table, **settings):
    return kind("nas-bench-101", table.vocabulary, kind.Settings(**(SMALL | settings)))


def fit(kind, pool, **settings):
    labelled = pool.take(np.arange(20))
    y = np.random.default_rng(0).normal(size=20)
    return make(kind, pool, **settings).fit(labelled, y, unlabelled=pool, rng=np.random.default_rng(0))


@pytest.mark.parametrize(("inner", "outer"), [(1, 2), (1, 3), (2, 3)])
def test_neighbourhoods_are_balls_of_networkx(pool, inner, outer):
    batch = graph_batch(pool, pool.part_names).stacked(1)
    found = neighbourhoods(batch, inner, outer, torch.Generator().manual_seed(0))
    central, context, anchors = ({(r, v) for r, v in np.argwhere(part.numpy() > 0).tolist()} for part in found[:3])
    for row, graph in enumerate(pool):
        centre = int(found[3][row])
        assert centre < len(graph)
        hops = networkx.single_source_shortest_path_length(graph.to_networkx().to_undirected(), centre)
        for node in range(pool.nodes):
            distance = hops.get(node, 99)
            assert ((row, node) in central) == (distance <= inner)
            assert ((row, node) in context) == (1 <= distance <= outer)
            assert ((row, node) in anchors) == (1 <= distance <= inner)
    counts = np.bincount(found[3], minlength=pool.nodes)
    assert (counts > 0).all()  # every node can be the centre


def wanted(pool, **more):
    base = {
        "space": "nas-bench-101",
        "vocabulary": list(pool.vocabulary),
        "encoder": "two-direction",
        "width": 32,
        "layers": 2,
        "score": "scaled",
        "budget": 150,
        "batch": 64,
        "seed": 0,
    }
    return base | more


def test_the_context_task_is_learned_and_starts_at_chance(pool):
    """Pair accuracy .5 without training; well above on graphs small enough to be known by heart."""
    cpu = torch.device("cpu")
    start = pretraining.pretrain(pool, wanted(pool, task="context", budget=1, batch=200), cpu)
    learned = pretraining.pretrain(pool, wanted(pool, task="context"), cpu)
    assert 0.4 < start.figure < 0.6
    assert learned.figure > 0.65
    assert learned.about["figure_name"] == "pair accuracy"


def test_released_score_is_unscaled_with_dropout_a_half(pool):
    from predictors.neural.layers import Dropout
    from predictors.neural.tasks import Context

    generator = torch.Generator()
    released, scaled = (
        Context(pool, pool.part_names, wanted(pool, task="context", score=score), generator)
        for score in ("released", "scaled")
    )
    assert (released.factor, scaled.factor) == (1.0, 32**-0.5)
    for task, p in ((released, 0.5), (scaled, 0.1)):
        assert {m.p for m in task.modules() if isinstance(m, Dropout)} == {p}
        assert (len(task.encoder.layers), len(task.auxiliary.layers)) == (2, 2)
        assert task.radii == (1, 2)


def test_masked_operations_stay_at_chance_where_every_assignment_occurs(pool):
    """Operations drawn at random carry no signal (three of them: a third)."""
    rng = np.random.default_rng(0)
    inner = pool.mask & (pool.ops > 1)
    ops = np.where(inner, rng.integers(2, 5, pool.ops.shape), pool.ops).astype(np.int8)
    random = type(pool)(pool.vocabulary, ops, pool.adjacency, pool.mask, pool.parts, pool.part_names)
    found = pretraining.pretrain(random, wanted(pool, task="masked", budget=60), torch.device("cpu"))
    assert 0.25 < found.figure < 0.45


def test_masked_operations_are_learned_where_neighbours_tell_them(pool):
    """All inner nodes of a graph share one operation: one visible node tells the rest."""
    ops = np.where(pool.mask & (pool.ops > 1), 2 + np.arange(len(pool))[:, None] % 3, pool.ops).astype(np.int8)
    told = type(pool)(pool.vocabulary, ops, pool.adjacency, pool.mask, pool.parts, pool.part_names)
    found = pretraining.pretrain(told, wanted(pool, task="masked", space="other", budget=100), torch.device("cpu"))
    assert found.figure > 0.7


def test_features_are_learned(pool):
    found = pretraining.pretrain(pool, wanted(pool, task="features", budget=120), torch.device("cpu"))
    assert found.figure > 0.5


def test_training_stops_on_a_plateau():
    falling = [1 / (k + 1) for k in range(20)]
    assert not pretraining._plateau(falling)
    assert pretraining._plateau(falling + [0.05] * 7)
    assert not pretraining._plateau([1.0] * 4)


@pytest.mark.parametrize("kind", [Cap, Gmae, FeatureDistilled])
def test_pretrained_weights_are_cached_by_what_made_them(kind, pool, tmp_path):
    first = fit(kind, pool)
    files = lambda: sorted((tmp_path / "home" / "pretrained").glob("*.safetensors"))  # noqa: E731
    assert len(files()) == 1
    made = files()[0].stat().st_mtime_ns
    again = fit(kind, pool, epochs=3)
    assert [f.stat().st_mtime_ns for f in files()] == [made]
    for name, value in first.pretrained.weights.items():
        assert torch.equal(value, again.pretrained.weights[name])
    fit(kind, pool, pretrain_seed=1)
    assert len(files()) == 2
    assert first.pretrained.steps == 3


@pytest.mark.parametrize(("mode", "kept"), [("frozen", "all"), ("partial", "first"), ("full", "none")])
def test_modes_keep_what_they_say(mode, kept, pool):
    for kind in (Cap, FeatureDistilled):
        predictor = fit(kind, pool, mode=mode, members=2)
        first = ("embedding.", "layers.0.")
        for name, value in predictor._model.encoder.state_dict().items():
            same = torch.equal(value, predictor.pretrained.weights[name].expand_as(value))
            assert same == (kept == "all" or (kept == "first" and name.startswith(first))), name


def test_scratch_needs_no_pool_and_differs_from_full(pool):
    labelled, y = pool.take(np.arange(20)), np.random.default_rng(0).normal(size=20)
    scratch = make(Cap, pool, mode="scratch").fit(labelled, y, rng=np.random.default_rng(0))
    assert scratch.pretrained is None
    assert not np.allclose(scratch.predict(pool), fit(Cap, pool).predict(pool))


def test_fits_after_one_pre_training_run_in_one_stack(pool):
    orders = [np.random.default_rng(seed).permutation(200)[:20] for seed in range(3)]
    problems = [(pool.take(o), np.random.default_rng(1).normal(size=20), None, pool) for o in orders]
    together = make(FeatureDistilled, pool).fit_many(problems, [np.random.default_rng(k) for k in range(3)])
    for k, (graphs, y, _, _) in enumerate(problems):
        alone = make(FeatureDistilled, pool).fit(graphs, y, unlabelled=pool, rng=np.random.default_rng(k))
        np.testing.assert_allclose(together[k].predict(pool), alone.predict(pool), atol=2e-3)


def test_weights_travel_as_a_file(pool, tmp_path):
    first = fit(FeatureDistilled, pool)
    path = tmp_path / "weights.safetensors"
    first.pretrained.save(path)
    labelled, y = pool.take(np.arange(20)), np.random.default_rng(0).normal(size=20)
    other = make(FeatureDistilled, pool, pretrained=str(path)).fit(labelled, y, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(other.predict(pool), first.predict(pool))
    other.save(tmp_path / "saved")
    path.unlink()  # a saved predictor needs it no more
    loaded = FeatureDistilled.load(tmp_path / "saved")
    np.testing.assert_allclose(loaded.predict(pool), first.predict(pool), atol=1e-6)


def test_bad_input_is_named(pool, tmp_path, monkeypatch):
    labelled, y = pool.take(np.arange(20)), np.arange(20.0)

    def refused(match, **settings):
        with pytest.raises(UserError, match=match):
            make(Cap, pool, **settings).fit(labelled, y, rng=np.random.default_rng(0))

    refused("unlabelled=.*scratch")
    refused("a file of pre-trained weights", pretrained=str(tmp_path / "none.safetensors"))
    (tmp_path / "broken.safetensors").write_text("{}")
    refused("as nasforge writes them", pretrained=str(tmp_path / "broken.safetensors"))
    path = tmp_path / "w.safetensors"
    fit(FeatureDistilled, pool).pretrained.save(path)
    refused("pre-trained for encoder gin", pretrained=str(path))
    refused("pre-trained for width 32", pretrained=str(path), encoder="two-direction", width=32)
    monkeypatch.setattr(pretraining, "FORMAT", 0)
    refused("newer nasforge", pretrained=str(path), encoder="two-direction")


def test_the_file_says_how_it_came_about(pool, tmp_path):
    from safetensors import safe_open

    fit(Cap, pool).pretrained.save(tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        about = json.loads(file.metadata()["nasforge"])
    assert (about["task"], about["steps"], about["space"], about["format"]) == ("context", 3, "nas-bench-101", 1)
