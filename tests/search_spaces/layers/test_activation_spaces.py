"""The sets of operators of two published searches: counts, forms, mutations, notation."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from search_spaces.common.errors import UserError
from search_spaces.layers.activation_space import BASELINES, activation
from search_spaces.layers.evaluate import evaluate
from search_spaces.layers.filters import numeric, static
from search_spaces.layers.formula import parse_formula
from search_spaces.layers.graph import LayerGraph
from search_spaces.layers.identity import fingerprint
from search_spaces.layers.ops import PANGAEA_BINARY, PANGAEA_UNARY, PARAMETERS
from search_spaces.layers.pangaea_space import FORMS, MUTATIONS, PangaeaSpace, Term, from_graph, initial_terms, places
from search_spaces.layers.pangaea_space import to_graph as graph_of
from search_spaces.layers.swish_space import BINARY, UNARY, SwishSpace, Unit

SPACES = (
    PangaeaSpace(),
    PangaeaSpace(guarded=False, parameters=0, largest=3),
    SwishSpace(),
    SwishSpace(units=2, guarded=False),
)
every_space = pytest.mark.parametrize("space", SPACES, ids=repr)


def classes_of(form: str) -> list[np.ndarray]:
    """The different outputs of a form's plain functions in float32; zeros of either sign are equal, bits otherwise."""
    x = np.clip(np.random.RandomState(0).normal(size=1000), -5, 5).astype(np.float32)
    points = torch.from_numpy(x).reshape(-1, 1)
    found = {}
    for term in initial_terms(form):
        value = (evaluate(graph_of(term, guarded=False), points) + 0.0).flatten().numpy()
        found.setdefault(value.tobytes(), value)
    return list(found.values())


def test_functions_of_act_bench():
    """5,103 expressions are 2,913 functions (Bingham and Miikkulainen 2023, arXiv 2301.05785)."""
    assert (len(PANGAEA_UNARY), len(PANGAEA_BINARY)) == (27, 7)
    assert sum(1 for _ in initial_terms(FORMS[1])) == 5103
    found = classes_of(FORMS[1])
    finite = [value for value in found if np.isfinite(value).all()]
    varying = [value for value in finite if np.ptp(value) > 1e-6]  # erf + erfc is 1 but for rounding
    assert (len(found), len(finite), len(varying)) == (2913, 2530, 2521)


def test_functions_of_two_unary_operators():
    assert sum(1 for _ in initial_terms(FORMS[0])) == 27**2
    found = classes_of(FORMS[0])
    assert sum(np.isfinite(value).all() for value in found) == 549


@every_space
def test_spaces_are_closed(space):
    rng = np.random.default_rng(0)
    other = space.sample(rng)
    for _ in range(120):
        arch = space.sample(rng)
        child = space.crossover(arch, other, rng)
        mutant = space.mutate(arch, rng)
        for graph in (arch, child, mutant):
            assert space.decode(space.encode(graph)) == graph
            assert space.embed(graph) == graph
            assert not graph.affine
            assert set(space.graph(graph).ops) <= set(space.vocabulary)
        assert mutant != arch
        other = child
    copy = pickle.loads(pickle.dumps(space))
    assert copy.sample(np.random.default_rng(3)) == space.sample(np.random.default_rng(3))
    for graph in itertools.islice(space.neighbors(other), 60):
        assert graph != other
        assert space.decode(space.encode(graph)) == graph


def test_what_a_space_lacks():
    for text in ("sin(x)", "v0 + x", "x + alpha", "std[group](x)"):
        graph = parse_formula(text, affine=False)
        with pytest.raises(UserError):
            PangaeaSpace().decode(PangaeaSpace().encode(graph))
    with pytest.raises(UserError, match="at most 0 multipliers"):
        PangaeaSpace(parameters=0).embed(parse_formula("alpha * tanh(x)"))
    with pytest.raises(UserError, match="one trained factor"):
        from_graph(parse_formula("alpha * (beta * x)"))
    shared = parse_formula(
        "; ".join([f"t{i} = " + (f"t{i - 1} + t{i - 1}" if i else "x + x") for i in range(9)] + ["t8"])
    )
    with pytest.raises(UserError, match="at most 64 operations"):
        from_graph(shared)  # nine nodes, 511 when written out
    with pytest.raises(UserError, match="one or two"):
        SwishSpace(units=3)
    with pytest.raises(UserError, match="core unit"):
        SwishSpace(units=2).embed(activation("mish"))
    with pytest.raises(UserError, match="core unit"):
        SwishSpace().decode(SwishSpace().encode(parse_formula("sin(cos(x))", affine=False)))


def test_initial_forms_and_multipliers():
    """Both forms half of the time, 0 to 3 multipliers equally often, on any edge."""
    rng = np.random.default_rng(1)
    space = PangaeaSpace()
    terms = [from_graph(space.sample(rng)) for _ in range(2000)]
    shapes = Counter((term.size, len(term.terms)) for term in terms)
    assert set(shapes) == {(2, 1), (3, 2)}
    assert abs(shapes[2, 1] - 1000) < 4 * 500**0.5
    counts = Counter(sum(t.scaled for _, t in places(term)) for term in terms)
    assert set(counts) == {0, 1, 2, 3}
    assert all(abs(n - 500) < 4 * 375**0.5 for n in counts.values())
    where = Counter(path for term in terms if len(term.terms) == 2 for path, t in places(term) if t.scaled)
    assert set(where) == {(), (0,), (1,), (0, 0), (1, 0)}
    names = {n.op for term in terms for n in graph_of(term).nodes if n.op in PARAMETERS}
    assert names == {"alpha", "beta", "gamma"}


