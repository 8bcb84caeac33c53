"""Triton source of the kernels of a program: its rules, how operations are written, lines and their names.

Rules of the text: every load is masked, has `other=` and is widened to float32 at once; every address is written by one
program; nothing that another program of the same launch wrote is read; no atomics, no libdevice, no inline assembly;
offsets inside a sample are 32-bit, the sample's own is 64-bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels import special
from kernels.nodes import CONDITIONS, REDUCTIONS, Unsupported, axes_text
from kernels.program import Program
from search_spaces.common.errors import one_of

VERSION = 1  # of the text; part of every cache key
HEADER = "import triton\nimport triton.language as tl\n"
NAN = special.NAN
_TANH_SERIES = "{0} * (1.0 + {0} * {0} * (-1.0 / 3.0 + {0} * {0} * (2.0 / 15.0 - {0} * {0} * (17.0 / 315.0))))"
_LOG1P = (
    "tl.where(1.0 + {0} == 1.0, {0}, tl.log(1.0 + {0}) * ({0} / tl.where(1.0 + {0} == 1.0, 1.0, (1.0 + {0}) - 1.0)))"
)

# {0}, {1}, {2}: arguments; {t}: a fresh name, for templates of several lines, of which the last is the value
TEMPLATES: dict[str, tuple[str, ...]] = {
    "neg": ("-{0}",),
    "abs": ("tl.abs({0})",),
    "sign": ("tl.where({0} > 0.0, 1.0, tl.where({0} < 0.0, -1.0, 0.0))",),
    "square": ("{0} * {0}",),
    "exp": ("tl.exp({0})",),
    "log": ("tl.log({0})",),
    "sqrt": ("tl.sqrt({0})",),
    "rsqrt": ("tl.rsqrt({0})",),
    "sigmoid": ("tl.sigmoid({0})",),
    # 2 sigmoid(2a) - 1 loses all digits of a small a, for which the Taylor series is exact to 2e-9
    "tanh": (f"tl.where(tl.abs({{0}}) < 0.125, {_TANH_SERIES}, 2.0 * tl.sigmoid(2.0 * {{0}}) - 1.0)",),
    "erf": ("tl.erf({0})",),
    "sin": special.SIN,
    "cos": special.COS,
    "atan": special.ATAN,
    "i0e": special.I0E,
    "i1e": special.I1E,
    "softplus": (
        "{t} = tl.exp(-tl.abs({0}))",
        "tl.where({0} > 20.0, {0}, tl.maximum({0}, 0.0, " + NAN + ") + " + _LOG1P.replace("{0}", "{t}") + ")",
    ),
    "add": ("{0} + {1}",),
    "sub": ("{0} - {1}",),
    "mul": ("{0} * {1}",),
    "div": ("{0} / {1}",),
    "pow": special.POW,
    "max": ("tl.maximum({0}, {1}, " + NAN + ")",),
    "min": ("tl.minimum({0}, {1}, " + NAN + ")",),
    "guard": ("tl.where({0} < 0.0, {0} - {1}, {0} + {1})",),
    "clamp_max": ("tl.minimum({0}, {1}, " + NAN + ")",),
    "lt": ("{0} < {1}",),
    "le": ("{0} <= {1}",),
    "eq": ("{0} == {1}",),
    "where": ("tl.where({0}, {1}, {2})",),
    "expand": ("{0}",),
}


def check_supported(program: Program) -> None:
    """Errors: Unsupported for an operation that is not written in Triton here."""
    for node in program.nodes:
        if node.op not in TEMPLATES and node.op not in (*REDUCTIONS, "input", "const", "scalar", "numel"):
            raise Unsupported(node.op, f"an operation with a Triton form ({one_of(TEMPLATES, 40)})")


@dataclass(frozen=True)
class Source:
    """A kernel: its name, text, arguments in order, and of these the compile-time ones."""

    name: str
    text: str
    arguments: tuple[str, ...]
    constants: tuple[str, ...]


class Lines:
    """Lines of a function, the arguments it was found to need, and the names of values already written."""

    def __init__(self, program: Program, ones: str):
        self.program, self.ones = program, ones
        self.lines: list[str] = []
        self.indent = 1
        self.pointers: dict[str, None] = {}
        self.numbers: dict[str, None] = {}
        self.names: dict[int, str] = {}
        self._fresh = 0

    def add(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)

    def fresh(self, stem: str = "t") -> str:
        self._fresh += 1
        return f"{stem}_{self._fresh}"

    def pointer(self, name: str) -> str:
        self.pointers[name] = None
        return name

    def number(self, name: str) -> str:
        self.numbers[name] = None
        return name

    def count(self, axes: int) -> str:
        """The number of elements over axes, as a float."""
        return self.number(f"count_{axes_text(axes)}") if axes else "1.0"

    def leaf(self, at: int) -> str | None:
        """Constants and numbers from outside."""
        node = self.program.nodes[at]
        if node.op == "const":
            value = repr(node.attr)
            return (
                value
                if value[-1].isdigit() and value[0] != "-"
                else f'float("{value}")'
                if value[-1].isalpha()
                else f"({value})"
            )
        if node.op == "scalar":
            return self.number(f"scalar_{int(node.attr or 0)}")  # type: ignore[call-overload]
        return self.count(node.axes) if node.op == "numel" else None

    def elementwise(self, at: int, args: list[str]) -> str:
        """Write an element-wise operation; returns its name."""
        node = self.program.nodes[at]
        ops = [self.program.nodes[a].op for a in node.args]
        values = range(1, 3) if node.op == "where" else range(len(args))
        if all(ops[i] == "const" for i in values):  # the language wants at least one tensor among the arguments
            args = [f"tl.full({self.ones}, {arg}, tl.float32)" if i in values else arg for i, arg in enumerate(args)]
            if len(args) == 1 or node.op == "guard":
                name = self.fresh("c")
                self.add(f"{name} = {args[0]}")
                args[0] = name
        *before, last = TEMPLATES[node.op]
        if node.op == "expand":
            return args[0]
        fresh = self.fresh()
        for line in before:
            self.add(line.format(*args, t=fresh))
        name = f"{'b' if node.op in CONDITIONS else 'v'}{at}"
        self.add(f"{name} = {last.format(*args, t=fresh)}")
        return name
