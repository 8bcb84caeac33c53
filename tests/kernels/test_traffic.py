"""Bytes read off the text of kernels against those that Triton's interpreter sees them load and store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.aot import jobs_of
from kernels.nodes import FULL, C, N, S
from kernels.program import Builder, parse
from kernels.schedule import Shape
from kernels.traffic import accesses, by_schedule, fewest, traffic
from search_spaces.layers import catalog

ROOT = Path(__file__).parents[2]
IMAGES = Shape(128, 256, 784)
# x-sized tensors at the least, by hand: EvoNorm-S0, GroupNorm and activations read x (and dy) once; with statistics of
# the batch everything is read once for these and once more to use them
LEAST = {
    ("evonorm-s0", "forward"): (1, 1),
    ("evonorm-s0", "backward"): (2, 1),
    ("gn-silu", "backward"): (2, 1),
    ("silu", "forward"): (1, 1),
    ("silu", "backward"): (2, 1),
    ("layer-norm", "backward"): (2, 1),
    ("bn-relu", "forward"): (2, 1),
    ("bn-relu", "backward"): (4, 1),
    ("evonorm-b0", "forward"): (2, 1),
    ("evonorm-b0", "backward"): (4, 1),
}
LAYERS = ("evonorm-s0", "gn-silu", "bn-relu", "evonorm-b0", "layer-norm", "silu")
COUNTED = """
import json, sys
import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder as Builder
import triton.language as tl
from kernels import runtime
from kernels.aot import jobs_of
from kernels.program import parse
from kernels.schedule import Shape
from kernels.traffic import by_schedule
from search_spaces.layers import catalog

lanes = {"load": 0, "store": 0}
def counted(name, place):
    plain = getattr(Builder, name)
    def call(self, ptrs, *rest, **names):
        if ptrs.get_element_ty() == tl.float16:  # x and what is like it; all else is float32
            lanes[name.rpartition("_")[2]] += int(np.broadcast_to(rest[place].data, ptrs.data.shape).sum())
        return plain(self, ptrs, *rest, **names)
    setattr(Builder, name, call)
counted("create_masked_load", 0)
counted("create_masked_store", 1)

found = []
for name in sys.argv[1:]:
    shape = Shape(3, 12, 40, last=name == "silu")
    for job in jobs_of(name, catalog.layer(name, groups=3), shape, dtype="float16"):
        program = parse(job.text)
        generator = torch.Generator().manual_seed(0)
        sizes = runtime.compile_program(program, job.shape).spaces
        inputs = {
            n: torch.rand(runtime.shape_of(space, 3, 3, 4, 40), generator=generator) + 0.5
            for n, space in sizes.items()
        }
        for n, space in sizes.items():
            if space == 15:
                inputs[n] = inputs[n].half()
                if shape.last:
                    inputs[n] = inputs[n].transpose(1, 2).contiguous().transpose(1, 2)
        for schedule in by_schedule(program, job.shape):
            lanes.update(load=0, store=0)
            compiled = runtime.compile_program(program, job.shape, schedule=schedule)
            compiled.launch(inputs, program.scalars)
            found.append([name, job.direction, schedule, lanes["load"] / 1440, lanes["store"] / 1440])
print(json.dumps(found))
"""


def programs(name: str, shape: Shape = IMAGES, **settings):
    for job in jobs_of(name, catalog.layer(name, **settings), shape):
        yield job.direction, parse(job.text), job.shape


def test_what_is_counted_is_what_kernels_load_and_store(importable):
    importable("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COUNTED, *LAYERS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {(name, way, kind): (read, written) for name, way, kind, read, written in json.loads(done.stdout)}
    assert {kind for _, _, kind in found} >= {"R", "U"}
    for name in LAYERS:
        shape = Shape(3, 12, 40, last=name == "silu")
        for job in jobs_of(name, catalog.layer(name, groups=3), shape, dtype="float16"):
            for kind, moved in by_schedule(parse(job.text), job.shape).items():
                assert (moved.read, moved.written) == found.pop((name, job.direction, kind)), (
                    name,
                    job.direction,
                    kind,
                )
    assert not found


@pytest.mark.parametrize(("name", "direction"), LEAST)
def test_the_least_is_what_it_is_by_hand(name, direction):
    program, shape = {way: (program, shape) for way, program, shape in programs(name)}[direction]
    assert fewest(program, shape)[:2] == LEAST[name, direction]


def test_smaller_tensors_count_once():
    """EvoNorm-S0 forward: weight, bias, v1 of 256 channels; the sum and the squares of 32 groups of 128 samples."""
    (_, forward, shape), _ = programs("evonorm-s0")
    names = {name for name, _ in forward.outputs} - {"y"}
    saved = 4 * 128 * shape.groups * len(names)
    moved = traffic(forward, shape)
    assert moved.least == 2 * 2 * 128 * 256 * 784 + 4 * 3 * 256 + saved
    assert moved.total == moved.least
    assert moved.launches == 1


def test_most_layers_move_little_more_than_the_least():
    """No schedule moves less than the least; resident and batch kernels at most 2% more."""
    for name in LAYERS:
        for _, program, shape in programs(name):
            for kind, moved in by_schedule(program, shape).items():
                assert moved.total >= moved.least
                if kind == "R" or name in ("bn-relu", "evonorm-b0", "silu"):
                    assert moved.total <= 1.02 * moved.least


def test_a_backward_that_needs_no_x_reads_none():
    builder = Builder()
    program = builder.program({"dx": builder("mul", builder.input("dy", FULL), builder.input("weight", C))})
    assert fewest(program, IMAGES)[:2] == (1, 1)
    chain = builder.input("x", FULL)
    for _ in range(2):  # a statistic of the batch behind another
        chain = builder("sub", chain, builder.sum(builder("square", chain), N | S))
    assert fewest(builder.program({"y": chain}), IMAGES)[:2] == (3, 1)


def test_accesses_are_found_in_loops_and_lines():
    text = (
        "def f(x, y):\n    for i in range(3):\n        a = tl.load(x + i + 1, mask=m, other=0.0)\n    tl.store(y, a)\n"
    )
    assert accesses(text) == [(True, "y"), (False, "x")]
