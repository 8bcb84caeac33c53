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


def check(least: dict[str, int]) -> None:
    """All checks that `generated_interpreted.py` prints hold, and of each part there are at least so many."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(ROOT / "tests" / "support" / "generated_interpreted.py"), *least]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    checks: list[list[dict]] = []
    for line in map(json.loads, done.stdout.splitlines()):
        if "part" in line:
            checks.append([])
        else:
            checks[-1].append(line)
    assert not [line for part in checks for line in part if not line["error"] <= line["bound"]]
    counts = dict(zip(least, map(len, checks), strict=True))
    assert {part: counts[part] >= number for part, number in least.items()} == dict.fromkeys(least, True), counts


GRAPHS = {"graphs:5:1": 100}  # 20 random graphs: so many of each of four sets of operations


@pytest.mark.parametrize(
    "parts",
    [
        {"layers": 320},
        {**GRAPHS, "tokens": 100, "inputs": 19, "operations": 120},
        {"schedules": 60, "traps": 120, "non_finite": 25},
    ],
    ids=", ".join,
)
def test_parts(parts):
    check(parts)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_many_random_graphs(seed):
    check({f"graphs:34:{seed}": 650})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "least"),
    [("layers", 1100), ("tokens", 180), ("schedules", 350), ("traps", 380), ("non_finite", 70)],
)
def test_the_whole_of_a_part(part, least):
    check({f"{part}:full": least})
