"""Plans: what passes through memory, which schedule a shape gets, how often x is read and written."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from kernel_cases import random_cases

from kernels.autodiff import differentiate
from kernels.lower import lower
from kernels.nodes import FULL, REDUCTIONS, C, K, S, Unsupported
from kernels.reference import execute
from kernels.schedule import Plan, Shape, plan
from kernels.stages import Level, Stages, Tile, normalised
from search_spaces.layers import catalog
from search_spaces.layers.formula import parse_formula

LARGE = Shape(128, 256, 784, 32, itemsize=2)


def programs(name_or_graph, training: bool = True):
    graph = catalog.layer(name_or_graph) if isinstance(name_or_graph, str) else name_or_graph
    lowered = lower(graph, training=training, mixed=True)
    return differentiate(lowered.program, ("x", *lowered.parameters))


def traffic(found: Plan) -> tuple[int, int, int]:
    """(Tensors of the size of x that the emitted text reads, that it writes, launches); a loop reads on every pass."""
    reads = writes = 0
    for source in found.sources():
        reads += len(re.findall(r"tl\.load\(\w+ \+ base \+ offset", source.text))
        writes += len(re.findall(r"tl\.store\(\w+ \+ base \+ offset", source.text))
    return reads, writes, len(found.launches)


# reads, writes and launches: the least a schedule can do (specification of the generator, section B.3)
@pytest.mark.parametrize(
    ("name", "shape", "training", "schedule", "forward", "backward"),
    [
        ("evonorm-s0", LARGE, True, "R", (1, 1, 1), (2, 1, 2)),
        ("gn-silu", LARGE, True, "R", (1, 1, 1), (2, 1, 2)),
        ("in-relu", LARGE, True, "R", (1, 1, 1), (2, 1, 2)),
        ("evonorm-s0", LARGE, True, "U", (2, 1, 3), (4, 1, 4)),  # merging S, then K
        ("layer-norm", replace(LARGE, groups=1), True, "L", (2, 1, 1), (4, 1, 2)),
        ("bn-relu", LARGE, True, "U", (2, 1, 3), (4, 1, 3)),
        ("bn-relu", replace(LARGE, last=True), True, "U", (2, 1, 3), (4, 1, 3)),
        ("bn-relu", LARGE, False, "U", (1, 1, 1), (2, 1, 2)),
        ("evonorm-b0", LARGE, True, "R", (2, 1, 3), (4, 1, 3)),
        ("relu", LARGE, True, "U", (1, 1, 1), (2, 1, 2)),
        ("bn-relu", Shape(4096, 256, 1, 1, True, 2), True, "U", (2, 1, 3), (4, 1, 3)),
    ],
)
def test_the_least_traffic(name, shape, training, schedule, forward, backward):
    derivative = programs(name, training)
    for program, wanted in ((derivative.forward, forward), (derivative.backward, backward)):
        found = plan(program, shape, schedule=schedule)
        assert traffic(found) == wanted


def test_rows_are_read_once():
    graph = parse_formula("(x - mean[channel](x)) / std[channel](x)")
    derivative = programs(graph)
    for channels in (64, 768, 4096, 16384):
        shape = Shape(8192, channels, 1, 1, True, 2)
        assert traffic(plan(derivative.forward, shape)) == (1, 1, 1)
        assert traffic(plan(derivative.backward, shape)) == (2, 1, 2)


def test_what_is_cheapest_is_taken():
    derivative = programs("evonorm-s0")
    assert plan(derivative.forward, LARGE).schedule == "R"
    assert plan(derivative.forward, replace(LARGE, n=1, groups=1, s=50176)).schedule == "U"  # one group: one program
    assert plan(derivative.backward, replace(LARGE, s=12544)).schedule == "L"  # too large to keep
    assert plan(programs("bn-relu").forward, LARGE).schedule == "U"
    costs = [plan(derivative.forward, LARGE, schedule=kind).cost for kind in "RU"]
    assert costs == sorted(costs)


def test_channels_that_no_tile_holds_and_unknown_schedules_are_refused():
    rows = programs(parse_formula("x / std[channel](x)")).backward
    with pytest.raises(Unsupported, match="registers"):
        plan(rows, Shape(64, 1 << 20, 1, 1, True, 2))
    with pytest.raises(Unsupported, match="schedule"):
        plan(programs("relu").forward, LARGE, schedule="R")
    with pytest.raises(Unsupported, match="2\\^31"):
        plan(programs("relu").forward, Shape(1, 1 << 16, 1 << 15))


@pytest.mark.parametrize("preset", ["evonorm24", "extended", "tokens"])
def test_normalised_rows_compute_the_same(preset):
    """A program on [N, C, 1] equals its rows on [1, C, N] with positions for samples."""
    for case in random_cases(preset, 25, 11):
        lowered = lower(case.graph, layout=case.layout, mixed=True)
        rows = normalised(lowered.program, rows=True)
        scalars = [node for node in rows.nodes if node.op == "scalar"]
        numbers = {float(k): value for k, value in enumerate(lowered.program.scalars)}
        nodes = tuple(replace(n, attr=numbers[n.attr]) if n.op == "scalar" else n for n in rows.nodes)
        assert all(node.attr in numbers for node in scalars)
        channels, groups = 12, 3
        x = torch.randn(5, channels, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        given = {name: torch.linspace(-1, 1, channels, dtype=torch.float64) for name in lowered.parameters}
        wanted = execute(lowered.program, {"x": x, **given}, groups=groups)
        # x has lost the axis N: give the executor one sample, and x as an input over channels and positions
        named = tuple(replace(n, attr="rows") if n.op == "input" and n.attr == "x" else n for n in nodes)
        inputs = {"x": x[:, :, 0].T[None], "rows": x[:, :, 0].T.contiguous(), **given}
        found = execute(replace(rows, nodes=named), inputs, groups=groups)
        torch.testing.assert_close(found["y"].T, wanted["y"][:, :, 0], rtol=1e-9, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("own", [0, S, K | S, C | S])
def test_every_kernel_reads_only_what_earlier_ones_wrote(own):
    for preset in ("evonorm24", "extended"):
        for case in random_cases(preset, 30, 5):
            for program in (programs(case.graph).forward, programs(case.graph).backward):
                try:
                    stages = Stages(normalised(program, rows=False), own)
                except Unsupported:
                    continue
                check_order(stages)


def check_order(stages: Stages) -> None:
    nodes, written = stages.program.nodes, set()
    produced: set[str] = set()

    def reads(roots, stored) -> set[int]:
        found, stack, seen = set(), list(roots), set()
        while stack:
            at = stack.pop()
            if at in seen:
                continue
            seen.add(at)
            if stored(at):
                found |= {at} if nodes[at].op in REDUCTIONS else set()
            else:
                stack += nodes[at].args
        return found

    partials: set[int] = set()
    for kernel in stages.kernels:
        names = {name for name, _ in kernel.outputs}
        assert not names & produced
        produced |= names
        if isinstance(kernel, Tile):
            roots = [*kernel.kept, *(p.value for p in kernel.partials), *(at for _, at in kernel.outputs)]
            assert reads(roots, lambda at, j=kernel.stage: stages.is_stored(at, j)) <= written
            partials |= {p.value for p in kernel.partials}
            written |= set(kernel.kept)
        else:
            assert isinstance(kernel, Level)
            assert not any(stages.program.spaces[at] & S for at in kernel.reductions)
            for at in kernel.reductions:
                (value,) = nodes[at].args
                assert value in partials or reads([value], stages.is_stored_for_level) <= written
            before = set(written)
            written |= set(kernel.reductions)
            assert reads([at for _, at in kernel.outputs], stages.is_stored_for_level) <= before | set(
                kernel.reductions
            )
    for name, at in stages.program.outputs:
        assert name in produced or at in written


def test_depth_of_universal_plans_is_the_depth_of_the_program():
    """Tile kernels are one more than the chain of big reductions below the output that varies most."""
    for case in random_cases("extended", 60, 6):
        program = normalised(lower(case.graph, track=False, mixed=True).program, rows=False)
        if any(
            node.op in REDUCTIONS and program.spaces[node.args[0]] & S and not node.axes & S for node in program.nodes
        ):
            continue
        stages = Stages(program, 0)
        full = [at for _, at in program.outputs if program.spaces[at] == FULL]
        assert sum(isinstance(k, Tile) for k in stages.kernels) == program.depths[full[0]] + 1


def test_spaces_without_samples_are_rows():
    assert Stages(normalised(programs("bn-relu").forward, rows=True), 0).rows
    assert not Stages(normalised(programs("bn-relu").forward, rows=False), 0).rows
    assert not Stages(normalised(programs("evonorm-s0").forward, rows=False), K | S).rows
