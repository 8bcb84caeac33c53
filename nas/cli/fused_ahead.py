"""nas kernels compile and nas kernels bytes: what is known of kernels without a GPU."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli import options
from nas.cli.output import Output
from search_spaces.common.errors import RunError, UserError

if TYPE_CHECKING:
    from kernels.aot import Job, KernelReport
    from search_spaces.layers.graph import LayerGraph

Layers = Annotated[
    list[str] | None,
    typer.Argument(metavar="LAYER...", help="Names, RUN:best, files or formulas (default: the catalogue)."),
]
Shape = Annotated[str, typer.Option("--shape", help="Samples x channels x positions.")]
DataType = Annotated[str, typer.Option("--dtype", help="Of x: bfloat16, float16 or float32.")]
ChannelsLast = Annotated[
    bool, typer.Option("--channels-last", help="Channels innermost in memory, as always for layers of tokens.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Write the table to this file, .md or .json.")]


def read_shape(text: str) -> tuple[int, ...]:
    """`32x64x28x28` as numbers. Errors: UserError."""
    try:
        sizes = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        sizes = ()
    if len(sizes) < 2 or min(sizes, default=0) < 1:
        raise UserError(text, "a shape of samples x channels x positions", "32x64x28x28")
    return sizes


def layer_graphs(layers: list[str] | None) -> dict[str, LayerGraph]:
    from nas.layers.references import find_layer
    from search_spaces.layers.catalog import names

    return {name: find_layer(name) for name in layers or names()}


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def compile_(
    layers: Layers = None,
    arch: Annotated[str, typer.Option(help="sm_80, sm_86, sm_89, sm_90, sm_100; commas between.")] = "sm_90",
    shape: Shape = "32x64x28x28",
    dtype: DataType = "bfloat16",
    channels_last: ChannelsLast = False,
    processors: Annotated[
        int | None, typer.Option(min=1, help="Of the GPU (default: A100 108, H100 132, ...); plans depend on it.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="Keep the compiled kernels in this folder, for TRITON_CACHE_DIR.")
    ] = None,
    out: Out = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Compilers at a time (default: the cores).")] = None,
    json: options.Json = False,
) -> None:
    """Compile layers for GPUs that need not be here: registers, spills, shared memory and width of loads."""
    from kernels.aot import architecture, compile_jobs, table
    from kernels.backend import HAVE_TRITON

    output = Output("kernels compile", json)
    if not HAVE_TRITON:
        raise RunError("Triton is not installed (pip install triton)")
    targets = list(dict.fromkeys(architecture(name) for name in arch.split(",")))
    graphs = layer_graphs(layers)
    jobs, refused = _jobs(graphs, shape, dtype, channels_last, targets, processors)
    _check_file(out)
    with output.progress("layers, forward and backward") as progress:
        reports = compile_jobs(jobs, processes=processes or os.cpu_count() or 1, cache=to, progress=progress)
    columns = ["layer", "pass", "kernel", "arch", "schedule", "registers", "spills", "shared", "loads", "stores"]
    rows = [
        [r.layer, r.direction, r.kernel, r.arch, r.schedule, r.registers, r.spills, r.shared, *_widths(r), r.seconds]
        for r in reports
    ]
    output.table([*columns, "seconds"], rows)
    for name, reason in refused.items():
        output.warn(f"{name} runs by torch: {reason}")
    spilling, done = sum(r.spills > 0 for r in reports), len(graphs) - len(refused)
    summary = f"{counted(len(reports), 'kernel')} of {counted(done, 'layer')} for {', '.join(targets)}"
    most = max((r.registers for r in reports), default=0)
    summary += f": {spilling or 'none'} with spilled registers, at most {most} registers a thread"
    output.say(f"\n{summary}\nshared: bytes; loads, stores: instructions x bits; seconds: of one core, to compile")
    records = [asdict(r) for r in reports]
    text = f"{_title('compile', layers, shape, dtype, channels_last, arch)}\n\n{summary}.\n\n{table(reports)}\n"
    files = _write(out, text, records)
    if to is not None:
        devices = ", ".join(f"{j.arch} with {j.processors} processors" for j in {j.arch: j for j in jobs}.values())
        same = f"Triton {_triton()}, Python {sys.version_info.major}.{sys.version_info.minor}"
        output.say(f"copy {to} to the GPU machine and set TRITON_CACHE_DIR to the copy; needs there {same}")
        output.say(f"  and {devices}; for x {shape} of {dtype}")
    output.finish({"kernels": records, "refused": refused, "cache": to and str(to), "files": files})


def bytes_(
    layers: Layers = None,
    shape: Shape = "128x256x28x28",
    dtype: DataType = "bfloat16",
    channels_last: ChannelsLast = False,
    out: Out = None,
    json: options.Json = False,
) -> None:
    """Count the bytes that kernels load and store, by schedule, against the fewest that any can; needs no GPU."""
    from kernels.program import parse
    from kernels.traffic import by_schedule, table

    output = Output("kernels bytes", json)
    jobs, refused = _jobs(layer_graphs(layers), shape, dtype, channels_last, ["sm_90"], None)
    _check_file(out)
    found = {(job.layer, job.direction): by_schedule(parse(job.text), job.shape) for job in jobs}
    rows, records = [], []
    for (layer, direction), schedules in found.items():
        for number, t in enumerate(schedules.values()):
            about = {"layer": layer, "direction": direction, "chosen": number == 0, **asdict(t)}
            records.append(about)
            moved = [t.read, t.written, t.total / 1e6, t.least / 1e6, t.total / t.least, t.launches]
            rows.append([layer, direction, t.schedule, number == 0, *moved])
    columns = ["layer", "pass", "schedule", "chosen", "read", "written", "MB", "least MB", "ratio", "kernels"]
    output.table(columns, rows)
    for name, reason in refused.items():
        output.warn(f"{name} runs by torch: {reason}")
    output.say(
        "\nread, written: tensors of the size of x; ratio: bytes by the fewest, where a sample may stay on the chip"
    )
    heading = _title("bytes", layers, shape, dtype, channels_last, None)
    legend = "R, L, U: tensors of the size of x read + written: all bytes by the fewest, kernels."
    files = _write(out, f"{heading}\n{legend}\n\n{table(found)}\n", records)
    output.finish({"traffic": records, "refused": refused, "files": files})


def _jobs(
    graphs: dict[str, LayerGraph],
    shape: str,
    dtype: str,
    channels_last: bool,
    targets: list[str],
    processors: int | None,
) -> tuple[list[Job], dict[str, str]]:
    """Forward and backward of layers for architectures, and the layers that kernels cannot run with the reason."""
    from kernels.aot import jobs_of
    from kernels.nodes import Unsupported
    from kernels.schedule import Shape as Sizes

    n, c, *positions = read_shape(shape)
    found: list[Job] = []
    refused: dict[str, str] = {}
    for name, graph in graphs.items():
        last = channels_last or name.endswith("-tokens")
        for target in targets:
            size = Sizes(n, c, math.prod(positions), last=last)
            try:
                found += jobs_of(name, graph, size, dtype=dtype, arch=target, processors=processors)
            except Unsupported as error:
                refused[name] = str(error)
    return found, refused


def _check_file(out: Path | None) -> None:
    if out is not None and out.suffix not in (".md", ".json"):
        raise UserError(str(out), "a file that ends with .md or .json", str(out.with_suffix(".md")))


def _write(out: Path | None, text: str, records: list[dict[str, Any]]) -> list[str]:
    import json

    from search_spaces.common.files import atomic_write

    if out is None:
        return []
    with atomic_write(out) as file:
        file.write(text if out.suffix == ".md" else json.dumps(records, indent=1) + "\n")
    return [str(out)]


def _title(
    command: str, layers: list[str] | None, shape: str, dtype: str, channels_last: bool, arch: str | None
) -> str:
    words = [command, *(layers or ()), *(["--arch", arch] if arch else []), "--shape", shape, "--dtype", dtype]
    words += ["--channels-last"] * channels_last
    return f"Made by `nas kernels {' '.join(words)}` with Triton {_triton()}, without a GPU."


def _triton() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return "(not installed)"


def _widths(report: KernelReport) -> list[str]:
    found = (report.loads, report.stores)
    return [", ".join(f"{count} x {bits}" for bits, count in sorted(widths.items())) for widths in found]
