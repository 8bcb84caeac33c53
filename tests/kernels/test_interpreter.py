"""Generated kernels in Triton's interpreter, against evaluation and autograd in float64 (processes of their own)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def check(least: int, *arguments: object) -> None:
    """All checks that `generated_interpreted.py` prints hold, and there are at least so many."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(ROOT / "tests" / "support" / "generated_interpreted.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [line for line in found if not line["error"] <= line["bound"]]
    assert len(found) >= least


def test_random_graphs():
    check(100, "graphs", 5, 1)  # of each of four presets


PARTS = {
    "layers": 380,
    "tokens": 100,
    "schedules": 120,
    "traps": 120,
    "non_finite": 40,
    "inputs": 19,
    "operations": 120,
}


@pytest.mark.parametrize(("part", "least"), PARTS.items())
def test_part(part, least):
    check(least, part)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_many_random_graphs(seed):
    check(650, "graphs", 34, seed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "least"),
    [("layers", 1100), ("tokens", 180), ("schedules", 350), ("traps", 380), ("non_finite", 70)],
)
def test_the_whole_of_a_part(part, least):
    check(least, part, "full")
