"""Searches in a user's own module and in spaces with choices of layers, from the search to the exported program."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from nas.export.source import network_source
from nas.export.subject import Build, named_architecture
from nas.supernet.building import make_supernet, network_scale
from nas.supernet.candidates import check_candidates
from nas.supernet.discretization import discretize
from nas.supernet.evolution import path_accuracy
from nas.supernet.recipes import recipe, scaled
from nas.supernet.search import SearchTask, open_supernet, read_log, search_run, skip_share
from nas.training.checkpoints import checkpoints, read
from nas.training.data import load_data
from search_spaces.choice import Choice, selected_state_dict
from search_spaces.common.errors import UserError
from search_spaces.module_space import ModuleSpace
from search_spaces.registry import load_space

SOURCE = """
from torch import nn
from search_spaces.cells.operations import CellNetwork
from search_spaces.choice import Choice
from search_spaces.module_choices import NamedChoice, choice_of_acts, choice_of_layers

class Net(nn.Module):
    stages = "an attribute of this name that is no method of the house"

    def __init__(self, in_channels, num_classes, channels=6):
        super().__init__()
        kernels = {f"conv{k}": nn.Conv2d(in_channels, channels, k, padding=k // 2) for k in (1, 3)}
        self.stem = NamedChoice(kernels, "stem")
        self.layer = choice_of_layers(["batch-norm+relu", "evonorm-s0", "batch-norm"], channels, "layer")
        act = choice_of_acts(["relu", "gelu"], channels, "act")
        deep = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), act)
        self.block = Choice([nn.Identity(), deep], "block")
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x):
        return self.head(self.block(self.layer(self.stem(x))).mean((2, 3)))

def cells(in_channels=3, num_classes=10, channels=4):
    layer = choice_of_layers(["evonorm-s0", "frn-tlu"], channels, "stem")
    stem = nn.Sequential(nn.Conv2d(in_channels, channels, 3), layer)
    return CellNetwork(stem, [choice_of_acts(["relu", "mish"], channels, "act")], nn.ReLU(), channels, num_classes)
