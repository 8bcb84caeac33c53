"""The search over activation functions on digits: filters, evaluator, run, resume, references, command line."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from nas.cli.app import app
from nas.layers.activation_search import ActivationEvaluator, FilteredActivations
from nas.layers.evaluator import LayerEvaluator
from nas.layers.references import find_layer
from nas.layers.search import evaluator_from, funnel_counts, search_layers, space_from
from nas.references import find_architecture, load_result
from nas.report import write_report
from nas.training.recipe import Recipe
from search_spaces.common.errors import UserError
from search_spaces.layers.activation_space import activation
from search_spaces.layers.filters import numeric, static
from search_spaces.layers.identity import fingerprint
from search_spaces.layers.module import GraphLayer

RECIPE = Recipe(steps=25, batch_size=32)
ARGUMENTS = {"seed": 3, "strategy_settings": {"population": 3, "tournament": 2}}


def evaluator(**settings) -> ActivationEvaluator:
    return ActivationEvaluator(**{"recipe": RECIPE, "stability_steps": 1, **settings})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("activations") / "run"
    space = FilteredActivations("pangaea", first=("relu", "silu"))
    return search_layers(space, evaluator(), budget=6, out=out, **ARGUMENTS)


@pytest.mark.parametrize("settings", [{"ops": "pangaea"}, {"ops": "swish", "units": 2}], ids=str)
def test_only_admissible_functions_are_proposed_and_none_twice(settings):
    space = FilteredActivations(**settings)
    rng = np.random.default_rng(0)
    graphs = [space.sample(rng) for _ in range(12)]
    graphs += [space.mutate(g, rng) for g in graphs] + [space.crossover(graphs[0], g, rng) for g in graphs[1:6]]
    assert all(static(g) is None and numeric(g) is None for g in graphs)
    assert len({fingerprint(g) for g in graphs}) == len(graphs)
    assert space.counts["drawn"] == len(graphs) + sum(n for reason, n in space.counts.items() if reason != "drawn")
    assert pickle.loads(pickle.dumps(space)).sample(np.random.default_rng(0)) == graphs[0]
    assert all(static(g) is None for _, g in zip(range(5), space.neighbors(graphs[0]), strict=False))


def test_the_anchor_keeps_its_normalisation():
    """One BatchNorm before every candidate, and the network is that of BatchNorm and nn.ReLU."""
    network = evaluator().network(activation("relu"), "resnet")
    pairs = [m for m in network.modules() if isinstance(m, nn.Sequential) and isinstance(m[-1:][0], GraphLayer)]
    assert len(pairs) == 7
    assert all(isinstance(pair[0], nn.BatchNorm2d) for pair in pairs)
    x = torch.randn(4, 1, 8, 8)
    found = network(x)
    for pair in pairs:
        pair[1] = nn.ReLU()
    torch.testing.assert_close(network(x), found)
    names = dict(evaluator().network(find_layer("alpha * relu(x)", affine=False), "resnet").named_parameters())
    assert sum(name.endswith("1.alpha") for name in names) == 7


def test_activations_and_layers_do_not_share_measurements():
    """The same graph as a layer without normalisation and behind one gives different figures."""
    graph = activation("tanh")
    plain = LayerEvaluator(recipe=RECIPE, stability_steps=0).evaluate(graph, seed=0)
    behind = evaluator(stability_steps=0).evaluate(graph, seed=0)
    assert plain["resnet_train_loss"] != behind["resnet_train_loss"]
    assert behind == evaluator(stability_steps=0).evaluate(graph, seed=0)


def test_a_run_is_kept_and_resumes(run, tmp_path):
    assert [run.space.readable(run.space.decode(r.arch)) for r in run.records[:2]] == ["relu(x)", "silu(x)"]
    settings = run.run.settings
    assert evaluator_from(settings) == evaluator()
    assert space_from(settings).settings == run.space.settings
    assert isinstance(space_from(settings), FilteredActivations)
    found = find_architecture(f"{run.run.path}:best")
    graph = find_layer(f"{run.run.path}:best")
    assert graph == found.space.decode(found.record.arch)
    assert not graph.affine
    module = GraphLayer(graph, 8)
    assert module(torch.randn(2, 8, 3, 3)).shape == (2, 8, 3, 3)
    counts = funnel_counts(load_result(run.run.path))
    assert counts["drawn"] > 0
    assert counts["trained"] == sum(r.status == "done" for r in run.records)
    again = search_layers(
        FilteredActivations("pangaea", first=("relu", "silu")), evaluator(), budget=6, out=tmp_path / "b", **ARGUMENTS
    )
    assert [(r.arch, r.status) for r in again.records] == [(r.arch, r.status) for r in run.records]
    write_report(load_result(run.run.path), tmp_path / "report.html")
    assert "The funnel" in (tmp_path / "report.html").read_text()


def test_the_command_line(tmp_path):
    arguments = ["layers", "search", "--ops", "swish", "--budget", "2", "--steps", "20", "--out", str(tmp_path / "r")]
    arguments += ["--first", "sigmoid(alpha * x) * x", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["funnel"]["trained"] + sum(printed["funnel"]["rejected"].values()) >= 2
    settings = json.loads((tmp_path / "r" / "settings.json").read_text())
    assert settings["layer_evaluator"]["norm"] == "batch"
    shown = CliRunner().invoke(app, ["layers", "show", f"{tmp_path / 'r'}:0", "--json"])
    assert json.loads(shown.stdout)["formula"] == "x * sigmoid(x * alpha)"
    source = tmp_path / "found.py"
    exported = CliRunner().invoke(app, ["layers", "export", f"{tmp_path / 'r'}:0", "--to", str(source)])
    assert exported.exit_code == 0
    space: dict = {"__name__": "found"}
    exec(source.read_text(), space)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(space["Found"](4)(x), torch.nn.functional.silu(x))


def test_show_says_what_becomes_of_gaussian_inputs():
    def shown(layer: str):
        return json.loads(CliRunner().invoke(app, ["layers", "show", layer, "--json"]).stdout)["gaussian"]

    found = shown("relu(x)")
    assert found["mean"] == pytest.approx((2 * np.pi) ** -0.5)
    assert found["chi"] == pytest.approx(0.5)
    assert found["gain"] == pytest.approx(2**0.5)
    assert shown("bn-relu") is None
    assert shown("1 /{eps=0} x") is None


def test_aquasurf_on_the_command_line(tmp_path):
    arguments = ["layers", "search", "--ops", "pangaea", "--strategy", "aquasurf", "--setting", "pool=9"]
    arguments += ["--setting", "begin=3", "--budget", "4", "--steps", "5", "--out", str(tmp_path / "r"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    space = space_from(json.loads((tmp_path / "r" / "settings.json").read_text()))
    records = load_result(tmp_path / "r").records
    assert [space.readable(space.decode(r.arch)) for r in records[:3]] == ["elu(x)", "relu(x)", "selu(x)"]
    wrong = CliRunner().invoke(app, [*arguments[:2], "--strategy", "aquasurf", "--budget", "1"])
    assert isinstance(wrong.exception, UserError)


def test_what_is_refused():
    with pytest.raises(UserError, match="pangaea"):
        FilteredActivations("pangea")
    with pytest.raises(UserError, match="layer or none"):
        ActivationEvaluator(anchors=("vit",))
    assert ActivationEvaluator(anchors=("vit",), norm="layer").layout == "tokens"
    with pytest.raises(UserError, match="batch"):
        ActivationEvaluator(norm="bach")
