"""Objectives: what the text means, and sets of points against brute force and pymoo."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.objectives import (
    Objective,
    hypervolume,
    losses,
    non_dominated,
    optimised,
    parse_objectives,
    primary_score,
    scaled_hypervolume,
    violation,
)
from search_spaces.common.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("val_acc", [Objective("val_acc", True)]),
        ("val-acc_12_seed3", [Objective("val_acc_12_seed3", True)]),
        (
            "val_acc, latency_ms,params",
            [Objective("val_acc", True), Objective("latency_ms", False), Objective("params", False)],
        ),
        ("energy_mj,live_macs", [Objective("energy_mj", False), Objective("live_macs", False)]),
        ("my_score:max,other : min", [Objective("my_score", True), Objective("other", False)]),
        ("val_acc:min", [Objective("val_acc", False)]),
        (
            "val_acc,params<=1e6,other>=-2",
            [Objective("val_acc", True), Objective("params", False, 1e6), Objective("other", True, -2.0)],
        ),
        ("params,params<=3", [Objective("params", False), Objective("params", False, 3.0)]),
    ],
)
def test_parsing(text, expected):
    assert parse_objectives(text) == tuple(expected)


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["<=", ">="]))
def test_text_round_trip(bound, sign):
    for text in (f"val_acc,params{sign}{bound!r}", "my_score:max,val_acc,val_loss", "val_acc:min,params"):
        objectives = parse_objectives(text)
        assert parse_objectives(",".join(map(str, objectives))) == objectives


def test_bounds_are_written_plainly():
    assert str(Objective("params", False, 1e6)) == "params<=1000000"
    assert str(Objective("val_acc", True, 0.1)) == "val_acc>=0.1"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", ""),
        ("params<=3", "params<=3"),
        ("score", "score"),
        ("val_acc:up", "val_acc:up"),
        ("val_acc,val_acc", "val_acc"),
        ("val_acc,params<=many", "params<=many"),
        ("val_acc,params<=nan", "params<=nan"),
        ("val_acc,params<=inf", "params<=inf"),
    ],
)
def test_nonsense_is_refused_by_name(text, value):
    with pytest.raises(UserError) as caught:
        parse_objectives(text)
    assert caught.value.value == value


def test_losses_violation_and_score():
    objectives = parse_objectives("val_acc,latency_ms,params<=100,depth>=4,zero:max")
    metrics = {"val_acc": 90.0, "latency_ms": 5.0, "params": 150.0, "depth": 3.0, "zero": 7.0}
    assert losses(objectives, metrics) == (-90.0, 5.0, -7.0)
    assert [o.name for o in optimised(objectives)] == ["val_acc", "latency_ms", "zero"]
    assert violation(objectives, metrics) == pytest.approx(0.5 + 0.25)
    assert violation(parse_objectives("a:max,b<=0"), {"a": 0.0, "b": 2.0}) == 2.0  # absolute where the bound is 0
    feasible = {**metrics, "params": 100.0, "depth": 4.0, "val_acc": 10.0}
    order = [None, metrics, feasible, {**feasible, "val_acc": 11.0}]
    scores = [primary_score(objectives, m) for m in order]
    assert scores == sorted(scores)
    assert len(set(scores)) == 4
    assert primary_score(parse_objectives("val_loss"), {"val_loss": 1.0}) > primary_score(
        parse_objectives("val_loss"), {"val_loss": 2.0}
    )
    assert primary_score(objectives, None) == (-math.inf, -math.inf)


def front_by_brute_force(points):
    """The distinct non-dominated points."""
    rows = {tuple(p) for p in points.tolist()}
    return {p for p in rows if not any(all(a <= b for a, b in zip(q, p, strict=True)) and q != p for q in rows)}


def volume_by_counting(points, reference):
    """Unit cells of the integer grid that some point dominates."""
    cells = itertools.product(*(range(r) for r in reference))
    return sum(any(all(a <= c for a, c in zip(p, cell, strict=True)) for p in points.tolist()) for cell in cells)


@st.composite
def integer_points(draw):
    dimensions = draw(st.integers(1, 4))
    rows = draw(st.lists(st.tuples(*[st.integers(0, 5)] * dimensions), min_size=0, max_size=12))
    return np.array(rows, float).reshape(-1, dimensions)


@given(integer_points())
def test_non_dominated_against_brute_force(points):
    found = non_dominated(points)
    chosen = [tuple(p) for p in points[found].tolist()]
    assert set(chosen) == front_by_brute_force(points)
    assert len(set(chosen)) == len(chosen)
    assert [p[0] for p in chosen] == sorted(p[0] for p in chosen)
    for index, row in zip(found, chosen, strict=True):  # the first of equal rows
        assert index == next(i for i, p in enumerate(points.tolist()) if tuple(p) == row)


@given(integer_points())
def test_hypervolume_against_counting(points):
    reference = (4,) * points.shape[1]
    assert hypervolume(points, np.array(reference)) == volume_by_counting(points, reference)


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_hypervolume_and_front_against_pymoo(importable, rng, dimensions):
    indicator = importable("pymoo.indicators.hv").HV(ref_point=np.full(dimensions, 0.9))
    sorting = importable("pymoo.util.nds.non_dominated_sorting").NonDominatedSorting()
    for count in (1, 5, 40):
        points = rng.random((count, dimensions))
        assert hypervolume(points, np.full(dimensions, 0.9)) == pytest.approx(indicator(points), abs=1e-12)
        front = sorting.do(points, only_non_dominated_front=True)
        assert set(non_dominated(points).tolist()) == set(front.tolist())


def test_empty_sets():
    assert hypervolume(np.empty((0, 2)), np.ones(2)) == 0.0
    assert hypervolume([], [1.0, 1.0]) == 0.0
    assert len(non_dominated(np.empty((0, 3)))) == 0


def test_scaled_hypervolume():
    front = np.array([[0.0, 30.0], [5.0, 20.0], [10.0, 10.0]])
    # Scaled to (0, 1), (.5, .5), (1, 0) with reference 1.1: three strips of .5, .5 and .1 in width.
    assert scaled_hypervolume(front, front) == pytest.approx(0.5 * 0.1 + 0.5 * 0.6 + 0.1 * 1.1)
    assert scaled_hypervolume(front[:1], front) == pytest.approx(1.1 * 0.1)
    assert scaled_hypervolume(np.array([[0.0, 10.0]]), front) == pytest.approx(1.1 * 1.1)
    assert scaled_hypervolume([], front) == 0.0
    constant = np.array([[1.0, 5.0], [2.0, 5.0]])  # an objective without range is scaled by 1
    assert scaled_hypervolume(constant[1:], constant) == pytest.approx(0.1 * 1.1)
