"""Compiled programs: what is remembered, and what is refused where no kernel can run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels import cache, runtime
from kernels.lower import lower
from kernels.nodes import Unsupported
from kernels.schedule import Shape
from search_spaces.common.errors import UserError
from search_spaces.layers import catalog

pytest.importorskip("triton")
SHAPE = Shape(4, 8, 32, 2)


def program(**settings):
    return lower(catalog.layer("gn-silu", groups=2, **settings)).program


def test_programs_of_one_structure_share_their_kernels():
    graph = catalog.layer("gn-silu", groups=2)
    other = replace(graph, nodes=tuple(replace(n, eps=0.5) if n.eps else n for n in graph.nodes))
    one, two = lower(graph).program, lower(other).program
    assert one != two
    assert runtime.compile_program(one, SHAPE) is runtime.compile_program(two, SHAPE)
    assert runtime.compile_program(one, SHAPE) is not runtime.compile_program(one, replace(SHAPE, n=5))
    functions = [
        [call.function for call in runtime.compile_program(one, shape).calls] for shape in (SHAPE, replace(SHAPE, n=5))
    ]
    assert functions[0] == functions[1], "another batch size needs no other text"


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(runtime, "REMEMBERED", 3)
    monkeypatch.setattr(runtime, "_COMPILED", {})
    first = runtime.compile_program(program(), SHAPE)
    for n in range(5, 7):
        runtime.compile_program(program(), replace(SHAPE, n=n))
    assert runtime.compile_program(program(), SHAPE) is first  # used again: the newest now
    runtime.compile_program(program(), replace(SHAPE, n=7))
    assert len(runtime._COMPILED) == 3
    assert runtime.compile_program(program(), SHAPE) is first


def test_sources_are_files_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path))
    runtime._functions.cache_clear()
    runtime.compile_program(program(), replace(SHAPE, n=11))
    (path,) = cache.entries()
    assert "tl.load" in path.read_text()


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_without_a_device_kernels_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(4, 8, 32)
    given = {"x": x, "weight": torch.ones(8), "bias": torch.ones(8)}
    with pytest.raises(Unsupported, match="cpu"):
        runtime.run(program(), given, groups=2)
    for bad in (x.double(), x.int(), x.bool()):
        with pytest.raises(Unsupported, match="type"):
            runtime.run(program(), {**given, "x": bad}, groups=2)
    for bad in (x[0], x.to_sparse(), torch.quantize_per_tensor(x, 1.0, 0, torch.qint8)):
        with pytest.raises(UserError, match="dense"):
            runtime.run(program(), {**given, "x": bad}, groups=2)
    with pytest.raises(UserError, match="x"):
        runtime.run(program(), {"weight": torch.ones(8)}, groups=2)


def test_large_samples_are_refused_before_anything_is_allocated():
    with pytest.raises(Unsupported, match=r"2\^31"):
        runtime.compile_program(program(), Shape(1, 1 << 12, 1 << 19, 2))
    with pytest.raises(Unsupported, match=r"2\^31"):
        runtime.compile_program(program(), Shape(1 << 20, 1 << 12, 2, 2))
    last, many = Shape(1, 1 << 12, 1 << 19, 2, True), Shape(1 << 12, 1 << 10, 1 << 10, 2)
    for shape in (last, many, Shape(1 << 22, 1 << 10, 1)):  # 2^31 elements and more
        assert runtime.compile_program(program(), shape).plan.launches


def test_importing_the_generator_imports_no_triton():
    code = "import sys, kernels.runtime, kernels.schedule, kernels.aot; assert 'triton' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
