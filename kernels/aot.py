"""Generated kernels compiled for a GPU that is not there, and what the compiler made of them.

Every job runs in a process of its own without Triton's interpreter, by the launch path of `kernels.runtime`: what is
compiled for a shape is what a launch on that GPU would look for. Point TRITON_CACHE_DIR on the GPU machine to a copy of
the cache folder; Triton's version and the processor count must be the same there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.autodiff import differentiate
from kernels.lower import lower
from kernels.program import Program, parse
from kernels.schedule import PROCESSORS, Shape
from search_spaces.common.errors import RunError, UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.layers.graph import LayerGraph

ARCHITECTURES = {"sm_80": 80, "sm_86": 86, "sm_89": 89, "sm_90": 90, "sm_100": 100}
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Job:
    """A program to compile for a shape. text: `Program.to_text()`. arch: of ARCHITECTURES. dtype: of x."""

    layer: str
    direction: str
    text: str
    shape: Shape
    dtype: str = "bfloat16"
    arch: str = "sm_90"
    schedule: str | None = None
    processors: int = PROCESSORS


@dataclass(frozen=True)
class KernelReport:
    """One compiled kernel. loads, stores: instructions to global memory by their width in bits. spills: instructions
    to local memory. stack, shared: bytes; seconds: with the disassembly, 0 from the cache."""

    layer: str
    direction: str
    kernel: str
    arch: str
    dtype: str
    schedule: str
    over: str
    tile: int
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    seconds: float


def jobs_of(
    layer: str, graph: LayerGraph, shape: Shape, *, dtype: str = "bfloat16", arch: str = "sm_90", training: bool = True
) -> list[Job]:
    """Forward and backward of a layer on x [N, C, S]. Errors: UserError for names, Unsupported for the graph."""
    for value, names, what in ((arch, ARCHITECTURES, "an architecture"), (dtype, DTYPES, "a type")):
        if value not in names:
            raise UserError(value, f"{what} ({one_of(names)})", nearest(value, names))
    lowered = lower(graph, training=training, mixed=True)
    groups = graph.group_count(shape.c)
    n, s = (shape.n * shape.s, 1) if lowered.flat else (shape.n, shape.s)
    shape = Shape(n, shape.c, s, groups, shape.last or lowered.flat, DTYPES[dtype])
    derivative = differentiate(lowered.program, ("x", *lowered.parameters))
    pair = {"forward": derivative.forward, "backward": derivative.backward}
    return [Job(layer, name, program.to_text(), shape, dtype, arch) for name, program in pair.items()]


def compile_jobs(
    jobs: Iterable[Job],
    *,
    processes: int = 1,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> list[KernelReport]:
    """The kernels of all jobs, in their order. cache: folder of compiled kernels, by default a temporary one.

    Errors: RunError with the compiler's message where a kernel does not compile.
    """
    jobs = list(jobs)
    count = max(min(processes, len(jobs)), 1)
    with tempfile.TemporaryDirectory(prefix="nasforge-aot-") as temporary:
        environment = {**os.environ, "TRITON_CACHE_DIR": str(cache or temporary), "TRITON_INTERPRET": "0"}
        root = str(Path(__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        workers, files = [], []
        for number in range(count):
            path = Path(temporary) / f"jobs-{number}.json"
            path.write_text(json.dumps([dataclasses.asdict(job) for job in jobs[number::count]]))
            files.append(path.with_suffix(".err").open("w+"))
            command = [sys.executable, "-m", "kernels.aot", str(path)]
            workers.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=files[-1], text=True, env=environment)
            )
        done: list[list[KernelReport]] = [[] for _ in jobs]
        finished = 0
        for number, worker in enumerate(workers):
            assert worker.stdout is not None
            for line in worker.stdout:
                position, found = json.loads(line)
                done[number + position * count] = [_report(one) for one in found]
                finished += 1
                if progress is not None:
                    progress(finished, len(jobs))
            if worker.wait():
                files[number].seek(0)
                raise RunError(f"kernels could not be compiled: {files[number].read()[-2000:].strip()}")
        for file in files:
            file.close()
    return [report for reports in done for report in reports]


def table(reports: Sequence[KernelReport]) -> str:
    """Reports as lines of Markdown."""
    head = ["layer", "pass", "kernel", "arch", "type", "schedule", "over", "tile", "warps", "registers"]
    head += ["stack", "spills", "shared", "loads", "stores"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in reports:
        widths = [", ".join(f"{n} x {bits}" for bits, n in sorted(found.items())) for found in (r.loads, r.stores)]
        row = [r.layer, r.direction, r.kernel, r.arch, r.dtype, r.schedule, r.over, r.tile, r.warps, r.registers]
        lines.append("| " + " | ".join(str(cell) for cell in [*row, r.stack, r.spills, r.shared, *widths]) + " |")
    return "\n".join(lines)


def _report(entry: dict[str, Any]) -> KernelReport:
    widths = {key: {int(bits): n for bits, n in entry[key].items()} for key in ("loads", "stores")}
    return KernelReport(**{**entry, **widths})


# -- in the worker ------------------------------------------------------------------------------------------------


class _AbsentDriver:
    """What Triton asks a driver while it compiles."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_here(job: Job) -> Iterator[KernelReport]:
    """The kernels of a job, compiled in this process, which loses its GPU for Triton by that."""
    import torch
    from triton.runtime import driver

    from kernels.runtime import Scalar, compile_program
    from kernels.stages import Tile

    driver.set_active(_AbsentDriver(ARCHITECTURES[job.arch]))
    program = parse(job.text)
    compiled = compile_program(program, job.shape, schedule=job.schedule, processors=job.processors)
    full = {name for name, space in (*compiled.spaces.items(), *_spaces(program)) if space == 15}
    for launch, call in zip(compiled.plan.launches, compiled.calls, strict=True):
        start = time.perf_counter()
        arguments: list[Any] = []
        for argument in call.arguments:
            if isinstance(argument, str):
                name = argument.removeprefix("in_").removeprefix("out_")
                dtype = getattr(torch, job.dtype) if name in full else torch.float32
                arguments.append(torch.empty(1, dtype=dtype, device="meta"))
            else:
                arguments.append(1.0 if isinstance(argument, Scalar) else argument)
        kernel = call.function.warmup(*arguments, grid=(call.grid,), **call.options)
        over = "x" if isinstance(launch.kernel, Tile) else "small"
        elements = 1
        for _, size in launch.constants:
            elements *= size
        yield KernelReport(
            layer=job.layer,
            direction=job.direction,
            kernel=call.function.__name__,
            arch=job.arch,
            dtype=job.dtype,
            schedule=compiled.plan.schedule,
            over=over,
            tile=elements,
            warps=launch.warps,
            shared=kernel.metadata.shared,
            **_disassembled(kernel.asm["cubin"]),
            seconds=round(time.perf_counter() - start, 3),
        )


