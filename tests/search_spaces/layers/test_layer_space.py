"""LayerSpace: distributions against exact counts, closed operators, and which layers mutation can reach."""

from __future__ import annotations

import collections
import itertools
import pickle

import numpy as np
import pytest

from search_spaces.common.errors import UserError
from search_spaces.layers.catalog import layer
from search_spaces.layers.filters import normalizes, static
from search_spaces.layers.formula import parse_formula
from search_spaces.layers.graph import LEAVES, LayerGraph, X
from search_spaces.layers.mutations import MUTATIONS
from search_spaces.layers.ops import PRESETS, arity, split_name
from search_spaces.layers.patterns import with_guards
from search_spaces.layers.space import LayerSpace

FIRST = len(LEAVES)
EVERY = tuple(MUTATIONS)
SPACES = [
    LayerSpace(mutations=EVERY, immigrants=0),
    LayerSpace("evonorm21", 6, "nested", mutations=EVERY, groups=8),
    LayerSpace("extended", 12, mutations=EVERY, immigrants=0),
    LayerSpace(("add", "mul", "div", "exp", "neg", "std-channel", "mean-channel"), 5, group_size=4),
    LayerSpace(sampling="normalizing", mutations=EVERY, immigrants=0, affine=False),
]
every_space = pytest.mark.parametrize("space", SPACES, ids=repr)


def assert_member(space: LayerSpace, graph: LayerGraph) -> None:
    """A graph of the space: its size, operations and settings, guarded, and its own text."""
    assert len(graph.nodes) <= space.nodes
    assert graph.nodes
    assert {node.name for node in graph.nodes} <= set(space.ops)
    assert with_guards(graph) == graph
    assert (graph.affine, graph.groups, graph.group_size) == tuple(
        space.settings[name] for name in ("affine", "groups", "group_size")
    )
    assert space.decode(space.encode(graph)) == graph
    assert space.sampling != "normalizing" or normalizes(graph)


# -- sampling ----------------------------------------------------------------------------------------------------


def shares(space: LayerSpace, count: int) -> tuple[collections.Counter, list[LayerGraph]]:
    rng = np.random.default_rng(3)
    graphs = [space.sample(rng) for _ in range(count)]
    return collections.Counter(node.name for graph in graphs for node in graph.nodes), graphs


def test_flat_sampling_is_uniform_over_operations_and_inputs():
    counts, graphs = shares(LayerSpace(), 1500)
    assert set(counts) == set(PRESETS["evonorm24"])
    assert chi_square([counts[name] for name in PRESETS["evonorm24"]]) < 60  # 23 degrees of freedom: p = 4e-5
    sources = collections.Counter(i for graph in graphs for i in graph.nodes[-1].inputs)
    assert chi_square([sources[i] for i in range(FIRST + 9)]) < 45  # 12 degrees of freedom
    assert all(len(graph.nodes) == 10 and graph.output == FIRST + 9 for graph in graphs)


def test_nested_sampling_draws_the_aggregates_as_one_of_thirteen():
    counts, _ = shares(LayerSpace(sampling="nested"), 1500)
    single = [counts[name] for name in PRESETS["evonorm24"] if "-" not in name]
    inner = [counts[name] for name in PRESETS["evonorm24"] if "-" in name]
    assert chi_square([*single, sum(inner)]) < 45
    assert chi_square(inner) < 42


def chi_square(counts: list[int]) -> float:
    expected = sum(counts) / len(counts)
    return sum((c - expected) ** 2 / expected for c in counts)


