"""Synthetic curves: the shape they promise, on every space, in other processes."""

from __future__ import annotations

import itertools
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from nas.evaluators import Evaluator
from nas.synthetic import HIGHEST, LOWEST, SyntheticCurves, learning_curve
from search_spaces.cells.nas_bench_201 import NasBench201
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

SPACE = NasBench201()


@pytest.fixture(scope="module")
def archs():
    return [SPACE.sample(np.random.default_rng(i)) for i in range(200)]


def test_the_curve_is_a_power_law():
    assert learning_curve(90.0, 1, gap=40.0, exponent=0.5) == 50.0
    assert learning_curve(90.0, 16, gap=40.0, exponent=0.5) == 80.0
    epochs = np.array([1, 3, 10, 30, 100])
    shortfall = np.array([90.0 - learning_curve(90.0, int(e), gap=40.0, exponent=0.7) for e in epochs])
    slope, intercept = np.polyfit(np.log(epochs), np.log(shortfall), 1)
    assert (slope, np.exp(intercept)) == (pytest.approx(-0.7), pytest.approx(40.0))


def test_metrics(archs):
    evaluator = SyntheticCurves(noise=0.0)
    assert isinstance(evaluator, Evaluator)
    for arch in archs[:20]:
        values = [evaluator.evaluate(arch, e, seed=0) for e in (1, 10, 50, 200)]
        assert all(a["val_acc"] < b["val_acc"] < HIGHEST for a, b in itertools.pairwise(values))
        assert [v["cost_seconds"] for v in values] == [10.0, 100.0, 500.0, 2000.0]
        assert evaluator.evaluate(arch, seed=5) == values[-1]
        limit, exponent = evaluator.traits(arch)
        assert values[1]["val_acc"] == pytest.approx(limit - 40 * 10**-exponent)


def test_noise_follows_the_seed_and_shrinks_with_the_root_of_the_epochs():
    arch, evaluator, still = (3,) * 6, SyntheticCurves(noise=2.0), SyntheticCurves(noise=0.0)
    assert evaluator.evaluate(arch, 4, seed=1) == evaluator.evaluate(arch, 4, seed=1)
    for epochs in (1, 16, 100):
        centre = still.evaluate(arch, epochs, seed=0)["val_acc"]
        errors = [evaluator.evaluate(arch, epochs, seed=s)["val_acc"] - centre for s in range(1000)]
        assert np.std(errors) * epochs**0.5 == pytest.approx(2.0, rel=0.1)
        assert abs(np.mean(errors)) < 4 * 2.0 / (epochs * 1000) ** 0.5


def test_landscapes(archs):
    """Values spread, curves cross, other weights give another benchmark, neighbours are alike."""
    evaluator = SyntheticCurves(noise=0.0)
    early, late, other = (
        np.array([e.evaluate(a, f, seed=0)["val_acc"] for a in archs])
        for e, f in ((evaluator, 4), (evaluator, 200), (SyntheticCurves(landscape=1, noise=0.0), 200))
    )
    assert late.max() - late.min() > 20
    pairs = list(itertools.combinations(range(len(archs)), 2))
    crossing = np.mean([(early[i] - early[j]) * (late[i] - late[j]) < 0 for i, j in pairs])
    assert 0.01 < crossing < 0.4
    assert abs(np.corrcoef(late, other)[0, 1]) < 0.9
    limits = {a: evaluator.traits(a)[0] for a in archs}
    rng = np.random.default_rng(0)
    beside = [abs(limits[a] - evaluator.traits(SPACE.mutate(a, rng))[0]) for a in archs]
    apart = [abs(limits[archs[i]] - limits[archs[j]]) for i, j in pairs]
    assert np.mean(beside) < 0.8 * np.mean(apart)


def test_only_the_live_graph_counts():
    evaluator = SyntheticCurves()
    assert evaluator.traits((0,) * 6)[0] == LOWEST
    assert evaluator.traits((3, 0, 0, 3, 0, 0)) == evaluator.traits((0, 0, 0, 3, 0, 0))  # edge 0 -> 1 leads nowhere


@pytest.mark.parametrize("name", ["nas-bench-201", "nats-size", "nas-bench-macro", "darts", "nas-bench-101"])
def test_every_space(name, rng):
    evaluator, space = SyntheticCurves(name), load_space(name)
    found = {evaluator.evaluate(space.sample(rng), seed=0)["val_acc"] for _ in range(10)}
    assert len(found) > 3
    assert all(0 <= value <= 100 for value in found)


def test_rungs():
    assert SyntheticCurves(epochs=81).fidelities() == [3, 9, 27, 81]
    assert SyntheticCurves(epochs=2).fidelities() == [1, 2]


def test_workers_agree(archs):
    evaluator = SyntheticCurves(landscape=3)
    assert pickle.loads(pickle.dumps(evaluator)) == evaluator
    here = [evaluator.evaluate(arch, 12, seed=7) for arch in archs[:3]]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        there = [pool.submit(evaluator.evaluate, arch, 12, seed=7).result() for arch in archs[:3]]
    assert here == there


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"space": "nas-bench-202"}, "nas-bench-202"),
        ({"epochs": 0}, 0),
        ({"landscape": -1}, -1),
        ({"gap": 90}, 90),
        ({"noise": -0.1}, -0.1),
        ({"seconds_per_epoch": 0}, 0),
    ],
)
def test_settings_out_of_range(settings, value):
    with pytest.raises(UserError) as caught:
        SyntheticCurves(**settings)
    assert caught.value.value == value


@pytest.mark.parametrize("fidelity", [0, -1, 201])
def test_fidelities_out_of_range(fidelity):
    with pytest.raises(UserError, match="1 to 200"):
        SyntheticCurves().evaluate((3,) * 6, fidelity, seed=0)
