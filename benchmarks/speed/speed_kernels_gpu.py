"""Fused layers on a GPU against eager torch, torch.compile and, where it is installed, Liger-Kernel.

    python -m benchmarks.speed.speed_kernels_gpu [--sections copy,layers,rows,graphs,memory] [--out FILE.md]
    python -m benchmarks.speed.speed_kernels_gpu --dry-run        # the same code on a CPU, tiny: times mean nothing

Needs torch, triton and numpy only. Sections:
copy: bytes read and written by a large copy in a second, the ceiling of all others, and what an empty step costs;
layers: layers of the catalogue and torch's BatchNorm with SiLU on a ResNet-50's shapes, in both memory layouts;
rows: LayerNorm and RMSNorm of rows; graphs: random layers of a search, compile time included; memory: what one
training step of a ResNet with EvoNorm-S0 needs beside one with BatchNorm and ReLU.

A time is the median between CUDA events with a cold level-2 cache, all candidates in turns (`kernels.timing`); the
backward is forward and backward together less the forward. Bandwidth counts the fewest bytes that the layer can move:
2 T forward and 3 T backward, T those of x; 3 T and 5 T with statistics of the batch, which read x twice.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FRESH = tempfile.TemporaryDirectory(prefix="nasforge-speed-")  # compile times are those of empty caches
for variable, name in (
    ("NASFORGE_HOME", "home"),
    ("TRITON_CACHE_DIR", "triton"),
    ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
):
    os.environ[variable] = str(Path(FRESH.name) / name)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import kernels  # noqa: E402
from kernels.handwritten import layer_norm_act, rms_norm_act  # noqa: E402
from kernels.timing import compare  # noqa: E402
from search_spaces.layers import catalog  # noqa: E402
from search_spaces.layers.graph import LayerGraph  # noqa: E402
from search_spaces.layers.module import GraphLayer  # noqa: E402
from search_spaces.layers.space import LayerSpace  # noqa: E402

SECTIONS = ("copy", "layers", "rows", "graphs", "memory")
LAYERS = ("evonorm-s0", "evonorm-b0", "bn-silu", "gn-silu", "torch bn-silu")
IMAGES = (
    *((128, c, s, s) for c, s in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))),
    (256, 96, 56, 56),
    (128, 64, 32, 32),
)
ROWS = ((65536, 768), (65536, 1024), (32768, 4096), (16384, 8192), (8192, 16384))
LARGE = 50e6  # bytes of x from which the targets of bandwidth hold
Step = Callable[[], object]


@dataclass(frozen=True)
class Machine:
    """Where it runs, how large, and how often. copy: bytes a second, measured, None before and in a dry run."""

    device: torch.device
    dry: bool
    rounds: int
    copy: float | None = None
    compile: bool = True

    def shapes(self, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """All of them, or small ones with the same number of dimensions."""
        return [(2, 8, *[4] * (len(shape) - 2)) for shape in shapes[:1]] if self.dry else list(shapes)


# -- measuring ---------------------------------------------------------------------------------------------------


def steps(module: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, wrt: Sequence[Tensor]) -> tuple[Step, Step]:
    """The forward alone, and forward and backward."""

    def forward() -> Tensor:
        return module(x)

    def both() -> Any:
        return torch.autograd.grad(module(x), wrt, dy)

    return forward, both


def measure(machine: Machine, modules: dict[str, Any], x: Tensor) -> dict[str, dict[str, float]]:
    """Milliseconds of each module forward and backward, and the extra peak of memory in bytes on CUDA."""
    dy = torch.randn_like(x)
    x.requires_grad_()
    runs: dict[str, Step] = {}
    for name, module in modules.items():
        parameters = [p for p in module.parameters() if p.requires_grad] if isinstance(module, nn.Module) else []
        runs[f"{name} forward"], runs[f"{name} both"] = steps(module, x, dy, [x, *parameters])
    seconds = compare(runs, machine.device, machine.rounds)
    found = {}
    for name in modules:
        forward, both = (1e3 * seconds[f"{name} {part}"] for part in ("forward", "both"))
        found[name] = {"forward_ms": forward, "backward_ms": both - forward, "both_ms": both}
        if machine.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            runs[f"{name} both"]()
            found[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return found


def rate(machine: Machine, count: int, milliseconds: float) -> float | None:
    """The fraction of the copy's bandwidth that moving `count` bytes in a time is; None where none was measured."""
    return None if machine.copy is None else count / (milliseconds / 1e3) / machine.copy


def measure_copy(machine: Machine) -> dict[str, Any]:
    """The copy's bytes a second, and microseconds of a kernel that does almost nothing."""
    count = 1 << 20 if machine.dry else 4 << 30
    source, target = (torch.empty(count, dtype=torch.int8, device=machine.device) for _ in range(2))
    small = torch.zeros(1, device=machine.device)
    seconds = compare({"copy": lambda: target.copy_(source), "small": lambda: small.add_(1)}, machine.device, 10)
    return {"bytes_per_second": 2 * count / seconds["copy"], "small_us": 1e6 * seconds["small"]}


def first_call(step: Step, machine: Machine) -> float:
    """Seconds until a first call is done: with compilation."""
    begin = time.perf_counter()
    step()
    if machine.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


# -- sections ----------------------------------------------------------------------------------------------------


def candidates(name: str, channels: int, machine: Machine) -> dict[str, Any]:
    """A layer by each provider, with the same parameters."""
    plain: nn.Module
    if name.startswith("torch "):
        plain = nn.Sequential(nn.BatchNorm2d(channels), nn.SiLU()).to(machine.device)
    else:
        plain = GraphLayer(catalog.layer(name), channels, device=machine.device)
    found: dict[str, Any] = {"eager": plain, "fused": kernels.fuse(plain).model}
    if machine.compile:
        torch.compiler.reset()
        found["compile"] = torch.compile(kernels.unfuse(kernels.fuse(plain).model))
    return found


def measure_layers(machine: Machine) -> list[dict[str, Any]]:
    """Layers on images."""
    found = []
    for name in LAYERS:
        batch = name in ("evonorm-b0", "bn-silu", "torch bn-silu")
        for shape in machine.shapes(IMAGES):
            for layout in (torch.contiguous_format, torch.channels_last):
                dtype = torch.float32 if machine.dry else torch.bfloat16
                x = torch.randn(shape, device=machine.device, dtype=dtype).contiguous(memory_format=layout)
                times = measure(machine, candidates(name, shape[1], machine), x)
                found += rows_of(machine, name, x, times, (3, 5) if batch else (2, 3))
    return found


def measure_rows(machine: Machine) -> list[dict[str, Any]]:
    """Norms of rows."""
    found = []
    for shape in machine.shapes(ROWS):
        dtype = torch.float32 if machine.dry else torch.bfloat16
        width = shape[-1]
        for name in ("layer-norm", "rms-norm"):
            norm = nn.LayerNorm if name == "layer-norm" else nn.RMSNorm
            plain = norm(width, eps=1e-6, device=machine.device, dtype=dtype)
            modules: dict[str, Any] = {"eager": plain, "fused": FusedRows(plain)}
            if machine.compile:
                torch.compiler.reset()
                modules["compile"] = torch.compile(norm(width, eps=1e-6, device=machine.device, dtype=dtype))
            modules |= {} if machine.dry else liger(name, width, machine, dtype)
            x = torch.randn(shape, device=machine.device, dtype=dtype)
            found += rows_of(machine, name, x, measure(machine, modules, x), (2, 3))
    return found


class FusedRows(nn.Module):
    """LayerNorm or RMSNorm of torch by the handwritten kernel."""

    def __init__(self, norm: nn.LayerNorm | nn.RMSNorm):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Any:
        if isinstance(self.norm, nn.LayerNorm):
            return layer_norm_act(x, self.norm.weight, self.norm.bias, eps=self.norm.eps)
        return rms_norm_act(x, self.norm.weight, eps=self.norm.eps or 1e-6)


