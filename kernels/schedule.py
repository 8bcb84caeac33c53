"""Which kernels run a program on a shape: what tiles own, how large they are, how many programs share the work.

Three schedules come out of one form of kernel. R, resident: a program keeps all that its sample's statistics need, and
reads x once. L, looped: the same, but the group is too large to keep; it is read once for each statistic that depends
on another. U, universal: every reduction goes through memory, one kernel over x for each level of reductions. Batch
statistics always do, so layers with them are U, with what is local resident or looped.

A program's layers on rows [rows, C] are U whose tiles own whole rows. The sizes were chosen for registers, as the
compiler reports them for sm_80 and sm_90 (`kernels.aot`); they have not been tuned on a GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kernels.emit import Source, check_supported
from kernels.emit_small import emit_levels
from kernels.emit_tile import Form, emit_tile
from kernels.nodes import REDUCTIONS, C, G, K, N, S, Unsupported
from kernels.program import Program
from kernels.stages import Level, Pressure, Stages, Tile, normalised

SCHEDULES = ("R", "L", "U")
PROCESSORS = 132  # of a device that is not asked: H100 and H200
_LAUNCH_BYTES = 16 << 20  # what a launch costs, as bytes: about 4 microseconds at 4 TB/s
_REREAD = 0.5  # of the price of a read, for what a looped program read just before
_FIXED_REGISTERS = 16  # addresses and the like
_MOST_EACH = 32  # elements of a thread
_WIDEST = 32 * 32 * _MOST_EACH  # a row, which must be in one tile
_REGISTERS = {1: 255, 2: 255, 4: 255, 8: 255, 16: 128, 32: 64}  # a thread's, by warps: 65536 for a block
_LARGEST = 2**31


@dataclass(frozen=True)
class Shape:
    """x [n, c, s] in memory: channels innermost (`last`) or positions; groups of channels; bytes of an element."""

    n: int
    c: int
    s: int
    groups: int = 1
    last: bool = False
    itemsize: int = 4

    @property
    def rows(self) -> bool:
        """Whether every sample has one position."""
        return self.s == 1


@dataclass(frozen=True)
class Launch:
    """A kernel with the sizes of its blocks. form: of kernels over x. grid: programs. constants: compile-time sizes."""

    kernel: Tile | tuple[Level, ...]
    form: Form | None
    grid: int
    constants: tuple[tuple[str, int], ...]
    numbers: tuple[tuple[str, int], ...]
    warps: int


@dataclass(frozen=True)
class Plan:
    """The launches of a program on a shape, in order. schedule: R, L or U. cost: bytes moved and their like."""

    stages: Stages
    shape: Shape
    launches: tuple[Launch, ...]
    schedule: str
    cost: float

    def sources(self) -> list[Source]:
        """The Triton text of every launch."""
        found = []
        for number, launch in enumerate(self.launches):
            name = f"kernel_{number}"
            if isinstance(launch.kernel, Tile):
                assert launch.form is not None
                found.append(emit_tile(self.stages, launch.kernel, launch.form, name))
            else:
                found.append(emit_levels(self.stages, launch.kernel, self.split, name))
        return found

    @property
    def split(self) -> frozenset[int]:
        """The tile kernels whose positions several programs share."""
        tiles = ((launch.kernel, dict(launch.numbers)) for launch in self.launches)
        return frozenset(k.stage for k, numbers in tiles if isinstance(k, Tile) and numbers["splits"] > 1)

    def form_key(self) -> str:
        """What the text depends on beside the program."""
        forms = [launch.form for launch in self.launches]
        return repr((self.stages.own, self.shape.rows, forms, sorted(self.split)))


def plan(
    program: Program,
    shape: Shape,
    *,
    schedule: str | None = None,
    tile: int | None = None,
    processors: int = PROCESSORS,
) -> Plan:
    """The cheapest plan for a program (not normalised) on a shape.

    schedule: admit only this kind. tile: the most elements in a tile, where blocks need not be larger.

    Errors: Unsupported for operations without a Triton form, channels that no tile holds, samples of 2^31 elements
    with positions innermost, 2^31 channels of all samples together, and a schedule that the program cannot have.
    """
    check_supported(program)
    if shape.c * shape.s >= _LARGEST and not (shape.last or shape.rows):
        raise Unsupported(f"a sample of {shape.c * shape.s} elements", "fewer than 2^31, or channels_last")
    if shape.n * shape.c >= _LARGEST and not shape.rows:  # statistics have 32-bit places
        raise Unsupported(f"{shape.n} samples of {shape.c} channels", "fewer than 2^31 of both together")
    program = normalised(program, shape.rows)
    found: list[Plan] = []
    problems: list[Unsupported] = []
    for own in _ownerships(program, shape.rows):
        try:
            found.append(_plan(Stages(program, own), shape, tile, processors))
        except Unsupported as error:
            problems.append(error)
    if schedule is not None:
        found = [one for one in found if one.schedule == schedule]
        problems.append(Unsupported(schedule, f"a schedule that this program has on {shape}"))
    if not found:
        raise problems[-1]
    return min(found, key=lambda one: one.cost)


def _ownerships(program: Program, rows: bool) -> list[int]:
    """Axes that tiles may own: what the reductions of single samples need, and nothing."""
    nodes, spaces = program.nodes, program.spaces
    needed: set[int] = set()
    stack = [at for _, at in program.outputs if spaces[at] & S]
    while stack:
        at = stack.pop()
        if at not in needed:
            needed.add(at)
            stack += nodes[at].args
    own = 0
    for at, node in enumerate(nodes):
        if node.op not in REDUCTIONS:
            continue
        varies = spaces[node.args[0]]
        if varies & S and not node.axes & S if rows else at in needed and varies & N and not node.axes & N:
            own |= node.axes
    if rows:
        return [own]
    return [0, own] if own else [0]


def _plan(stages: Stages, shape: Shape, tile: int | None, processors: int) -> Plan:
    launches: list[Launch] = []
    numbers: dict[str, int] = {}
    cost, loops = 0.0, False
    numel = shape.n * shape.c * shape.s
    for kernel in _together(stages.kernels):
        if isinstance(kernel, tuple):
            launches.append(_small_launch(kernel, shape, numbers))
        else:
            launch = _tile_launch(stages, kernel, shape, tile, processors)
            launches.append(launch)
            sizes = dict(launch.numbers)
            numbers |= {f"splits{kernel.stage}": sizes["splits"]}
            numbers |= {f"chunk{kernel.stage}": sizes["tiles"] * dict(launch.constants)["BS"]}
            assert launch.form is not None
            passes = stages.passes_of(kernel) if launch.form.loop else 1
            loops |= passes > 1
            moved = stages.reads(kernel) * (1 + _REREAD * (passes - 1)) + stages.writes(kernel)
            cost += moved * numel * shape.itemsize / min(1.0, launch.grid / processors)
        cost += _LAUNCH_BYTES
    kind = "U" if not stages.own else "L" if loops else "R"
    return Plan(stages, shape, tuple(launches), kind, cost)


def _power(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _fits(pressure: Pressure, elements: int, warps: int, itemsize: int, loop: bool) -> bool:
    """Whether a tile leaves registers: whole for what waits, for eight elements at a time of everything else."""
    each = max(elements // (32 * warps), 1)
    waiting = pressure.loaded * each * itemsize / 4 + pressure.kept * each + pressure.sums * each * loop
    needed = _FIXED_REGISTERS + waiting + pressure.alive * min(each, 8)
    most = _MOST_EACH if pressure.kept == 0 and pressure.loaded <= 1 else min(_MOST_EACH, _REGISTERS[warps] // 8)
    return each <= most and needed <= _REGISTERS[warps]


def _warps(pressure: Pressure, elements: int, itemsize: int, loop: bool) -> int:
    """Warps for a tile: as few as give a thread at most 8 elements, or the most that have the registers; 0 for none."""
    fitting = [warps for warps in _REGISTERS if _fits(pressure, elements, warps, itemsize, loop)]
    few = [warps for warps in fitting if elements <= 256 * warps]
    return min(few) if few else max(fitting, default=0)


def _tile_launch(stages: Stages, tile: Tile, shape: Shape, most: int | None, processors: int) -> Launch:
    """Tiles and programs of a kernel over x. Errors: Unsupported where no tile has the registers."""
    n, c, s = (1, shape.c, shape.n) if shape.rows else (shape.n, shape.c, shape.s)
    last = shape.last or shape.rows
    groups, per_group = shape.groups, shape.c // shape.groups
    pressure = stages.pressure(tile)
    most = most and 1 << (most.bit_length() - 1)  # tiles are powers of two
    target = min(2048 if pressure.alive + pressure.sums <= 8 else 1024, most or 2048)
    sizes: dict[str, int]
    if not stages.own & K:
        sizes = _free_block(c, s, target, last)
        if stages.own & S:  # a sector of memory is 32 bytes
            sizes["C"] = min(sizes["C"], max(target // _power(s), 32 // shape.itemsize if last else 1))
        blocks = -(-c // sizes["C"])
    elif stages.own & C == C:
        sizes = {"G": _power(groups), "K": _power(per_group)} if stages.splits_groups else {"C": _power(c)}
        blocks = 1
    else:
        elements = _power(per_group) * (_power(s) if stages.own & S else 1)
        several = max(256 // elements, 32 // (_power(per_group) * shape.itemsize) if last else 1, 1)
        several = min(several, _power(groups))
        sizes = {"G": several} if several > 1 else {}
        sizes["K"] = _power(per_group)
        blocks = -(-groups // several)
    channels = 1
    for dim, size in sizes.items():
        channels *= size if dim != "S" else 1
    loop = False
    if stages.own & S:
        sizes["S"] = _power(s)
        # channels innermost: a thread has eight of them, with all that is known of each
        largest = _WIDEST // 2 if last else _WIDEST
        resident = channels * sizes["S"] <= min(most or largest, largest)
        if not (resident and _warps(pressure, channels * sizes["S"], shape.itemsize, False)):
            loop = True
            sizes["S"] = max(min((most or 4 * target) // channels, sizes["S"] // 2), 1)
        splits, tiles = 1, -(-s // sizes["S"])
    else:
        sizes.setdefault("S", min(max(target // channels, 1), _power(s)))
        count = -(-s // sizes["S"])
        splits, tiles = count, 1
        if any(p.axes & S for p in tile.partials):  # fewer, longer programs leave fewer partials
            wanted = max(-(-4 * processors // (n * blocks)), 1)
            tiles = -(-count // min(count, wanted))
            splits = -(-count // tiles)
            loop = tiles > 1
    elements = channels * sizes["S"]
    warps = _warps(pressure, elements, shape.itemsize, loop)
    if not warps and shape.rows and elements <= _WIDEST:  # too near the limit to promise that nothing spills
        warps = 16 if elements <= 8192 else 32
    if not warps:
        raise Unsupported(f"{shape.c} channels", f"tiles that fit the registers, not of {elements} elements")
    unit = c if last else s
    dims = tuple(dim for dim in "CGKS" if dim in sizes)
    form = Form(dims, loop, last, fixed=unit % 16 != 0, reverse=tile.stage % 2 == 1)
    constants = {f"B{dim}": size for dim, size in sizes.items()}
    numbers = {"splits": splits, "tiles": tiles, "blocks": blocks}
    return Launch(tile, form, n * blocks * splits, tuple(constants.items()), tuple(numbers.items()), warps)


def _free_block(c: int, s: int, target: int, last: bool) -> dict[str, int]:
    """A tile of any channels and positions, longest where memory is contiguous."""
    if last:
        channels = min((128, 64, 32), key=lambda size: -(-c // size) * size)
        channels = min(channels, _power(c))
        return {"C": channels, "S": min(max(target // channels, 1), _power(s))}
    positions = min(_power(s), target)
    return {"C": min(target // positions, _power(c)), "S": positions}


def _together(kernels: Iterable[Tile | Level]) -> Iterator[Tile | tuple[Level, ...]]:
    """Kernels with the levels joined that have the same place, and so do not wait for each other."""
    for place, found in itertools.groupby(kernels, key=lambda kernel: isinstance(kernel, Level) and kernel.place):
        if place:
            yield tuple(kernel for kernel in found if isinstance(kernel, Level))
        else:
            yield from (kernel for kernel in found if isinstance(kernel, Tile))


def _small_launch(levels: tuple[Level, ...], shape: Shape, numbers: dict[str, int]) -> Launch:
    """Blocks of a kernel over small values; `numbers` are the splits of the kernels over x before it."""
    sizes = {N: shape.n, S: shape.s, G: shape.groups, K: shape.c // shape.groups}
    results = [math.prod(size for axis, size in sizes.items() if level.space & axis) for level in levels]
    block = min(_power(max(results)), 64)
    begins = [0, *itertools.accumulate(-(-count // block) for count in results)]
    used = {**numbers, **{f"R{k}": count for k, count in enumerate(results)}}
    used |= {f"begin{k}": begin for k, begin in enumerate(begins)}
    constants = {"BQ": 512 // block, "BR": block}
    return Launch(levels, None, begins[-1], tuple(constants.items()), tuple(used.items()), 4)
