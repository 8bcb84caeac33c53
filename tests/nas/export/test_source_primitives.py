"""The written source of a network with each primitive is the network: state, outputs, gradients, running values."""

from __future__ import annotations

import builtins
import copy
import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn

from nas.export.source import network_source
from search_spaces.primitives.registry import ACTIVATIONS, NORMS
from search_spaces.registry import load_space

SPACE = load_space("nas-bench-201")
CELL = SPACE.decode("|nor_conv_3x3~0|+|none~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_1x1~1|none~2|")
TOOLKIT = {"nas", "search_spaces", "zero_cost", "benchmarks", "predictors", "kernels"}
PAIRS = [*itertools.product(["norm"], NORMS), *itertools.product(["act"], ACTIVATIONS)]
SORTS = [  # a function of the sample; own gradients; a wrapped module; two modules; a table of functions; a graph
    ("norm", "rms-norm"),
    ("norm", "power-norm"),
    ("norm", "unified-norm"),
    ("norm", "alpha-bn"),
    ("norm", "prep-bn"),
    ("norm", "adab2n"),
    ("norm", "saturlog-norm"),
    ("norm", "region-norm-l"),
    ("norm", "evonorm-b0"),
    ("act", "crrelu"),
    ("act", "xielu"),
    ("act", "poly-norm"),
    ("act", "hermite-3"),
    ("act", "powlu"),
    ("act", "skan-gelu"),
    ("act", "rerelu"),
]


def build(place: str, name: str) -> nn.Module:
    torch.manual_seed(0)
    factory = {"norm": NORMS, "act": ACTIVATIONS}[place][name]
    model = SPACE.build(CELL, channels=4, cells_per_stage=1, **{place: factory})
    with torch.no_grad():  # away from the start, but not far: polynomials overflow
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03)
    return model.double()


def run(source: str) -> nn.Module:
    def guarded(name: str, *rest):
        if name.split(".")[0] in TOOLKIT:
            raise ModuleNotFoundError(name)
        return __import__(name, *rest)

    space = {"__name__": "written", "__builtins__": {**vars(builtins), "__import__": guarded}}
    exec(compile(source, "written.py", "exec"), space)
    return space["Network"]().double()


def results(model: nn.Module) -> list[torch.Tensor]:
    """Two steps of training, then evaluation."""
    found = []
    for step in range(3):
        model.train(step < 2)
        x = torch.randn(
            4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
        ).requires_grad_()
        out = model(x)
        grads = torch.autograd.grad(out.square().mean(), [x, *model.parameters()], allow_unused=True)
        found += [out.detach(), *(grad for grad in grads if grad is not None)]
    return [*found, *(value.clone() for value in model.state_dict().values())]


def check(place: str, name: str) -> str:
    model = build(place, name)
    source = network_source(model)
    written = run(source)
    assert list(written.state_dict()) == list(model.state_dict())
    written.load_state_dict(model.state_dict())
    wanted = results(copy.deepcopy(model))
    assert all(value.isfinite().all() for value in wanted)
    for own, other in zip(wanted, results(written), strict=True):
        torch.testing.assert_close(other, own, rtol=1e-10, atol=1e-10)
    return source


@pytest.mark.parametrize(("place", "name"), SORTS)
def test_a_primitive_of_each_sort(place, name):
    check(place, name)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "name"), PAIRS)
def test_every_primitive(place, name):
    check(place, name)


def test_the_text_is_clean(tmp_path):
    """By the formatter and the linter, with settings for anybody's code; ours is named nowhere."""
    for place, name in SORTS:
        text = network_source(build(place, name))
        assert not any(f"{package}." in text for package in TOOLKIT - {"nas"})
        (tmp_path / f"{name.replace('-', '_')}.py").write_text(text)
    ruff = [sys.executable, "-m", "ruff"]
    common = ["--isolated", "--line-length", "120", "--no-cache", str(tmp_path)]
    for command in (["format", "--diff"], ["check", "--select", "E,F,I,B,UP,SIM,D419"]):
        found = subprocess.run([*ruff, *command, *common], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout
