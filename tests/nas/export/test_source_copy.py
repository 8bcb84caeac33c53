"""Primitives of ours are copied into written files with what they use, whatever their modules are."""

from __future__ import annotations

import builtins
import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import nn

from nas.export.source import network_source
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

HELPERS = '''"""Helpers of primitives."""

from __future__ import annotations

import torch

SLOPE = 0.25


def mean(x: torch.Tensor) -> torch.Tensor:
    """A name that written layers use for something else."""
    return x.mean((2, 3), keepdim=True)


def unused() -> None:
    pass
'''
PRIMITIVES = '''"""Primitives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.common.errors import UserError
from search_spaces.primitives.helpers_for_tests import SLOPE, mean

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = math.sqrt(2.0)


def total(values: Sequence[float]) -> float:
    """Their sum."""
    return sum(values)


class Gate(nn.Module):
    """x * sigmoid(scale * x), leaky."""

    def __init__(self, slope: float = SLOPE, *, powers: tuple[float, ...] = (1.0, 2.0)):
        super().__init__()
        self.slope, self.powers = slope, powers

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope) * torch.sigmoid(x * total(self.powers) / ROOT)


class Centre(nn.Module):
    """Takes off the mean of every channel."""

    def __init__(self, channels: int, groups: int = 1):
        super().__init__()
        if channels < 1:
            raise UserError(channels, "at least one channel")
        self.channels, self.groups = channels, groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.gate = Gate(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x - mean(x)) * self.weight[:, None, None]


class Secret(nn.Module):
    """Hides what it was made with."""

    def __init__(self, channels: int, factor: float):
        super().__init__()
        self._power = factor**2

    def forward(self, x: Tensor) -> Tensor:
        return x * self._power
'''


def run(source: str) -> nn.Module:
    """The network of a written file, which may not import the toolkit."""

    def guarded(name: str, *rest):
        if name.split(".")[0] in ("search_spaces", "nas"):
            raise ModuleNotFoundError(name)
        return __import__(name, *rest)

    space = {"__name__": "written", "__builtins__": {**vars(builtins), "__import__": guarded}}
    exec(compile(source, "written.py", "exec"), space)
    return space["Network"]()


@pytest.fixture
def primitives(tmp_path, monkeypatch):
    """Two modules below search_spaces.primitives, as the toolkit may have them."""
    for name, text in (("helpers_for_tests", HELPERS), ("primitives_for_tests", PRIMITIVES)):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        full = f"search_spaces.primitives.{name}"
        spec = importlib.util.spec_from_file_location(full, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, full, module)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["nas-bench-201", "nas-bench-macro"])
def test_copies(name, primitives, tmp_path):
    space = load_space(name)
    arch = space.from_code(5) if name == "nas-bench-macro" else (3, 1, 2, 4, 3, 0)
    model = space.build(arch, norm=primitives.Centre, act=lambda channels: primitives.Gate(0.5), channels=4)
    source = network_source(model)
    written = run(source)
    written.load_state_dict(model.state_dict(), strict=True)
    for training in (True, False):
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(written.train(training)(x), model.train(training)(x))
    for part in (
        "import math",
        "SLOPE = 0.25",
        "def mean_2(",
        "from collections.abc import Sequence",
        "Gate(slope=0.5)",
    ):
        assert part in source
    for absent in ("unused", "TYPE_CHECKING", "UserError", "Secret", "import search_spaces"):
        assert absent not in source
    (tmp_path / "network.py").write_text(source)
    ruff = [sys.executable, "-m", "ruff"]
    common = ["--isolated", "--line-length", "120", "--no-cache", str(tmp_path / "network.py")]
    for command in (["format", "--diff"], ["check", "--select", "E,F,I,B,UP,SIM,D419"]):
        found = subprocess.run([*ruff, *command, *common], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout
    with pytest.raises(ValueError, match="at least one channel"):
        type(written.stem[1])(0)


def test_defaults_are_not_written(primitives):
    model = load_space("nas-bench-201").build((3,) * 6, act=lambda channels: primitives.Gate())
    assert "self.act = Gate()" in network_source(model)


def test_what_cannot_be_read_back(primitives):
    """A constructor's argument that the module does not keep."""
    model = load_space("nas-bench-201").build((3,) * 6, act=lambda channels: primitives.Secret(channels, 2.0))
    with pytest.raises(UserError, match="Secret"):
        network_source(model)
    assert torch.is_tensor(model(torch.randn(1, 3, 8, 8)))
