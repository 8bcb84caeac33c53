"""Generated kernels compiled for a GPU that is not there, and what the compiler made of them.

Every job runs in a process of its own without Triton's interpreter, by the launch path of `kernels.runtime`: what is
compiled for a shape is what a launch on that GPU would look for. Point TRITON_CACHE_DIR on the GPU machine to a copy of
the cache folder; Triton and Python's version and the processor count must be the same there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.autodiff import differentiate
from kernels.cache import mark, settle
from kernels.lower import lower
from kernels.program import Program, parse
from kernels.schedule import PROCESSORS, Shape
from search_spaces.common.errors import RunError, UserError, one_of
from search_spaces.common.names import match, nearest
from search_spaces.layers.graph import LayerGraph

ARCHITECTURES = {"sm_80": 80, "sm_86": 86, "sm_89": 89, "sm_90": 90, "sm_100": 100}
DEVICES = {  # by the architecture, devices that have it, and how many processors the first has (NVIDIA's data sheets)
    "sm_80": (("A100",), 108),
    "sm_86": (("RTX 3090", "A40"), 82),
    "sm_89": (("RTX 4090", "L4", "L40"), 128),
    "sm_90": (("H100", "H200", "GH200"), 132),
    "sm_100": (("B200", "GB200"), 148),
}
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
    to local memory. stack, shared: bytes. seconds: of a processor, for compilation by Triton and ptxas; next to nothing
    from the cache."""

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


def architecture(name: str) -> str:
    """The architecture that is meant: `sm_90`, `sm90` or `90`. Errors: UserError, which knows devices (`H100`)."""
    plain = name.strip().lower().removeprefix("sm").replace("_", "").replace(".", "")
    if f"sm_{plain}" in ARCHITECTURES:
        return f"sm_{plain}"
    devices = {device.lower().replace(" ", ""): arch for arch, (found, _) in DEVICES.items() for device in found}
    meant = devices.get(name.lower().replace(" ", "")) or nearest(name, ARCHITECTURES)
    raise UserError(name, f"an architecture ({one_of(ARCHITECTURES)})", meant)


def jobs_of(
    layer: str,
    graph: LayerGraph,
    shape: Shape,
    *,
    dtype: str = "bfloat16",
    arch: str = "sm_90",
    training: bool = True,
    processors: int | None = None,
) -> list[Job]:
    """Forward and backward of a layer on x [N, C, S].

    processors: of the device, by default of the first in DEVICES. Errors: UserError for names, Unsupported for graphs.
    """
    arch, dtype = architecture(arch), match(dtype, DTYPES, "a type")
    processors = processors or DEVICES[arch][1]
    lowered = lower(graph, training=training, mixed=True)
    groups = graph.group_count(shape.c)
    n, s = (shape.n * shape.s, 1) if lowered.flat else (shape.n, shape.s)
    shape = Shape(n, shape.c, s, groups, shape.last or lowered.flat, DTYPES[dtype])
    derivative = differentiate(lowered.program, ("x", *lowered.parameters))
    pair = {"forward": derivative.forward, "backward": derivative.backward}
    return [
        Job(layer, name, program.to_text(), shape, dtype, arch, processors=processors) for name, program in pair.items()
    ]