def liger(name: str, width: int, machine: Machine, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Liger-Kernel's module where it is installed."""
    try:
        from liger_kernel.transformers.layer_norm import LigerLayerNorm
        from liger_kernel.transformers.rms_norm import LigerRMSNorm
    except ImportError:
        return {}
    if name == "layer-norm":
        made = LigerLayerNorm(width, eps=1e-6)
    else:
        made = LigerRMSNorm(width, eps=1e-6, in_place=False)  # in place it would overwrite the shared dy
    return {"liger": made.to(machine.device, dtype)}


def rows_of(
    machine: Machine, name: str, x: Tensor, times: dict[str, dict[str, float]], least: tuple[int, int]
) -> list[dict[str, Any]]:
    """One row for each provider, with fractions of the copy's bandwidth."""
    size = x.numel() * x.element_size()
    last = x.ndim == 4 and not x.is_contiguous()
    return [
        {
            "layer": name,
            "shape": "x".join(map(str, x.shape)),
            "layout": "channels last" if last else "contiguous",
            "bytes": size,
            "provider": provider,
            **found,
            "forward_of_copy": rate(machine, least[0] * size, found["forward_ms"]),
            "backward_of_copy": rate(machine, least[1] * size, found["backward_ms"]),
        }
        for provider, found in times.items()
    ]


def measure_graphs(machine: Machine, count: int) -> list[dict[str, Any]]:
    """Random layers of the search: time of forward and backward, and seconds until the first is done."""
    rng, space = np.random.default_rng(0), LayerSpace("evonorm24", sampling="normalizing")
    shape = (2, 8, 4, 4) if machine.dry else (128, 64, 32, 32)
    x = torch.randn(shape, device=machine.device, requires_grad=True)
    dy, found = torch.randn_like(x), []
    for number in range(count):
        graph: LayerGraph = space.sample(rng)
        plain = GraphLayer(graph, shape[1], device=machine.device)
        entry: dict[str, Any] = {"graph": number, "formula": space.readable(graph)}
        try:
            modules: dict[str, Any] = {"eager": plain, "fused": kernels.FusedLayer.of(plain)}
        except kernels.Unsupported as error:
            found.append(entry | {"refused": str(error)})
            continue
        if machine.compile:
            torch.compiler.reset()
            modules["compile"] = torch.compile(GraphLayer(graph, shape[1], device=machine.device))
        runs = {}
        for name, module in modules.items():
            runs[name] = steps(module, x, dy, [x])[1]
            entry[f"{name}_first_seconds"] = first_call(runs[name], machine)
        times = compare(runs, machine.device, machine.rounds)
        found.append(entry | {f"{name}_ms": 1e3 * seconds for name, seconds in times.items()})
    return found


def resnet(layer: Callable[[int], nn.Module], depths: Sequence[int], width: int) -> nn.Module:
    """A ResNet of bottlenecks (He et al. 2016, arXiv 1512.03385, table 1)."""

    class Bottleneck(nn.Module):
        def __init__(self, inside: int, middle: int, stride: int):
            super().__init__()
            outside = 4 * middle
            self.branch = nn.Sequential(
                nn.Conv2d(inside, middle, 1, bias=False),
                layer(middle),
                nn.Conv2d(middle, middle, 3, stride, 1, bias=False),
                layer(middle),
                nn.Conv2d(middle, outside, 1, bias=False),
            )
            changes = stride > 1 or inside != outside
            self.short = nn.Conv2d(inside, outside, 1, stride, bias=False) if changes else nn.Identity()
            self.end = layer(outside)

        def forward(self, x: Tensor) -> Tensor:
            return self.end(self.branch(x) + self.short(x))

    blocks, inside = [], width
    for stage, depth in enumerate(depths):
        for number in range(depth):
            blocks.append(Bottleneck(inside, width << stage, 2 if stage and not number else 1))
            inside = 4 * (width << stage)
    stem = (nn.Conv2d(3, width, 7, 2, 3, bias=False), layer(width), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 1000))


