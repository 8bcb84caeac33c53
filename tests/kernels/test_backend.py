"""Where kernels run: what is installed, devices, types; without Triton, without torch, without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import backend
from search_spaces.common.errors import UserError

ROOT = Path(__file__).parents[2]


def fresh(code: str, **environment: str) -> str:
    """What `code` prints in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    code = """
import sys, kernels
dir(kernels)
print([name for name in ("torch", "triton", "numpy") if name in sys.modules])
kernels.fuse, kernels.FusedLayer
import kernels.operators, kernels.handwritten
print([name for name in ("torch", "triton") if name in sys.modules])
"""
    assert fresh(code).splitlines() == ["[]", "['torch']"]


def test_every_public_name():
    for name in kernels.__all__:
        assert getattr(kernels, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        kernels.no_such_name  # noqa: B018


HIDDEN = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
sys.modules["triton"] = None
import torch, kernels
from torch import nn
from search_spaces.layers import catalog
from search_spaces.layers.module import GraphLayer
torch.manual_seed(0)
model = nn.Sequential(GraphLayer(catalog.layer("evonorm-s0"), 4), nn.GroupNorm(2, 4), nn.SiLU())
x = torch.randn(2, 4, 3, 3)
for name in ("auto", "reference"):
    fused = kernels.fuse(model, backend=name)
    assert fused.count == 2
    fused.model(x).sum().backward()
    torch.testing.assert_close(fused.model(x), model(x))
try:
    kernels.fuse(model, backend="triton")
except kernels.Unsupported.__mro__[1] as error:
    print(error)
"""


@pytest.mark.parametrize("interpret", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_everything_runs_without_triton(interpret):
    found = fresh(HIDDEN, TRITON_INTERPRET=interpret)
    assert found == "'triton': expected a process in which Triton kernels can run (Triton is not installed);" + (
        " did you mean 'auto'?"
    )


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert backend.compiler() is None
    monkeypatch.setattr(backend, "COMPILER", backend.compiler())
    monkeypatch.setattr(backend, "HAVE_TRITON", True)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "no C compiler" in backend.obstacle()
    with pytest.raises(UserError, match="gcc"):
        backend.resolve("triton")
    on_gpu = type("OnGpu", (), {"dtype": torch.float32, "device": torch.device("cuda"), "is_cuda": True})()
    assert not backend.by_kernels(on_gpu)
    assert backend.resolve("auto") == "auto"
    monkeypatch.setenv("CC", "/opt/cc")
    monkeypatch.setattr(backend, "COMPILER", backend.compiler())
    assert backend.obstacle() == ""
    assert backend.by_kernels(on_gpu)


def test_where_kernels_run(monkeypatch):
    x = torch.zeros(2)
    monkeypatch.setattr(backend, "HAVE_TRITON", True)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    assert not backend.by_operator(x, "auto")
    assert backend.by_operator(x, "reference")
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert backend.obstacle() == ""
    for name in ("auto", "triton"):
        assert backend.by_operator(x, name)
        assert backend.by_operator(x.half(), name)
        assert not backend.by_operator(x.double(), name)
    assert not backend.by_operator(x, "eager")
    assert not backend.by_kernels(x.to("meta"))


def test_names_of_backends():
    assert backend.resolve("Reference") == "reference"
    with pytest.raises(UserError, match="eagr.*did you mean 'eager'"):
        backend.resolve("eagr")


def test_recomputing_is_seen_inside_a_backward_alone():
    seen = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(backend.recomputing())
            return gradient

    Looks.apply(torch.ones(1, requires_grad=True)).backward()
    assert seen == [True]
    assert not backend.recomputing()


@pytest.mark.parametrize("x", [None, "x", torch.ones(2, dtype=torch.int8), torch.ones(2, 2).to_sparse()], ids=str)
def test_what_is_no_dense_floating_tensor(x):
    with pytest.raises(UserError, match="dense tensor"):
        backend.check_dense(x)
