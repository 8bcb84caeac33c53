"""The GPU benchmark: that it runs with torch, triton and numpy alone, and what it makes of its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import timing

ROOT = Path(__file__).parents[2]
ALONE = """
import runpy, sys
for name in ("platformdirs", "scipy", "sklearn", "rich", "typer", "matplotlib", "pyarrow", "safetensors", "nas",
             "torch_geometric", "zero_cost", "predictors"):
    sys.modules[name] = None
sys.argv = ["speed", "--dry-run", "--json", sys.argv[1], "--graphs", "2"]
runpy.run_module("benchmarks.speed.speed_kernels_gpu", run_name="__main__")
"""


@pytest.mark.parametrize("interpret", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_dry_run_needs_nothing_else(tmp_path, interpret, importable):
    importable("triton")
    path = tmp_path / "figures.json"
    sections = ["--sections", "copy,layers,rows,graphs,memory"] if interpret == "0" else ["--sections", "graphs"]
    code = ALONE.replace('"--graphs", "2"]', f'"--graphs", "2", *{sections!r}]')
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the times mean nothing" in done.stdout
    assert "%" not in done.stdout  # no fraction of any bandwidth
    assert "eager time by fused" not in done.stdout
    found = json.loads(path.read_text())
    assert len(found["graphs"]) == 2
    if interpret == "0":
        memory = {name: figures["kept_bytes"] for name, figures in found["memory"].items()}
        assert memory["evonorm-s0 fused"] < 1.1 * memory["bn-relu eager"] < memory["evonorm-s0 eager"]
        assert {row["provider"] for row in found["rows"]} == {"eager", "fused"}


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    command = [sys.executable, "-m", "benchmarks.speed.speed_kernels_gpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0
    assert done.stdout.startswith("nothing measured: ")
    assert len(done.stdout.splitlines()) == 1


def test_what_it_makes_of_its_figures():
    from benchmarks.speed import speed_kernels_gpu as speed

    machine = speed.Machine(torch.device("cpu"), False, 2, copy=4e12)
    assert speed.rate(machine, 2 * 10**9, 1.0) == 0.5  # 2 GB in a millisecond of 4 GB
    x = torch.zeros(8, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    times = {"fused": {"forward_ms": 1.0, "backward_ms": 2.0}}
    (row,) = speed.rows_of(machine, "evonorm-s0", x, times, (2, 3))
    assert row["layout"] == "channels last"
    assert row["forward_of_copy"] == pytest.approx(2 * 3200 / 1e-3 / 4e12)
    assert row["backward_of_copy"] == pytest.approx(3 * 3200 / 2e-3 / 4e12)
    common = {"layer": "evonorm-s0", "shape": "a", "layout": "contiguous", "bytes": 60e6}
    layers = [
        {**common, "provider": "fused", "both_ms": 2.0, "forward_of_copy": 0.9, "backward_of_copy": 0.7},
        {**common, "provider": "eager", "both_ms": 8.0, "forward_of_copy": 0.1, "backward_of_copy": 0.1},
    ]
    graphs = [
        {"compile_ms": c, "fused_ms": f, "compile_first_seconds": 9.0, "fused_first_seconds": 3.0}
        for c, f in ((8.0, 2.0), (1.0, 4.0))
    ]
    memory = {"bn-relu eager": {"peak_bytes": 10.0}, "evonorm-s0 fused": {"peak_bytes": 10.5}}
    results = {"about": {"dry_run": False}, "layers": layers, "graphs": graphs, "memory": memory}
    found = {what: measured for what, measured, _ in speed.targets(results)}
    assert found["forward above 50 MB, of the copy"].startswith("90%")
    assert found["backward above 50 MB, of the copy"].startswith("70%")
    assert found["EvoNorm, eager time by fused"].startswith("4.00")
    assert found["random graphs, torch.compile's time by fused"] == "1.00, least 0.25, 1 of 2 lost"
    assert found["the same until the first step is done"].startswith("3.00")
    assert found["ResNet step, peak_bytes of EvoNorm-S0 by BN-ReLU"] == "1.05"


def test_times_are_of_what_runs():
    work = {"little": lambda: sum(range(2000)), "much": lambda: sum(range(40000))}
    found = timing.compare(work, torch.device("cpu"), rounds=5)
    assert 8 < found["much"] / found["little"] < 50


@pytest.mark.parametrize("compiled", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_times_until_the_first_launch(importable, compiled):
    importable("triton")
    options = ["--json", "--graphs", "3", "--compiled", str(compiled), "--processes", "1"]
    command = [sys.executable, "-m", "benchmarks.speed.speed_kernels_compile", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {(row["stage"], row["graphs"]): row for row in json.loads(done.stdout)}
    for kind in ("flat", "normalizing"):
        made, known, files = (rows[stage, kind]["median"] for stage in ("text", "in memory", "from files"))
        assert 0 < known < files
        assert known < made
    assert (("cold compile", "normalizing") in rows) == (compiled > 0)
    if compiled:
        assert rows["compiled before", "normalizing"]["mean"] < rows["cold compile", "normalizing"]["mean"]
