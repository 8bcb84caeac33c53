"""Triton source of the kernels over small values: partials merged, values without S reduced further.

One program computes BR results of one space; it goes through what each of them reduces BQ elements at a time. Means and
squared distances are merged as Chan, Golub and LeVeque do (Updating formulae and a pairwise algorithm for computing
sample variances, 1979): the squares of the parts plus those of the distances of their means.
"""

from __future__ import annotations

from collections.abc import Sequence

from kernels.emit import Lines, Source
from kernels.nodes import C, G, K, N, S, axes_text
from kernels.stages import Level, Partial, Stages


def emit_levels(stages: Stages, levels: Sequence[Level], split: frozenset[int], name: str) -> Source:
    """The kernel of levels that do not wait for each other: each has its share of the programs.

    split: the tile kernels whose positions several programs share.
    """
    return _LevelKernel(stages, levels, split, name).emit()


class _LevelKernel(Lines):
    def __init__(self, stages: Stages, levels: Sequence[Level], split: frozenset[int], name: str):
        super().__init__(stages.program, "[1, 1]")
        self.stages, self.levels, self.split, self.name = stages, levels, split, name
        self.spaces = stages.program.spaces
        self.rename: dict[str, str] = {}  # of the coordinates that a loop goes over
        self.loaded: set[str] = set()  # partials that the present pass has loaded

    def emit(self) -> Source:
        self.add("pid = tl.program_id(0)")
        for number, level in enumerate(self.levels):
            if len(self.levels) > 1:
                begin, end = (self.number(f"begin{place}") for place in (number, number + 1))
                self.add(f"if (pid >= {begin}) & (pid < {end}):")
                self.indent += 1
                self.add(f"block = pid - {begin}")
            else:
                self.add("block = pid")
            self.names = {}
            self.section(level, self.number(f"R{number}"))
            self.indent = 1
        return self.source()

    def section(self, level: Level, results: str) -> None:
        """The code of one level; `block` is the program's place among its programs."""
        self.add("r = block * BR + tl.arange(0, BR)[None, :]")
        self.add(f"in_r = r < {results}")
        self.coordinates("r", level.space, "n", "c", "g")
        loops: dict[tuple[int, int | None], list[int]] = {}
        for at in level.reductions:
            loops.setdefault(self.domain(at), []).append(at)
        for (axes, stage), reductions in loops.items():
            self.loop(axes, stage, reductions)
        for at in level.reductions:
            self.add(f"tl.store({self.pointer(f'r{at}')} + r, v{at}, mask=in_r)")
            self.names[at] = f"v{at}"
        for output, at in level.outputs:
            value = f"{self.value(at, 'in_r', '[1, BR]')} + tl.zeros([1, BR], tl.float32)"
            self.add(f"tl.store({self.pointer(f'out_{output}')} + r, {value}, mask=in_r)")

    def partial(self, at: int) -> Partial | None:
        return self.stages.partials.get(self.program.nodes[at].args[0])

    def domain(self, at: int) -> tuple[int, int | None]:
        """(The axes that a reduction still reduces, the tile kernel that split its positions)."""
        partial, axes = self.partial(at), self.program.nodes[at].axes
        if partial is None or not partial.axes:
            return axes, None
        return axes & ~partial.axes, self.stages.place[partial.value][0] if partial.axes & S else None

    def coordinates(self, index: str, axes: int, n: str, c: str, g: str) -> None:
        """Samples, channels and groups of a row-major index over axes; of a channel within its group over K."""
        if axes & C == C:
            self.add(f"{c} = {index} % C")
            if self.stages.has_groups:
                self.add(f"{g} = {c} // K")
        elif axes & C == G:
            self.add(f"{g} = {index} % G")
        elif axes & C == K:
            self.add(f"{c} = g * K + {index} % K")
        if axes & N:
            size = {C: "C", G: "G", K: "K", 0: "1"}[axes & C]
            self.add(f"{n} = {index} // {size}")

    def loop(self, axes: int, stage: int | None, reductions: list[int]) -> None:
        sizes = [*(["C"] if axes & C == C else ["G"] if axes & C == G else ["K"] if axes & C else [])]
        sizes += [self.number("N")] if axes & N else []
        sizes += [self.number(f"splits{stage}")] if stage in self.split else []
        self.add(f"size = {' * '.join(sizes) or '1'}")
        centred = [at for at in reductions if self.program.nodes[at].op == "var"]
        for at in reductions:
            self.add(f"acc{at} = tl.zeros([BQ, BR], tl.float32)")
        self.pass_over(axes, stage, reductions, squares=False)
        for at in reductions:
            node = self.program.nodes[at]
            self.add(f"v{at} = tl.sum(acc{at}, 0, keep_dims=True)")
            if node.op == "var":
                self.add(f"mean{at} = v{at} / {self.count(node.axes)}")
        if not centred:
            return
        for at in centred:
            self.add(f"acc{at} = tl.zeros([BQ, BR], tl.float32)")
        self.pass_over(axes, stage, centred, squares=True)
        for at in centred:
            self.add(f"v{at} = tl.sum(acc{at}, 0, keep_dims=True) / {self.count(self.program.nodes[at].axes)}")

    def pass_over(self, axes: int, stage: int | None, reductions: list[int], squares: bool) -> None:
        """Add the values, or their squared distances from the mean, to the accumulators."""
        names = self.names
        shadowed = {"n": axes & N, "c": axes & C, "g": axes & C == C or axes & C == G}
        self.add("for i in range(0, tl.cdiv(size, BQ)):")
        self.indent += 1
        self.add("q = i * BQ + tl.arange(0, BQ)[:, None]")
        self.add("inside = (q < size) & in_r")
        if stage in self.split:
            self.add(f"split = q % splits{stage}")
            self.add(f"q = q // splits{stage}")
            chunk = self.number(f"chunk{stage}")
            self.add(f"positions = tl.minimum({chunk}, S - split * {chunk}).to(tl.float32)")
        self.names, self.loaded = {}, set()
        outer = self.rename
        self.rename = {name: f"{name}q" for name, over in shadowed.items() if over}
        self.coordinates("q", axes, "nq", "cq", "gq")
        for at in reductions:
            value, weight, below = self.summand(at)
            if squares:
                distance = self.fresh("d")
                self.add(f"{distance} = {value} - mean{at}")
                value = f"{distance} * {distance}"
                value = f"{value} * {weight}" if weight else value
                value = f"{below} + {value}" if below else value
            elif weight:
                value = f"{value} * {weight}"
            self.add(f"acc{at} += tl.where(inside, {value}, 0.0)")
        self.rename, self.names = outer, names
        self.indent -= 1

    def summand(self, at: int) -> tuple[str, str, str]:
        """(A part's sum or mean, how many elements its mean stands for, its squares) of a reduction."""
        value = self.program.nodes[at].args[0]
        partial = self.partial(at)
        if partial is None:
            return self.value(value, "inside", "[BQ, BR]"), "", ""
        space = self.spaces[value] & ~partial.axes
        split = partial.axes & S and self.stages.place[value][0] in self.split
        names = []
        for stem in "pq" if partial.var else "p":
            pointer = self.pointer(f"{stem}{value}")
            if pointer not in self.loaded:
                self.loaded.add(pointer)
                index = self.index(space, "[BQ, BR]")
                index += f" + split * {self.number(f'size_{axes_text(space)}')}" if split else ""
                self.add(f"{pointer}_part = tl.load({pointer} + {index}, mask=inside, other=0.0).to(tl.float32)")
            names.append(f"{pointer}_part")
        if not partial.var:
            return names[0], "", ""
        if not split:
            return names[0], self.count(partial.axes), names[1]
        channels = partial.axes & C
        return names[0], f"(positions * {self.count(channels)})" if channels else "positions", names[1]

    def index(self, space: int, shape: str) -> str:
        """The place of an element in a dense tensor of a space, of the full shape of what is computed."""
        n, c, g = (self.rename.get(name, name) for name in "ncg")
        channel, size = (c, "C") if space & K else (g, "G") if space & G else ("", "")
        terms = [f"{n} * {size}" if size else n] if space & N else []
        terms += [channel] if channel else []
        return " + ".join([*terms, f"tl.zeros({shape}, tl.int32)"])

    def value(self, at: int, inside: str, shape: str) -> str:
        """Write a value at the present coordinates, unless it is there; returns its name."""
        if at not in self.names:
            node = self.program.nodes[at]
            leaf = self.leaf(at)
            if leaf is not None:
                self.names[at] = leaf
            elif self.stages.is_stored_for_level(at):
                pointer = self.pointer(f"in_{node.attr}" if node.op == "input" else f"r{at}")
                name = self.fresh("w")
                index = self.index(self.spaces[at], shape)
                self.add(f"{name} = tl.load({pointer} + {index}, mask={inside}, other=0.0).to(tl.float32)")
                self.names[at] = name
            else:
                self.names[at] = self.elementwise(at, [self.value(a, inside, shape) for a in node.args])
        return self.names[at]

    def source(self) -> Source:
        runtime = ["C", "S", "G"]
        constants = ["K", "BQ", "BR"]
        arguments = [*self.pointers, *runtime, *self.numbers]
        free = [*runtime, *(name for name in self.numbers if not name.startswith(("scalar", "count")))]
        signature = ", ".join([*arguments, *(f"{name}: tl.constexpr" for name in constants)])
        decorator = f"@triton.jit(do_not_specialize={free!r})"
        text = "\n".join([decorator, f"def {self.name}({signature}):", *self.lines, ""])
        return Source(self.name, text, (*arguments, *constants), tuple(constants))
