"""The activation functions of the Swish search: core units b(u1(x1), u2(x2)), one or two in a row.

Ramachandran, Zoph and Le, Searching for Activation Functions, 2017 (arXiv 1710.05941). The unary and binary sets are
those of NNI's port, the constant beta is recollection. beta is trained per channel and begins as one, a new one at
every place. Square roots are the house's, sign(x) sqrt(|x| + eps).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from search_spaces.common.errors import UserError
from search_spaces.layers.activation_space import ActivationSpace, GraphBuilder
from search_spaces.layers.graph import LEAVES, V0, LayerGraph, Node, X
from search_spaces.layers.identity import fingerprint
from search_spaces.layers.ops import PARAMETERS

Unary = Callable[[GraphBuilder, int], int]
Binary = Callable[[GraphBuilder, int, int], int]


def _plain(name: str) -> Unary:
    return lambda g, a: g.add(name, a)


def _pair(name: str) -> Binary:
    return lambda g, a, b: g.add(name, a, b)


UNARY: dict[str, Unary] = {
    "x": lambda g, a: a,
    **{name: _plain(name) for name in ("neg", "abs", "square", "cube", "sqrt")},
    "beta*x": lambda g, a: g.add("mul", g.parameter(), a),
    "x+beta": lambda g, a: g.add("add", a, g.parameter()),
    **{name: _plain(name) for name in ("logabs", "exp", "sin", "cos", "sinh", "cosh", "tanh", "asinh", "atan", "sinc")},
    "max(x,0)": _plain("relu"),
    "min(x,0)": lambda g, a: g.add("min", a, 1),
    **{name: _plain(name) for name in ("sigmoid", "softplus", "gaussian", "erf")},
    "beta": lambda g, a: g.parameter(),
}
BINARY: dict[str, Binary] = {
    **{name: _pair(name) for name in ("add", "mul", "sub", "div", "max", "min")},
    "sigmoid(x1)*x2": lambda g, a, b: g.add("mul", g.add("sigmoid", a), b),
    "exp(-beta(x1-x2)^2)": lambda g, a, b: _decay(g, "square", a, b),
    "exp(-beta|x1-x2|)": lambda g, a, b: _decay(g, "abs", a, b),
    # beta x1 + (1 - beta) x2 with one use of beta
    "beta*x1+(1-beta)*x2": lambda g, a, b: g.add("add", b, g.add("mul", g.parameter(), g.add("sub", a, b))),
}
_OPS = (
    *("neg", "abs", "square", "cube", "sqrt", "logabs", "exp", "sin", "cos", "sinh", "cosh", "tanh", "asinh", "atan"),
    *("sinc", "relu", "sigmoid", "softplus", "gaussian", "erf", "add", "mul", "sub", "div", "max", "min"),
)


def _decay(g: GraphBuilder, distance: str, a: int, b: int) -> int:
    return g.add("exp", g.add("neg", g.add("mul", g.parameter(), g.add(distance, g.add("sub", a, b)))))


@dataclass(frozen=True, slots=True)
class Unit:
    """A core unit. first, second: what x1 and x2 are, 0 for x and 1 for the unit before."""

    binary: str
    unary1: str
    unary2: str
    first: int = 0
    second: int = 0

    def build(self, builder: GraphBuilder, before: int) -> int:
        """The id of its value, behind a unit whose value has the id `before`."""
        sources = (X, before)
        a = UNARY[self.unary1](builder, sources[self.first])
        b = UNARY[self.unary2](builder, sources[self.second])
        return BINARY[self.binary](builder, a, b)


class SwishSpace(ActivationSpace):
    """All functions of one or two core units: 25 x 25 x 10 = 6,250, and 6,250 x 25,000 = 156,250,000.

    guarded: see `activation_space`. Errors: UserError for other numbers of units.
    """

    name = "swish"

    def __init__(self, *, units: int = 1, guarded: bool = True):
        if units not in (1, 2):
            raise UserError(units, "one or two core units", "1")
        self.settings = {"units": units, "guarded": guarded}
        self.units, self.guarded = units, guarded
        self._name(_OPS)

    def graph_of(self, units: tuple[Unit, ...]) -> LayerGraph:
        """The graph of a chain of units."""
        builder = GraphBuilder(self.guarded)
        value = X
        for unit in units:
            value = unit.build(builder, value)
        return builder.graph(value)

    def units_of(self, arch: LayerGraph) -> tuple[Unit, ...]:
        """A chain of units whose graph is `arch`. Errors: UserError if there is none."""
        nodes = arch.nodes
        known = _units(self.guarded, self.units)
        for cut in [len(nodes)] if self.units == 1 else range(1, len(nodes)):
            parts = (nodes[:cut],) if self.units == 1 else (nodes[:cut], _relative(nodes[cut:], cut))
            found = tuple(known[part] for part in parts if part in known)
            if len(found) == self.units and self.graph_of(found).nodes == nodes:
                return found
        raise UserError("layer", f"a function of {self.units} core unit{'s' * (self.units > 1)} b(u1(x1), u2(x2))")

    def embed(self, arch: LayerGraph) -> LayerGraph:
        """A chain of units for the same function; for one unit by value if the graph is none itself (the first such
        call describes all 6,250, which takes seconds). Errors: UserError."""
        try:
            return self.graph_of(self.units_of(arch))
        except UserError:
            names = dict(zip(arch.parameters, PARAMETERS, strict=False))
            nodes = tuple(replace(node, op=names.get(node.op, node.op)) for node in arch.nodes)
            known = _by_value(self.guarded) if self.units == 1 else {}
            found = known.get(fingerprint(replace(arch, nodes=nodes, affine=False)))
            if found is None:
                raise
            return self.graph_of((found,))

    def _check(self, graph: LayerGraph) -> None:
        self.units_of(graph)

    def _random_unit(self, at: int, rng: np.random.Generator) -> Unit:
        def pick(names: dict) -> str:
            return list(names)[int(rng.integers(len(names)))]

        sources = rng.integers(2, size=2).tolist() if at else (0, 0)
        return Unit(pick(BINARY), pick(UNARY), pick(UNARY), *sources)

    def sample(self, rng: np.random.Generator) -> LayerGraph:
        """Uniform units; what the second one reads is uniform too."""
        return self.graph_of(tuple(self._random_unit(at, rng) for at in range(self.units)))

    def neighbors(self, arch: LayerGraph) -> Iterator[LayerGraph]:
        """Another function, or another source, at one place."""
        units = self.units_of(arch)
        for at, unit in enumerate(units):
            changes = [replace(unit, binary=name) for name in BINARY]
            changes += [replace(unit, unary1=name) for name in UNARY] + [replace(unit, unary2=name) for name in UNARY]
            if at:
                changes += [replace(unit, first=1 - unit.first), replace(unit, second=1 - unit.second)]
            for changed in changes:
                other = self.graph_of((*units[:at], changed, *units[at + 1 :]))
                if other != arch:
                    yield other

    def mutate(self, arch: LayerGraph, rng: np.random.Generator) -> LayerGraph:
        """One slot of one unit drawn anew: its binary function, a unary one, or what an input reads."""
        units = self.units_of(arch)
        while True:
            at = int(rng.integers(len(units)))
            slots = ("binary", "unary1", "unary2", "first", "second")[: 5 if at else 3]
            slot = slots[int(rng.integers(len(slots)))]
            changed = replace(units[at], **{slot: getattr(self._random_unit(at, rng), slot)})
            child = self.graph_of((*units[:at], changed, *units[at + 1 :]))
            if child != arch:  # other units may spell the same graph
                return child

    def crossover(self, first: LayerGraph, second: LayerGraph, rng: np.random.Generator) -> LayerGraph:
        """Every slot from one of both, at random."""
        children = []
        for pair in zip(self.units_of(first), self.units_of(second), strict=True):
            slots = ("binary", "unary1", "unary2", "first", "second")
            children.append(Unit(*(getattr(pair[int(rng.integers(2))], slot) for slot in slots)))
        return self.graph_of(tuple(children))

    def __len__(self) -> int:
        single = len(BINARY) * len(UNARY) ** 2
        return single if self.units == 1 else single * 4 * single

    def __iter__(self) -> Iterator[LayerGraph]:
        return (self.graph_of(units) for units in itertools.product(*(_all_units(at) for at in range(self.units))))


def _all_units(at: int) -> list[Unit]:
    sources = (0, 1) if at else (0,)
    return [Unit(*parts) for parts in itertools.product(BINARY, UNARY, UNARY, sources, sources)]


@functools.cache
def _units(guarded: bool, count: int) -> dict[tuple[Node, ...], Unit]:
    """The first unit of every list of nodes that a unit makes; in place of the unit before stands v0."""
    known: dict[tuple[Node, ...], Unit] = {}
    for unit in _all_units(count - 1):
        builder = GraphBuilder(guarded)
        unit.build(builder, V0)
        known.setdefault(tuple(builder.nodes), unit)
    return known


@functools.cache
def _by_value(guarded: bool) -> dict[str, Unit]:
    """The first unit with each fingerprint."""
    space, known = SwishSpace(guarded=guarded), dict[str, Unit]()
    for unit in _all_units(0):
        known.setdefault(fingerprint(space.graph_of((unit,))), unit)
    return known


def _relative(nodes: tuple[Node, ...], before: int) -> tuple[Node, ...]:
    """The nodes behind `before` others as if they were the first, with v0 for the last of those others."""
    start, names = len(LEAVES) + before, iter(PARAMETERS)
    ids = {id: id for id in range(len(LEAVES))} | {start - 1: V0}
    ids |= {start + k: len(LEAVES) + k for k in range(len(nodes))}
    return tuple(
        replace(
            node,
            op=next(names) if node.op in PARAMETERS else node.op,
            inputs=tuple(ids.get(i, V0) for i in node.inputs),
        )
        for node in nodes
    )
