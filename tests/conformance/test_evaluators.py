"""Every evaluator: plain, picklable, repeatable. A new one joins by one line of EVALUATORS."""

from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
import small_space

from nas.evaluators import Evaluator, ObjectEvaluator, TableEvaluator
from nas.scoring.evaluator import ProxyEvaluator
from nas.synthetic import SyntheticCurves
from nas.training.evaluator import train_evaluator
from search_spaces.registry import load_space

EVALUATORS = {
    "table": lambda: (TableEvaluator("nas-bench-201/cifar10", ("val_acc", "params")), load_space("nas-bench-201")),
    "table-random-seed": lambda: (
        TableEvaluator("nas-bench-201/cifar10", ("val_acc",), seed_policy="random"),
        load_space("nas-bench-201"),
    ),
    "object": lambda: (ObjectEvaluator("small_space:score"), small_space.Digits()),
    "synthetic": lambda: (SyntheticCurves("nas-bench-201"), load_space("nas-bench-201")),
    "train": lambda: (
        train_evaluator("nas-bench-201", changes={"epochs": 1}, scale={"channels": 4, "cells_per_stage": 1}),
        load_space("nas-bench-201"),
    ),
    "proxy": lambda: (
        ProxyEvaluator("nas-bench-201", ("nwot", "live-macs"), network={"channels": 4, "cells_per_stage": 1}),
        load_space("nas-bench-201"),
    ),
}


@pytest.fixture(params=EVALUATORS)
def evaluator_and_space(request, nas_bench_201):
    return EVALUATORS[request.param]()


def test_is_a_frozen_value_that_travels(evaluator_and_space):
    evaluator, space = evaluator_and_space
    assert isinstance(evaluator, Evaluator)
    assert dataclasses.is_dataclass(evaluator)
    assert evaluator.__dataclass_params__.frozen
    arch = space.sample(np.random.default_rng(0))
    before = evaluator.evaluate(arch, seed=1)
    copy = pickle.loads(pickle.dumps(evaluator))
    assert copy == evaluator
    assert copy.evaluate(arch, seed=1) == before


def test_gives_finite_numbers_that_depend_only_on_arch_fidelity_and_seed(evaluator_and_space):
    evaluator, space = evaluator_and_space
    rng = np.random.default_rng(0)
    archs = [space.sample(rng) for _ in range(5)]
    forward = [dict(evaluator.evaluate(a, seed=7)) for a in archs]
    backward = [dict(evaluator.evaluate(a, seed=7)) for a in reversed(archs)][::-1]
    assert forward == backward
    assert all(isinstance(v, float) and math.isfinite(v) for metrics in forward for v in metrics.values())