def compile_jobs(
    jobs: Iterable[Job],
    *,
    processes: int = 1,
    cache: str | os.PathLike[str] | None = None,
    disassemble: bool = True,
    progress: Callable[[int, int | None], None] | None = None,
) -> list[KernelReport]:
    """The kernels of all jobs, in their order.

    cache: folder of compiled kernels, by default a temporary one. disassemble: count instructions in the machine code,
    which takes longer than compiling; otherwise only that of kernels with a stack, and loads and stores as the
    compiler handed them to the assembler, which merges equal ones. Errors:
    RunError with the compiler's message where a kernel does not compile.
    """
    jobs = list(jobs)
    if cache is not None:
        Path(cache).mkdir(parents=True, exist_ok=True)
        settle(Path(cache))
        mark(Path(cache))
    count = max(min(processes, len(jobs)), 1)
    with tempfile.TemporaryDirectory(prefix="nasforge-aot-") as temporary:
        environment = {
            **os.environ,
            "TRITON_CACHE_DIR": str(Path(cache or temporary).absolute()),
            "TRITON_INTERPRET": "0",
        }
        root = str(Path(__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        workers, files = [], []
        for number in range(count):
            path = Path(temporary) / f"jobs-{number}.json"
            path.write_text(json.dumps([dataclasses.asdict(job) for job in jobs[number::count]]))
            files.append(path.with_suffix(".err").open("w+"))
            command = [sys.executable, "-m", "kernels.aot", str(path), *(["--disassemble"] if disassemble else [])]
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
        return self.target.arch  # by which functions remember what was compiled of them

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_here(job: Job, disassemble: bool = True) -> Iterator[KernelReport]:
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
        start = _processor_time()
        arguments: list[Any] = []
        for argument in call.arguments:
            if isinstance(argument, str):
                name = argument.removeprefix("in_").removeprefix("out_")
                dtype = getattr(torch, job.dtype) if name in full else torch.float32
                arguments.append(torch.empty(1, dtype=dtype, device="meta"))
            else:
                arguments.append(1.0 if isinstance(argument, Scalar) else argument)
        kernel = call.function.warmup(*arguments, grid=(call.grid,), **call.options)
        seconds = _processor_time() - start
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
            **_read_off(kernel.asm["cubin"], kernel.asm["ptx"], disassemble),
            seconds=round(seconds, 3),
        )


def _processor_time() -> float:
    """Of this process and the compilers that it started."""
    return sum(os.times()[:4])


def _spaces(program: Program) -> list[tuple[str, int]]:
    return [(name, program.spaces[at]) for name, at in program.outputs]


def _read_off(cubin: bytes, ptx: str, disassemble: bool) -> dict[str, Any]:
    """Registers, stack, spills and the widths of loads and stores, by the tools that Triton brings along."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output([tools / "cuobjdump", "-res-usage", file.name])
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise RunError(f"cuobjdump said: {usage[:300]}")
        registers, stack = (int(value) for value in found.groups())
        listing = _output([tools / "nvdisasm", "-c", "-ndf", file.name]) if disassemble or stack else ""
    loads, stores = _widths(r"\b(LDG|STG)\.E([.\w]*)", listing) if disassemble else _widths(_PTX, ptx)
    spills = len(re.findall(r"\b(?:STL|LDL)\b", listing))
    return {"registers": registers, "stack": stack, "spills": spills, "loads": loads, "stores": stores}


_PTX = r"\b(ld|st)\.global([.:\w]*)"


def _widths(pattern: str, listing: str) -> tuple[dict[int, int], dict[int, int]]:
    """How many loads and stores there are of each width: `.128` of machine code, `.v4.b32` of PTX."""
    widths: dict[str, dict[int, int]] = {"l": {}, "s": {}}
    for op, options in re.findall(pattern, listing):
        bits, vector = re.search(r"\.[a-zA-Z]?(8|16|32|64|128)\b", options), re.search(r"\.v(\d)", options)
        width = (int(bits.group(1)) if bits else 32) * (int(vector.group(1)) if vector else 1)
        found = widths[op[0].lower()]
        found[width] = found.get(width, 0) + 1
    return widths["l"], widths["s"]


def _output(command: list[Any]) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def _main(path: str, *options: str) -> None:
    for position, entry in enumerate(json.loads(Path(path).read_text())):
        job = Job(**{**entry, "shape": Shape(**entry["shape"])})
        found = compile_here(job, "--disassemble" in options)
        sys.stdout.write(json.dumps([position, [dataclasses.asdict(report) for report in found]]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main(*sys.argv[1:])
