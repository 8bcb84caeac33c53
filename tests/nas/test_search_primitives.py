"""A search over cells, normalisations and activations, each candidate trained on images."""

from __future__ import annotations

import sys

import pytest
import torch

from nas.loop import search
from nas.training.data import load_data
from nas.training.evaluator import train_evaluator
from search_spaces.registry import load_space

MODULE = """
from search_spaces import load_space, with_layers

SPACE = with_layers(
    load_space("nas-bench-201"), norms=["batch-norm", "rms-norm", "power-norm"], acts=["relu", "crrelu", "xielu"]
)
"""


@pytest.fixture
def product(tmp_path, monkeypatch):
    """`package.module:object` of three normalisations and three activations around NAS-Bench-201."""
    (tmp_path / "layered_cells.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path / "home"))
    yield "layered_cells:SPACE"
    sys.modules.pop("layered_cells", None)


def test_cells_with_their_primitives_are_searched_by_training(product):
    space = load_space(product)
    scale = {"channels": 4, "cells_per_stage": 1}
    recipe = {"epochs": 2, "batch_size": 128, "warmup_epochs": 0.0}
    evaluator = train_evaluator(product, changes=recipe, scale=scale)
    settings = {"population": 4, "tournament": 2}
    result = search(
        space, evaluator, "regularized-evolution", budget=8, objectives="val_acc", seed=1, strategy_settings=settings
    )
    done = [record for record in result.records if record.status == "done"]
    assert len(done) == 8
    archs = [space.decode(record.arch) for record in done]
    assert len({(arch.norm, arch.act) for arch in archs}) >= 3
    assert result.best.metrics["val_acc"] == max(record.metrics["val_acc"] for record in done)
    assert result.best.metrics["val_acc"] > 25  # chance is 10

    best = result.best.arch
    network = space.build(space.decode(best) if isinstance(best, str) else best, in_channels=1, **scale)
    assert result.best.metrics["params"] == sum(parameter.numel() for parameter in network.parameters())
    assert network(torch.zeros(2, *load_data("digits").shape)).shape == (2, 10)


def test_one_architecture_trains_differently_with_each_primitive(product):
    space = load_space(product)
    recipe = {"epochs": 1, "batch_size": 256, "warmup_epochs": 0.0}
    evaluator = train_evaluator(product, changes=recipe, scale={"channels": 4, "cells_per_stage": 1})
    cell = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|skip_connect~0|none~1|nor_conv_1x1~2|"
    found = {
        (norm, act): evaluator.evaluate(space.decode(f"{cell} # norm={norm} act={act}"), seed=0)["val_loss"]
        for norm, act in (
            ("batch-norm", "relu"),
            ("batch-norm", "xielu"),
            ("rms-norm", "relu"),
            ("power-norm", "crrelu"),
        )
    }
    assert len(set(found.values())) == len(found)
