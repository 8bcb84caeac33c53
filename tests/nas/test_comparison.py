"""compare: against the loop, against the exact expectation, and its interface."""

from __future__ import annotations

import numpy as np
import pytest

from nas.comparison import compare
from nas.evaluators import TableEvaluator
from nas.loop import search
from search_spaces.common.errors import UserError


def test_a_curve_is_what_the_loop_finds(nas_bench_201):
    result = compare(nas_bench_201, ["regularized-evolution", "local-search"], queries=40, seeds=2, seed=5, workers=1)
    evaluator = TableEvaluator(nas_bench_201)
    for curves in result.strategies:
        for i in range(2):
            one = search(evaluator.table.space, evaluator, curves.name, budget=40, seed=5 + i)
            values = [r.metrics["val_acc"] for r in one.records]
            np.testing.assert_array_equal(curves.curves[i], np.maximum.accumulate(values))


def test_processes_change_nothing(nas_bench_201):
    one = compare(nas_bench_201, ["random-search"], queries=60, seeds=170, workers=1)
    two = compare(nas_bench_201, ["random-search"], queries=60, seeds=170, workers=2)
    np.testing.assert_array_equal(one.strategies[0].curves, two.strategies[0].curves)


def test_random_search_meets_the_exact_expectation(nas_bench_201):
    result = compare(nas_bench_201, ["random-search"], queries=100, seeds=200)
    curves = result.strategies[0]
    # The published reference: 91.024 at 100 uniform draws.
    assert result.expectation[99] == pytest.approx(91.024, abs=5e-4)
    error = curves.standard_error([100])["100"]
    assert abs(curves.mean_best([100])["100"] - result.expectation[99]) < 3 * error


def test_optimum_and_queries_to_it(nas_bench_201):
    result = compare(nas_bench_201, ["local-search"], queries=150, seeds=20)
    curves = result.strategies[0]
    assert result.optimum == pytest.approx(91.607, abs=1e-3)
    by_hand = [next((i + 1 for i, v in enumerate(row) if v == result.optimum), np.inf) for row in curves.curves]
    np.testing.assert_array_equal(curves.queries_to_optimum(), by_hand)
    assert curves.optimum_share() == np.mean(np.isfinite(by_hand))
    assert curves.median_queries_to_optimum() == np.median(by_hand)


def test_bounds_are_kept(nas_bench_201):
    result = compare(nas_bench_201, ["random-search"], queries=200, seeds=5, objectives="val_acc,params<=300000")
    table = TableEvaluator(nas_bench_201).table
    small = table.column("params") <= 300_000
    assert result.optimum == table.column("val_acc")[small].max()
    assert np.nanmax(result.strategies[0].curves) <= result.optimum


def test_minimised_objectives(nas_bench_201):
    result = compare(nas_bench_201, ["random-search"], queries=50, seeds=40, objectives="latency_ms")
    curves = result.strategies[0]
    assert (np.diff(curves.curves, axis=1) <= 0).all()
    assert result.optimum == TableEvaluator(nas_bench_201).table.column("latency_ms").min()
    assert abs(curves.mean_best([50])["50"] - result.expectation[49]) < 4 * curves.standard_error([50])["50"]


@pytest.mark.parametrize(
    "wrong", [{"queries": 0}, {"seeds": -1}, {"strategies": []}, {"strategies": ["random-serach"]}, {"benchmark": "nb"}]
)
def test_bad_input_is_refused(nas_bench_201, wrong):
    arguments = {"benchmark": nas_bench_201, "strategies": ["random-search"], **wrong}
    with pytest.raises(UserError):
        compare(arguments.pop("benchmark"), arguments.pop("strategies"), **arguments)
