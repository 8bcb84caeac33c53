"""`nas evaluate` as its users meet it, on a training of two epochs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from nas.cli.app import app
from nas.cli.evaluate import evaluate as command
from nas.training.recipe import Recipe
from nas.training.runs import train_run
from nas.training.task import Task
from nas.training.trained import load_trained


def train(folder: Path, **settings) -> str:
    arch = "|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|none~1|nor_conv_1x1~2|"
    scale = {"channels": 4, "cells_per_stage": 1}
    train_run(Task(Recipe(batch_size=64, **settings), space="nas-bench-201", arch=arch, network=scale), folder)
    return str(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    """The folder of a finished training on the digits."""
    return train(tmp_path_factory.mktemp("evaluate") / "run", epochs=2, batch_statistics=False)


@pytest.fixture
def nas(nas):
    """`nas` with the command, which the application takes up by one line."""
    if not any(known.name == "evaluate" for known in app.registered_commands):
        app.command("evaluate")(command)
    return nas


def as_json(result) -> dict:
    status, out, err = result
    assert status == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


def test_json_agrees_with_the_model(nas, trained):
    found = as_json(nas("evaluate", trained, "--on", "test", "--no-compile", "--attack", "fgsm:count=50", "--json"))
    loaded = load_trained(trained)
    part = loaded.data.test
    with torch.no_grad():
        logits = loaded.model(loaded.data.normalize(part.images))
    assert found["command"] == "evaluate"
    assert found["warnings"] == []
    assert found["run"] == trained
    assert found["on"] == "test"
    assert found["accuracy"] == pytest.approx(100 * (logits.argmax(1) == part.labels).float().mean().item())
    assert found["accuracy"] == pytest.approx(loaded.metrics["test_acc"])
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(logits, part.labels).item(), rel=1e-5)
    assert found["count"] == len(part) == sum(map(sum, found["confusion"]))
    assert found["robustness"]["count"] == 50
    assert found["robustness"]["accuracy"] <= found["robustness"]["clean_accuracy"]
    assert [(t["mode"], t["batch_size"]) for t in found["timings"]] == [("eager", 1), ("eager", 64)]


def test_the_table(nas, trained):
    status, out, err = nas("evaluate", f"{trained}:best", "--no-latency", "--attack", "pgd:steps=2")
    assert status == 0, err
    assert "latency" not in out
    lines = [line.split("  ")[0] for line in out.splitlines()]
    for name in ("accuracy", "top-5 accuracy", "under pgd", "calibration error", "multiply-adds", "most confused"):
        assert name in lines
    assert "pgd, epsilon 8/255, 2 steps of 2/255" in out
    first = as_json(nas("evaluate", trained, "--no-latency", "--attack", "pgd:steps=2", "--json", "--seed", "3"))
    again = as_json(nas("evaluate", trained, "--no-latency", "--attack", "pgd:steps=2", "--json", "--seed", "3"))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert first["timings"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--attack", "pdg"), "did you mean 'pgd'"),
        (("--on", "tset"), "did you mean 'test'"),
        (("--device", "cpuu"), "did you mean 'cpu'"),
        (("--batch-size", "0"), "at least 1"),
    ],
)
def test_wrong_usage_is_one_line(nas, trained, options, message):
    status, out, err = nas("evaluate", trained, "--no-latency", *options)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_no_run(nas):
    status, _, err = nas("evaluate", "no-such-run")
    assert status == 2
    assert "no-such-run" in err


def test_other_statistics_than_in_the_training_are_said(nas, tmp_path):
    run = train(tmp_path / "run", epochs=1, batch_statistics=True)
    found = as_json(nas("evaluate", run, "--on", "test", "--no-latency", "--json"))
    assert any("running statistics" in text for text in found["warnings"])
    assert found["accuracy"] != load_trained(run).metrics["test_acc"]
