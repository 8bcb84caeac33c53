"""Predictors that start from another run or data set: what the source is worth, what is corrected, what is kept."""

from __future__ import annotations

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import scipy.stats

from benchmarks import add_table
from nas.loop import search
from nas.objectives import parse_objectives
from nas.prediction.evaluator import PredictorEvaluator
from nas.prediction.transfer import WarmStarted, load_saved, warm_start
from nas.strategies import make_strategy
from predictors.predictor import Predictor
from predictors.registry import make_predictor
from search_spaces.common.errors import UserError
from search_spaces.graph import OpGraph
from search_spaces.registry import load_space

SPACE = load_space("nas-bench-201")
WEIGHTS = np.random.default_rng(5).normal(size=(2, 6, 5))  # two functions of place and operation


def draw(count, seed):
    rng = np.random.default_rng(seed)
    found = {}
    while len(found) < count:
        arch = SPACE.sample(rng)
        found.setdefault(SPACE.key(arch), arch)
    return list(found.values())


def worth(archs, share=0.0):
    """`share` of the second function joins the first."""
    both = np.array([[sum(w[place, op] for place, op in enumerate(a)) for w in WEIGHTS] for a in archs])
    return both @ [1 - share, share]


def graphs(archs):
    return [SPACE.graph(arch) for arch in archs]


def plain():
    return make_predictor("linear", "nas-bench-201", SPACE.vocabulary)


ARCHS, POOL = draw(300, 0), draw(400, 1)


def tau(predictor, share):
    return scipy.stats.kendalltau(predictor.predict(graphs(POOL)), worth(POOL, share)).statistic


@pytest.fixture(scope="module")
def source():
    return plain().fit(graphs(ARCHS), worth(ARCHS), rng=np.random.default_rng(0))


def fitted(source, count, share, seed=0):
    labelled = draw(count, 10 + seed)
    found = WarmStarted(source, plain)
    return found.fit(graphs(labelled), worth(labelled, share), rng=np.random.default_rng(seed))


def test_a_few_labels_suffice_where_the_source_is_right(source):
    assert isinstance(WarmStarted(source, plain), Predictor)
    cold = [plain() for _ in range(3)]
    for seed, predictor in enumerate(cold):
        labelled = draw(12, 10 + seed)
        predictor.fit(graphs(labelled), worth(labelled), rng=np.random.default_rng(seed))
    warm = [fitted(source, 12, 0.0, seed) for seed in range(3)]
    assert min(tau(p, 0.0) for p in warm) > 0.9
    assert max(tau(p, 0.0) for p in cold) < 0.7


def test_what_the_source_does_not_know_is_corrected(source):
    """Half of the worth is a function that the source has never seen; enough labels bring it back."""
    assert tau(source, 0.5) < 0.65
    assert tau(fitted(source, 150, 0.5), 0.5) > 0.85


def test_a_source_that_is_wrong_is_turned_round_or_ignored(source):
    labelled = draw(100, 3)
    found = WarmStarted(source, plain).fit(graphs(labelled), -worth(labelled), rng=np.random.default_rng(0))
    assert found.slope < 0
    assert tau(found, 0.0) < -0.9
    assert tau(fitted(source, 150, 1.0), 1.0) > 0.85  # nothing in common


def test_the_slope_is_that_of_least_squares(source):
    labelled = draw(40, 4)
    labels = worth(labelled, 0.3)
    found = WarmStarted(source, plain).fit(graphs(labelled), labels, rng=np.random.default_rng(0))
    scores = scipy.stats.norm.ppf((scipy.stats.rankdata(labels) - 0.5) / 40)
    expected = scipy.stats.linregress(source.predict(graphs(labelled)), scores).slope
    assert found.slope == pytest.approx(expected)


def test_scale_and_unit_of_the_source_do_not_matter(source):
    other = plain().fit(graphs(ARCHS), 1000 * worth(ARCHS) - 7, rng=np.random.default_rng(0))
    first, second = (fitted(s, 30, 0.4).predict(graphs(POOL)) for s in (source, other))
    np.testing.assert_allclose(first, second, rtol=1e-6, atol=1e-9)


def test_saved_and_loaded_it_predicts_the_same(source, tmp_path):
    gp = lambda: make_predictor("gp-graf", "nas-bench-201", SPACE.vocabulary)  # noqa: E731
    labelled = draw(30, 6)
    found = WarmStarted(source, gp).fit(graphs(labelled), worth(labelled, 0.3), rng=np.random.default_rng(0))
    found.save(tmp_path / "saved")
    mean, deviation = found.predict(graphs(POOL), return_std=True)
    again = load_saved(tmp_path / "saved")
    for one, other in zip(again.predict(graphs(POOL), return_std=True), (mean, deviation), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)
    assert (deviation > 0).all()
    evaluator = PredictorEvaluator(str(tmp_path / "saved"))
    assert evaluator.evaluate(POOL[0], seed=0)["predicted_score"] == pytest.approx(mean[0])
    with pytest.raises(UserError, match="a source that was not warm-started itself.*saved/source"):
        warm_start(tmp_path / "saved", plain)


