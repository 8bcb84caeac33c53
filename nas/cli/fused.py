"""nas kernels: what works here, compile for a GPU that is elsewhere, the cache of sources, times on this machine."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli import options
from nas.cli.output import Output
from search_spaces.common.errors import RunError, UserError

if TYPE_CHECKING:
    from search_spaces.layers.graph import LayerGraph

app = typer.Typer(
    help="Fused Triton kernels: check, compile, cache, times.", no_args_is_help=True, rich_markup_mode=None
)
Layers = Annotated[
    list[str] | None,
    typer.Argument(metavar="LAYER...", help="Names, RUN:best, files or formulas (default: the catalogue)."),
]
SIGNS = {"ok": "ok", "failed": "FAILED", "missing": "not here"}


def _shape(text: str) -> tuple[int, ...]:
    """`32x64x28x28` as numbers. Errors: UserError."""
    try:
        sizes = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        sizes = ()
    if len(sizes) < 2 or min(sizes, default=0) < 1:
        raise UserError(text, "a shape of samples x channels x positions", "32x64x28x28")
    return sizes


def _graphs(layers: list[str] | None) -> dict[str, LayerGraph]:
    from nas.layers.references import find_layer
    from search_spaces.layers.catalog import names

    return {name: find_layer(name) for name in layers or names()}


@app.command()
def check(json: options.Json = False) -> None:
    """Say what of the kernels works here, checked now, and what needs a GPU."""
    from kernels.check import NEEDS_A_GPU
    from kernels.check import check as run_checks

    output = Output("kernels check", json)
    with output.progress("checks") as progress:
        found = run_checks(progress)
    output.table(["check", "state", "found"], [[c.name, SIGNS[c.state], c.detail] for c in found])
    missing = [c.name for c in found if c.state == "missing"]
    if "kernels on the GPU" in missing:
        output.say("\non a machine with a GPU, not verified here:", style="bold")
        for line in NEEDS_A_GPU:
            output.say(f"  {line}")
    output.finish({"checks": [asdict(c) for c in found], "needs_gpu": list(NEEDS_A_GPU) if missing else []})
    failed = [c.name for c in found if c.state == "failed"]
    if failed:
        raise RunError(f"failed: {', '.join(failed)}")


@app.command("list")
def list_(json: options.Json = False) -> None:
    """List the generated sources in the cache, newest first."""
    import time

    from kernels import cache

    output = Output("kernels list", json)
    now = time.time()
    files: list[dict[str, Any]] = []
    for path in reversed(cache.entries()):
        try:
            about = path.stat()
        except FileNotFoundError:  # removed by another process
            continue
        files.append({"file": path.name, "bytes": about.st_size, "age_seconds": round(now - about.st_mtime)})
    output.table(["file", "bytes", "age (seconds)"], [list(f.values()) for f in files[:20]])
    if len(files) > 20:
        output.say(f"and {len(files) - 20:,} older ones")
    total = sum(f["bytes"] for f in files)
    output.say(f"\n{len(files):,} of at most {cache.LIMIT:,} files, {total / 1e6:.2f} MB in {cache.folder()}")
    output.finish({"folder": str(cache.folder()), "files": files, "bytes": total, "limit": cache.LIMIT})


@app.command()
def clear(json: options.Json = False) -> None:
    """Remove the generated sources from the cache; they are made again when needed."""
    from kernels import cache

    output = Output("kernels clear", json)
    count = cache.clear()
    output.say(f"{count:,} files removed from {cache.folder()}")
    output.finish({"folder": str(cache.folder()), "removed": count})


@app.command("compile")
def compile_(
    layers: Layers = None,
    arch: Annotated[str, typer.Option(help="sm_80, sm_86, sm_89, sm_90, sm_100; commas between.")] = "sm_90",
    shape: Annotated[str, typer.Option(help="Samples x channels x positions.")] = "32x64x28x28",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Channels innermost in memory.")] = False,
    to: Annotated[
        Path | None, typer.Option(help="Keep the compiled kernels in this folder, for TRITON_CACHE_DIR.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the table to this Markdown file.")] = None,
    processes: Annotated[int | None, typer.Option(help="Compilers at a time (default: the cores).")] = None,
    json: options.Json = False,
) -> None:
    """Compile layers for GPUs that need not be here: registers, spills, shared memory and width of loads."""
    from kernels.aot import compile_jobs, jobs_of, table
    from kernels.backend import HAVE_TRITON
    from kernels.program import Unsupported
    from kernels.schedule import Shape
    from search_spaces.common.files import atomic_write

    output = Output("kernels compile", json)
    n, c, *positions = _shape(shape)
    if not HAVE_TRITON:
        raise RunError("Triton is not installed (pip install triton)")
    s = 1
    for size in positions:
        s *= size
    jobs, refused = [], {}
    for name, graph in _graphs(layers).items():
        for target in arch.split(","):
            try:
                jobs += jobs_of(name, graph, Shape(n, c, s, last=channels_last), dtype=dtype, arch=target.strip())
            except Unsupported as error:
                refused[name] = str(error)
    with output.progress("kernels") as progress:
        reports = compile_jobs(jobs, processes=processes or os.cpu_count() or 1, cache=to, progress=progress)
    columns = [
        "layer",
        "pass",
        "kernel",
        "arch",
        "schedule",
        "registers",
        "spills",
        "shared",
        "loads",
        "stores",
        "seconds",
    ]
    rows = [
        [
            r.layer,
            r.direction,
            r.kernel,
            r.arch,
            r.schedule,
            r.registers,
            r.spills,
            r.shared,
            *map(_widths, (r.loads, r.stores)),
        ]
        for r in reports
    ]
    output.table(columns, [[*row, r.seconds] for row, r in zip(rows, reports, strict=True)])
    for name, reason in refused.items():
        output.warn(f"{name} runs by torch: {reason}")
    spilling = sum(r.spills > 0 for r in reports)
    output.say(f"\n{len(reports)} kernels of {len(_graphs(layers)) - len(refused)} layers, {spilling} spill registers")
    files: list[str] = []
    if out is not None:
        with atomic_write(out) as file:
            file.write(f"{_title(shape, dtype, channels_last)}\n\n{table(reports)}\n")
        files.append(str(out))
    if to is not None:
        output.say(f"on the GPU machine: TRITON_CACHE_DIR={to} with Triton of the same version")
    output.finish(
        {"kernels": [asdict(r) for r in reports], "refused": refused, "cache": to and str(to), "files": files}
    )


def _title(shape: str, dtype: str, channels_last: bool) -> str:
    from importlib.metadata import version

    layout = "channels last" if channels_last else "positions last"
    return f"Kernels for x {shape}, {dtype}, {layout}, compiled by Triton {version('triton')} without a GPU."


def _widths(found: dict[int, int]) -> str:
    return ", ".join(f"{count} x {bits}" for bits, count in sorted(found.items()))


@app.command()
def bench(
    layers: Layers = None,
    shape: Annotated[str, typer.Option(help="Samples x channels x positions.")] = "32x64x28x28",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Channels innermost in memory.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also torch.compile, which takes seconds a layer.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Measurements of each.")] = 15,
    json: options.Json = False,
) -> None:
    """Time layers before and after `kernels.fuse` on this machine, forward and backward."""
    import torch

    from kernels import Unsupported, obstacle
    from kernels.aot import DTYPES
    from kernels.layer import FusedLayer
    from kernels.timing import compare
    from search_spaces.common.names import match
    from search_spaces.layers.module import GraphLayer

    output = Output("kernels bench", json)
    sizes, kind = _shape(shape), getattr(torch, match(dtype, DTYPES, "a type"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    x = torch.randn(sizes, device=device, dtype=kind)
    if channels_last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    dy = torch.randn_like(x)
    found: list[dict[str, Any]] = []
    graphs = _graphs(layers)
    with output.progress("layers") as progress:
        for number, (name, graph) in enumerate(graphs.items()):
            progress(number, len(graphs))
            plain = GraphLayer(graph, sizes[1], device=device)
            modules: dict[str, Any] = {"eager": plain}
            try:
                modules["fused"] = FusedLayer.of(plain)
            except Unsupported as error:
                output.warn(f"{name} runs by torch: {error}")
            if compiled:
                modules["compile"] = torch.compile(GraphLayer(graph, sizes[1], device=device))
            seconds = compare({k: _step(m, x, dy) for k, m in modules.items()}, device, rounds)
            found.append({"layer": name} | {f"{k}_ms": 1e3 * v for k, v in seconds.items()})
    keys = ["eager_ms", "fused_ms", *(["compile_ms"] if compiled else [])]
    rows = [
        [f["layer"], *(f.get(k) for k in keys), f["eager_ms"] / f["fused_ms"] if "fused_ms" in f else None]
        for f in found
    ]
    title = f"milliseconds forward and backward, {shape}, {dtype}, on {_device_name(device)}"
    output.table(["layer", *(k.removesuffix("_ms") for k in keys), "times as fast"], rows, title=title)
    reason = obstacle()
    if reason:
        output.say(f"\nfused layers run by torch here: {reason}")
    output.finish(
        {"layers": found, "device": _device_name(device), "shape": list(sizes), "dtype": dtype, "kernels": not reason}
    )


def _step(module: Any, x: Any, dy: Any) -> Any:
    def run() -> None:
        x.grad = None
        module(x).backward(dy)

    return run


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "one core of the CPU"
