"""RoBoT and warm starts on the shared tables, and on scores whose best weighting is known."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as parquet
import pytest

from nas.objectives import parse_objectives
from nas.strategies import make_strategy
from search_spaces.cells.nas_bench_201 import NasBench201
from search_spaces.common.errors import UserError

SPACE = NasBench201()
OBJECTIVES = parse_objectives("val_acc")
SIX = "grad-norm,snip,grasp,fisher,synflow,jacov"  # the proxies of the paper


def counts(archs):
    """How often each operation occurs, [N, 5]."""
    return np.stack([(np.array(archs) == operation).sum(1) for operation in range(5)], 1).astype(float)


def run(name, measure, queries, seed=0, **settings):
    strategy = make_strategy(name, SPACE, OBJECTIVES, np.random.default_rng(seed), **settings)
    for _ in range(queries):
        trial = strategy.ask()
        strategy.tell(trial.id, {"val_acc": float(measure(trial.arch))})
    return strategy


def best(strategy):
    return max(strategy.trials, key=lambda trial: strategy.score(trial.id)).arch


@pytest.mark.parametrize("seed", range(3))
def test_robot_finds_the_weighting_behind_the_measurements(seed):
    """Worth is a weighted count; equal weights choose badly, since all counts add up to six."""
    weights = np.array([-1.0, -0.5, 0.3, 1.0, 0.2])
    strategy = run("robot", lambda arch: counts([arch])[0] @ weights, 20, seed, scores=counts)
    assert best(strategy) == (3,) * 6
    assert len({SPACE.key(t.arch) for t in strategy.trials}) == 20


def test_robot_follows_the_ranking_after_the_search_over_weights():
    """One proxy: after the first weighting the order is that of the proxy."""

    def proxy(archs):
        return np.array([sum(a) + 0.01 * a[0] for a in archs], float)

    strategy = run("robot", lambda arch: proxy([arch])[0], 8, scores=proxy, explore=1)
    asked = [proxy([t.arch])[0] for t in strategy.trials]
    assert asked == sorted(asked, reverse=True)
    unseen = {SPACE.key(a): proxy([a])[0] for a in SPACE if SPACE.key(a) not in strategy._seen}
    pool = {SPACE.key(a): value for a, value in zip(strategy.pool, proxy(strategy.pool), strict=True)}
    assert asked[-1] >= max(pool[key] for key in unseen)


@pytest.mark.parametrize("seeds", [2, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("data_set", "bar"), [("cifar10", 94.2), ("imagenet16", 46.2)])
def test_robot_reaches_its_bar(shared_table, data_set, bar, seeds):
    """20 queries of the validation accuracy after 12 epochs; mean test accuracy over the seeds."""
    accuracy = parquet.read_table(shared_table("nas-bench-201/accuracy.parquet")).to_pydict()
    short = dict(zip(accuracy["arch"], accuracy[f"{data_set}_val_acc_12"], strict=True))
    final = dict(zip(accuracy["arch"], accuracy[f"{data_set}_test_acc_200"], strict=True))
    table = str(shared_table(f"nas-bench-201/zero_cost_{data_set}.parquet"))
    found = []
    for seed in range(seeds):
        strategy = run("robot", lambda arch: short[SPACE.encode(arch)], 20, seed, scores=SIX, table=table)
        found.append(final[SPACE.encode(best(strategy))])
    assert np.mean(found) >= bar


@pytest.mark.parametrize("inner", ["random-search", "regularized-evolution", "local-search", "nsga-ii"])
def test_a_warm_start_asks_for_the_best_of_the_pool_first(inner):
    def proxy(archs):
        return np.array([hash(a) % 1009 for a in archs], float)

    strategy = run("warm-start", sum, 12, scores=proxy, strategy=inner, count=4, pool=300, settings={})
    pool = make_strategy("robot", SPACE, OBJECTIVES, np.random.default_rng(0), scores=proxy, pool=300).pool
    highest = sorted((proxy([a])[0] for a in pool), reverse=True)[:4]
    assert (
        sorted((proxy([t.arch])[0] for t in strategy.trials[: 4 if inner != "local-search" else 1]), reverse=True)
        == highest[: 4 if inner != "local-search" else 1]
    )
    assert len(strategy.trials) == len(strategy.metrics) == 12


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("robot", {"explore": 0}, "explore"),
        ("robot", {"kappa": -1}, "kappa"),
        ("robot", {"scores": "nwto"}, "nwot"),
        ("robot", {"scores": lambda archs: np.zeros(3)}, "number of proxies"),
        ("warm-start", {"strategy": "grid"}, "random architectures"),
        ("warm-start", {"count": 0}, "count"),
    ],
)
def test_bad_settings_are_refused(name, settings, word):
    with pytest.raises(UserError, match=word):
        make_strategy(name, SPACE, OBJECTIVES, np.random.default_rng(0), **{"pool": 30, **settings})
