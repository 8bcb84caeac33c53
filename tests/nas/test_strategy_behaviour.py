"""Each strategy does what its paper says, checked step by step against brute force, formulas and pymoo."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from nas.objectives import parse_objectives
from nas.strategies import make_strategy
from nas.strategies.nsga2 import constrained_sort, crowding_distance, non_dominated_sort
from nas.synthetic import SyntheticCurves
from search_spaces.cells.nas_bench_201 import NasBench201

SPACE = NasBench201()
VAL_ACC = parse_objectives("val_acc")


@pytest.fixture(scope="module")
def rugged():
    """A random value for every class: many local optima."""
    keys = sorted({SPACE.key(arch) for arch in SPACE})
    return dict(zip(keys, np.random.default_rng(7).random(len(keys)).tolist(), strict=True))


def run(strategy, value, trials):
    """Ask and tell one by one; `value(trial)` is val_acc or a dict, None a failure."""
    for _ in range(trials):
        trial = strategy.ask()
        found = value(trial)
        strategy.tell(trial.id, {"val_acc": found} if isinstance(found, float) else found)
    return strategy.trials


def make(name, seed=0, objectives=VAL_ACC, **settings):
    return make_strategy(name, SPACE, objectives, np.random.default_rng(seed), **settings)


def differences(a, b):
    return sum(x != y for x, y in zip(a, b, strict=True))


# Random search and grid


def test_random_search_samples_uniformly():
    """Chi-squared over the operations of every edge; duplicates cannot matter among the first trials."""
    counts = np.zeros((6, 5))
    for seed in range(1000):
        for edge, operation in enumerate(make("random-search", seed).ask().arch):
            counts[edge, operation] += 1
    statistic = ((counts - 200) ** 2 / 200).sum()
    assert statistic < 51.2  # the 99.9 % point of chi-squared with 24 degrees of freedom


def test_grid_orders():
    first_members = list({SPACE.key(a): a for a in reversed(list(SPACE))}.values())[::-1]
    strategy = make("grid")
    assert [strategy.ask().arch for _ in range(500)] == sorted(first_members)[:500]
    orders = [
        [make_and_ask.ask().arch for _ in range(50)] for make_and_ask in (make("grid", s, shuffle=True) for s in (0, 1))
    ]
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


# Regularised evolution


def test_children_are_mutants_of_the_living(rugged):
    trials = run(make("regularized-evolution"), lambda t: rugged[SPACE.key(t.arch)], 200)
    assert all(t.parent is None for t in trials[:10])
    for trial in trials[10:]:
        assert trial.id - 10 <= trial.parent < trial.id  # the oldest have died
        assert differences(trial.arch, trials[trial.parent].arch) == 1


def test_tournament_pressure():
    """Rank r of n wins a tournament of k draws with replacement with probability ((n-r+1)^k - (n-r)^k) / n^k."""
    strategy = make("regularized-evolution", population=10, tournament=3)
    run(strategy, lambda t: float(t.id), 10)
    wins = Counter(strategy._tournament() for _ in range(20_000))
    for rank in range(1, 11):
        expected = ((11 - rank) ** 3 - (10 - rank) ** 3) / 1000
        spread = (expected * (1 - expected) / 20_000) ** 0.5
        assert abs(wins[10 - rank] / 20_000 - expected) < 4 * spread


def test_evolution_without_a_living_parent_draws_at_random():
    trials = run(make("regularized-evolution"), lambda t: None if t.id < 30 else 1.0, 60)
    assert all(t.parent is None for t in trials[:31])
    assert all(t.parent >= 30 for t in trials[31:])


# Local search


def neighbors_by_key(arch):
    return {SPACE.key(n) for n in SPACE.neighbors(arch)} - {SPACE.key(arch)}


def test_first_improvement_climbs_step_by_step(rugged):
    strategy = make("local-search")
    restarts, moves, climb = 0, 0, None
    for _ in range(1200):
        before = climb.centre if climb else -1
        trial = strategy.ask()
        value = {t.id: rugged[SPACE.key(t.arch)] for t in strategy.trials}
        if trial.parent is None and climb is not None:
            restarts += 1
            known = {SPACE.key(t.arch) for t in strategy.trials[:-1]}
            around = neighbors_by_key(strategy.trials[climb.centre].arch)
            assert around <= known  # nothing was left to ask around the end of the climb,
            assert max(rugged[key] for key in around) <= value[climb.centre]  # and nothing was better there
        elif climb is not None:
            assert trial.parent == climb.centre
            assert differences(trial.arch, strategy.trials[climb.centre].arch) == 1
            assert before < 0 or value[climb.centre] >= value[before]
        centre = strategy.climbs[0].centre
        strategy.tell(trial.id, {"val_acc": value[trial.id]})
        if trial.parent is not None:  # an improvement is taken at once, anything else changes nothing
            better = value[trial.id] > value[centre]
            moves += better
            assert strategy.climbs[0].centre == (trial.id if better else centre)
        climb = strategy.climbs[0]
        assert len(strategy.climbs) == 1
    assert restarts > 10
    assert moves > restarts


def test_full_query_is_steepest_ascent(rugged):
    """The first climb from every start visits exactly the centres that brute force visits."""
    for seed in range(20):
        strategy = make("local-search", seed, query="full")
        trials = run(strategy, lambda t: rugged[SPACE.key(t.arch)], 300)
        path, arch = [SPACE.key(trials[0].arch)], trials[0].arch
        while True:
            best = max(neighbors_by_key(arch), key=rugged.__getitem__)
            if rugged[best] <= rugged[path[-1]]:
                break
            path.append(best)
            arch = next(t.arch for t in trials if SPACE.key(t.arch) == best)  # the member that was asked
        restart = next(t.id for t in trials[1:] if t.parent is None)
        centres = dict.fromkeys(SPACE.key(trials[t.parent].arch) for t in trials[1:restart])
        assert set(centres) <= set(path)
        assert max(rugged[SPACE.key(t.arch)] for t in trials[:restart]) == rugged[path[-1]]


def test_plateaus_end_a_climb():
    trials = run(make("local-search"), lambda t: 1.0, 100)
    for trial in trials:
        assert trial.parent is None or trials[trial.parent].parent is None


def test_workers_share_a_climb(rugged):
    """Six trials in flight, told in random order: few starts, never more climbs than workers, a good end."""
    strategy = make("local-search")
    order, in_flight = np.random.default_rng(5), []
    for _ in range(600):
        in_flight.append(strategy.ask())
        if len(in_flight) == 6:
            trial = in_flight.pop(int(order.integers(6)))
            strategy.tell(trial.id, {"val_acc": rugged[SPACE.key(trial.arch)]})
        assert len(strategy.climbs) <= 6
    starts = [t for t in strategy.trials if t.parent is None]
    assert len(starts) < 100
    best = max(rugged[SPACE.key(t.arch)] for t in strategy.trials)
    assert best > np.quantile(list(rugged.values()), 0.99)


# Successive halving and Hyperband


def rungs(trials):
    """The sizes of consecutive blocks of equal fidelity."""
    blocks = []
    for trial in trials:
        if not blocks or blocks[-1][0] != trial.fidelity:
            blocks.append([trial.fidelity, 0])
        blocks[-1][1] += 1
    return [tuple(block) for block in blocks]


def test_halving_promotes_the_best_third(rugged):
    value = {0: {}, 1: {}, 2: {}, 3: {}}

    def measured(trial):
        level = (1, 3, 9, 27).index(trial.fidelity)
        value[level][trial.id] = float(np.random.default_rng(trial.id).random()) - level  # later rungs look worse
        return value[level][trial.id]

    trials = run(make("successive-halving", fidelities=(1, 3, 9, 27), configurations=27), measured, 40)
    assert rungs(trials) == [(1, 27), (3, 9), (9, 3), (27, 1)]
    for level, kept in enumerate((9, 3, 1)):
        promoted = {t.parent for t in trials if t.fidelity == (1, 3, 9, 27)[level + 1]}
        assert promoted == set(sorted(value[level], key=value[level].get)[-kept:])
    assert all(t.parent is None or trials[t.parent].arch == t.arch for t in trials)


def test_halving_keeps_one_and_no_failures():
    trials = run(make("successive-halving", fidelities=(1, 2, 4), configurations=2), lambda t: 1.0, 4)
    assert [t.fidelity for t in trials] == [1, 1, 2, 4]
    trials = run(make("successive-halving", configurations=9), lambda t: None if t.id != 4 else 1.0, 11)
    assert rungs(trials) == [(12, 9), (200, 1), (12, 1)]
    assert trials[9].parent == 4


def test_hyperband_brackets():
    """Algorithm 1 with R = 81 and eta = 3: n = ceil(5 * 3^s / (s + 1)) = 81, 34, 15, 8, 5, thirds thereof above."""
    brackets = [
        [(1, 81), (3, 27), (9, 9), (27, 3), (81, 1)],
        [(3, 34), (9, 11), (27, 3), (81, 1)],
        [(9, 15), (27, 5), (81, 1)],
        [(27, 8), (81, 2)],
        [(81, 5)],
    ]
    expected = [rung for bracket in brackets for rung in bracket]
    expected[-2:] = [(81, 7)]  # the last two rungs are of one fidelity
    total = sum(count for _, count in expected)
    trials = run(make("hyperband", fidelities=(1, 3, 9, 27, 81)), lambda t: float(t.id), total + 81)
    assert rungs(trials[:total]) == expected
    assert rungs(trials[total:]) == [(1, 81)]  # and again from the beginning


def test_waiting_workers_open_the_next_bracket():
    strategy = make("successive-halving", configurations=6)
    trials = [strategy.ask() for _ in range(8)]
    assert [t.fidelity for t in trials] == [12] * 8
    assert len(strategy.brackets) == 2
    for trial in trials[:6]:
        strategy.tell(trial.id, {"val_acc": float(trial.id)})
    assert {strategy.ask().parent for _ in range(2)} == {4, 5}  # the older bracket goes first
    assert strategy.ask().fidelity == 12


def test_halving_saves_training():
    """On synthetic curves: a better architecture than random search at the same number of epochs, paired by seed."""
    evaluator = SyntheticCurves(landscape=1)

    def best_limit(name, seed, **settings):
        strategy, epochs, best = make(name, seed, **settings), 0, 0.0
        while epochs < 20 * evaluator.epochs:
            trial = strategy.ask()
            metrics = evaluator.evaluate(trial.arch, trial.fidelity, seed=trial.id)
            strategy.tell(trial.id, metrics)
            epochs += trial.fidelity or evaluator.epochs
            if trial.fidelity in (None, evaluator.epochs):
                best = max(best, metrics["val_acc"])
        return best

    for name in ("successive-halving", "hyperband"):
        gains = [best_limit(name, s, fidelities=(7, 22, 67, 200)) - best_limit("random-search", s) for s in range(20)]
        assert np.mean(gains) > 2 * np.std(gains, ddof=1) / 20**0.5


# NSGA-II


def sort_by_brute_force(points):
    """Peel off what nothing else dominates."""
    left, fronts = set(range(len(points))), []
    while left:
        front = {
            i for i in left if not any((points[j] <= points[i]).all() and (points[j] < points[i]).any() for j in left)
        }
        fronts.append(front)
        left -= front
    return fronts


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_sorting_against_brute_force_and_pymoo(importable, rng, objectives):
    sorting = importable("pymoo.util.nds.non_dominated_sorting").NonDominatedSorting()
    for count in (1, 7, 60):
        points = rng.integers(0, 8, (count, objectives)).astype(float)  # with ties and equal rows
        fronts = [set(front.tolist()) for front in non_dominated_sort(points)]
        assert fronts == sort_by_brute_force(points)
        assert fronts == [set(front.tolist()) for front in sorting.do(points)]
    assert non_dominated_sort(np.empty((0, objectives))) == []


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_crowding_against_pymoo(importable, rng, objectives):
    metrics = importable("pymoo.operators.survival.rank_and_crowding.metrics")
    for count in (2, 3, 40):
        points = rng.random((count, objectives))
        theirs = metrics.calc_crowding_distance(points) * objectives  # theirs is the mean, the paper's the sum
        np.testing.assert_allclose(crowding_distance(points), theirs)


def test_crowding_by_hand():
    points = np.array([[0.0, 10.0], [1.0, 6.0], [4.0, 5.0], [10.0, 0.0]])
    # (4 - 0) / 10 + (10 - 5) / 10 and (10 - 1) / 10 + (6 - 0) / 10
    np.testing.assert_allclose(crowding_distance(points), [np.inf, 0.9, 1.5, np.inf])


def test_infeasible_points_rank_by_violation_after_feasible_ones(rng):
    points, violations = rng.random((40, 2)), np.maximum(rng.integers(-20, 5, 40), 0).astype(float)
    fronts = constrained_sort(points, violations)
    assert sorted(i for front in fronts for i in front.tolist()) == list(range(40))
    rank = {i: r for r, front in enumerate(fronts) for i in front.tolist()}

    def beats(i, j):  # constrained domination, definition 1
        if violations[i] == 0 and violations[j] == 0:
            return (points[i] <= points[j]).all() and (points[i] < points[j]).any()
        return violations[i] < violations[j]

    assert all(rank[i] < rank[j] for i in range(40) for j in range(40) if beats(i, j))


def test_generations_select_like_pymoo(importable):
    """After every generation the parents are those of pymoo's survival from the same parents and children."""
    survival = importable("pymoo.operators.survival.rank_and_crowding.classes").RankAndCrowding()
    population_of = importable("pymoo.core.population").Population
    problem = importable("pymoo.core.problem").Problem(n_var=1, n_obj=2)
    objectives = parse_objectives("a:min,b:min")
    strategy = make("nsga-ii", objectives=objectives, population=10)
    metrics = {}
    weights = np.random.default_rng(1).random((2, 6, 5))

    def value(trial):
        a, b = (float(sum(w[e][o] for e, o in enumerate(trial.arch))) for w in weights)
        metrics[trial.id] = {"a": a, "b": b}
        return metrics[trial.id]

    parents = []
    for generation in range(12):
        run(strategy, value, 10)
        ids = parents + list(range(generation * 10, generation * 10 + 10))
        points = np.array([[metrics[i]["a"], metrics[i]["b"]] for i in ids])
        merged = population_of.new("F", points, "X", np.array(ids, float)[:, None])
        kept = survival.do(problem, merged, n_survive=10, random_state=np.random.default_rng(0))
        assert set(strategy.parents) == {int(x) for x in kept.get("X")[:, 0]}
        parents = strategy.parents
    assert all(t.parent is not None for t in strategy.trials[10:])


