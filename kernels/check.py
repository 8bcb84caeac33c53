"""What of the kernels works on this machine, checked now; what needs a GPU is named. The data of `nas kernels check`.

As a module in a process of its own (`python -m kernels.check`) it compares fused layers with float64 where kernels
run: in Triton's interpreter under TRITON_INTERPRET=1, on CUDA otherwise.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kernels import aot, cache, operators
from kernels.autodiff import differentiate
from kernels.backend import HAVE_TRITON, by_kernels, compiler
from kernels.layer import FusedLayer
from kernels.lower import lower
from kernels.program import Unsupported, parse
from kernels.schedule import Shape, plan
from kernels.traffic import traffic
from search_spaces.common.errors import RunError
from search_spaces.layers import catalog
from search_spaces.layers.module import GraphLayer
from search_spaces.layers.space import LayerSpace

LAYERS = ("evonorm-b0", "evonorm-s0", "bn-relu", "gn-silu", "layer-norm", "layer-norm-tokens", "silu")
MOVING = ("evonorm-s0", "evonorm-b0", "bn-relu", "gn-silu", "in-relu", "silu")
COMPILED = ("evonorm-s0", "bn-relu")
TOLERANCE = 1e-5  # of float32 against float64
GRAPHS = 100  # random ones
NEEDS_A_GPU = (
    "speed and fraction of the copy bandwidth: python -m benchmarks.speed.speed_kernels_gpu",
    "compiled kernels against float64, two runs bit for bit, a training: python -m pytest -m gpu tests/kernels",
)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. state: `ok`, `failed`, or `missing` where the machine lacks what it needs."""

    name: str
    state: str
    detail: str


