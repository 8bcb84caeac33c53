"""The activation functions of PANGAEA: trees of 27 unary and 7 binary operators with up to three trained multipliers.

Bingham and Miikkulainen, Discovering Parametric Activation Functions, Neural Networks 2022 (arXiv 2006.03179). The
operator set is that of the authors' later release; the kinds of mutation, that a multiplier is per channel and begins
as one, and the crossover (of arXiv 2002.07224, by the same authors) are recollection.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from search_spaces.common.errors import UserError
from search_spaces.layers.activation_space import ActivationSpace, GraphBuilder
from search_spaces.layers.graph import LEAVES, LayerGraph, X
from search_spaces.layers.ops import PANGAEA_BINARY, PANGAEA_UNARY, PARAMETERS

FORMS = ("unary(unary(x))", "binary(unary(x), unary(x))")
MUTATIONS = ("insert", "remove", "change", "regenerate", "parameters")
_TRIES = 100


@dataclass(frozen=True, slots=True)
class Term:
    """x, or an operation on terms. scaled: its value is multiplied by a trained channel vector."""

    op: str = "x"
    terms: tuple[Term, ...] = ()
    scaled: bool = False

    @property
    def size(self) -> int:
        """How many operations it has, multipliers apart."""
        return sum(term.op != "x" for _, term in places(self))


Path = tuple[int, ...]


def places(term: Term, path: Path = ()) -> Iterator[tuple[Path, Term]]:
    """(path, term) of the term and all below it, children first, as the graph has them."""
    for index, child in enumerate(term.terms):
        yield from places(child, (*path, index))
    yield path, term


def with_term(term: Term, path: Path, new: Term) -> Term:
    """The term with another one at a path."""
    if not path:
        return new
    first, *rest = path
    terms = tuple(with_term(c, tuple(rest), new) if i == first else c for i, c in enumerate(term.terms))
    return replace(term, terms=terms)


def to_graph(term: Term, *, guarded: bool = True) -> LayerGraph:
    """The term as a graph with one node for every operation, `identity` included; parameters alpha, beta, ... in the
    order of the nodes. Errors: UserError for more multipliers than there are names."""
    builder = GraphBuilder(guarded)

    def value(term: Term) -> int:
        inputs = [value(child) for child in term.terms]
        id = X if term.op == "x" else builder.add(term.op, *inputs)
        return builder.add("mul", builder.parameter(), id) if term.scaled else id

    return builder.graph(value(term))


def from_graph(graph: LayerGraph, most: int = 64) -> Term:
    """The term that a graph spells, with shared values written out; guards are not part of it.

    Errors: UserError for a graph with other leaves than x, 0 and 1, with a parameter elsewhere than in a product, or
    of more than `most` operations when written out.
    """
    left = 3 * most

    def term(id: int) -> Term:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError("layer", f"a function of at most {most} operations")
        if id == X:
            return Term()
        if id < len(LEAVES):
            if id == 1:
                return Term("zeros", (Term(),))
            raise UserError(LEAVES[id], "a function of x alone, with alpha, beta, gamma for what is trained", "alpha")
        node = graph.node(id)
        if node.op in PARAMETERS:
            raise UserError(node.op, "a trained vector only as a factor, alpha * x")
        if node.op == "exp" and node.inputs == (1,):
            return Term("ones", (Term(),))
        if node.op == "mul":
            for one, other in (node.inputs, node.inputs[::-1]):
                if one >= len(LEAVES) and graph.node(one).op in PARAMETERS:
                    inner = term(other)
                    if inner.scaled:
                        raise UserError(graph.node(one).op, "one trained factor on a value")
                    return replace(inner, scaled=True)
        return Term(node.op, tuple(term(i) for i in node.inputs))

    return term(graph.output)


class PangaeaSpace(ActivationSpace):
    """Trees over 27 unary and 7 binary operators that begin as unary(unary(x)) or binary(unary(x), unary(x)).

    guarded: see `activation_space`. parameters: at most so many multipliers (0 to 6; the paper has 3). largest:
    operations in a tree; the limit is ours. Errors: UserError.
    """

    name = "pangaea"

    def __init__(self, *, guarded: bool = True, parameters: int = 3, largest: int = 7):
        if not 0 <= parameters <= len(PARAMETERS):
            raise UserError(parameters, f"0 to {len(PARAMETERS)} trained multipliers")
        if largest < 3:
            raise UserError(largest, "at least 3 operations")
        self.settings = {"guarded": guarded, "parameters": parameters, "largest": largest}
        self.guarded, self.parameters, self.largest = guarded, parameters, largest
        self._name((*PANGAEA_UNARY, *PANGAEA_BINARY))

    # -- random trees --------------------------------------------------------------------------------------------

    def sample(self, rng: np.random.Generator) -> LayerGraph:
        """One of the two initial forms, uniform operators, 0 to `parameters` multipliers on random edges."""
        if rng.random() < 0.5:
            term = Term(_unary(rng), (Term(_unary(rng), (Term(),)),))
        else:
            term = Term(_binary(rng), (Term(_unary(rng), (Term(),)), Term(_unary(rng), (Term(),))))
        return self._graph(self._rescaled(term, rng))

    def mutate(self, arch: LayerGraph, rng: np.random.Generator) -> LayerGraph:
        """One of MUTATIONS, drawn uniformly."""
        term = from_graph(arch)
        for _ in range(_TRIES):
            kind = MUTATIONS[int(rng.integers(len(MUTATIONS)))]
            changed = self._mutant(kind, term, rng)
            if changed is not None and changed != term and 0 < changed.size <= self.largest:
                return self._graph(self._within(changed, rng))
        return self.sample(rng)

    def _mutant(self, kind: str, term: Term, rng: np.random.Generator) -> Term | None:
        """insert: a node on an edge, the other input of a binary one is x. remove: a node gives way to one of its
        inputs. change: another operator of the same arity at one node. regenerate: at every node. parameters: the
        multipliers are drawn anew."""
        spots = list(places(term))
        inner = [(path, t) for path, t in spots if t.op != "x"]
        if kind == "insert":
            path, old = spots[int(rng.integers(len(spots)))]
            if rng.random() < 0.5:
                return with_term(term, path, Term(_unary(rng), (old,)))
            pair = (old, Term("identity", (Term(),)))
            return with_term(term, path, Term(_binary(rng), pair if rng.random() < 0.5 else pair[::-1]))
        if kind == "parameters":
            return self._rescaled(term, rng)
        if not inner:
            return None
        path, old = inner[int(rng.integers(len(inner)))]
        if kind == "remove":
            return with_term(term, path, old.terms[int(rng.integers(len(old.terms)))])
        chosen = [(path, old)] if kind == "change" else inner
        for path, old in chosen:
            new = _unary(rng) if len(old.terms) == 1 else _binary(rng)
            term = with_term(term, path, replace(_at(term, path), op=new))
        return term

    def crossover(self, first: LayerGraph, second: LayerGraph, rng: np.random.Generator) -> LayerGraph:
        """`first` with a random subtree replaced by one of `second`; a mutant of `first` if none fits."""
        ours, theirs = list(places(from_graph(first))), list(places(from_graph(second)))
        for _ in range(_TRIES):
            path, _ = ours[int(rng.integers(len(ours)))]
            child = with_term(from_graph(first), path, theirs[int(rng.integers(len(theirs)))][1])
            if 0 < child.size <= self.largest:
                return self._graph(self._within(child, rng))
        return self.mutate(first, rng)

    def neighbors(self, arch: LayerGraph) -> Iterator[LayerGraph]:
        """Every other operator of the same arity at one node, and every multiplier there or not."""
        term = from_graph(arch)
        count = sum(t.scaled for _, t in places(term))
        for path, old in places(term):
            for op in () if old.op == "x" else PANGAEA_UNARY if len(old.terms) == 1 else PANGAEA_BINARY:
                if op != old.op:
                    yield self._graph(with_term(term, path, replace(old, op=op)))
            if old.scaled or count < self.parameters:
                yield self._graph(with_term(term, path, replace(old, scaled=not old.scaled)))

    def embed(self, arch: LayerGraph) -> LayerGraph:
        """The same tree with this space's guards. Errors: UserError if it is too large or has other operators."""
        term = from_graph(arch)
        count = sum(t.scaled for _, t in places(term))
        if not 0 < term.size <= self.largest or count > self.parameters:
            limits = f"1 to {self.largest} operations and at most {self.parameters} multipliers"
            raise UserError(f"{term.size} operations, {count} multipliers", limits)
        for _, part in places(term):
            if part.op != "x" and part.op not in self.ops:
                raise UserError(part.op, f"an operator of PANGAEA ({', '.join(self.ops)})")
        return self._graph(term)

    def _graph(self, term: Term) -> LayerGraph:
        return to_graph(term, guarded=self.guarded)

    def _rescaled(self, term: Term, rng: np.random.Generator) -> Term:
        """The term with 0 to `parameters` multipliers on random edges: every operator's output and every x."""
        spots = [path for path, _ in places(term)]
        count = min(int(rng.integers(self.parameters + 1)), len(spots))
        chosen = {spots[int(i)] for i in rng.choice(len(spots), count, replace=False)}
        for path in spots:
            term = with_term(term, path, replace(_at(term, path), scaled=path in chosen))
        return term

    def _within(self, term: Term, rng: np.random.Generator) -> Term:
        """The term without random multipliers that are too many."""
        scaled = [path for path, t in places(term) if t.scaled]
        for i in rng.permutation(len(scaled))[self.parameters :]:
            term = with_term(term, scaled[int(i)], replace(_at(term, scaled[int(i)]), scaled=False))
        return term


def initial_terms(form: str) -> Iterator[Term]:
    """All terms of one of FORMS, without multipliers: 729 and 5,103. Errors: UserError."""
    if form not in FORMS:
        raise UserError(form, f"{FORMS[0]} or {FORMS[1]}", FORMS[1])
    inner = [Term(op, (Term(),)) for op in PANGAEA_UNARY]
    if form == FORMS[0]:
        yield from (Term(op, (term,)) for op, term in itertools.product(PANGAEA_UNARY, inner))
    else:
        yield from (Term(op, (a, b)) for op, a, b in itertools.product(PANGAEA_BINARY, inner, inner))


def _at(term: Term, path: Path) -> Term:
    for index in path:
        term = term.terms[index]
    return term


def _unary(rng: np.random.Generator) -> str:
    return PANGAEA_UNARY[int(rng.integers(len(PANGAEA_UNARY)))]


def _binary(rng: np.random.Generator) -> str:
    return PANGAEA_BINARY[int(rng.integers(len(PANGAEA_BINARY)))]
