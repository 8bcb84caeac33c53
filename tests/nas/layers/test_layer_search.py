"""The layer search as a whole on digits: funnel, evaluator, cache, resume, comparison, references, report."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch

from nas.evaluators import Rejected
from nas.layers import evaluator as evaluator_module
from nas.layers.comparison import compare_layers
from nas.layers.cost import activation_bytes, step_milliseconds
from nas.layers.evaluator import LayerEvaluator
from nas.layers.funnel import FilteredLayers
from nas.layers.references import find_layer
from nas.layers.report import survivors
from nas.layers.search import evaluator_from, funnel_counts, search_layers, space_from
from nas.references import find_architecture, load_result
from nas.report import write_report
from nas.training.loop import train
from nas.training.recipe import Recipe
from search_spaces.common.errors import UserError
from search_spaces.layers.catalog import layer
from search_spaces.layers.filters import numeric, static
from search_spaces.layers.formula import format_formula, parse_formula
from search_spaces.layers.identity import fingerprint

RECIPE = Recipe(steps=35, batch_size=32)
SETTINGS = {"sampling": "normalizing", "group_size": 4, "immigrants": 0.2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small search with its folder."""
    out = tmp_path_factory.mktemp("layers") / "run"
    evaluator = LayerEvaluator(recipe=RECIPE)
    arguments = {"budget": 8, "seed": 4, "out": out, "strategy_settings": {"population": 3, "tournament": 2}}
    return search_layers(FilteredLayers(**SETTINGS, first=("bn-relu",)), evaluator, **arguments)


def test_the_funnel_proposes_admissible_layers_once_and_counts_the_rest():
    space = FilteredLayers(**SETTINGS)
    rng = np.random.default_rng(0)
    graphs = [space.sample(rng) for _ in range(8)]
    graphs += [space.mutate(g, rng) for g in graphs[:8]]
    assert all(static(g) is None and numeric(g) is None for g in graphs)
    assert len({fingerprint(g) for g in graphs}) == 16
    refused = sum(n for reason, n in space.counts.items() if reason != "drawn")
    assert space.counts["drawn"] == 16 + refused
    again, rng = FilteredLayers(**SETTINGS), np.random.default_rng(0)
    assert [again.sample(rng) for _ in range(8)] == graphs[:8]
    assert pickle.loads(pickle.dumps(space)).sample(np.random.default_rng(0)) == graphs[0]


def test_a_search_begins_from_known_layers(run):
    first = run.space.decode(run.records[0].arch)
    assert format_formula(first) == format_formula(layer("bn-relu"))
    assert first.group_size == 4  # the space's rules, not the catalogue's


def test_metrics_are_those_of_a_training_by_hand(run):
    best = run.best
    graph = run.space.decode(best.arch)
    evaluator = LayerEvaluator(recipe=RECIPE)
    data = evaluator.dataset()
    found = train(evaluator.network(graph, "resnet"), data, RECIPE, seed=0)
    assert best.metrics["resnet_val_acc"] == found.metrics["val_acc"]
    assert best.metrics["resnet_train_loss"] == found.late_loss
    assert best.metrics["cost_seconds"] == 5 + 35  # stability steps and training steps


def test_results_are_kept_and_shared(monkeypatch):
    evaluator = LayerEvaluator(recipe=Recipe(steps=32, batch_size=16))
    graph = layer("gn-silu", group_size=4)
    first = evaluator.evaluate(graph, seed=0)

    def unexpected(*arguments, **named):
        raise AssertionError("trained again")

    monkeypatch.setattr(evaluator_module, "train", unexpected)
    assert evaluator.evaluate(graph, seed=99) == first
    twin = parse_formula("n = (x - mean[group](x)) / std[group](x); sigmoid(n) * n", group_size=4)
    assert evaluator.evaluate(twin, seed=0) == first  # another graph of the same function
    with pytest.raises(AssertionError, match="trained again"):
        LayerEvaluator(recipe=Recipe(steps=33, batch_size=16)).evaluate(graph, seed=0)


@pytest.mark.parametrize(
    ("formula", "signal", "reason"),
    [("x * std[batch](x)", False, "unstable"), ("exp(x)", True, "no_signal"), ("x / x", True, "low_accuracy")],
)
def test_useless_layers_are_rejected_with_the_reason(formula, signal, reason):
    graph = parse_formula(formula)
    with pytest.raises(Rejected) as caught:
        LayerEvaluator(recipe=RECIPE, signal=signal, cache=False).evaluate(graph, seed=0)
    assert caught.value.reason == reason
    assert caught.value.cost_seconds <= 40