@pytest.mark.parametrize("kind", MUTATIONS)
def test_kinds_of_mutation(kind):
    """What each kind keeps: insert and remove change the size by one, the others keep the shape."""
    space, rng = PangaeaSpace(), np.random.default_rng(2)
    for _ in range(200):
        term = from_graph(space.mutate(space.sample(rng), rng))
        new = space._mutant(kind, term, rng)
        assert new is not None
        plain, before = [(p, t.op) for p, t in places(new)], [(p, t.op) for p, t in places(term)]
        if kind == "parameters":
            assert plain == before
        elif kind in ("change", "regenerate"):
            assert [p for p, _ in plain] == [p for p, _ in before]
            assert kind == "regenerate" or sum(a != b for a, b in zip(plain, before, strict=True)) <= 1
        elif kind == "insert":
            ops, old = Counter(op for _, op in plain), Counter(op for _, op in before)
            assert not old - ops
            assert sum((ops - old).values()) in (1, 3)  # a unary operator, or a binary one with identity(x)
        else:
            assert new.size < term.size


def test_a_removed_insertion_leaves_the_function():
    term = Term("tanh", (Term(scaled=True),))
    wrapped = Term("add", (term, Term("identity", (Term(),))))
    assert from_graph(graph_of(wrapped)).terms[0] == term
    x = torch.randn(50, 2, dtype=torch.double)
    torch.testing.assert_close(evaluate(graph_of(wrapped), x), torch.tanh(x) + x)


def test_swish_units_are_all_there():
    space = SwishSpace()
    assert (len(UNARY), len(BINARY)) == (25, 10)
    assert len(space) == 6250 == sum(1 for _ in space)
    assert len(SwishSpace(units=2)) == 6250 * 25_000
    reached = {space.key(graph) for graph in itertools.islice(space, 0, None, 7)}
    assert len(reached) > 400
    known = {space.key(graph) for graph in (space.graph_of((Unit("mul", "x", u),)) for u in UNARY)}
    assert space.key(activation("silu")) in known


def test_swish_functions_of_the_paper():
    """The functions that the paper found, by value."""
    x = torch.linspace(-3, 3, 41, dtype=torch.double).reshape(-1, 1)
    expected = {
        Unit("sigmoid(x1)*x2", "beta*x", "x"): x * torch.sigmoid(x),
        Unit("max", "x", "sigmoid"): torch.maximum(x, torch.sigmoid(x)),
        Unit("sub", "cos", "x"): torch.cos(x) - x,
        Unit("min", "x", "sin"): torch.minimum(x, torch.sin(x)),
        Unit("add", "sinc", "x"): torch.sinc(x / torch.pi) + x,
        Unit("exp(-beta(x1-x2)^2)", "x", "beta"): torch.exp(-((x - 1) ** 2)),
        Unit("exp(-beta|x1-x2|)", "x+beta", "neg"): torch.exp(-(2 * x + 1).abs()),
        Unit("beta*x1+(1-beta)*x2", "square", "cube"): x * x,  # beta begins as one
        Unit("add", "min(x,0)", "max(x,0)"): x,
    }
    for unit, value in expected.items():
        for guarded in (True, False):
            space = SwishSpace(guarded=guarded)
            graph = space.graph_of((unit,))
            torch.testing.assert_close(evaluate(graph, x), value)
            assert space.graph_of(space.units_of(graph)) == graph
    twice = SwishSpace(units=2).graph_of((Unit("mul", "x", "atan"), Unit("sub", "x", "x", first=1)))
    torch.testing.assert_close(evaluate(twice, x), x * torch.atan(x) - x)


@pytest.mark.slow
def test_swish_functions_are_found_by_value():
    """All 6,250 units are described once, which takes seconds."""
    space = SwishSpace()
    x = torch.linspace(-3, 3, 41, dtype=torch.double).reshape(-1, 1)
    for text in ("relu(x)", "x * sigmoid(beta * x)", "softplus(x)"):
        graph = parse_formula(text, affine=False)
        torch.testing.assert_close(evaluate(space.embed(graph), x), evaluate(graph, x))
    with pytest.raises(UserError, match="core unit"):
        space.embed(activation("mish"))


def test_guarded_functions_are_finite_where_plain_ones_are_not():
    """1 / x has a slope beyond half precision near 0 even so; the numeric test refuses it."""
    for op in PANGAEA_UNARY:
        graph = graph_of(Term(op, (Term(),)))
        if static(graph) is None:
            assert numeric(graph) in (("non_finite",) if op == "reciprocal" else (None, "trivial")), op
        plain = graph_of(Term(op, (Term(),)), guarded=False)
        x = torch.tensor([[0.0], [1000.0], [-1000.0]])
        assert torch.isfinite(evaluate(graph, x)).all()
        assert torch.isfinite(evaluate(plain, x)).all() == (op not in ("reciprocal", "exp", "sinh", "cosh", "expm1"))


def test_baselines():
    x = torch.linspace(-4, 4, 33, dtype=torch.double).reshape(-1, 1)
    for name in BASELINES:
        torch.testing.assert_close(evaluate(activation(name), x), getattr(torch.nn.functional, name)(x))
        if name not in ("gelu", "mish"):
            assert PangaeaSpace().embed(activation(name)) == activation(name)
    assert isinstance(activation("x * sigmoid(x)"), LayerGraph)
    assert fingerprint(activation("silu")) == fingerprint(activation("x * sigmoid(x)"))
