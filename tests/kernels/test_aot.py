"""Generated kernels compiled for GPUs that are not here (processes of their own): no spills, wide loads, registers."""

from __future__ import annotations

import functools
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from kernel_cases import random_cases

from kernels.aot import ARCHITECTURES, Job, KernelReport, architecture, compile_jobs, jobs_of, table
from kernels.program import FULL, Builder
from kernels.schedule import Shape
from search_spaces.common.errors import RunError, UserError
from search_spaces.layers import catalog
from search_spaces.layers.formula import parse_formula

pytest.importorskip("triton")
LARGE = Shape(128, 256, 784)
REGISTERS = {1: 255, 2: 255, 4: 255, 8: 255, 16: 128, 32: 64}  # 65536 for a block of at most so many warps
SPILLS = {
    ("layer norm 16384", "backward"),
    ("rms norm 16384", "backward"),
}  # rows of 16,384 channels: 256 bytes at most
LAYER_NORM = "v1 * (x - mean[channel](x)) / std[channel](x) + v0"
TENSORS = {"forward": (1, 1), "backward": (2, 1)}  # of the size of x, that one pass over x reads and writes

CASES = [  # disassembled
    ("evonorm-s0", LARGE),
    ("evonorm-s0", replace(LARGE, s=3136)),
    ("bn-relu", LARGE),
    ("in-relu", replace(LARGE, s=196)),
]
SAMPLE = sorted({"bn-relu", *random.Random(6).sample(sorted(catalog.CATALOG), 4)})  # all of it by `make slow`


def check(reports: list[KernelReport], wide: bool = True) -> None:
    for r in reports:
        name = f"{r.layer} {r.direction} {r.kernel} {r.arch}\n{table([r])}"
        if (r.layer, r.direction) not in SPILLS:
            assert r.stack == r.spills == 0, name
        assert r.registers <= REGISTERS[r.warps], name
        assert r.shared <= 48 << 10, name
        if r.over == "x" and wide and r.loads:
            assert 128 in {**r.loads, **r.stores}, name


def jobs(cases, arch: str = "sm_90") -> list[Job]:
    return [job for name, shape in cases for job in jobs_of(name, catalog.layer(name), shape, arch=arch)]


@functools.cache
def compiled() -> list[KernelReport]:
    return compile_jobs(jobs(CASES))


@functools.cache
def sample() -> list[KernelReport]:
    rows = jobs_of("layer norm", parse_formula(LAYER_NORM, affine=False), Shape(64, 768, 784, last=True))
    last = jobs([("gn-silu", replace(LARGE, last=True))])
    return compile_jobs([*jobs([(name, LARGE) for name in SAMPLE]), *last, *rows], disassemble=False)


def test_no_spills_within_the_registers():
    reports = compiled()
    check([r for r in reports if r.layer != "in-relu"])
    check([r for r in reports if r.layer == "in-relu"], wide=False)
    assert {r.layer for r in reports} == {"evonorm-s0", "bn-relu", "in-relu"}
    assert sum(r.seconds for r in reports) > 0


def test_a_sample_of_the_catalogue():
    reports = sample()
    check(reports)
    assert {r.layer for r in reports} == {*SAMPLE, "gn-silu", "layer norm"}
    assert {r.schedule for r in reports} >= {"R", "U"}


def test_text_and_machine_code_agree_on_what_is_wide():
    """The assembler merges equal narrow loads; wide ones and stores stay as the compiler wrote them."""
    whole = [r for r in compiled() if r.layer == "bn-relu"]
    quick = [r for r in sample() if r.layer == "bn-relu"]
    for one, other in zip(whole, quick, strict=True):
        assert one.stores == other.stores
        assert {bits: n for bits, n in one.loads.items() if bits > 32} == {
            bits: n for bits, n in other.loads.items() if bits > 32
        }
        assert (one.registers, one.stack, one.shared) == (other.registers, other.stack, other.shared)


def test_196_positions_are_loaded_four_at_a_time():
    for r in compiled():
        if r.layer == "in-relu" and r.over == "x":
            assert 64 in r.loads
            assert 64 in r.stores
            assert 16 not in r.loads


def test_resident_kernels_move_every_element_once():
    """128-bit loads and stores of all threads hold the tile exactly as often as there are tensors of its size."""
    found = 0
    for r in compiled():
        if (r.layer, r.schedule, r.over) == ("evonorm-s0", "R", "x"):
            reads, writes = TENSORS[r.direction]
            held = 32 * r.warps * 16
            assert r.loads[128] * held == reads * 2 * r.tile
            assert r.stores[128] * held == writes * 2 * r.tile
            found += 1
    assert found == 3  # 784 positions both ways, 3136 forward


