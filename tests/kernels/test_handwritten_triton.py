"""The handwritten Triton kernels without a GPU: in the interpreter, and compiled ahead of time for sm_90."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import handwritten_cases as cases
import pytest
import torch

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

QUICK = ["batch-relu", "group-silu", "row-768", "swiglu", "poly", "sign"]  # one of each family
REST = [
    "powlu",
    "batch-silu-residual-last",
    "batch-gelu-eval",
    "batch-49",
    "group-silu-residual-14",
    "group-last",
    "group-universal",
    "row-8192",
    "row-16384",
    "row-32768",
    "row-65536",
    "row-odd",
    "poly-8192",
    "poly-32768",
    "sign-128",
]
NARROW = {"batch-49", "row-odd", "group-silu-residual-14"}  # no multiple of 16: 7 x 7, 14 x 14, 196


def lines(script: str, arguments: list[str], **environment: str) -> list[dict]:
    """What a script of tests/support prints, run in a process of its own."""
    paths = os.pathsep.join((str(ROOT), str(SUPPORT)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(SUPPORT / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_interpreted(parts: list[str], least: int) -> None:
    found = lines("handwritten_interpreted.py", parts, TRITON_INTERPRET="1")
    wrong = [line for line in found if not line["error"] <= line["bound"]]
    assert not wrong
    assert len(found) >= least


def test_interpreted_kernels_equal_float64():
    check_interpreted(["base", "traps", "low"], 450)


@pytest.mark.slow
def test_long_rows_and_low_precision_interpreted():
    check_interpreted(["slow"], 250)


def check_compiled(cases: list[str], folder: Path) -> dict[tuple[str, str], dict]:
    found = lines("handwritten_compile.py", cases, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(folder))
    assert {line["case"] for line in found} == set(cases)
    for line in found:
        name = f"{line['case']} {line['kernel']}"
        assert line["stack"] == 0, name
        assert line["spills"] == 0, name
        if line["case"] not in NARROW:
            assert any("128" in load for load in line["loads"]), name
            assert line["registers"] <= (255 if line["case"] == "sign-128" else 128), name
    return {(line["case"], line["kernel"]): line for line in found}


def wide_accesses(line: dict) -> tuple[int, int]:
    """How many loads and stores of 128 bits a kernel has."""
    loads, stores = (sum("128" in name for name in line[key]) for key in ("loads", "stores"))
    return loads, stores


def check_gate(found: dict[tuple[str, str], dict], case: str) -> None:
    """One 128-bit access a thread is 8 bfloat16 of its tile: 1024 elements over 128 threads, so one an operand."""
    assert wide_accesses(found[case, "gate_forward"]) == (2, 1), "3 T: gate, value; the result"
    assert wide_accesses(found[case, "gate_backward"]) == (3, 2), "5 T: dy, gate, value; both gradients"


def test_compiles_without_spills_with_wide_loads_and_least_bytes(tmp_path):
    found = check_compiled(QUICK, tmp_path)

    def wide(case: str, kernel: str) -> tuple[int, int]:
        return wide_accesses(found[case, kernel])

    check_gate(found, "swiglu")
    # Tiles of 2048 over 256 threads (1024 over 128 for batches): x once a pass, and nothing else of its size.
    assert wide("batch-relu", "moments") == (1, 0)
    assert wide("batch-relu", "apply") == (1, 1), "with the moments 3 T"
    assert wide("batch-relu", "grad_sums") == (2, 0)
    assert wide("batch-relu", "grad_apply") == (2, 1), "with the sums 5 T"
    # Groups of 4 x 32 x 32 over 256 threads: two accesses an operand.
    assert wide("group-silu", "group_forward") == (2, 2), "2 T"
    assert wide("group-silu", "group_backward") == (4, 2), "3 T"


@pytest.mark.slow
def test_other_shapes_compile_without_spills(tmp_path):
    check_gate(check_compiled(REST, tmp_path), "powlu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*cases.base_cases(), *cases.long_cases(), *cases.trap_cases()], ids=lambda c: c.name)
def test_compiled_kernels_equal_float64_and_repeat(case, dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if dtype == torch.float32 or case.kind == "normal":
        for name, error, bound in cases.errors(case, dtype, device="cuda"):
            assert error <= bound, name
    tensors = [t.cuda() for t in case.draw(dtype)]
    first, second = (cases.outputs_and_gradients(case.ours, tensors) for _ in range(2))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second))
