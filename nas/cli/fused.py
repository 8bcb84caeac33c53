"""nas kernels: what works here, compile for a GPU that is elsewhere, bytes moved, the cache, times on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from nas.cli import fused_ahead, options
from nas.cli.fused_ahead import ChannelsLast, Layers, Shape, counted, layer_graphs, read_shape
from nas.cli.output import Output
from search_spaces.common.errors import RunError

app = typer.Typer(
    help="Fused Triton kernels: check, compile, bytes, cache, times.", no_args_is_help=True, rich_markup_mode=None
)
app.command("compile")(fused_ahead.compile_)
app.command("bytes")(fused_ahead.bytes_)
SIGNS = {"ok": "ok", "failed": "FAILED", "missing": "not here"}


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
    """List the generated sources in the cache, newest first, and say where compiled kernels lie."""
    import time

    from kernels import cache

    output = Output("kernels list", json)
    now = time.time()
    files: list[dict[str, Any]] = []
    for path in reversed(cache.entries()):
        try:
            about, text = path.stat(), path.read_text(errors="replace")
        except FileNotFoundError:  # removed by another process
            continue
        count = text.count("@triton.jit")
        age = max(round(now - about.st_mtime), 0)
        files.append({"file": path.name, "kernels": count, "bytes": about.st_size, "age_seconds": age})
    if files:
        rows = [[f["file"], f["kernels"], f["bytes"], _age(f["age_seconds"])] for f in files[:20]]
        output.table(["file", "kernels", "bytes", "written"], rows)
    if len(files) > 20:
        output.say(f"and {len(files) - 20:,} older ones")
    total = sum(f["bytes"] for f in files)
    output.say(f"{len(files):,} of at most {cache.LIMIT:,} files, {total / 1e6:.2f} MB in {cache.folder()}")
    output.say(f"compiled by Triton: {cache.triton_folder()}")
    found = {"folder": str(cache.folder()), "compiled": str(cache.triton_folder()), "files": files}
    output.finish({**found, "bytes": total, "limit": cache.LIMIT})


def _age(seconds: int) -> str:
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}{'s' * (seconds >= 2 * size)} ago"
    return "just now"


@app.command()
def clear(json: options.Json = False) -> None:
    """Remove the generated sources from the cache; they are made again when needed. Compiled kernels stay."""
    from kernels import cache

    output = Output("kernels clear", json)
    count = cache.clear()
    output.say(f"{counted(count, 'file')} removed from {cache.folder()}")
    output.finish({"folder": str(cache.folder()), "removed": count})


@app.command()
def bench(
    layers: Layers = None,
    shape: Shape = "32x64x28x28",
    dtype: Annotated[str, typer.Option("--dtype", help="Of x: float32, float16 or bfloat16.")] = "float32",
    channels_last: ChannelsLast = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also torch.compile, which takes seconds a layer.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=2, help="Measurements of each.")] = 15,
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
    sizes, kind = read_shape(shape), getattr(torch, match(dtype, DTYPES, "a type"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    x = torch.randn(sizes, device=device, dtype=kind)
    if channels_last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    dy = torch.randn_like(x)
    found: list[dict[str, Any]] = []
    graphs = layer_graphs(layers)
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