def check(progress: Callable[[int, int | None], None] | None = None) -> list[Check]:
    """Run all checks (half a minute on one core); what goes wrong is reported, never raised."""
    checks: tuple[tuple[str, Callable[[], str]], ...] = (
        ("triton", _triton),
        ("C compiler", _compiler),
        ("source cache", _cache),
        ("operators by torch", lambda: layers_agree("cpu", "reference")),
        ("random graphs", _fallbacks),
        ("kernels in the interpreter", lambda: _in_a_process(interpret=True)),
        ("bytes they move", _moved),
        ("kernels compiled for sm_90", _compiled),
        ("kernels on the GPU", lambda: _in_a_process(interpret=False)),
    )
    found = []
    for number, (name, run) in enumerate(checks):
        try:
            found.append(Check(name, "ok", run()))
        except _Missing as error:
            found.append(Check(name, "missing", str(error)))
        except Exception as error:  # a check says what is broken
            found.append(Check(name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        if progress is not None:
            progress(number + 1, len(checks))
    return found


class _Missing(RuntimeError):
    """The machine lacks what a check needs."""


def _triton() -> str:
    if not HAVE_TRITON:
        raise _Missing("not installed; every layer runs by torch")
    from importlib.metadata import version

    return version("triton")


def _compiler() -> str:
    found = compiler()
    if found is None:
        raise _Missing("Triton needs one to launch kernels (install gcc or set CC)")
    return found


def _cache() -> str:
    files = cache.entries()
    path = cache.folder()
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise _Missing(f"{path} cannot be written; kernels go to a temporary folder in each process")
    return f"{path}, {len(files)} files"


def layers_agree(device: str, backend: str) -> str:
    """Compare catalogue layers with float64, forward and backward, in training. Errors: RunError where one is off."""
    errors = {}
    for name in LAYERS:
        tokens = name.endswith("tokens")
        shape = (3, 10, 8) if tokens else (3, 8, 5, 4)
        exact = GraphLayer(catalog.layer(name, groups=2), 8, layout="tokens" if tokens else "channels-first").double()
        generator = torch.Generator().manual_seed(0)
        for parameter in exact.parameters():
            nn.init.uniform_(parameter, 0.4, 1.2, generator=generator)
        fused = FusedLayer.of(copy.deepcopy(exact).float(), backend).to(device)
        x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        if backend != "reference" and not by_kernels(x.float().to(device)):
            raise RunError(f"kernels do not run on {device} here")
        operators._warn_once.cache_clear()
        results = []
        for layer, dtype, place in ((exact, torch.float64, "cpu"), (fused, torch.float32, device)):
            given = x.to(place, dtype).requires_grad_()
            y = layer(given)
            gradients = torch.autograd.grad(y, [given, *layer.parameters()], dy.to(place, dtype))
            results.append([y.detach().cpu().double(), *(g.cpu().double() for g in gradients)])
        if operators._warn_once.cache_info().currsize:
            raise RunError(f"{name} fell back to torch")
        errors[name] = max(float((b - a).norm() / a.norm().clamp(min=1e-6)) for a, b in zip(*results, strict=True))
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= TOLERANCE:
        raise RunError(f"{worst} differs from float64 by {errors[worst]:.1e}, more than {TOLERANCE:.0e}")
    return f"{len(errors)} layers forward and backward, within {errors[worst]:.1e} of float64"


def fallbacks(count: int, seed: int = 0, preset: str = "evonorm24") -> dict[str, int]:
    """How many of `count` random graphs kernels cannot express, by the reason."""
    rng, space = np.random.default_rng(seed), LayerSpace(preset)
    found: dict[str, int] = {}
    for _ in range(count):
        graph = space.sample(rng)
        try:
            lowered = lower(graph)
            derivative = differentiate(lowered.program, ("x", *lowered.parameters))
            for program in (derivative.forward, derivative.backward):
                plan(program, Shape(32, 64, 196, graph.group_count(64)))
        except Unsupported as error:
            found[str(error)] = found.get(str(error), 0) + 1
    return found


def _fallbacks() -> str:
    found = {preset: fallbacks(GRAPHS, preset=preset) for preset in ("evonorm24", "extended", "tokens")}
    if found["evonorm24"]:
        raise RunError(
            f"{sum(found['evonorm24'].values())} of {GRAPHS} have no kernels: {next(iter(found['evonorm24']))}"
        )
    counts = ", ".join(f"{preset} {GRAPHS - sum(reasons.values())}" for preset, reasons in found.items())
    return f"have kernels, of {GRAPHS} each: {counts}; others run by torch"


def _moved() -> str:
    """The bytes of the emitted loads and stores, of resident and batch kernels, against the fewest."""
    if not HAVE_TRITON:
        raise _Missing("Triton is not installed")
    ratios = {}
    for name in MOVING:
        for job in aot.jobs_of(name, catalog.layer(name), Shape(128, 256, 784)):
            moved = traffic(parse(job.text), job.shape)
            ratios[f"{name} {job.direction}"] = moved.total / moved.least
    worst = max(ratios, key=lambda name: ratios[name])
    if not ratios[worst] <= 1.02:
        raise RunError(f"{worst} moves {ratios[worst]:.2f} times the fewest bytes")
    return f"{len(MOVING)} layers forward and backward at 128x256x28x28: at most {ratios[worst]:.3f} of the fewest"


def _compiled() -> str:
    if not HAVE_TRITON:
        raise _Missing("Triton is not installed")
    jobs = [job for name in COMPILED for job in aot.jobs_of(name, catalog.layer(name), Shape(32, 64, 784))]
    reports = aot.compile_jobs(jobs, processes=os.cpu_count() or 1)
    spilling = [report for report in reports if report.spills]
    if spilling:
        raise RunError(f"{len(spilling)} kernels spill registers, such as {spilling[0].layer} {spilling[0].kernel}")
    narrow = [report for report in reports if report.over == "x" and 128 not in report.loads]
    if narrow:
        raise RunError(f"{len(narrow)} kernels load less than 128 bits, such as {narrow[0].layer} {narrow[0].kernel}")
    most = max(report.registers for report in reports)
    return f"{len(reports)} kernels of {len(COMPILED)} layers: no spills, 128-bit loads, at most {most} registers"


def _in_a_process(interpret: bool) -> str:
    if not HAVE_TRITON:
        raise _Missing("Triton is not installed")
    if not interpret and not torch.cuda.is_available():
        raise _Missing("no GPU is here")
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "kernels.check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    if done.returncode:
        raise RunError((done.stderr.strip().splitlines() or ["the process ended"])[-1])
    return json.loads(done.stdout)


if __name__ == "__main__":
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    sys.stdout.write(json.dumps(layers_agree(device, "triton")))
