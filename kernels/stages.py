"""How a program falls into kernels: which reductions a tile finishes by itself, and what passes through memory.

A kernel over x ("tile kernel") gives each of its programs a block of channels of one sample and some of the positions.
`own` names the axes that such a block holds completely. A reduction over axes that are all owned is local: done
without leaving the kernel. Others cross: the tile kernel writes what its blocks know (a partial), and a small kernel
merges the partials. Tile kernel j runs when everything that crosses j times is merged; between tile kernels run small
kernels, one for each level of further reductions of small values, the values without S.

Programs are normalised first: scalars become their positions, and where every position is a sample of its own (S is 1,
"rows"), the samples take the place of the positions, so that a statistic at each position is a reduction over
channels, and a batch statistic one over S.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from kernels.nodes import FULL, REDUCTIONS, C, G, K, N, Node, S, Unsupported, axes_text
from kernels.program import Builder, Program

Place = tuple[int, int]  # (tile kernel, level of small kernels before it)
_TILE = 1 << 30  # in the place of a level: the tile kernel itself, after all of them


def normalised(program: Program, rows: bool) -> Program:
    """The program with scalars numbered; with `rows` of one sample whose positions are the rows of x [rows, C]."""
    builder = Builder()
    ids: list[int] = []
    scalars = 0
    for node in program.nodes:
        args = [ids[a] for a in node.args]
        axes = node.axes & ~(N | S) | (S if node.axes & N else 0) if rows else node.axes
        if node.op == "scalar":
            ids.append(builder.scalar(float(scalars)))
            scalars += 1
        elif rows and node.op in REDUCTIONS and not axes:  # over S alone, of which there is one
            ids.append(args[0] if node.op == "sum" else builder("square", builder("sub", args[0], args[0])))
        elif node.op == "numel" and not axes:
            ids.append(builder.const(1.0))
        else:
            ids.append(builder.copy(Node(node.op, (), axes, node.attr), args))
    return builder.program({name: ids[at] for name, at in program.outputs})


@dataclass(frozen=True)
class Partial:
    """What a tile kernel writes of a value: its sum over `axes`, or its mean and summed squared distances (`var`).

    No axes: the value itself.
    """

    value: int
    axes: int
    var: bool


@dataclass(frozen=True)
class Level:
    """A small kernel: reductions of one result space, and outputs of that space computed from them."""

    place: Place
    space: int
    reductions: tuple[int, ...]
    outputs: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Tile:
    """A tile kernel: local results it keeps (`kept`), partials it writes, outputs it writes."""

    stage: int
    kept: tuple[int, ...]
    partials: tuple[Partial, ...]
    outputs: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Pressure:
    """Numbers alive for each position of a tile: `loaded` and computed ones (`kept`) while a reduction is waited for,
    the most at any moment (`alive`), and sums that a loop carries."""

    loaded: int
    kept: int
    alive: int
    sums: int


class Stages:
    """The kernels of a program whose tiles own the axes `own`. Errors: Unsupported where they cannot be found."""

    def __init__(self, program: Program, own: int):
        self.program, self.own = program, own
        self.rows = not any(space & N for space in program.spaces)
        self.place: list[Place] = []
        self.passes: list[int] = []  # inside the tile kernel, if it reads x once for every chain of local reductions
        self.tile: list[bool] = []  # known in tile kernels only
        self.local: set[int] = set()
        self.crossing: dict[int, list[int]] = {}  # by value: its reductions through memory
        for at in range(len(program.nodes)):
            self._locate(at)
        self._levels: dict[int, dict[int, int]] = {}  # by tile kernel
        self._big: dict[int, list[int]] = {}
        self.partials = {value: self._partial(value, found) for value, found in self.crossing.items()}
        self.kernels = self._kernels()

    def _locate(self, at: int) -> None:
        node, spaces = self.program.nodes[at], self.program.spaces
        place, passes, tile = (0, 0), 0, bool(spaces[at] & S)
        if node.op in REDUCTIONS:
            (value,) = node.args
            place = self.place[value]
            if self.tile[value] and not node.axes & ~self.own:
                passes = self.passes[value] + bool(node.axes & S)
                tile = True
                self.local.add(at)
            elif self.tile[value]:
                if spaces[value] & S and not node.axes & S:
                    raise Unsupported(axes_text(node.axes), f"tiles that own it, not {axes_text(self.own)}")
                place = place[0] + 1, 1
                self.crossing.setdefault(value, []).append(at)
            else:
                place = place[0], place[1] + 1
        elif node.args:
            place = max(self.place[a] for a in node.args)
            here = [a for a in node.args if self.place[a][0] == place[0]]
            passes = max(self.passes[a] for a in here)
            tile |= any(self.tile[a] and not spaces[a] & S for a in here)
        self.place.append(place)
        self.passes.append(passes)
        self.tile.append(tile)

    def _partial(self, value: int, found: list[int]) -> Partial:
        nodes = [self.program.nodes[at] for at in found]
        axes = functools.reduce(int.__and__, (node.axes & (self.own | S) for node in nodes))
        return Partial(value, axes, axes > 0 and any(node.op == "var" for node in nodes))

    def pass_in(self, at: int, j: int) -> int:
        """The pass over x of tile kernel j in which a value is known."""
        return self.passes[at] if self.place[at][0] == j else 0

    def is_stored(self, at: int, j: int) -> bool:
        """Whether tile kernel j finds a value in memory: inputs, and small results of earlier kernels."""
        node = self.program.nodes[at]
        if node.op == "input":
            return True
        if node.op not in REDUCTIONS or (at in self.local and self.program.spaces[at] & S):
            return False
        return at not in self.local or self.place[at][0] < j

    def is_stored_for_level(self, at: int) -> bool:
        """The same for small kernels."""
        return self.program.nodes[at].op in ("input", *REDUCTIONS)

    def _kernels(self) -> tuple[Tile | Level, ...]:
        nodes, spaces = self.program.nodes, self.program.spaces
        tiles: dict[int, list[tuple[str, int]]] = {}
        levels: dict[tuple[Place, int], tuple[list[int], list[tuple[str, int]]]] = {}
        for at, node in enumerate(nodes):
            if node.op in REDUCTIONS and at not in self.local:
                levels.setdefault((self.place[at], spaces[at]), ([], []))[0].append(at)
        for partial in self.partials.values():
            tiles.setdefault(self.place[partial.value][0], [])
        for at in self.local:
            tiles.setdefault(self.place[at][0], [])
        kept: set[int] = set()
        for name, at in self.program.outputs:
            if self.tile[at]:
                if at in self.local and not spaces[at] & S:
                    kept.add(at)
                else:
                    tiles.setdefault(self.place[at][0], []).append((name, at))
            elif nodes[at].op not in REDUCTIONS:
                levels.setdefault((self._level_of(at, levels), spaces[at]), ([], []))[1].append((name, at))
        places = sorted({(j, _TILE) for j in tiles} | {place for place, _ in levels}, reverse=True)
        found: list[Tile | Level] = []
        for j, level in places:  # backwards: what later kernels read, earlier ones keep
            if level < _TILE:
                for (place, space), (reductions, outputs) in levels.items():
                    if place == (j, level):
                        found.append(Level(place, space, tuple(reductions), tuple(outputs)))
                        small = [nodes[at].args[0] for at in reductions if nodes[at].args[0] not in self.crossing]
                        kept |= self._read(small + [at for _, at in outputs], None)
                continue
            partials = tuple(p for p in self.partials.values() if self.place[p.value][0] == j)
            outputs = tiles.get(j, [])
            own = {at for at in kept if self.place[at][0] == j}
            kept |= self._read([*own, *(p.value for p in partials), *(at for _, at in outputs)], j)
            if own or partials or outputs:
                found.append(Tile(j, tuple(sorted(own)), partials, tuple(outputs)))
        return tuple(found[::-1])

    def _level_of(self, at: int, levels: dict) -> Place:
        """Where a small output is computed: beside its last reductions if they have its space, else one level on."""
        j, level = self.place[at]
        stack, last = [at], []
        while stack:
            node = self.program.nodes[one := stack.pop()]
            if node.op in REDUCTIONS:
                last += [one] if self.place[one] == (j, level) else []
            else:
                stack += node.args
        together = level > 0 and all(self.program.spaces[one] == self.program.spaces[at] for one in last)
        return (j, level) if together else (j, level + 1)

    def _read(self, roots: list[int], j: int | None) -> set[int]:
        """The local results of other tile kernels that a kernel reads: tile kernel j, or a small one for None."""
        found, seen, stack = set(), set(), list(roots)
        while stack:
            at = stack.pop()
            if at in seen:
                continue
            seen.add(at)
            if self.is_stored(at, j) if j is not None else self.is_stored_for_level(at):
                found |= {at} & self.local
            else:
                stack += self.program.nodes[at].args
        return found

    def levels_of(self, tile: Tile) -> dict[int, int]:
        """The values that a tile kernel computes or loads: how many of its local reductions each has to wait for."""
        if tile.stage in self._levels:
            return self._levels[tile.stage]
        levels = self._levels[tile.stage] = {}
        stack = [*tile.kept, *(p.value for p in tile.partials), *(at for _, at in tile.outputs)]
        needed: dict[int, tuple[int, ...]] = {}
        while stack:
            at = stack.pop()
            if at not in needed:
                needed[at] = () if self.is_stored(at, tile.stage) else self.program.nodes[at].args
                stack += needed[at]
        for at in sorted(needed):  # arguments come first
            waits = 0
            for a in needed[at]:
                waits = max(waits, levels[a])
            levels[at] = waits + bool(needed[at] and at in self.local and self.program.spaces[needed[at][0]] & S)
        return levels

    def local_reductions(self, tile: Tile) -> list[int]:
        """The local reductions of a tile kernel, those first that wait for fewest others."""
        levels = self.levels_of(tile)
        found = (at for at in levels if at in self.local and not self.is_stored(at, tile.stage))
        return sorted(found, key=lambda at: (levels[at], at))

    def big(self, tile: Tile) -> list[int]:
        """The values with S that a tile kernel computes or loads, in the order in which it does."""
        if tile.stage in self._big:
            return self._big[tile.stage]
        order: dict[int, None] = {}
        seen: set[int] = set()

        def visit(at: int) -> None:
            if at in seen:
                return
            seen.add(at)
            if not self.is_stored(at, tile.stage):
                for a in self.program.nodes[at].args:
                    visit(a)
            if self.program.spaces[at] & S:
                order[at] = None

        for at in (*self.local_reductions(tile), *tile.kept):
            visit(at)
        for at in (*(p.value for p in tile.partials), *(at for _, at in tile.outputs)):
            visit(at)
        self._big[tile.stage] = list(order)
        return self._big[tile.stage]

    def pressure(self, tile: Tile) -> Pressure:
        """What each position of a tile keeps alive."""
        order, levels = self.big(tile), self.levels_of(tile)
        last = {at: place for place, at in enumerate(order)}
        waits: dict[int, int] = {}  # by level, the place at which its reductions have all they need
        for place, at in enumerate(order):
            for a in () if self.is_stored(at, tile.stage) else self.program.nodes[at].args:
                last[a] = max(last.get(a, 0), place)
        alive = max((sum(last[a] >= place for a in order[: place + 1]) for place in range(len(order))), default=0)
        places = {at: place for place, at in enumerate(order)}
        for at in self.local_reductions(tile):
            (value,) = self.program.nodes[at].args
            if value in places:
                waits[levels[at]] = max(waits.get(levels[at], 0), places[value])
        loaded = kept = 0
        for place in waits.values():
            across = [at for at in order[: place + 1] if last[at] > place]
            kept = max(kept, sum(not self.is_stored(at, tile.stage) for at in across))
            loaded = max(loaded, sum(self.is_stored(at, tile.stage) for at in across))
        return Pressure(loaded, kept, alive, sum(1 + p.var for p in tile.partials))

    def reads(self, tile: Tile) -> int:
        """How many tensors of the size of x a tile kernel reads in one pass."""
        return sum(self.program.nodes[at].op == "input" and self.is_full(at) for at in self.big(tile))

    def writes(self, tile: Tile) -> int:
        """How many tensors of the size of x it writes."""
        return sum(self.is_full(at) for _, at in tile.outputs)

    def passes_of(self, tile: Tile) -> int:
        """How many passes over x a tile kernel makes unless it keeps its block."""
        j = tile.stage
        roots = [*(at for _, at in tile.outputs), *(p.value for p in tile.partials)]
        roots += [self.program.nodes[at].args[0] for at in self.local if self.place[at][0] == j]
        return 1 + max((self.pass_in(at, j) for at in roots if self.program.spaces[at] & S), default=0)

    def is_full(self, at: int) -> bool:
        """Whether a value has all axes of x."""
        return self.program.spaces[at] | (N if self.rows else 0) == FULL

    @functools.cached_property
    def has_groups(self) -> bool:
        """Whether some value varies over groups but not within them."""
        return any(space & C == G for space in self.program.spaces)

    @property
    def splits_groups(self) -> bool:
        """Whether own reductions need groups as an axis of the tile."""
        return bool(self.own & K) and self.has_groups
