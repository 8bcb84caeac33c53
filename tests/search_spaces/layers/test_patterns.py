"""Patterns and signs, found without numbers, hold for the numbers."""

from __future__ import annotations

import numpy as np
import pytest
from layer_reference import full_values, live_graphs

from search_spaces.layers.formula import parse_formula
from search_spaces.layers.graph import LayerGraph, Node, make_node
from search_spaces.layers.ops import ELEMENTWISE
from search_spaces.layers.patterns import (
    FULL,
    GROUP,
    NON_NEGATIVE,
    NONE,
    POSITIVE,
    UNKNOWN,
    Pattern,
    patterns,
    signs,
    with_guards,
)

GROUPS = 3


def same(values: np.ndarray, axis: int) -> bool:
    """Whether values [B, ...] are constant along an axis, to rounding."""
    first = np.take(values, [0], axis)
    return bool(np.isclose(values, first, rtol=1e-6, atol=1e-9, equal_nan=True).all())


def test_patterns_hold(rng):
    """What a pattern denies is constant in the expanded values; 3 groups of 4 channels."""
    denied = 0
    for graph in live_graphs(rng, 300, groups=GROUPS):
        x = rng.normal(0.3, 1.0, (3, 12, 5))
        values = full_values(graph, x, {"v0": rng.normal(size=12), "v1": rng.normal(size=12)})
        for id, pattern in patterns(graph).items():
            value = values[id]
            if not np.isfinite(value).all():
                continue
            about = f"{graph.canonical_text()} node {id} {pattern}"
            assert pattern.batch or same(value, 0), about
            assert pattern.space or same(value, 2), about
            assert pattern.channel != NONE or same(value, 1), about
            assert pattern.channel != GROUP or same(value.reshape(3, GROUPS, -1, 5), 2), about
            denied += not pattern.full
    assert denied > 500


@pytest.mark.parametrize(
    ("formula", "pattern"),
    [
        ("x", Pattern(True, FULL, True)),
        ("mean[batch](x)", Pattern(False, FULL, False)),
        ("mean[instance](x)", Pattern(True, FULL, False)),
        ("mean[layer](x)", Pattern(True, NONE, False)),
        ("mean[group](x)", Pattern(True, GROUP, False)),
        ("mean[channel](x)", Pattern(True, NONE, True)),
        ("mean[channel-group](x)", Pattern(True, GROUP, True)),
        ("mean[layer](v1)", Pattern()),
        ("mean[group](v1)", Pattern(False, GROUP, False)),
        ("mean[group](mean[layer](x))", Pattern(True, NONE, False)),
        ("mean[batch](mean[group](x))", Pattern(False, GROUP, False)),
        ("mean[batch](x) + mean[instance](x)", Pattern(True, FULL, False)),
        ("mean[layer](x) * v1", Pattern(True, FULL, False)),
        ("x / std[batch](x)", Pattern(True, FULL, True)),
    ],
)
def test_patterns_are_tight(formula, pattern, rng):
    """They claim no less than can be claimed: what a pattern admits does vary."""
    graph = parse_formula(formula, groups=GROUPS)
    assert patterns(graph)[graph.output] == pattern
    params = {"v0": rng.normal(size=12), "v1": rng.normal(size=12)}
    value = full_values(graph, rng.normal(size=(3, 12, 5)), params)[graph.output]
    assert same(value, 0) != pattern.batch
    assert same(value, 2) != pattern.space
    assert same(value, 1) == (pattern.channel == NONE)
    assert same(value.reshape(3, GROUPS, -1, 5), 2) == (pattern.channel != FULL)


def test_signs_hold(rng):
    """NON_NEGATIVE is never negative. POSITIVE is above zero unless a number below 1e-300 was rounded to it."""
    known = 0
    for graph in live_graphs(rng, 400):
        x = rng.normal(0.0, 2.0, (3, 8, 5)) * 10.0 ** rng.integers(-3, 2)
        values = full_values(graph, x, {"v0": rng.normal(size=8), "v1": rng.normal(size=8)})
        calm = all(np.isfinite(v).all() and np.abs(v).max() < 100 for v in values.values())
        for id, sign in signs(graph).items():
            if id in values and sign >= NON_NEGATIVE and not np.isnan(values[id]).any():
                known += 1
                assert values[id].min() >= 0, f"{graph.canonical_text()} node {id}"
                if sign == POSITIVE and calm:
                    assert values[id].min() > 0, f"{graph.canonical_text()} node {id}"
    assert known > 400


@pytest.mark.parametrize(
    ("formula", "sign"),
    [
        ("std[batch](x)", POSITIVE),
        ("std[batch, eps=0](x)", NON_NEGATIVE),
        ("max(std[batch](x), v1 * x)", POSITIVE),
        ("max(v1 * x, std[batch](x))", POSITIVE),
        ("min(std[batch](x), x)", UNKNOWN),
        ("exp(x) + abs(x)", POSITIVE),
        ("exp(x) - abs(x)", UNKNOWN),
        ("x^2", NON_NEGATIVE),
        ("sigmoid(x)^2", POSITIVE),
        ("x * x", UNKNOWN),
        ("l1[group](x)", NON_NEGATIVE),
        ("mean[group](sigmoid(x))", POSITIVE),
        ("mean[group](x)", UNKNOWN),
        ("log(exp(x))", UNKNOWN),
        ("sqrt(1 + 1)", POSITIVE),
        ("0", NON_NEGATIVE),
        ("v1", UNKNOWN),
    ],
)
def test_signs_of_known_expressions(formula, sign):
    graph = parse_formula(formula)
    assert signs(graph)[graph.output] == sign


def test_no_sign_survives_a_negative_input():
    """Every element-wise operation on values that may be negative, found by trying."""
    x = np.linspace(-3, 3, 24).reshape(2, 3, 4)
    x[0, 0, 0] = 0
    for name, operation in ELEMENTWISE.items():
        graph = with_guards(LayerGraph((make_node(name, [0, 3][: operation.arity]),), 4))
        value = full_values(graph, x, {"v1": np.array([-1.0, 0.5, 2.0])})[4]
        found = POSITIVE if value.min() > 0 else NON_NEGATIVE if value.min() >= 0 else UNKNOWN
        assert signs(graph)[4] == found, name


def test_guards_stand_where_a_denominator_may_vanish():
    divisions = (Node("div", (0, 4), eps=0.1), Node("div", (5, 0)))
    dead = (make_node("exp", (0,)), Node("div", (0, 7)))
    graph = LayerGraph((make_node("std-group", (0,)), *divisions, *dead), 6)
    guarded = with_guards(graph, eps=1e-3)
    assert [n.eps for n in guarded.nodes] == [1e-5, 0.0, 1e-3, 0.0, 1e-3]  # what is dead is not analysed
    assert guarded.output == graph.output