def _spaces(program: Program) -> list[tuple[str, int]]:
    return [(name, program.spaces[at]) for name, at in program.outputs]


def _disassembled(cubin: bytes) -> dict[str, Any]:
    """Registers, stack, spills and the widths of loads and stores, by the tools that Triton brings along."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output([tools / "cuobjdump", "-res-usage", file.name])
        listing = _output([tools / "nvdisasm", "-c", file.name])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RunError(f"cuobjdump said: {usage[:300]}")
    widths: dict[str, dict[int, int]] = {"LDG": {}, "STG": {}}
    for op, options in re.findall(r"\b(LDG|STG)\.E([.\w]*)", listing):
        bits = re.search(r"\.(?:U|S)?(8|16|64|128)\b", options)
        width = int(bits.group(1)) if bits else 32
        widths[op][width] = widths[op].get(width, 0) + 1
    spills = len(re.findall(r"\b(?:STL|LDL)\b", listing))
    registers, stack = (int(value) for value in found.groups())
    return {
        "registers": registers,
        "stack": stack,
        "spills": spills,
        "loads": widths["LDG"],
        "stores": widths["STG"],
    }


def _output(command: list[Any]) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def _main(path: str) -> None:
    for position, entry in enumerate(json.loads(Path(path).read_text())):
        job = Job(**{**entry, "shape": Shape(**entry["shape"])})
        sys.stdout.write(json.dumps([position, [dataclasses.asdict(report) for report in compile_here(job)]]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main(sys.argv[1])
