"""Cases of the generated kernels: a program with its inputs, its outputs in float64, and how far float32 may be off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from kernel_cases import Case, expected, make_case, random_cases
from torch import Tensor

from kernels.autodiff import Derivative, differentiate
from kernels.lower import Lowered, lower
from kernels.reference import execute, from_program, to_program
from search_spaces.layers import catalog
from search_spaces.layers.evaluate import channel_dim

# Of the norm of an output; the interpreter rounds to bfloat16 towards zero.
TOLERANCE = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DEGENERATE = 1e-6 / 1e-5**0.5  # of gradients that vanish because a variance does: divided by the root of an eps
LAYERS = 2e-6  # of layers that are no random graphs, in float32
SCHEDULES = ("R", "L", "U")
PRESETS = ("evonorm24", "extended", "tokens", "pangaea")


@dataclass(frozen=True)
class Task:
    """A case whose tensors have a type and an order in memory (channels innermost: `last`)."""

    name: str
    case: Case
    dtype: torch.dtype = torch.float32
    last: bool = False
    tolerance: float | None = None
    floor: float = 1e-6  # of every number of an output, for those that are zero but for rounding

    @property
    def lowered(self) -> Lowered:
        return lower(self.case.graph, layout=self.case.layout, training=self.case.stats is None, mixed=True)

    @property
    def groups(self) -> int:
        return self.case.graph.group_count(self.case.x.shape[channel_dim(self.case.x.ndim, self.case.layout)])

    def rounded(self, dtype: torch.dtype) -> Case:
        """The case with the numbers that kernels see, in another type."""
        case, full = self.case, lambda t: t.to(self.dtype).to(dtype)
        params = {name: value.float().to(dtype) for name, value in case.params.items()}
        stats = {k: v.float().to(dtype) for k, v in case.stats.items()} if case.stats is not None else None
        return replace(case, x=full(case.x), dy=full(case.dy), params=params, stats=stats)

    def programs(self) -> Derivative:
        return differentiate(self.lowered.program, ("x", *self.lowered.parameters))

    def inputs(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """What the programs take; `dtype` of all of it, by default that of the task for x and dy, float32 else."""
        lowered, case = self.lowered, self.rounded(dtype or torch.float32)
        full = {"x": case.x, "dy": case.dy}
        if dtype is None:
            full = {name: value.to(self.dtype) for name, value in full.items()}
        full = {name: to_program(value, case.layout, lowered.flat).contiguous() for name, value in full.items()}
        if self.last:
            full = {name: value.transpose(1, 2).contiguous().transpose(1, 2) for name, value in full.items()}
        stats = {s.name: case.stats[s.id] for s in lowered.statistics} if case.stats is not None else {}
        return {**full, **case.params, **stats}


def by_kernels(task: Task, run, **options) -> dict[str, Tensor]:
    """y, gradients and statistics by `run`, in the layer's shapes; `saved_` statistics go from forward to backward."""
    lowered, case, derivative, inputs = task.lowered, task.case, task.programs(), task.inputs()
    forward = run(derivative.forward, inputs, groups=task.groups, **options)
    backward = run(derivative.backward, {**inputs, **forward}, groups=task.groups, **options)
    found = {"y": forward["y"], **backward}
    assert found["y"].stride() == found["dx"].stride() == inputs["x"].stride()
    assert found["y"].dtype == found["dx"].dtype == task.dtype
    for name in ("y", "dx"):
        found[name] = from_program(found[name].contiguous(), case.x.shape, case.layout, lowered.flat)
    return found | {name: value for name, value in forward.items() if name.startswith("moment")}


def errors(task: Task, found: dict[str, Tensor]) -> Iterator[tuple[str, float, float]]:
    """(output, distance from float64, what is allowed): a share of the norm, or 8 times what eager float32 is off."""
    wanted, eager = expected(task.rounded(torch.float64)), expected(task.rounded(torch.float32))
    if task.case.stats is None:
        exact = execute(task.lowered.program, task.inputs(torch.float64), groups=task.groups)
        wanted |= {name: value for name, value in exact.items() if name != "y"}
    for name, want in wanted.items():
        got, rough = found[name].double(), eager[name].double() if name in eager else want
        usable = want.isfinite() & rough.isfinite() & (want.abs() < (6e4 if task.dtype == torch.float16 else 1e38))
        off = float((got - want)[usable].norm())
        half = name in ("y", "dx")
        tolerance = TOLERANCE[task.dtype if half else torch.float32]
        if task.tolerance is not None:
            tolerance = max(task.tolerance, tolerance if task.dtype != torch.float32 and half else 0.0)
        size = float(want[usable].norm())
        floor = task.floor * usable.sum().item() ** 0.5
        allowed = max(tolerance * size, 8 * float((rough - want)[usable].norm()), floor)
        yield name, off if off == off else float("inf"), allowed


def graph_tasks(count: int, seed: int = 0, presets: tuple[str, ...] = PRESETS) -> Iterator[Task]:
    """Random graphs that kernels run, types and layouts taking turns."""
    dtypes = (torch.float32, torch.float32, torch.float16, torch.bfloat16)
    for preset in presets:
        for k, case in enumerate(random_cases(preset, count, seed)):
            yield Task(f"{preset} {k}", case, dtypes[k % 4], last=k % 3 == 1)


def layer_tasks(shapes: tuple[tuple[int, ...], ...], **more) -> Iterator[Task]:
    """The catalogue's layers, in training and, where it differs, in evaluation."""
    for number, name in enumerate(catalog.CATALOG):
        for k, shape in enumerate(shapes):
            graph = replace(catalog.layer(name), groups=(4, 1, 8)[(number + k) % 3], group_size=None)
            for training in (True, False) if graph.batch_aggregates() else (True,):
                case = make_case(graph, shape, layout="channels-first", training=training, seed=3 * number + 1)
                mode = "" if training else " evaluation"
                floor = 1e-6 if shape[2] > 1 else DEGENERATE
                yield Task(f"{name} {shape}{mode}", case, tolerance=LAYERS, floor=floor, **more)
