"""The loop: budgets, seeds, failures, workers, Python interface."""

from __future__ import annotations

import json

import numpy as np
import pytest
import small_space
from small_space import Digits, Faulty, Unpicklable

from nas.budget import Budget
from nas.evaluators import Rejected
from nas.executors import ProcessExecutor, checked
from nas.loop import search, trial_seed
from search_spaces.common.errors import UserError


def test_finds_the_best_of_a_small_space():
    result = search(Digits(), small_space.score, "random-search", budget=125, objectives="val_acc")
    assert len(result.records) == 125
    assert result.best_arch == (4, 4, 4)
    assert result.best.metrics["val_acc"] == 12


def test_stops_when_the_space_is_exhausted():
    result = search(Digits(), small_space.score, "random-search", budget=1000, objectives="val_acc")
    assert sorted(r.arch for r in result.records) == sorted(
        f"{i}{j}{k}" for i in range(5) for j in range(5) for k in range(5)
    )


def test_simulated_clock_ends_the_search():
    budget = Budget(simulated_seconds=21)  # a trial costs two seconds
    result = search(Digits(), small_space.score, "random-search", budget=budget, objectives="val_acc")
    assert len(result.records) == 11


def test_wall_clock_ends_the_search():
    result = search(Digits(), small_space.slow_score, budget=Budget(wall_seconds=0.2), objectives="val_acc")
    assert 1 <= len(result.records) <= 25


@pytest.mark.parametrize(
    "budget", [{"queries": 0}, {"queries": -3}, {"queries": 1.5}, {"simulated_seconds": -1.0}, {"wall_seconds": 0}, {}]
)
def test_bad_budgets_are_refused(budget):
    with pytest.raises(UserError, match="queries|seconds"):
        Budget(**budget)


@pytest.mark.parametrize(
    "wrong",
    [{"workers": 0}, {"timeout_seconds": -1}, {"seed": -1}, {"objectives": None}, {"strategy": "evolution-strategy"}],
)
def test_bad_arguments_are_refused(wrong):
    arguments = {"strategy": "random-search", "budget": 5, "objectives": "val_acc", **wrong}
    with pytest.raises(UserError):
        search(Digits(), small_space.score, **arguments)


def test_trial_seeds_follow_from_run_seed_and_id():
    words = np.random.SeedSequence(7, spawn_key=(3,)).generate_state(4)
    assert trial_seed(7, 3) == words[0]
    result = search(Digits(), small_space.score, "random-search", budget=5, objectives="val_acc", seed=7)
    assert [r.seed for r in result.records] == [trial_seed(7, i) for i in range(5)]


def test_values_depend_on_neither_worker_nor_order():
    one = search(Digits(), small_space.slow_score, "random-search", budget=30, objectives="val_acc")
    three = search(Digits(), small_space.slow_score, "random-search", budget=30, objectives="val_acc", workers=3)
    assert {(r.id, r.arch, r.metrics["val_acc"]) for r in one.records} == {
        (r.id, r.arch, r.metrics["val_acc"]) for r in three.records
    }
    assert {r.worker for r in three.records} > {0}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "RuntimeError: no such luck"),
        ("nan", "'val_acc' is nan, expected a finite number"),
        ("text", "'val_acc' is 'high', expected a number"),
        ("nothing", "returned None, expected a dict"),
        ("other", "but not val_acc"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_failures_are_recorded_with_their_message(how, message, workers):
    result = search(Digits(), Faulty(how), "random-search", budget=25, objectives="val_acc", workers=workers)
    failed = [r for r in result.records if r.status == "failed"]
    assert failed
    assert all(r.arch[0] == "0" and message in r.error and r.metrics is None for r in failed)
    assert all(r.status == "done" for r in result.records if r.arch[0] != "0")
    expected_attempts = 1 if how == "other" else 2  # the loop, not the evaluation, misses the metric
    assert {r.attempts for r in failed} == {expected_attempts}


@pytest.mark.parametrize(("how", "message"), [("hang", "no result within 0.3 s"), ("die", "the worker died (exit")])
def test_hanging_and_dying_evaluations_fail_and_the_worker_is_replaced(how, message):
    arguments = {"objectives": "val_acc", "workers": 2, "timeout_seconds": 0.3}
    result = search(Digits(), Faulty(how), "random-search", budget=8, **arguments)
    failed = [r for r in result.records if r.status == "failed"]
    assert failed
    assert all(r.arch[0] == "0" and message in r.error and r.attempts == 2 for r in failed)
    assert sum(r.status == "done" for r in result.records) == 8 - len(failed)


def test_an_evaluator_that_cannot_be_pickled_is_named():
    with pytest.raises(UserError, match="Unpicklable.*pickled"):
        search(Digits(), Unpicklable(), "random-search", budget=5, objectives="val_acc", workers=2)


def test_all_trials_failing_leaves_a_result_without_best():
    def broken(arch, fidelity, seed):
        raise OSError("gone")

    result = search(Digits(), broken, "regularized-evolution", budget=15, objectives="val_acc")
    assert {r.status for r in result.records} == {"failed"}
    with pytest.raises(UserError, match="gone"):
        _ = result.best


def test_constraints_bind_the_best():
    result = search(Digits(), small_space.score, "random-search", budget=125, objectives="val_acc,params<=1")
    assert result.best.arch == "144"


def test_workers_stop_with_their_executor():
    executor = ProcessExecutor(Faulty("hang"), 2)
    processes = [w.process for w in executor._workers]
    executor.close()
    assert not any(p.is_alive() for p in processes)


def test_checked_gives_plain_floats():
    assert checked({"a": np.float32(0.5), "b": 3}) == {"a": 0.5, "b": 3.0}
    assert json.dumps(checked({"a": np.int64(2)})) == '{"a": 2.0}'


def test_a_rejection_is_recorded_once_with_its_cost():
    def choosy(arch, fidelity, seed):
        if arch[0] == 0:
            raise Rejected("unstable", cost_seconds=5.0)
        return {"val_acc": 1.0, "cost_seconds": 1.0}

    result = search(Digits(), choosy, "random-search", budget=Budget(simulated_seconds=60), objectives="val_acc")
    rejected = [r for r in result.records if r.status == "failed"]
    assert rejected
    assert {(r.error, r.attempts, r.metrics["cost_seconds"]) for r in rejected} == {("rejected: unstable", 1, 5.0)}
    total = sum(r.metrics["cost_seconds"] for r in result.records)
    assert 60 <= total < 65