def test_universal_kernels_move_every_element_once_a_stage():
    big = [r for r in compiled() if r.layer == "bn-relu" and r.over == "x"]
    assert [r.direction for r in big] == ["forward", "forward", "backward", "backward"]
    for r, writes in zip(big, (0, 1, 0, 1), strict=True):
        held = 32 * r.warps * 16
        assert r.loads[128] * held == TENSORS[r.direction][0] * 2 * r.tile
        assert r.stores.get(128, 0) * held == writes * 2 * r.tile


def test_two_processes_two_architectures_and_a_carried_cache(tmp_path, monkeypatch):
    """Each architecture has its own code, also where one process compiles the same text for both; and from another
    source folder, in another process and in another place of the cache, nothing is compiled again."""
    work = [*jobs([("relu", LARGE)], "sm_90"), *jobs([("relu", LARGE)], "sm_80")]
    seen: list[tuple[int, int | None]] = []
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path / "one"))
    first = compile_jobs(
        work, processes=2, cache=tmp_path / "cache", disassemble=False, progress=lambda *done: seen.append(done)
    )
    assert sorted(seen) == [(k, 4) for k in range(1, 5)]
    assert [(r.arch, r.direction) for r in first] == [
        (arch, way) for arch in ("sm_90", "sm_80") for way in ("forward", "backward", "backward")
    ]
    assert len(table(first).splitlines()) == len(first) + 2
    carried = tmp_path / "carried"
    os.rename(tmp_path / "cache", carried)
    targets = [json.loads(path.read_text())["target"]["arch"] for path in carried.rglob("kernel_*.json")]
    assert sorted(targets) == [80, 80, 80, 90, 90, 90]
    files = {path: path.stat().st_mtime_ns for path in carried.rglob("*.cubin")}
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path / "two"))
    second = compile_jobs(work, cache=carried, disassemble=False)
    assert len(files) == 6
    assert {path: path.stat().st_mtime_ns for path in carried.rglob("*.cubin")} == files
    assert [replace(r, seconds=0.0) for r in first] == [replace(r, seconds=0.0) for r in second]
    assert Path(tmp_path / "two" / "kernels").exists()


def test_bad_input():
    with pytest.raises(UserError, match="sm_90"):
        jobs_of("relu", catalog.layer("relu"), LARGE, arch="sm_91")
    for name, meant in (("sm91", "sm_90"), ("H200", "sm_90"), ("a100", "sm_80"), ("RTX 4090", "sm_89")):
        with pytest.raises(UserError, match=f"did you mean '{meant}'"):
            architecture(name)
    assert [architecture(name) for name in ("sm_90", "SM90", "9.0", " 100 ")] == ["sm_90", "sm_90", "sm_90", "sm_100"]
    with pytest.raises(UserError, match="bfloat16"):
        jobs_of("relu", catalog.layer("relu"), LARGE, dtype="bfloat")
    builder = Builder()
    text = builder.program({"y": builder("exp", builder.input("x", FULL))}).to_text()
    with pytest.raises(RunError, match="could not be compiled"):
        compile_jobs([Job("bad", "forward", text.replace("exp", "expo"), LARGE)])


def random_jobs(arch: str, count: int) -> list[Job]:
    shapes = (Shape(64, 256, 784), Shape(64, 256, 784, last=True), Shape(64, 512, 49), Shape(64, 96, 3136))
    found: list[Job] = []
    for preset in ("evonorm24", "extended", "tokens"):
        for number, case in enumerate(random_cases(preset, count, 31)):
            graph = replace(case.graph, groups=32, group_size=None)
            found += jobs_of(f"{preset} {number}", graph, shapes[number % 4], arch=arch)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_whole_catalogue(arch):
    shapes = (LARGE, replace(LARGE, last=True))
    for shape in shapes:
        check(compile_jobs(jobs([(name, shape) for name in catalog.CATALOG], arch), processes=os.cpu_count() or 1))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_wide_rows(arch):
    rms = "v1 * x / rms[channel](x)"
    graphs = {"layer norm": parse_formula(LAYER_NORM, affine=False), "rms norm": parse_formula(rms, affine=False)}
    work: list[Job] = []
    for channels in (1024, 4096, 8192, 16384):
        for name, graph in graphs.items():
            work += jobs_of(f"{name} {channels}", graph, Shape(16384, channels, 1, last=True), arch=arch)
    reports = compile_jobs(work, processes=os.cpu_count() or 1)
    check(reports)
    spilling = {(r.layer, r.direction): r.stack for r in reports if r.stack}
    assert set(spilling) == SPILLS
    assert max(spilling.values()) <= 256


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_random_graphs(arch):
    assert arch in ARCHITECTURES
    reports = compile_jobs(random_jobs(arch, 18), processes=os.cpu_count() or 1)
    assert len({r.layer for r in reports}) >= 50
    check(reports, wide=False)
