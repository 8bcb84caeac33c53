"""Numbers and layouts that break careless kernels, by hypothesis: operators by torch here, kernels in a process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trapped_layers

ROOT = Path(__file__).parents[2]


def test_operators_by_torch():
    trapped_layers.check_many(40, "reference")


def test_every_kind_of_trap_is_one():
    """The numbers are what their names say, and strides what their forms say."""
    make = trapped_layers.Trap
    drawn = {
        kind: make("batch-norm", kind, (3, 4, 5), torch.float32, "sliced", "expanded", None, True, 1).draw()
        for kind in trapped_layers.KINDS
    }
    numbers = {kind: x for kind, (x, _) in drawn.items()}
    assert numbers["mean far above the deviation"].mean() > 5 * numbers["mean far above the deviation"].std()
    assert len(numbers["constant channels"][:, ::2].unique()) == 1 < len(numbers["constant channels"][:, 1].unique())
    assert not numbers["zeros"].any()
    assert numbers["a spike"].abs().max() > 2 * numbers["a spike"].abs().flatten().sort().values[-2]
    assert 0 < numbers["tiny"].abs().max() < 1e-10
    assert 2e4 < numbers["the range of half"].abs().max() < 65504
    assert not any(x.is_contiguous() for x in numbers.values())
    assert all(set(dy.stride()) == {0} for _, dy in drawn.values())


def interpreted(examples: int) -> None:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(ROOT / "tests" / "support" / "trapped_layers.py"), str(examples)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "traps hold" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("examples", [24, pytest.param(600, marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(examples):
    interpreted(examples)