def measure_memory(machine: Machine) -> dict[str, dict[str, float]]:
    """Bytes kept for the backward (from torch's hooks, on any device) and the peak of a step on CUDA."""
    depths, width, images = ((1, 1), 8, (2, 3, 32, 32)) if machine.dry else ((3, 4, 6, 3), 64, (64, 3, 224, 224))
    bn = lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(inplace=True))  # noqa: E731
    s0 = lambda c: GraphLayer(catalog.layer("evonorm-s0"), c)  # noqa: E731
    backend = "reference" if kernels.obstacle() else "triton"  # both keep x and small statistics
    models = {
        "bn-relu eager": lambda: resnet(bn, depths, width),
        "evonorm-s0 eager": lambda: resnet(s0, depths, width),
        "evonorm-s0 fused": lambda: kernels.fuse(resnet(s0, depths, width), backend=backend).model,
    }
    found = {}
    for name, make in models.items():
        model = make().to(machine.device)
        x = torch.randn(images, device=machine.device)
        found[name] = {"kept_bytes": float(kept_bytes(model, x))}
        if machine.device.type == "cuda":
            for _ in range(2):
                model.zero_grad(set_to_none=True)
                torch.cuda.reset_peak_memory_stats()
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model(x).float().square().mean()
                loss.backward()
            found[name]["peak_bytes"] = float(torch.cuda.max_memory_allocated())
        del model
    return found


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of all tensors that a forward keeps for the backward, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    alive: dict[int, Tensor] = {}  # held, so that no address is used again

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            alive[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast(x.device.type, torch.bfloat16):
            out = model(x)
        total = sum(tensor.untyped_storage().nbytes() for tensor in alive.values())
    del out
    return total


# -- report ------------------------------------------------------------------------------------------------------


def targets(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, measured, target) of everything that was measured; without times in a dry run."""
    lines: list[tuple[str, str, str]] = []
    if not results["about"]["dry_run"]:
        lines += _targets_of_times(results)
    refused = [g for g in results.get("graphs", []) if "refused" in g]
    if results.get("graphs"):
        lines.append(("random graphs without kernels", f"{len(refused)} of {len(results['graphs'])}", "0"))
    memory = results.get("memory")
    for key in ("kept_bytes", "peak_bytes"):
        if memory and key in memory["bn-relu eager"]:
            ratio = memory["evonorm-s0 fused"][key] / memory["bn-relu eager"][key]
            lines.append((f"ResNet step, {key} of EvoNorm-S0 by BN-ReLU", f"{ratio:.2f}", "at most 1.1"))
    return lines


def _targets_of_times(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    lines: list[tuple[str, str, str]] = []
    large = [r for r in results.get("layers", []) if r["provider"] == "fused" and r["bytes"] > LARGE]
    for part, least in (("forward", 0.85), ("backward", 0.75)):
        shares = [r[f"{part}_of_copy"] for r in large if r[f"{part}_of_copy"] is not None]
        if shares:
            measured = f"{statistics.median(shares):.0%} median, {min(shares):.0%} least of {len(shares)}"
            lines.append((f"{part} above 50 MB, of the copy", measured, f"{least:.0%}"))
    by_place: dict[tuple, dict[str, float]] = {}
    for r in results.get("layers", []):
        by_place.setdefault((r["layer"], r["shape"], r["layout"]), {})[r["provider"]] = r["both_ms"]
    gains = [t["eager"] / t["fused"] for (layer, *_), t in by_place.items() if layer.startswith("evonorm")]
    if gains:
        lines.append(("EvoNorm, eager time by fused", f"{_geomean(gains):.2f}, least {min(gains):.2f}", "3"))
    graphs = [g for g in results.get("graphs", []) if "compile_ms" in g]
    if graphs:
        times = [g["compile_ms"] / g["fused_ms"] for g in graphs]
        firsts = [sum(g[f"{name}_first_seconds"] for g in graphs) for name in ("compile", "fused")]
        about = f"{_geomean(times):.2f}, least {min(times):.2f}, {sum(t < 1 for t in times)} of {len(times)} lost"
        lines.append(("random graphs, torch.compile's time by fused", about, "1"))
        about = f"{firsts[0] / firsts[1]:.2f} ({firsts[0]:.1f} s by {firsts[1]:.1f} s)"
        lines.append(("the same until the first step is done", about, "3"))
    return lines


def _geomean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def markdown(results: dict[str, Any]) -> str:
    """Everything as tables."""
    about = results["about"]
    lines = [f"{about['device']}, torch {about['torch']}, triton {about['triton']}, {about['date']}"]
    if about["dry_run"]:
        lines = ["Dry run on a CPU with tiny shapes: the code works, the times mean nothing.", "", *lines]
    if "copy" in results:
        copy = results["copy"]
        lines += ["", f"copy {copy['bytes_per_second'] / 1e12:.3f} TB/s; a small kernel {copy['small_us']:.1f} us"]
    for section in ("layers", "rows"):
        columns = ("layer", "shape", "layout", "provider", "forward_ms", "backward_ms")
        columns += ("forward_of_copy", "backward_of_copy", "peak_bytes")
        lines += _table(results.get(section, []), columns)
    columns = ("graph", *(f"{n}_{k}" for n in ("eager", "fused", "compile") for k in ("ms", "first_seconds")))
    lines += _table(results.get("graphs", []), (*columns, "refused"))
    memory = [{"model": name, **found} for name, found in results.get("memory", {}).items()]
    lines += _table(memory, ("model", "kept_bytes", "peak_bytes"))
    found = [dict(zip(("what", "measured", "target"), line, strict=True)) for line in targets(results)]
    return "\n".join([*lines, *_table(found, ("what", "measured", "target"))]) + "\n"


def _table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[str]:
    if not rows:
        return []
    columns = [c for c in columns if any(row.get(c) is not None for row in rows)]
    lines = ["", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(_cell(c, row.get(c)) for c in columns) + " |" for row in rows]


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return (
            f"{value:.0%}" if column.endswith("_of_copy") else f"{value:.4g}" if value < 1e6 else f"{value / 1e6:.0f} M"
        )
    return str(value)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print; the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS), help="commas between")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--graphs", type=int, default=50)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--out", help="write the tables to this file too")
    parser.add_argument("--json", help="write all figures to this file")
    given = parser.parse_args(arguments)
    wanted = given.sections.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"--sections {','.join(sorted(unknown))}: expected some of {', '.join(SECTIONS)}")
    if not given.dry_run and (reason := kernels.obstacle() or ("" if torch.cuda.is_available() else "no GPU is here")):
        print(f"nothing measured: {reason}; --dry-run tries the code on a CPU")  # `make speed` goes on
        return {}
    device = torch.device("cpu" if given.dry_run else "cuda")
    rounds, count = (2, min(given.graphs, 3)) if given.dry_run else (given.rounds, given.graphs)
    machine = Machine(device, given.dry_run, rounds, compile=not (given.no_compile or given.dry_run))
    name = platform.processor() or "a CPU" if given.dry_run else torch.cuda.get_device_name()
    about = {"device": name, "torch": torch.__version__, "triton": _triton(), "dry_run": given.dry_run}
    results: dict[str, Any] = {"about": about | {"date": time.strftime("%Y-%m-%d")}}
    copy = measure_copy(machine)  # the ceiling of the others, so always
    if "copy" in wanted:
        results["copy"] = copy
    if not given.dry_run:
        machine = Machine(device, False, rounds, copy["bytes_per_second"], machine.compile)
    if "layers" in wanted:
        results["layers"] = measure_layers(machine)
    if "rows" in wanted:
        results["rows"] = measure_rows(machine)
    if "graphs" in wanted:
        results["graphs"] = measure_graphs(machine, count)
    if "memory" in wanted:
        results["memory"] = measure_memory(machine)
    text = markdown(results)
    print(text)
    for path, content in ((given.out, text), (given.json, json.dumps(results))):
        if path:
            Path(path).write_text(content)
    return results


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


if __name__ == "__main__":
    main()