"""
TINY = {"channels": 4, "batch_size": 16, "epochs": 2, "alpha_warmup_epochs": 0, "drop_last": True}


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    """The text of a space in a file of the user's own."""
    (tmp_path / "net_of_a_user.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return "net_of_a_user:Net"


def task(space: str, name: str = "darts-v1", **changes) -> SearchTask:
    found = scaled(recipe(name), "tiny", flip=False)
    if found.evolution is not None:
        changes |= {"evolution_population": 4, "evolution_generations": 2, "evolution_crossover": 2}
        changes |= {"evolution_mutation": 1, "evolution_recalibration": (1, 20), "evolution_evaluation": (1, 20)}
    return SearchTask(found.replaced({**TINY, **changes}), space=space, images=70)


class Killed(Exception):
    """Raised where a process would be killed."""


def kill_at(last: int):
    def progress(step: int, total: int | None) -> None:
        if step == last:
            raise Killed

    return progress


def outcome(run) -> tuple:
    """What a search leaves, without times."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(run)]
    state = read(checkpoints(run.path / "checkpoints" / "seed-0")[0])
    return rows, [t.arch for t in run.trials()], {k: v for k, v in state.items() if k not in ("seconds", "rows")}


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# -- searches ------------------------------------------------------------------------------------------------------


def test_a_search_in_a_users_module_goes_on_bit_for_bit(own, tmp_path):
    whole = search_run(task(own), tmp_path / "whole")
    with pytest.raises(Killed):
        search_run(task(own), tmp_path / "killed", progress=kill_at(3))
    assert same(outcome(whole), outcome(search_run(task(own), tmp_path / "killed")))
    space, (trial,), row = load_space(own), whole.trials(), read_log(whole)[-1]
    assert trial.status == "done", trial.error
    best = {label: int(np.argmax(values)) for label, values in row["alphas"].items()}
    assert space.select(space.decode(trial.arch)) == best
    assert trial.key == space.key(space.decode(trial.arch))
    _, state, _ = open_supernet(whole)
    assert discretize(space, state.supernet.alphas) == space.decode(trial.arch)
    assert state.supernet.network.head.in_features == 4  # the recipe's channels, which this module takes


@pytest.mark.parametrize("name", ["spos", "gdas"])
def test_other_recipes_search_in_it(own, name, tmp_path):
    (trial,) = search_run(task(own, name, epochs=1), tmp_path / "run").trials()
    assert trial.status == "done", trial.error
    space = load_space(own)
    assert space.encode(space.decode(trial.arch)) == trial.arch


@pytest.mark.parametrize(
    ("space", "name"),
    [
        ("nas-bench-macro", "darts-v1"),
        ("nas-bench-macro", "spos"),
        ("nas-bench-201+norm=batch-norm,group-norm+act=relu,silu", "gdas"),
        ("nas-bench-201+norm=batch-norm,evonorm-s0+act=relu,identity", "pc-darts"),
    ],
)
def test_macro_and_choices_of_layers(space, name, tmp_path):
    (trial,) = search_run(task(space, name, epochs=1), tmp_path / "run").trials()
    assert trial.status == "done", trial.error
    assert load_space(space).decode(trial.arch)


def test_the_path_of_a_selection_is_the_built_network(own):
    space, data = load_space(own), load_data("digits", val_share=0.2)
    found = task(own).recipe
    net = make_supernet(space, found, data, seed=0)
    images = data.normalize(data.val.images[:9])
    for arch in space:
        net.select(space.select(arch))
        built = space.build(arch, in_channels=1, num_classes=10, **network_scale(space, found))
        missing, unexpected = built.load_state_dict(selected_state_dict(net.network), strict=False)
        assert not unexpected
        assert all(key in ("layer.0.weight", "layer.0.bias") for key in missing)  # no weights: 1 and 0 in the built one
        torch.testing.assert_close(net.train()(images), built.train()(images))
    net.release()
    assert 0 <= path_accuracy(net, space.select(arch), data, recalibration=(1, 20))["acc"] <= 100
    identity = space.select(space.decode("stem=conv1,layer=evonorm-s0,block=Identity,act=relu"))
    assert skip_share(net, identity) == pytest.approx(1 / 4)


def test_a_normalisation_that_is_a_candidate_keeps_its_weights(own):
    net = make_supernet(load_space(own), task(own).recipe, load_data("digits"), seed=0).network
    inner, _, whole = net.layer.candidates
    assert inner[0].weight is None
    assert whole.weight is not None


# -- the commands --------------------------------------------------------------------------------------------------


def test_from_the_search_to_exported_programs(own, nas):
    small = ["--images", 40, "--epochs", 1, "--set", "batch_size=16", "--set", "drop_last=True", "--set", "channels=4"]
    command = ["supernet", "search", "--recipe", "darts-v1", "--space", own, "--scale", "tiny", "--out", "run", *small]
    status, out, err = nas(*command, "--json")
    assert status == 0, err
    arch = json.loads(out)["arch"]
    status, out, err = nas("resume", "run", "--json")
    assert status == 0, err
    assert json.loads(out)["arch"] == arch
    status, _, err = nas("train", "run:best", "--data", "digits", "--epochs", 1, "--out", "trained", "--json")
    assert status == 0, err
    status, out, err = nas("export", "trained:best", "--to", "model.pt2", "--json")
    assert status == 0, err
    assert json.loads(out)["arch"] == arch

    from nas.training.trained import load_trained

    images = torch.randn(5, 1, 8, 8)
    program = torch.export.load("model.pt2").module()
    torch.testing.assert_close(program(images), load_trained("trained:best").model(images))
    status, _, err = nas("export", "run:best", "--to", "other.py")
    assert status == 2
    assert "net_of_a_user.Net" in err
    assert ".pt2" in err
    assert ".onnx" in err


def test_a_module_of_known_parts_is_written_as_source(own):
    space = load_space(own.replace("Net", "cells"))
    built = space.build(space.decode("stem=frn-tlu,act=mish"), in_channels=1).eval()
    text = network_source(built)
    assert "nn.Mish()" in text
    assert "search_spaces" not in text
    names: dict = {"__name__": "written"}
    exec(compile(text, "written", "exec"), names)
    written = names["Network"]().eval()
    written.load_state_dict(built.state_dict())
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(written(images), built(images))


@pytest.mark.slow
def test_evolution_by_training(own, nas):
    command = ["search", "--space", own, "--evaluator", "train", "--set", "epochs=1", "--queries", 3, "--no-cache"]
    status, out, err = nas(*command, "--out", "run", "--json")
    assert status == 0, err
    assert load_space(own).decode(json.loads(out)["best"]["arch"])


# -- bad input -----------------------------------------------------------------------------------------------------


def test_recipes_that_need_edges_are_refused(own, nas):
    status, _, err = nas("supernet", "search", "--recipe", "pc-darts", "--space", own, "--scale", "tiny")
    assert status == 2
    assert "pc-darts" in err
    assert "<cell>_<source>_<node>" in err


class Raises(nn.Module):
    def forward(self, x):
        raise IndexError("no such thing")


@pytest.mark.parametrize(
    ("candidates", "named"),
    [
        ([nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 1)], r"op=Conv2d \(candidate 1\) gives \[2, 2, 8, 8\].*\[2, 2, 6, 6\]"),
        ([nn.Identity(), nn.Conv2d(3, 1, 1)], r"op=Conv2d \(candidate 1\).*takes inputs of \[2, 1, 8, 8\]"),
        ([nn.GELU(), nn.ReLU(inplace=True)], r"op=ReLU \(candidate 1\).*inplace=False"),
        ([nn.ReLU(), Raises()], r"op=Raises \(candidate 1\).*no such thing"),
        ([nn.Identity(), nn.Sequential(Choice([nn.ReLU(), nn.MaxPool2d(2)], "in"))], r"in=MaxPool2d \(candidate 1\)"),
    ],
)
def test_candidates_that_do_not_fit_are_named(candidates, named, tmp_path, monkeypatch):
    (tmp_path / "net_that_does_not_fit.py").write_text("make = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    import net_that_does_not_fit

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.op, self.head = Choice(candidates, "op"), nn.LazyLinear(10)

        def forward(self, x):
            return self.head(self.op(x).flatten(1))

    monkeypatch.setattr(net_that_does_not_fit, "make", Net)
    with pytest.raises(UserError, match=named):
        search_run(task("net_that_does_not_fit:make"), tmp_path / "run")


def test_checking_leaves_the_network_alone_and_finds_what_never_runs():
    network = nn.Sequential(Choice([nn.BatchNorm2d(1), nn.Dropout()], "op")).train()
    state = torch.random.get_rng_state()
    check_candidates(network, (1, 4, 4))
    assert network[0].candidates[0].num_batches_tracked == 0
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(part.training for part in network.modules())
    assert not network[0]._forward_pre_hooks
    network[0].other = Choice([nn.ReLU(), nn.GELU()], "never")
    with pytest.raises(UserError, match="'never': expected the label of a Choice that the module's forward runs"):
        check_candidates(network, (1, 4, 4))
    with pytest.raises(UserError, match="images of 3x4x4"):
        check_candidates(nn.Sequential(nn.Conv2d(1, 1, 1)), (3, 4, 4))


def test_a_space_without_a_path_is_searched_from_python():
    space = ModuleSpace(lambda: nn.Sequential(Choice([nn.ReLU(), nn.GELU()], "act"), nn.Flatten(), nn.Linear(64, 10)))
    net = make_supernet(space, task("darts").recipe, load_data("digits"), seed=0)
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert network_scale(space, task("darts").recipe) == {}


def test_an_architecture_with_layers_is_built_in_its_space_with_layers():
    text = "|none~0|+|none~0|none~1|+|nor_conv_1x1~0|none~1|none~2| # norm=group-norm act=gelu"
    build = Build(scale={"channels": 4, "cells_per_stage": 1})
    for space in ("nas-bench-201", "nas-bench-201+norm=batch-norm,group-norm+act=relu,gelu"):
        model = named_architecture(space, text, build).model
        assert any(isinstance(part, nn.GroupNorm) for part in model.modules())
        assert any(isinstance(part, nn.GELU) for part in model.modules())