def test_sources_that_cannot_serve_are_refused(source, tmp_path):
    with pytest.raises(UserError, match="the folder of a search or of a predictor"):
        warm_start(tmp_path / "nothing", plain)
    columns = {"params": np.arange(len(ARCHS))}
    needy = plain().fit(graphs(ARCHS), worth(ARCHS), extra=columns, rng=np.random.default_rng(0))
    with pytest.raises(UserError, match="a source of graphs alone; this one needs the columns params"):
        WarmStarted(needy, plain)
    chain = OpGraph(("input", "conv", "output"), np.eye(3, k=1, dtype=bool))
    strange = make_predictor("linear", "other", ("input", "output", "conv", "pool"))
    wide = OpGraph(("input", "pool", "output"), np.eye(3, k=1, dtype=bool))
    longer = OpGraph(("input", "conv", "pool", "output"), np.eye(4, k=1, dtype=bool))
    strange.fit([chain, wide, longer], np.arange(3.0), rng=np.random.default_rng(0))
    with pytest.raises(UserError, match="'other': expected a source that knows the operations .*nor_conv_3x3"):
        WarmStarted(strange, plain)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Two data sets with 200 architectures in common: `warm/first`, and `warm/second`, which is 30 % another thing."""
    archs, rng = draw(200, 8), np.random.default_rng(9)
    for name, share in (("first", 0.0), ("second", 0.3)):
        file = tmp_path_factory.mktemp("warm") / f"{name}.parquet"
        values = 50 + 5 * worth(archs, share) + 0.1 * rng.normal(size=200)
        pyarrow.parquet.write_table(
            pyarrow.table({"arch": [SPACE.encode(a) for a in archs], "val_acc_9": values}), file
        )
        add_table(f"warm/{name}", "nas-bench-201", file)


def searched(folder):
    """A search of 60 random architectures, measured by the first function."""
    search(
        SPACE,
        lambda arch, fidelity, seed: {"val_acc": float(worth([arch])[0])},
        "random-search",
        budget=60,
        objectives="val_acc",
        out=folder,
        describe={"space": "nas-bench-201", "evaluator": "a.function:here"},
    )


def as_json(result):
    status, out, err = result
    assert status == 0, err
    return json.loads(out)


def test_train_starts_from_a_predictor_or_a_search(nas, tables, tmp_path):
    train = ("predict", "train", "--predictor", "linear", "--json")
    as_json(nas(*train, "--benchmark", "warm/first", "--train-size", "150", "--out", "first"))
    searched(tmp_path / "run")
    second = (*train, "--benchmark", "warm/second", "--train-size", "15")
    cold = as_json(nas(*second, "--out", "cold"))
    warm = as_json(nas(*second, "--out", "warm", "--warm-from", "first"))
    from_run = as_json(nas(*second, "--out", "other", "--warm-from", "run"))
    assert warm["predictor"] == "linear, warm from linear"
    assert warm["held_out_kendall_tau"] > cold["held_out_kendall_tau"] + 0.1
    assert from_run["held_out_kendall_tau"] > cold["held_out_kendall_tau"]
    ranked = as_json(nas("predict", "rank", "warm", "--top", "5", "--json"))
    scores = load_saved(tmp_path / "warm").predict([SPACE.graph(SPACE.decode(r["arch"])) for r in ranked["ranking"]])
    np.testing.assert_allclose([r["score"] for r in ranked["ranking"]], scores)
    status, _, err = nas(*second[:-1], "2", "--out", "none", "--warm-from", "first")
    assert status == 2
    assert "a training size from 3" in err


def test_a_search_starts_from_another(tmp_path):
    searched(tmp_path / "run")

    def guided(**settings):
        """What is asked for after five random architectures."""
        strategy = make_strategy(
            "predictor", SPACE, parse_objectives("val_acc"), np.random.default_rng(0),
            predictor="linear", initial=5, batch=5, acquisition="mean", **settings,
        )  # fmt: skip
        for _ in range(10):
            trial = strategy.ask()
            strategy.tell(trial.id, {"val_acc": float(worth([trial.arch])[0])})
        return worth([trial.arch for trial in strategy.trials[5:]])

    warm, cold = guided(warm_from=str(tmp_path / "run")), guided()
    assert np.median(warm) > np.quantile(worth(ARCHS), 0.95)
    assert np.median(warm) > np.median(cold)
    with pytest.raises(UserError, match="the folder of a search or of a predictor"):
        guided(warm_from="nowhere")
