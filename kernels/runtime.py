"""Programs run by generated Triton kernels: on CUDA, or in Triton's interpreter on the CPU.

`run` does what `kernels.reference.execute` does. What is compiled is kept by structure, shape, layout and type; the
numbers of a program (an eps, a clamp) are handed over at each launch.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import cache
from kernels.backend import FLOATS
from kernels.emit import HEADER, VERSION
from kernels.nodes import FULL, REDUCTIONS, G, K, N, S, Unsupported, parse_axes, shape_of
from kernels.program import Program
from kernels.reference import execute
from kernels.schedule import PROCESSORS, Plan, Shape, plan
from kernels.stages import Stages, Tile
from search_spaces.common.errors import UserError

INTERPRETED_PROCESSORS = 2  # programs run one after another in the interpreter
REMEMBERED = 4096  # compiled programs, and modules with their source


def run(
    program: Program,
    inputs: Mapping[str, Tensor],
    *,
    groups: int = 1,
    schedule: str | None = None,
    tile: int | None = None,
) -> dict[str, Tensor]:
    """The outputs of a program by name.

    inputs: as for `kernels.reference.execute`: `x` and `dy` [N, C, S] of one type of `backend.FLOATS`, positions or
    channels with the unit stride (others are copied), everything else of its space's shape, in any floating type. The
    outputs of all axes have the type and layout of x, others are float32; none shares memory with another. schedule,
    tile: as for `kernels.schedule.plan`. Errors: UserError for inputs that do not fit, Unsupported for what kernels
    cannot run.
    """
    x = inputs.get("x")
    if x is None or x.ndim != 3 or x.layout != torch.strided or x.is_quantized:
        raise UserError("x" if x is None else f"x {tuple(x.shape)} {x.layout}", "a dense tensor x [N, C, S]")
    if x.dtype not in FLOATS:
        raise Unsupported(str(x.dtype), f"an input of type {', '.join(str(dtype) for dtype in FLOATS)}")
    if not x.is_cuda and not (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise Unsupported(str(x.device), "a CUDA device, or the CPU under TRITON_INTERPRET=1")
    if x.numel() == 0:
        return execute(program, inputs, groups=groups)
    if groups < 1 or x.shape[1] % groups:
        raise UserError(groups, f"a number of groups that divides the {x.shape[1]} channels of x")
    x, last = _arranged(x)
    shape = Shape(x.shape[0], x.shape[1], x.shape[2], groups, last, x.element_size())
    compiled = compile_program(program, shape, schedule=schedule, tile=tile, processors=_processors(x.device))
    return compiled.launch({**inputs, "x": x}, program.scalars)


def compile_program(
    program: Program,
    shape: Shape,
    *,
    schedule: str | None = None,
    tile: int | None = None,
    processors: int = PROCESSORS,
) -> Compiled:
    """The kernels of a program on a shape, remembered by structure. Errors: Unsupported."""
    key = program.structural_hash, shape, schedule, tile, processors
    found = _COMPILED.get(key)
    if found is None:
        found = _compile(program, plan(program, shape, schedule=schedule, tile=tile, processors=processors))
        while len(_COMPILED) >= REMEMBERED:
            _COMPILED.pop(next(iter(_COMPILED)), None)
    else:
        _COMPILED.pop(key, None)  # to the end: the oldest goes first
    _COMPILED[key] = found
    return found


_COMPILED: dict[tuple, Compiled] = {}


@dataclass(frozen=True)
class Call:
    """A launch: arguments are tensors by name (str), numbers of the program by position (Scalar), or known numbers."""

    function: Any
    grid: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Scalar:
    """A number that comes with each launch."""

    position: int


@dataclass(frozen=True)
class Compiled:
    """The kernels of a program on a shape, ready to run."""

    plan: Plan
    calls: tuple[Call, ...]
    spaces: dict[str, int]  # of inputs
    outputs: tuple[tuple[str, int, tuple[int, ...]], ...]  # name, space, shape
    memory: dict[str, str]  # what the kernels call an output, by its name
    sizes: dict[str, int]  # elements of temporary tensors

    def launch(self, inputs: Mapping[str, Tensor], scalars: tuple[float, ...] = ()) -> dict[str, Tensor]:
        """The outputs by name; `x` must have the shape and layout that was compiled for."""
        x = inputs["x"]
        tensors = self.tensors(inputs)
        found: dict[str, Tensor] = {}
        for name, space, shape in self.outputs:
            if space == FULL:
                found[name] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            else:
                found[name] = torch.empty(shape, dtype=torch.float32, device=x.device)
            tensors[self.memory[name]] = found[name]
        if self.sizes:
            slab = torch.empty(sum(self.sizes.values()), dtype=torch.float32, device=x.device)
            tensors.update(zip(self.sizes, slab.split(list(self.sizes.values())), strict=True))
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            for call in self.calls:
                arguments = [tensors[a] if type(a) is str else a for a in call.arguments]
                arguments = [scalars[a.position] if type(a) is Scalar else a for a in arguments]
                call.function[(call.grid,)](*arguments, **call.options)
        for name in found:  # a result that has two names
            if tensors[self.memory[name]] is not found[name]:
                found[name].copy_(tensors[self.memory[name]])
        return found

    def tensors(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs as kernels read them. Errors: UserError for a missing one and for another shape."""
        x, shape = inputs["x"], self.plan.shape
        tensors = {}
        for name, space in self.spaces.items():
            if name not in inputs:
                raise UserError(name, f"a tensor for each input ({', '.join(inputs)} are given)")
            tensor = inputs[name]
            wanted = shape_of(space, shape.n, shape.groups, shape.c // shape.groups, shape.s)
            if tuple(tensor.shape) != wanted or not tensor.is_floating_point():
                raise UserError(f"{name} {tuple(tensor.shape)} {tensor.dtype}", f"a floating tensor {wanted}")
            if tensor.device != x.device:
                raise UserError(f"{name} on {tensor.device}", f"all inputs on {x.device}")
            if space == FULL and tensor is not x:
                tensor = _like(tensor, x)
            elif not tensor.is_contiguous() and tensor is not x:
                tensor = tensor.contiguous()
            tensors[f"in_{name}"] = tensor
        return tensors


def _compile(program: Program, chosen: Plan) -> Compiled:
    stages, shape = chosen.stages, chosen.shape
    sources = chosen.sources()
    text = "\n\n".join([HEADER, *(source.text for source in sources)])
    functions = _functions(f"{VERSION} {chosen.form_key()} {program.structural_hash}", text)
    memory = {}
    for name, at in stages.program.outputs:
        is_result = stages.program.nodes[at].op in REDUCTIONS and not stages.program.spaces[at] & S
        memory[name] = f"r{at}" if is_result else f"out_{name}"
    calls, temporary = [], {}
    splits: dict[str, int] = {}
    for launch, source in zip(chosen.launches, sources, strict=True):
        known = {**_numbers(shape), **dict(launch.numbers), **dict(launch.constants)}
        if isinstance(launch.kernel, Tile):
            splits |= {
                f"{stem}{p.value}": known["splits"] for p in launch.kernel.partials if p.axes & S for stem in "pq"
            }
        arguments: list[Any] = []
        for name in source.arguments:
            kind, _, rest = name.partition("_")
            if kind == "scalar" and rest:
                arguments.append(Scalar(int(rest)))
            elif kind == "count" and rest:
                arguments.append(float(math.prod(_sizes(shape, parse_axes(rest)))))
            elif kind == "size" and rest:
                arguments.append(math.prod(_sizes(shape, parse_axes(rest))))
            elif name in known:
                arguments.append(known[name])
            else:
                arguments.append(name)
                if name[0] in "rpq" and name not in memory.values():
                    temporary[name] = -(-_elements(stages, shape, name) * splits.get(name, 1) // 64) * 64
        options = {"num_warps": launch.warps, "num_stages": 1}
        calls.append(Call(functions[source.name], launch.grid, tuple(arguments), options))
    per_group = shape.c // shape.groups
    spaces = {name: program.spaces[at] for name, at in program.outputs}
    outputs = tuple((name, at, shape_of(at, shape.n, shape.groups, per_group, shape.s)) for name, at in spaces.items())
    inputs = {"x": FULL} | {name: program.spaces[at] for name, at in program.inputs.items()}
    return Compiled(chosen, tuple(calls), inputs, outputs, memory, temporary)


@functools.lru_cache(REMEMBERED)
def _functions(key: str, text: str) -> dict[str, Any]:
    """The functions of a source text, from its file in the cache."""
    return vars(cache.load(cache.write_source(key, text), text))


def _sizes(shape: Shape, axes: int) -> list[int]:
    """The sizes of axes of a normalised program."""
    n, s = (1, shape.n) if shape.rows else (shape.n, shape.s)
    sizes = {N: n, G: shape.groups, K: shape.c // shape.groups, S: s}
    return [size for axis, size in sizes.items() if axes & axis]


def _numbers(shape: Shape) -> dict[str, int]:
    n, s = _sizes(shape, N | S)
    return {"N": n, "C": shape.c, "S": s, "G": shape.groups, "K": shape.c // shape.groups}


def _elements(stages: Stages, shape: Shape, name: str) -> int:
    """The size of a result or, without splits, of a partial."""
    at = int(name[1:])
    axes = stages.program.spaces[at]
    if name[0] != "r":
        axes &= ~stages.partials[at].axes
    return math.prod(_sizes(shape, axes))


def _arranged(x: Tensor) -> tuple[Tensor, bool]:
    """(x densely in one of the two layouts, whether channels have the unit stride)."""
    if x.shape[2] == 1:
        x = x if x.is_contiguous() else x.contiguous()
        return x, True
    if not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        return x, True
    return x.contiguous(), False


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """A tensor in the type and layout of x: gradients arrive expanded, permuted and in other types."""
    if tensor.dtype == x.dtype and tensor.stride() == x.stride():
        return tensor
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(tensor)


@functools.cache
def _cuda_processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _processors(device: torch.device) -> int:
    return _cuda_processors(device.index or 0) if device.type == "cuda" else INTERPRETED_PROCESSORS