@pytest.mark.parametrize("sampling", ["flat", "nested"])
def test_how_often_x_is_ignored(sampling):
    """Against the same model written with arrays: two inputs with probability 4/24 or 4/13, all uniform."""
    rng, count = np.random.default_rng(0), 200_000
    depends = np.zeros((count, 14), bool)
    depends[:, X] = True
    rows = np.arange(count)
    for id in range(4, 14):
        first, second = rng.integers(id, size=(2, count))
        two = rng.random(count) < 4 / (24 if sampling == "flat" else 13)
        depends[:, id] = depends[rows, first] | (two & depends[rows, second])
    expected = 1 - depends[:, -1].mean()
    _, graphs = shares(LayerSpace(sampling=sampling), 4000)
    found = np.mean([X not in graph.live for graph in graphs])
    assert abs(found - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5


def test_normalizing_samples_take_statistics_and_stay_bounded():
    space, rng = LayerSpace(sampling="normalizing"), np.random.default_rng(0)
    graphs = [space.sample(rng) for _ in range(40)]
    assert all(normalizes(graph) and static(graph) is None for graph in graphs)
    assert len({space.key(graph) for graph in graphs}) > 25


def test_the_trial_in_blocks_refuses_only_what_cannot_normalize():
    space, rng = LayerSpace(sampling="normalizing"), np.random.default_rng(1)
    block = rng.random((3000, 3, space.nodes))
    promising = space._may_normalize(block)
    truth = np.array([normalizes(space._random(numbers)) for numbers in block])
    assert truth.sum() >= 3
    assert not (truth & ~promising).any()
    assert promising.mean() < 0.1


# -- operators ---------------------------------------------------------------------------------------------------


@every_space
def test_samples_mutants_and_children_are_members(space):
    rng = np.random.default_rng(0)
    graphs = [space.sample(rng) for _ in range(12)]
    for first, second in itertools.pairwise(graphs):
        assert_member(space, first)
        assert len(first.nodes) == space.nodes
        child = space.crossover(first, second, rng)
        assert_member(space, child)
        for _ in range(4):
            assert_member(space, mutant := space.mutate(child, rng))
            assert mutant != child
            child = mutant


@pytest.mark.parametrize("kind", EVERY)
def test_each_mutation_changes_what_it_says(kind):
    space, rng, changed = LayerSpace("extended", mutations=[kind], immigrants=0), np.random.default_rng(2), 0
    for _ in range(150):
        graph = space.sample(rng)
        result = MUTATIONS[kind](graph, space, rng)
        if result is None:
            continue
        assert_member(space, with_guards(result))
        assert kind == "replace" or result != graph
        differences = [(a, b) for a, b in zip(graph.nodes, result.nodes) if a != b]
        if kind in ("replace", "rewire", "swap-axes", "swap-moment"):
            assert len(result.nodes) == len(graph.nodes)
            assert result.output == graph.output
            assert len(differences) <= 1
        for old, new in differences:
            if kind == "rewire":
                assert old.name == new.name
                assert sum(a != b for a, b in zip(old.inputs, new.inputs, strict=True)) == 1
            if kind == "swap-axes":
                assert (old.op, old.inputs) == (new.op, new.inputs)
                assert old.axes != new.axes
            if kind == "swap-moment":
                assert (old.axes, old.inputs) == (new.axes, new.inputs)
                assert old.op != new.op
        if kind == "delete":
            assert len(result.nodes) == len(graph.nodes) - 1
        live, before = len(result.live_nodes), len(graph.live_nodes)
        if kind == "insert":
            assert live > before
        changed += result != graph
    assert changed > (20 if kind.startswith("swap") else 100)


def test_insert_and_delete_know_their_limits():
    full = with_guards(parse_formula("tanh(exp(x))"))
    space, rng = LayerSpace(nodes=2), np.random.default_rng(0)
    assert MUTATIONS["insert"](full, space, rng) is None  # no room and nothing dead
    assert MUTATIONS["delete"](parse_formula("tanh(x)"), space, rng) is None
    leaf = LayerGraph((), X)
    assert all(MUTATIONS[kind](leaf, space, rng) is None for kind in EVERY if kind != "insert")
    assert len(MUTATIONS["insert"](leaf, space, rng).live_nodes) == 1


def test_immigrants_come_with_their_probability():
    graph = LayerSpace().embed(layer("evonorm-b0"), np.random.default_rng(0))
    for probability in (0.0, 0.5, 1.0):
        space, rng = LayerSpace(immigrants=probability), np.random.default_rng(1)
        near = np.mean(
            [sum(a == b for a, b in zip(graph.nodes, space.mutate(graph, rng).nodes)) >= 8 for _ in range(400)]
        )
        assert abs(1 - near - probability) < 0.1


def test_crossover_takes_from_both():
    space, rng = LayerSpace(), np.random.default_rng(0)
    first, second = (space.embed(layer(name), rng) for name in ("evonorm-b0", "evonorm-s0"))
    found = {frozenset(n.name for _, n in space.crossover(first, second, rng).live_nodes) for _ in range(100)}
    assert any({"std-batch", "std-group"} <= names for names in found)
    assert any({"std-instance", "sigmoid"} <= names for names in found)


def test_neighbors_are_one_node_away():
    space = LayerSpace(immigrants=0)
    graph = space.embed(layer("evonorm-s1"), np.random.default_rng(0))
    found = list(space.neighbors(graph))
    assert len(set(found)) == len(found) > 200
    for other in found:
        assert_member(space, other)
        changed = [id for id in range(FIRST, FIRST + 10) if unguarded(graph, id) != unguarded(other, id)]
        assert len(changed) == 1
        assert changed[0] in graph.live
    keys = {space.key(other) for other in found}
    assert space.key(layer("evonorm-s2")) in keys
    assert space.key(layer("evonorm-b0")) not in keys


def unguarded(graph: LayerGraph, id: int) -> tuple:
    node = graph.node(id)
    return node.name, node.inputs


# -- closure: the published layers are within reach --------------------------------------------------------------


class Scripted:
    """A generator that says what it is told, so that a mutation draws a given node."""

    def __init__(self, at: int, numbers: tuple[float, float, float], count: int):
        self.integer_answers, self.numbers = [(1, 0), (count, at)], numbers

    def random(self, size=None):
        return 0.99 if size is None else np.array(self.numbers)

    def integers(self, high):
        expected, answer = self.integer_answers.pop(0)
        assert high == expected
        return answer


PUBLISHED = {f"evonorm-{name}": n for name, n in zip(("b0", "b1", "b2", "s0", "s1", "s2"), (6, 7, 6, 5, 4, 4))}
PUBLISHED |= {"bn-relu": 6, "gn-relu": 6, "in-relu": 6, "ln-relu": 6, "silu": 3, "frn-tlu": 3}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layers_are_reachable_by_mutation(name):
    """From a random graph, node by node, each step one that `mutate` itself makes of suitable random numbers."""
    space, rng = LayerSpace(), np.random.default_rng(5)
    target = layer(name, eps=1e-5, unbiased=False)
    goal, graph = space.embed(target, rng), space.sample(rng)
    assert len(target.compact().nodes) == PUBLISHED[name]
    assert space.key(graph) != space.key(target)
    for id in range(FIRST, FIRST + 10):
        wanted = goal.node(id)
        if (graph.node(id).name, graph.node(id).inputs) == (wanted.name, wanted.inputs):
            continue
        pick = (space.ops.index(wanted.name) + 0.5) / len(space.ops)
        numbers = (pick, *((source + 0.5) / id for source in (*wanted.inputs, 0)[:2]))
        graph = space.mutate(graph, Scripted(id - FIRST, numbers, 10))
    assert space.key(graph) == space.key(target)


def test_random_mutation_finds_s2_from_s1():
    space, rng = LayerSpace(mutations=["replace", "swap-moment"], immigrants=0), np.random.default_rng(0)
    start, goal = space.embed(layer("evonorm-s1"), rng), space.key(layer("evonorm-s2"))
    assert any(space.key(space.mutate(start, rng)) == goal for _ in range(60))


# -- notation and identity ---------------------------------------------------------------------------------------


def test_keys_from_coarse_to_exact():
    space = LayerSpace()
    a, b, c = (
        parse_formula(text)
        for text in (
            "x * sigmoid(x) / std[group](x)",
            "-(-x) * sigmoid(x + 0) / std[group](x)",
            "x / std[group](x) * sigmoid(x)",
        )
    )
    assert len({space.encode(g) for g in (a, b, c)}) == 3
    assert space.function_key(a) == space.function_key(b) != space.function_key(c)
    assert space.key(a) == space.key(b) == space.key(c)


def test_encode_keeps_dead_nodes_and_decode_refuses_strangers():
    space, rng = LayerSpace(), np.random.default_rng(0)
    graph = space.embed(layer("evonorm-s0"), rng)
    assert len(graph.nodes) == 10
    assert graph.output == FIRST + 9
    assert graph.compact() == with_guards(layer("evonorm-s0")).compact()
    assert space.decode(space.encode(graph)) == graph
    with pytest.raises(UserError, match="min"):
        space.decode(space.encode(parse_formula("min(x, v0)")))
    with pytest.raises(UserError, match="at most 3"):
        LayerSpace(nodes=3).decode(space.encode(graph))
    with pytest.raises(UserError, match="std-batch"):
        LayerSpace("evonorm21").embed(layer("evonorm-b0"), rng)
    with pytest.raises(UserError, match="operations"):
        space.embed(LayerGraph((), X), rng)
    for text in ("", "{}", "[1]", '{"nodes": [], "output": 7}', "tanh(x)"):
        with pytest.raises(UserError):
            space.decode(text)


def test_op_graphs_show_live_values_and_the_order_of_inputs():
    space = LayerSpace()
    graph = space.graph(parse_formula("max(x / std[group](x), v0)"))
    assert graph.ops == ("input", "v0", "std-group", "divisor", "div", "max", "output")
    assert graph.edges() == [(0, 2), (0, 4), (1, 5), (2, 3), (3, 4), (4, 5), (5, 6)]
    assert space.graph(parse_formula("x / exp(x)")) != space.graph(parse_formula("exp(x) / x"))
    assert set(graph.ops) <= set(space.vocabulary)
    assert space.graph(LayerGraph((), X)).ops == ("input", "output")
    rng = np.random.default_rng(0)
    compact: dict = {}
    for _ in range(400):
        arch = space.sample(rng).compact()
        shape = tuple((n.name, n.inputs) for n in arch.nodes)
        swapped = min(shape, tuple((n, i[::-1] if n in ("add", "mul", "max") else i) for n, i in shape))
        known = compact.setdefault(space.graph(arch), swapped)
        assert [n for n, _ in known] == [n for n, _ in swapped]
        assert all(set(a) == set(b) for (_, a), (_, b) in zip(known, swapped, strict=True))


@every_space
def test_spaces_travel(space):
    copy = pickle.loads(pickle.dumps(space))
    assert copy.settings == space.settings
    assert copy.sample(np.random.default_rng(4)) == space.sample(np.random.default_rng(4))
    assert copy.vocabulary == space.vocabulary


def test_every_preset_samples():
    rng = np.random.default_rng(0)
    for name in PRESETS:
        space = LayerSpace(name, 4)
        assert_member(space, space.sample(rng))
        assert {arity(split_name(op)[0]) for op in space.ops} <= {1, 2}


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"ops": "evonorm25"}, "evonorm24"),
        ({"ops": ["add", "ad"]}, "add"),
        ({"ops": ["add", "add"]}, "none twice"),
        ({"nodes": 0}, "at least one node"),
        ({"sampling": "netsed"}, "nested"),
        ({"mutations": ["replce"]}, "replace"),
        ({"mutations": []}, "at least one mutation"),
        ({"immigrants": 1.5}, "from 0 to 1"),
        ({"groups": 0}, "positive number of groups"),
        ({"ops": "activations", "sampling": "normalizing"}, "aggregate"),
    ],
)
def test_bad_settings_are_refused(settings, part):
    with pytest.raises(UserError, match=part):
        LayerSpace(**settings)
