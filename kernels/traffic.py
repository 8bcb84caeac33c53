"""Bytes that the kernels of a program move, read off their text, and the fewest that any kernels can.

Tiles partition x, so each place in a kernel's text that loads or stores a tensor of the size of x moves all of it once,
whatever the shape; a place in a loop belongs to one pass. Smaller tensors (channel vectors, statistics, partials) stay
in the caches while a kernel runs, so each counts once for every kernel that touches it.
"""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass

from kernels.nodes import FULL, REDUCTIONS, N, S, Unsupported, shape_of
from kernels.program import Program
from kernels.runtime import Compiled, compile_program
from kernels.schedule import SCHEDULES, Shape


@dataclass(frozen=True)
class Traffic:
    """What all kernels of a program move once. read, written: tensors of the size of x. total, least: bytes, with
    those of smaller tensors; least: what `fewest` says. launches: kernels."""

    schedule: str
    read: int
    written: int
    total: int
    least: int
    launches: int


def traffic(program: Program, shape: Shape, schedule: str | None = None) -> Traffic:
    """The traffic of a program on a shape by the cheapest plan or a given kind. Errors: Unsupported."""
    compiled = compile_program(program, shape, schedule=schedule)
    full = _full_names(program, shape)
    whole = shape.n * shape.c * shape.s * shape.itemsize
    read = written = small = 0
    for source in compiled.plan.sources():
        touched = set()
        for stores, pointer in accesses(source.text):
            if pointer in full:
                read, written = read + (not stores), written + stores
            else:
                touched.add(pointer)
        small += sum(_bytes(compiled, pointer) for pointer in touched)
    reads, writes, rest = fewest(program, shape)
    return Traffic(
        compiled.plan.schedule,
        read,
        written,
        (read + written) * whole + small,
        (reads + writes) * whole + rest,
        len(compiled.calls),
    )


def by_schedule(program: Program, shape: Shape) -> dict[str, Traffic]:
    """The traffic by each kind of schedule that a program can have on a shape, first the one that is chosen."""
    chosen = traffic(program, shape)
    found = {chosen.schedule: chosen}
    for schedule in SCHEDULES:
        if schedule not in found:
            try:
                found[schedule] = traffic(program, shape, schedule)
            except Unsupported:
                continue
    return found


def accesses(text: str) -> list[tuple[bool, str]]:
    """(Whether it stores, the pointer's name) for every place in a kernel's text that loads or stores."""
    found = []
    for call in ast.walk(ast.parse(text)):
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("tl.load", "tl.store"):
            address = call.args[0]
            while isinstance(address, ast.BinOp):  # pointer + offset + offset
                address = address.left
            assert isinstance(address, ast.Name), ast.unparse(call)
            found.append((ast.unparse(call.func) == "tl.store", address.id))
    return found


def fewest(program: Program, shape: Shape) -> tuple[int, int, int]:
    """(Tensors of the size of x read, the same written, bytes of smaller inputs and outputs) at the least.

    What one sample needs can stay on the chip; a statistic over samples cannot be used before all samples were read
    once, so that values behind it need another pass, over the inputs that they are computed from. Statistics that
    only leave the program ride along with the last pass that has what they need.
    """
    nodes, spaces = program.nodes, program.spaces
    level: list[int] = []  # passes over x that are finished before a value can be known
    for node in nodes:
        over_samples = node.op in REDUCTIONS and bool(node.axes & N) and bool(spaces[node.args[0]] & S)
        level.append(max((level[a] for a in node.args), default=0) + over_samples)

    def inputs(at: int) -> set[int]:
        """The tensors of the size of x that a value is computed from in its own pass."""
        found, seen, stack = set(), set(), [at]
        while stack:
            one = stack.pop()
            if one in seen:
                continue
            seen.add(one)
            if nodes[one].op == "input":
                found |= {one} if spaces[one] == FULL else set()
            else:
                stack += [a for a in nodes[one].args if level[a] == level[one] or spaces[a] & S]
        return found

    def statistics(roots: list[int]) -> set[int]:
        """The statistics over samples that values need."""
        found, seen, stack = set(), set(), list(roots)
        while stack:
            one = stack.pop()
            if one not in seen:
                seen.add(one)
                stack += nodes[one].args
                found |= {one} if any(level[one] > level[a] for a in nodes[one].args) else set()
        return {one for one in found if nodes[one].op in REDUCTIONS and nodes[one].axes & N}

    outputs = [at for _, at in program.outputs]
    whole = [at for at in outputs if spaces[at] == FULL]
    passes: dict[int, set[int]] = {}
    for at in whole:
        passes.setdefault(level[at], set()).update(inputs(at))
    for at in statistics(whole):
        passes.setdefault(level[nodes[at].args[0]], set()).update(inputs(nodes[at].args[0]))
    for at in sorted(statistics(outputs) - statistics(whole), key=lambda at: -level[at]):
        needed = inputs(nodes[at].args[0])
        if not any(k >= level[nodes[at].args[0]] and needed <= read for k, read in passes.items()):
            passes.setdefault(max([level[nodes[at].args[0]], *passes]), set()).update(needed)
    for at in outputs:
        local = spaces[at] != FULL and not statistics([at])
        if local and not any(inputs(at) <= read for read in passes.values()):
            passes.setdefault(max([0, *passes]), set()).update(inputs(at))
    per_group = shape.c // shape.groups
    small = [spaces[at] for at in (*program.inputs.values(), *outputs) if spaces[at] != FULL]
    rest = sum(4 * math.prod(shape_of(space, shape.n, shape.groups, per_group, shape.s)) for space in small)
    return sum(map(len, passes.values())), len(whole), rest


def _full_names(program: Program, shape: Shape) -> set[str]:
    """What kernels call the tensors of the size of x."""
    names = {f"in_{name}" for name, at in program.inputs.items() if program.spaces[at] == FULL}
    return names | {f"out_{name}" for name, at in program.outputs if program.spaces[at] == FULL}


def _bytes(compiled: Compiled, pointer: str) -> int:
    """The size of a tensor that is smaller than x, all of them float32."""
    shape = compiled.plan.shape
    if pointer in compiled.sizes:
        return 4 * compiled.sizes[pointer]
    for name, _, size in compiled.outputs:
        if compiled.memory[name] == pointer:
            return 4 * math.prod(size)
    space = compiled.spaces[pointer.removeprefix("in_")]
    return 4 * math.prod(shape_of(space, shape.n, shape.groups, shape.c // shape.groups, shape.s))


def table(rows: dict[tuple[str, str], dict[str, Traffic]]) -> str:
    """Rows of Markdown by (layer, pass); by schedule x-sized tensors read and written, and bytes by the fewest."""
    lines = ["| layer | pass | MB at the least | chosen | R | L | U |", "|" + " --- |" * 7]
    for (layer, direction), found in rows.items():
        chosen = next(iter(found.values()))
        cells = []
        for schedule in SCHEDULES:
            t = found.get(schedule)
            cells.append("" if t is None else f"{t.read} + {t.written}: {t.total / t.least:.3f}, {t.launches}")
        about = [layer, direction, f"{chosen.least / 1e6:.1f}", chosen.schedule]
        lines.append("| " + " | ".join([*about, *cells]) + " |")
    return "\n".join(lines)
