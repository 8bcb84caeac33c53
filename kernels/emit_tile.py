"""Triton source of the kernels over x: a tile at a time, what is local reduced, what crosses written as partials."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.emit import NAN, Lines, Source
from kernels.nodes import REDUCTIONS, C, G, K, N, S, axes_text
from kernels.stages import Partial, Stages, Tile


@dataclass(frozen=True)
class Form:
    """What shapes the text of a tile kernel, beside the program.

    dims: the axes of a tile, ("C", "S"), ("K", "S") with one group a program, or ("G", "K", "S"). loop: whether a
    program goes through several tiles of positions, or has all its positions in one. last: whether channels have
    the unit stride (else positions). fixed: whether the size of the axis with the unit stride is compiled in, which
    wide loads need where 16 does not divide it. reverse: programs in reverse, so that what the last kernel read last
    is read first, while it is still in the cache.
    """

    dims: tuple[str, ...]
    loop: bool
    last: bool
    fixed: bool
    reverse: bool


def emit_tile(stages: Stages, tile: Tile, form: Form, name: str) -> Source:
    """The kernel over x of one stage."""
    return _TileKernel(stages, tile, form, name).emit()


class _TileKernel(Lines):
    def __init__(self, stages: Stages, tile: Tile, form: Form, name: str):
        super().__init__(stages.program, f"[{', '.join('1' for _ in form.dims)}]")
        self.stages, self.tile, self.form, self.name = stages, tile, form, name
        self.j = tile.stage
        self.spaces = stages.program.spaces
        self.grouped = form.dims[0] != "C"
        self.sums: dict[tuple[int, int], tuple[str, str, str]] = {}  # reductions at hand, by value and axes

    # -- shapes, masks and addresses -------------------------------------------------------------------------------

    def dims(self, space: int) -> tuple[bool, ...]:
        """Which dimensions of the tile a value of a space has."""
        has = {"C": bool(space & C), "G": bool(space & G), "K": bool(space & K), "S": bool(space & S)}
        return tuple(has[dim] for dim in self.form.dims)

    def shape(self, space: int) -> str:
        sizes = (f"B{dim}" if has else "1" for dim, has in zip(self.form.dims, self.dims(space), strict=True))
        return f"[{', '.join(sizes)}]"

    def mask(self, space: int) -> str | None:
        """The condition that an element of a value lies in the tensor."""
        used = [f"in_{dim.lower()}" for dim, has in zip(self.form.dims, self.dims(space), strict=True) if has]
        return " & ".join(used) if used else None

    def lanes(self, dim: str) -> str:
        at = self.form.dims.index(dim)
        index = ", ".join(":" if i == at else "None" for i in range(len(self.form.dims)))
        return f"tl.arange(0, B{dim})[{index}]"

    def index(self, space: int) -> str:
        """The place of an element in a dense tensor of a space; [rows, channels] in rows."""
        channel, size = ("c", "C") if space & K else ("g", "G") if space & G else ("", "")
        terms = []
        if space & N:
            terms.append(f"n * {size}" if size else "n")
        if space & S and self.stages.rows:
            terms.append(f"s.to(tl.int64) * {size}" if size else "s")
        terms += [channel] if channel else []
        text = " + ".join(terms) or "0"
        if space & S and not self.stages.rows:
            text = f"({text}).to(tl.int64) * S + s"
        return f"({text})"

    def address(self, name: str, at: int) -> str:
        pointer, space = self.pointer(name), self.spaces[at]
        if self.stages.is_full(at):
            return f"{pointer} + base + offset"
        text = f"{pointer} + {self.index(space)}"
        return text if any(self.dims(space)) else f"{text} + tl.zeros({self.ones}, tl.int32)"

    def load(self, at: int) -> str:
        node = self.program.nodes[at]
        name = f"in_{node.attr}" if node.op == "input" else f"r{at}"
        mask = self.mask(self.spaces[at])
        masked = f"mask={mask}, other=0.0" if mask else f"mask=tl.full({self.ones}, True, tl.int1), other=0.0"
        self.add(f"v{at} = tl.load({self.address(name, at)}, {masked}).to(tl.float32)")
        return f"v{at}"

    def store(self, address: str, value: str, space: int, pointer: str) -> None:
        """Write a value that has the dimensions of its space."""
        mask = self.mask(space)
        self.add(f"tl.store({address}, {value}.to({pointer}.dtype.element_ty){f', mask={mask}' if mask else ''})")

    def full(self, at: int) -> str:
        """A value with all dimensions of its space, also if it was only said to vary."""
        value, bare = self.value(at), at
        while self.program.nodes[bare].op == "expand":
            (bare,) = self.program.nodes[bare].args
        if self.spaces[bare] == self.spaces[at] and any(self.dims(self.spaces[at])):
            return value
        return f"({value} + tl.zeros({self.shape(self.spaces[at])}, tl.float32))"

    def store_output(self, output: str, at: int) -> None:
        self.store(self.address(f"out_{output}", at), self.full(at), self.spaces[at], f"out_{output}")

    # -- values ----------------------------------------------------------------------------------------------------

    def value(self, at: int) -> str:
        """Write a value and what it needs, unless it is there; returns its name."""
        if at not in self.names:
            node = self.program.nodes[at]
            leaf = self.leaf(at)
            if leaf is not None:
                self.names[at] = leaf
            elif self.stages.is_stored(at, self.j):
                self.names[at] = self.load(at)
            elif node.op in REDUCTIONS:
                total, _, squares = self.reduce_here(node.args[0], node.axes, node.op == "var")
                self.names[at] = f"v{at}"
                self.add(f"v{at} = {total if node.op == 'sum' else f'{squares} / {self.count(node.axes)}'}")
            else:
                self.names[at] = self.elementwise(at, [self.value(a) for a in node.args])
        return self.names[at]

    def reduced(self, value: str, axes: int) -> str:
        """The sum over axes of a tile that is zero outside the tensor."""
        for dim, has in reversed(list(enumerate(self.dims(axes)))):
            value = f"tl.sum({value}, {dim}, keep_dims=True)" if has else value
        return value

    def inside(self, value: str, space: int) -> str:
        return f"tl.where({self.mask(space)}, {value}, 0.0)"

    def reduce_here(self, value: int, axes: int, var: bool, count: str | None = None) -> tuple[str, str, str]:
        """(sum, mean, sum of squared distances) over axes of a value that lies in the tile entirely."""
        name, space = self.value(value), self.spaces[value]
        known = self.sums.get((value, axes), ("", "", ""))
        total = known[0] or self.fresh("sum")
        if not known[0]:
            self.add(f"{total} = {self.reduced(self.inside(name, space), axes)}")
            self.sums[value, axes] = total, "", ""
        if not var or known[2]:
            return self.sums[value, axes]
        mean, distance, squares = self.fresh("mean"), self.fresh("d"), self.fresh("squares")
        self.sums[value, axes] = total, mean, squares
        self.add(f"{mean} = {total} / {count or self.count(axes)}")
        self.add(f"{distance} = {self.inside(f'{name} - {mean}', space)}")
        self.add(f"{squares} = {self.reduced(f'{distance} * {distance}', axes)}")
        return total, mean, squares

    # -- the kernel ------------------------------------------------------------------------------------------------

    def emit(self) -> Source:
        self.head()
        finished: dict[Partial, tuple[str, str]] = {}
        if self.form.loop:
            for number in range(self.stages.passes_of(self.tile)):
                self.loop(number, finished)
        else:
            self.positions("split * BS", "tl.minimum(split * BS + BS, S)")
            for at in self.stages.local_reductions(self.tile):  # first, so that less waits for them in registers
                self.value(at)
            for partial in self.tile.partials:
                self.finish_here(partial, finished)
            for output, at in self.tile.outputs:
                self.store_output(output, at)
        for partial in self.tile.partials:
            self.store_partial(partial, finished)
        for at in self.tile.kept:
            self.store(self.address(f"r{at}", at), self.full(at), self.spaces[at], f"r{at}")
        for output, at in self.tile.outputs if self.form.loop else ():
            if not self.spaces[at] & S:
                self.store_output(output, at)
        return self.source()

    def head(self) -> None:
        self.add("pid = tl.num_programs(0) - 1 - tl.program_id(0)" if self.form.reverse else "pid = tl.program_id(0)")
        self.add("split = pid % splits")
        self.add("block = pid // splits % blocks")
        self.add("n = pid // splits // blocks")
        if not self.grouped:
            self.add(f"c = block * BC + {self.lanes('C')}")
            self.add("in_c = c < C")
            if self.stages.has_groups:
                self.add("g = c // K")
            return
        self.add(f"k = {self.lanes('K')}")
        self.add("in_k = k < K")
        if "G" in self.form.dims:
            self.add(f"g = block * BG + {self.lanes('G')}")
            self.add("in_g = g < G")
        else:
            self.add("g = block")
        self.add("c = g * K + k")

    def positions(self, start: str, end: str) -> None:
        """Coordinates of the tile that begins at a position."""
        self.add(f"start = {start}")
        self.add(f"end = {end}")
        self.tile_coordinates()

    def tile_coordinates(self) -> None:
        self.add(f"s = start + {self.lanes('S')}")
        self.add("in_s = s < end")
        sample = "" if self.stages.rows else "n.to(tl.int64) * C * S + "
        if self.form.last:
            self.add(f"base = {sample}start.to(tl.int64) * C")
            self.add(f"offset = {self.lanes('S')} * C + c")
        else:
            self.add(f"base = {sample or '0 + '}start")
            self.add(f"offset = c * S + {self.lanes('S')}")

    def loop(self, number: int, finished: dict[Partial, tuple[str, str]]) -> None:
        """One pass over the positions of a program: reductions of what is known in it, and outputs."""
        stages, nodes = self.stages, self.program.nodes
        local = [at for at in self.needed() if at in stages.local and nodes[at].axes & S]
        local = [at for at in local if stages.pass_in(nodes[at].args[0], self.j) == number]
        partials = [p for p in self.tile.partials if p.axes & S and stages.pass_in(p.value, self.j) == number]
        outputs = [
            (o, at) for o, at in self.tile.outputs if self.spaces[at] & S and stages.pass_in(at, self.j) == number
        ]
        if not (local or partials or outputs):
            return
        jobs: dict[tuple[int, int], bool] = {}  # (value, axes): whether distances are needed
        for at in local:
            key = nodes[at].args[0], nodes[at].axes
            jobs[key] = jobs.get(key, False) or nodes[at].op == "var"
        for partial in partials:
            key = partial.value, partial.axes
            jobs[key] = jobs.get(key, False) or partial.var
        self.hoist([value for value, _ in jobs] + [at for _, at in outputs])
        sums = {key: _Sums(self, *key, var) for key, var in jobs.items()}
        self.add("first = split * tiles * BS")
        self.add("end = tl.minimum(first + tiles * BS, S)")
        self.add("for i in range(0, tl.cdiv(end - first, BS)):")
        outer, self.names, self.indent = (self.names, self.sums), dict(self.names), self.indent + 1
        self.sums = {}
        self.add("start = first + i * BS")
        self.tile_coordinates()
        for one in sums.values():
            one.step()
        for output, at in outputs:
            self.store_output(output, at)
        (self.names, self.sums), self.indent = outer, self.indent - 1
        for one in sums.values():
            one.finish()
        for at in local:
            one = sums[nodes[at].args[0], nodes[at].axes]
            self.names[at] = f"v{at}"
            self.add(f"v{at} = {one.total if nodes[at].op == 'sum' else f'{one.squares} / {one.count}'}")
        for partial in partials:
            one = sums[partial.value, partial.axes]
            finished[partial] = (one.mean, one.squares) if partial.var else (one.total, "")

    def needed(self) -> list[int]:
        """All values that this kernel computes."""
        seen: set[int] = set()
        stack = [*self.tile.kept, *(p.value for p in self.tile.partials), *(at for _, at in self.tile.outputs)]
        while stack:
            at = stack.pop()
            if at not in seen:
                seen.add(at)
                stack += [] if self.stages.is_stored(at, self.j) else self.program.nodes[at].args
        return sorted(seen)

    def hoist(self, roots: list[int]) -> None:
        """Write the values without S that a loop needs in front of it."""
        seen: set[int] = set()
        stack = list(roots)
        while stack:
            at = stack.pop()
            if at in seen:
                continue
            seen.add(at)
            if not self.spaces[at] & S:
                self.value(at)
            elif not self.stages.is_stored(at, self.j):
                stack += self.program.nodes[at].args

    def finish_here(self, partial: Partial, finished: dict[Partial, tuple[str, str]]) -> None:
        if partial.axes & S:
            total, mean, squares = self.reduce_here(
                partial.value, partial.axes, partial.var, self.tile_count(partial.axes)
            )
            finished[partial] = (mean, squares) if partial.var else (total, "")

    def tile_count(self, axes: int, size: str = "(end - start)") -> str:
        """How many elements a program reduces over axes with S."""
        return f"({size} * {self.count(axes & C)})"

    def store_partial(self, partial: Partial, finished: dict[Partial, tuple[str, str]]) -> None:
        space = self.spaces[partial.value] & ~partial.axes
        pair = finished.get(partial) or (self.full(partial.value), "")
        for stem, value in zip("pq", pair, strict=True):
            if value:
                name = f"{stem}{partial.value}"
                index = self.index(space)
                if partial.axes & S:
                    index += f" + split * {self.number(f'size_{axes_text(space)}')}"
                address = f"{self.pointer(name)} + {index}"
                address += "" if any(self.dims(space)) else f" + tl.zeros({self.ones}, tl.int32)"
                self.store(address, value, space, name)

    def source(self) -> Source:
        form = self.form
        unit = "C" if form.last else "S"
        sizes = ["C", "S", "G"]
        runtime = [*sizes, "splits", "tiles", "blocks"]
        if form.fixed:
            runtime.remove(unit)
        constants = [*([unit] if form.fixed else []), "K", *(f"B{dim}" for dim in form.dims)]
        arguments = [*self.pointers, *runtime, *self.numbers]
        free = [name for name in (*runtime, *self.numbers) if name != unit and not name.startswith(("count", "scalar"))]
        signature = ", ".join([*arguments, *(f"{name}: tl.constexpr" for name in constants)])
        decorator = f"@triton.jit(do_not_specialize={free!r})"
        text = "\n".join([decorator, f"def {self.name}({signature}):", *self.lines, ""])
        return Source(self.name, text, (*arguments, *constants), tuple(constants))


class _Sums:
    """Sums of a value over the tiles of a loop; of squared distances from a shift, the mean of the first tile."""

    def __init__(self, kernel: _TileKernel, value: int, axes: int, var: bool):
        self.kernel, self.value, self.axes, self.var = kernel, value, axes, var
        self.sum = kernel.fresh("acc")
        self.total = self.mean = self.squares = self.count = ""
        space = kernel.spaces[value]
        shape = kernel.shape(space)
        kernel.add(f"{self.sum} = tl.zeros({shape}, tl.float32)")
        if var:
            self.square, self.shift = f"{self.sum}_square", f"{self.sum}_shift"
            kernel.add(f"{self.square} = tl.zeros({shape}, tl.float32)")
            kernel.add(f"{self.shift} = tl.zeros({kernel.shape(space & ~axes)}, tl.float32)")

    def step(self) -> None:
        kernel = self.kernel
        name, space = kernel.value(self.value), kernel.spaces[self.value]
        if not self.var:
            kernel.add(f"{self.sum} += {kernel.inside(name, space)}")
            return
        count = kernel.tile_count(self.axes, "(tl.minimum(start + BS, end) - start)")
        kernel.add("if i == 0:")
        kernel.add(f"    {self.shift} = {kernel.reduced(kernel.inside(name, space), self.axes)} / {count}")
        finite = f'tl.abs({self.shift}) < float("inf")'  # the mean of infinities is infinite, not NaN
        kernel.add(f"    {self.shift} = tl.where({finite}, {self.shift}, 0.0)")
        distance = kernel.fresh("d")
        kernel.add(f"{distance} = {kernel.inside(f'{name} - {self.shift}', space)}")
        kernel.add(f"{self.sum} += {distance}")
        kernel.add(f"{self.square} += {distance} * {distance}")

    def finish(self) -> None:
        kernel = self.kernel
        self.total = f"{self.sum}_total"
        kernel.add(f"{self.total} = {kernel.reduced(self.sum, self.axes)}")
        if self.var:
            self.mean, self.squares, self.count = f"{self.sum}_mean", f"{self.sum}_squares", f"{self.sum}_count"
            kernel.add(f"{self.count} = {kernel.tile_count(self.axes, '(end - first)')}")
            kernel.add(f"{self.mean} = {self.shift} + {self.total} / {self.count}")
            less = f"{kernel.reduced(self.square, self.axes)} - {self.total} * ({self.total} / {self.count})"
            kernel.add(f"{self.squares} = tl.maximum({less}, 0.0, {NAN})")
            kernel.add(f"{self.total} = {self.mean} * {self.count}")
