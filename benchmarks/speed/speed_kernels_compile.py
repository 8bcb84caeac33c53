"""What comes before the first launch of generated kernels, stage by stage, without a GPU.

    python -m benchmarks.speed.speed_kernels_compile [--json] [--graphs 200] [--compiled 20] [--processes 2]

The graphs are random ones of the evonorm24 space at x [128, 256, 28, 28] in bfloat16, forward and backward. Stages:
the text of their kernels (lowering, differentiation, planning, emission); the same with what an earlier call left in
memory, and what an earlier process left in the cache of sources; compilation for sm_90 on one core and, side by
side, in several processes. Milliseconds of processor time, compilers included, which other processes do not
advance; of each stage in memory the fastest of three rounds. Wall time only where processes are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FRESH = tempfile.TemporaryDirectory(prefix="nasforge-speed-")
os.environ["NASFORGE_HOME"] = str(Path(FRESH.name) / "home")
os.environ["TRITON_CACHE_DIR"] = str(Path(FRESH.name) / "triton")

import numpy as np  # noqa: E402

from kernels import runtime  # noqa: E402
from kernels.aot import compile_jobs, jobs_of  # noqa: E402
from kernels.autodiff import differentiate  # noqa: E402
from kernels.lower import lower  # noqa: E402
from kernels.program import Program  # noqa: E402
from kernels.schedule import Shape, plan  # noqa: E402
from search_spaces.layers import catalog  # noqa: E402
from search_spaces.layers.graph import LayerGraph  # noqa: E402
from search_spaces.layers.space import LayerSpace  # noqa: E402

BARS = {"text": 5.0, "in memory": 5.0, "cold compile": 1000.0}  # milliseconds a graph, means


def programs(graph: LayerGraph) -> tuple[Program, Program]:
    """Forward and backward of a layer."""
    lowered = lower(graph)
    derivative = differentiate(lowered.program, ("x", *lowered.parameters))
    return derivative.forward, derivative.backward


def shape(graph: LayerGraph) -> Shape:
    """The measured shape."""
    return Shape(128, 256, 784, graph.group_count(256), itemsize=2)


def text(graph: LayerGraph) -> None:
    """From the graph to Triton source."""
    for program in programs(graph):
        plan(program, shape(graph)).sources()


def ready(graph: LayerGraph) -> None:
    """From the graph to functions that can be launched."""
    for program in programs(graph):
        runtime.compile_program(program, shape(graph))


def forget() -> None:
    """Leave what a new process would find: the files."""
    runtime._COMPILED.clear()
    runtime._functions.cache_clear()


def milliseconds(run: Callable[[LayerGraph], None], graphs: Sequence[LayerGraph], before: Callable[[], None]) -> Any:
    """Mean, median and largest of the fastest of three for each graph."""
    rounds = []
    for _ in range(3):
        before()
        times = []
        for graph in graphs:
            begin = time.process_time()
            run(graph)
            times.append(1e3 * (time.process_time() - begin))
        rounds.append(times)
    return about([min(times) for times in zip(*rounds, strict=True)])


def about(times: Sequence[float]) -> dict[str, float]:
    """What is printed of times."""
    return {"mean": statistics.fmean(times), "median": statistics.median(times), "most": max(times)}


def measure(count: int, compiled: int, processes: int) -> list[dict[str, Any]]:
    """All stages."""
    rows: list[dict[str, Any]] = []
    for kind in ("flat", "normalizing"):
        space, rng = LayerSpace("evonorm24", sampling=kind), np.random.default_rng(0)
        graphs = [space.sample(rng) for _ in range(count)]
        rows.append({"stage": "text", "graphs": kind, **milliseconds(text, graphs, lambda: None)})
        for graph in graphs:
            ready(graph)
        rows.append({"stage": "in memory", "graphs": kind, **milliseconds(ready, graphs, lambda: None)})
        rows.append({"stage": "from files", "graphs": kind, **milliseconds(ready, graphs, forget)})
    if not compiled:
        return rows
    some = graphs[:compiled]
    warm = jobs_of("first", catalog.layer("evonorm-s0"), Shape(128, 256, 784))  # a process's first takes longer
    jobs = [job for k, graph in enumerate(some) for job in jobs_of(str(k), graph, Shape(128, 256, 784))]
    cache = Path(FRESH.name) / "compiled"
    for stage in ("cold compile", "compiled before"):
        each: dict[str, float] = {}
        for report in compile_jobs([*warm, *jobs], cache=cache, disassemble=False):
            each[report.layer] = each.get(report.layer, 0.0) + 1e3 * report.seconds
        del each["first"]
        rows.append({"stage": stage, "graphs": kind, **about(list(each.values()))})
    for used in sorted({1, processes}):
        begin = time.perf_counter()
        compile_jobs(jobs, processes=used, disassemble=False)
        spent = 1e3 * (time.perf_counter() - begin) / len(some)
        rows.append({"stage": f"wall, {used} process{'es' * (used > 1)}", "graphs": kind, "mean": spent})
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--graphs", type=int, default=200)
    parser.add_argument("--compiled", type=int, default=20)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    try:
        import triton  # noqa: F401
    except ImportError:
        print("nothing measured: Triton is not installed")
        sys.exit(0)
    rows = measure(given.graphs, given.compiled, given.processes)
    if given.json:
        print(json.dumps(rows))
        return
    print(f"{'stage (ms a graph)':22s}{'graphs':13s}{'mean':>9s}{'median':>9s}{'most':>9s}{'bar':>8s}")
    for row in rows:
        figures = "".join(f"{row[key]:9.2f}" if key in row else f"{'':9s}" for key in ("mean", "median", "most"))
        bar = BARS.get(row["stage"])
        print(f"{row['stage']:22s}{row['graphs']:13s}{figures}{'' if bar is None else f'{bar:8.0f}'}")


if __name__ == "__main__":
    main()