def test_one_objective_makes_an_elitist_search(rugged):
    strategy = make("nsga-ii", population=10)
    value = [rugged[SPACE.key(t.arch)] for t in run(strategy, lambda t: rugged[SPACE.key(t.arch)], 100)]
    assert sorted(value[i] for i in strategy.parents) == sorted(value)[-10:]


def test_binary_tournament_pressure():
    """Rank r of n wins a binary tournament with replacement with probability (2 (n - r) + 1) / n^2."""
    strategy = make("nsga-ii", population=8)
    run(strategy, lambda t: float(t.id), 8)
    wins = Counter(winner for _ in range(10_000) for winner in strategy._tournaments())
    for rank in range(1, 9):
        expected = (2 * (8 - rank) + 1) / 64
        spread = (expected * (1 - expected) / 20_000) ** 0.5
        assert abs(wins[8 - rank] / 20_000 - expected) < 4 * spread


def test_generations_overlap_with_workers():
    strategy = make("nsga-ii", population=4, objectives=parse_objectives("a:min,b:min"))
    trials = [strategy.ask() for _ in range(7)]
    assert all(t.parent is None for t in trials)
    for trial in trials[:4]:
        strategy.tell(trial.id, {"a": float(trial.id), "b": 0.0})
    assert set(strategy.parents) == {0, 1, 2, 3}
    assert strategy.ask().parent in strategy.parents


def test_a_space_without_crossover():
    class Mutants(NasBench201):
        def crossover(self, first, second, rng):
            return super(NasBench201.__mro__[1], self).crossover(first, second, rng)

    strategy = make_strategy("nsga-ii", Mutants(), VAL_ACC, np.random.default_rng(0), population=4)
    trials = run(strategy, lambda t: float(sum(t.arch)), 40)
    assert all(differences(t.arch, trials[t.parent].arch) == 1 for t in trials[4:] if t.parent is not None)
    assert sum(t.parent is not None for t in trials[4:]) > 30