def test_a_run_keeps_what_it_needs_to_go_on(run, tmp_path):
    settings = json.loads((run.run.path / "settings.json").read_text())
    assert evaluator_from(settings) == LayerEvaluator(recipe=RECIPE)
    assert space_from(settings).settings == run.space.settings
    assert load_result(run.run.path).best.arch == run.best.arch
    space = space_from(settings)
    arguments = {"seed": 4, "out": run.run.path, "strategy_settings": {"population": 3, "tournament": 2}}
    longer = search_layers(space, evaluator_from(settings), budget=11, **arguments)
    whole = search_layers(
        FilteredLayers(**SETTINGS, first=("bn-relu",)),
        LayerEvaluator(recipe=RECIPE),
        budget=11,
        **{**arguments, "out": tmp_path / "whole"},
    )
    assert [(r.arch, r.metrics) for r in longer.records] == [(r.arch, r.metrics) for r in whole.records]
    assert funnel_counts(longer) == funnel_counts(whole)  # replaying counts what was counted


def test_the_funnel_adds_up(run):
    result = load_result(run.run.path)
    counts = funnel_counts(result)
    rows = survivors(counts)
    assert rows[0] == ("drawn", counts["drawn"])
    assert [n for _, n in rows] == sorted((n for _, n in rows), reverse=True)
    assert rows[-1][1] + len(run.space.first) >= counts["trained"]


def test_the_report_shows_formula_and_funnel(run, tmp_path):
    write_report(load_result(run.run.path), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "The funnel" in text
    assert "candidates left" in text or "refused because" in text
    assert text.count("<svg") >= 3


def test_layers_are_found_by_any_name(run, tmp_path):
    graph = layer("evonorm-s0")
    (tmp_path / "mine.json").write_text(json.dumps(graph.to_json()))
    assert find_layer(str(tmp_path / "mine.json")) == graph
    assert find_layer("EvoNorm_S0") == graph
    assert fingerprint(find_layer("x * sigmoid(v1 * x) / std[group](x)")) == fingerprint(graph)
    assert find_layer(f"{run.run.path}:best") == run.space.decode(run.best.arch)
    assert find_layer(f"{run.run.path}:0") == run.space.decode(run.records[0].arch)
    assert find_architecture(f"{run.run.path}:0").record.id == 0
    for wrong in ("evonorm-x9", "nowhere:best", str(tmp_path / "absent.json"), "x +"):
        with pytest.raises(UserError):
            find_layer(wrong)


def test_compared_layers_are_trained_alike():
    evaluator = LayerEvaluator(recipe=RECIPE)
    scores = compare_layers({"a": layer("bn-relu"), "b": layer("bn-relu")}, evaluator, seeds=2)
    assert scores[0].val_acc == scores[1].val_acc
    by_hand = [
        train(evaluator.network(layer("bn-relu"), "resnet", seed=s), evaluator.dataset(), RECIPE, seed=s)
        for s in (0, 1)
    ]
    accuracies = [found.metrics["val_acc"] for found in by_hand]
    assert scores[0].val_acc == pytest.approx(np.mean(accuracies))
    assert scores[0].standard_error == pytest.approx(np.std(accuracies, ddof=1) / math.sqrt(2))


def test_activation_bytes_by_hand():
    """Linear keeps its input; ReLU keeps its output; both once."""
    model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.ReLU(), torch.nn.Linear(20, 5))
    x = torch.randn(7, 10)
    assert activation_bytes(model, x) == 4 * (7 * 10 + 7 * 20)
    assert step_milliseconds(model, x, torch.zeros(7, dtype=torch.long), repeats=3) > 0


def test_objectives_that_nothing_measures_are_refused():
    with pytest.raises(UserError, match="vit_val_acc"):
        search_layers(FilteredLayers(**SETTINGS), LayerEvaluator(), budget=2, objectives="vit_val_acc")
    with pytest.raises(UserError, match="one layout"):
        LayerEvaluator(anchors=("resnet", "vit"))


def test_latency_and_memory_are_objectives():
    result = search_layers(
        FilteredLayers(**SETTINGS, first=("bn-relu",)),
        LayerEvaluator(recipe=RECIPE),
        "random-search",
        budget=2,
        objectives="val_acc,latency_ms,activation_bytes",
    )
    metrics = result.records[0].metrics
    assert metrics["latency_ms"] > 0
    assert metrics["activation_bytes"] > 1e5


def test_a_screen_stops_what_is_behind_the_reference():
    screened = LayerEvaluator(recipe=RECIPE, screen_steps=32, screen_margin=0.3)
    good, slow = (
        layer("gn-silu", group_size=4),
        parse_formula("x / std[group](x) / (1 + 1 + 1 + 1 + 1 + 1 + 1 + 1)", group_size=4),
    )
    assert screened.evaluate(good, seed=0) == LayerEvaluator(recipe=RECIPE).evaluate(good, seed=0)
    with pytest.raises(Rejected) as caught:
        screened.evaluate(slow, seed=0)
    assert caught.value.cost_seconds == 5 + 32
    reference = train(screened.network(layer("bn-relu"), "resnet"), screened.dataset(), RECIPE, seed=0)
    half = reference.losses[16:32]
    assert screened._reference_loss(RECIPE) == pytest.approx(sum(half) / 16)
