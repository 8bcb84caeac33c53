"""`nas export` as its users meet it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch

from nas.cli import app as application
from nas.cli import export as command
from search_spaces.layers.catalog import layer
from search_spaces.layers.module import GraphLayer
from search_spaces.registry import load_space

CELL = "|nor_conv_3x3~0|+|nor_conv_3x3~0|none~1|+|skip_connect~0|nor_conv_1x1~1|avg_pool_3x3~2|"
TINY = ("--scale", "channels=4", "--scale", "cells_per_stage=1", "--size", "8")
KEYS = {"command", "version", "seed", "seconds", "warnings", "files", "params", "verified", "verification"}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    commands = application.app.registered_commands
    if not any(entry.name == "export" for entry in commands):
        monkeypatch.setattr(application.app, "registered_commands", list(commands))
        application.app.command("export")(command.export)


def as_json(result) -> dict:
    status, out, err = result
    assert status == 0, err
    assert out.count("\n") == 1
    found = json.loads(out)
    assert set(found) >= KEYS
    assert found["verified"] is True
    return found


def test_an_architecture_by_name(nas, tmp_path, importable):
    runtime = importable("onnxruntime")
    words = ("--space", "nas_bench_201", "--arch", CELL, *TINY, "--layer", "evonorm-s0", "--num-classes", "7")
    found = as_json(nas("export", *words, "--to", "net.onnx", "--seed", "3", "--json"))
    assert found["files"] == ["net.onnx", "net.md"]
    assert found["seed"] == 3
    assert found["trained"] is False
    graph = layer("evonorm-s0")
    torch.manual_seed(3)
    space = load_space("nas-bench-201")
    expected = space.build(
        space.decode(CELL),
        norm=lambda c: GraphLayer(graph, c),
        act=lambda c: torch.nn.Identity(),
        num_classes=7,
        channels=4,
        cells_per_stage=1,
    ).eval()
    assert found["params"] == sum(p.numel() for p in expected.parameters())
    x = torch.randn(7, 3, 8, 8)  # not a size that verification tries
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("x", ["batch", 3, 8, 8])]
    out = session.run(["output"], {"x": x.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(out, expected(x).numpy(), rtol=1e-4, atol=1e-5)
    train = shlex.split(found["train_command"])
    assert train[:2] == ["nas", "train"]
    assert train[train.index("--arch") + 1] == CELL
    assert train[train.index("--layer") + 1] == "evonorm-s0"
    assert found["train_command"] in (tmp_path / "net.md").read_text()


def test_a_find_of_a_search(nas, tmp_path):
    search = (
        "--evaluator",
        "small_space:score",
        "--space",
        "nas-bench-201",
        "--objectives",
        "val_acc",
        "--queries",
        "12",
    )
    assert nas("search", *search, "--strategy", "random-search", "--out", "run")[0] == 0
    best = json.loads(nas("show", "run:best", "--json")[1])
    status, out, err = nas("export", "run:best", *TINY, "--to", "net.py")
    assert (status, err) == (0, "")
    line = next(line for line in out.splitlines() if "train it with" in line)
    words = "nas train run:best --data cifar10 --scale channels=4 --scale cells_per_stage=1"
    assert line == f"the weights are random; train it with: {words}"
    card = (tmp_path / "net.md").read_text()
    assert f"`{best['arch']}`" in card
    assert f"val acc (%):** {best['metrics']['val_acc']:g}\n" in card
    assert "they are not of the weights in this export" in card
    assert f"`run, trial {best['trial']}`" in card
    again = nas("export", "run:best", *TINY, "--to", "net.py")
    assert again[0] == 2
    assert "a file that does not exist (--force replaces it)" in again[2]


def test_a_trained_network_with_its_weights(nas, tmp_path):
    from nas.training.recipe import Recipe
    from nas.training.runs import train_run
    from nas.training.task import Task
    from nas.training.trained import load_trained

    scale = {"channels": 4, "cells_per_stage": 1}
    recipe = Recipe(steps=3, batch_size=16)
    task = Task(recipe, space="nas-bench-201", arch=CELL, network=scale, act="silu", data="digits")
    train_run(task, "run")
    found = as_json(nas("export", "run", "--to", "net.py", "--json"))
    assert found["files"] == ["net.py", "net.safetensors", "net.md"]
    assert found["trained"] is True
    assert found["run"] == "run"
    assert found["verification"]["gradient_error"] <= 1e-4
    trained = load_trained("run:best")
    x = torch.randn(2, *trained.data.shape)
    torch.save(x, "x.pt")
    program = (
        "import torch, net; torch.save(net.load_network().eval()(torch.load('x.pt', weights_only=True)).detach(), 'y')"
    )
    blocked = "import sys; sys.modules['search_spaces'] = sys.modules['nas'] = None\n"
    subprocess.run([sys.executable, "-c", blocked + program], cwd=tmp_path, check=True, timeout=60)
    torch.testing.assert_close(torch.load("y", weights_only=True), trained.model(x).detach(), rtol=1e-5, atol=1e-5)
    card = (tmp_path / "net.md").read_text()
    assert f"val acc (%):** {trained.metrics['val_acc']:.5g}\n" in card
    assert re.search(r"mean 0\.\d+ and std 0\.\d+", card)
    status, _, err = nas("export", "run", "--to", "other.pt2", "--act", "relu")
    assert status == 2
    assert "--act" in err


BAD = {
    "no target": (["--space", "nas-bench-201", "--arch", CELL], "--to"),
    "no subject": (["--to", "net.py"], "--space"),
    "two subjects": (["run", "--space", "darts", "--arch", "x", "--to", "net.py"], "--space"),
    "no architecture": (["--space", "nas-bench-201", "--to", "net.py"], "--arch"),
    "architecture alone": (["run", "--arch", CELL, "--to", "net.py"], "--space and --arch together"),
    "suffix": (["--space", "nas-bench-201", "--arch", CELL, "--to", "net.onxx"], "did you mean 'net.onnx'"),
    "space": (["--space", "nas-bench-21", "--arch", CELL, "--to", "net.py"], "did you mean 'nas-bench-201'"),
    "norm": (["--space", "nas-bench-201", "--arch", CELL, "--norm", "batchnorm", "--to", "net.py"], "'batch-norm'"),
    "act": (["--space", "nas-bench-201", "--arch", CELL, "--act", "sillu", "--to", "net.py"], "'silu'"),
    "layer and act": (
        ["--space", "nas-bench-201", "--arch", CELL, "--layer", "gn-silu", "--act", "relu", "--to", "net.py"],
        "not both",
    ),
    "layers twice": (
        ["--space", "nas-bench-201", "--arch", f"{CELL} # norm=identity act=relu", "--act", "silu", "--to", "net.py"],
        "options for these",
    ),
    "scale": (
        ["--space", "nas-bench-201", "--arch", CELL, "--scale", "channel=4", "--to", "net.py"],
        "did you mean 'channels'",
    ),
    "classes": (["--space", "nas-bench-201", "--arch", CELL, "--num-classes", "0", "--to", "net.py"], "positive"),
    "size of a graph": (
        ["--space", "nas-bench-graph", "--arch", "0,1,2,2:gcn,sage,gin,gin", "--size", "8", "--to", "g.py"],
        "--size",
    ),
    "run": (["nowhere:best", "--to", "net.py"], "nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(nas, tmp_path, name):
    words, message = BAD[name]
    status, out, err = nas("export", *words)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert not [p for p in tmp_path.iterdir() if p.suffix]


def test_a_run_over_layers_has_a_command_of_its_own(nas, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text(json.dumps({"format": 1, "kind": "layers"}))
    status, _, err = nas("export", "run:best", "--to", "net.py")
    assert status == 2
    assert "nas layers export run:best --to FILE" in err


def test_the_notation_of_with_layers():
    from nas.export.subject import Build, named_architecture

    build = Build(scale={"channels": 4, "cells_per_stage": 1}, size=8)
    subject = named_architecture("nas-bench-201", f"{CELL} # norm=group-norm act=silu", build)
    kinds = {type(module).__name__ for module in subject.model.modules()}
    assert {"GroupNorm", "SiLU"} <= kinds
    assert not {"BatchNorm2d", "ReLU"} & kinds
    assert subject.card.arch == CELL
    assert subject.card.training is not None
    assert subject.card.training.endswith("--norm group-norm --act silu --scale channels=4 --scale cells_per_stage=1")
    space = load_space("nas-bench-201")
    assert subject.card.macs == space.cost(space.decode(CELL), input_size=8, channels=4, cells_per_stage=1)["macs"]


def test_graph_networks_know_their_features():
    from nas.export.subject import Build, named_architecture

    subject = named_architecture("nas-bench-graph", "0,1,2,2:gcn,sage,gin,gin", Build(in_channels=6))
    assert subject.example[0].shape[1] == 6
    assert subject.model.eval()(*subject.example).shape[0] == len(subject.example[0])
    assert subject.card.training is None  # trainings are of images
    assert named_architecture("nas-bench-graph", "0,1,2,2:gcn,sage,gin,gin", Build()).example[0].shape[1] == 1433
