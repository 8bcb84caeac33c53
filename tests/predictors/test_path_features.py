"""Path features against enumeration of every path with networkx: NAS-Bench-101 and -201, DARTS, random graphs."""

import itertools

import networkx
import numpy as np
import pytest

import predictors.path_features
from predictors.graphs import as_table
from predictors.path_features import operation_subsets, path_features
from search_spaces.graph import OpGraph
from search_spaces.registry import load_space

VOCABULARY = ("input", "output", "none", "a", "b", "c", "d")


def random_graph(rng, nodes=8):
    """Any acyclic graph: dead ends, `none` nodes, isolated nodes, sometimes no path at all."""
    ops = ("input", *(VOCABULARY[i] for i in rng.integers(2, len(VOCABULARY), nodes - 2)), "output")
    return OpGraph(ops, np.triu(rng.random((nodes, nodes)) < rng.uniform(0.2, 0.7), 1))


def sampled(space, count, rng):
    return [space.graph(space.sample(rng)) for _ in range(count)]


def by_enumeration(graph: networkx.DiGraph, vocabulary: tuple[str, ...], source: int, target: int) -> dict[str, float]:
    """Every column of one cell, from the list of its paths and their probabilities."""
    operation = dict(graph.nodes(data="op"))
    kinds = [op for op in vocabulary if op not in ("input", "output", "none")]
    open_nodes = [v for v in graph if operation[v] != "none"]
    carrying = graph.subgraph(open_nodes)
    through = networkx.descendants(carrying, source) & networkx.ancestors(carrying, target)
    live = carrying.subgraph({*through, source, target}).copy()
    inner = [v for v in live if v not in (source, target)]
    paths = list(networkx.all_simple_paths(live, source, target))
    forward = [np.prod([1 / live.out_degree(v) for v in path[:-1]]) for path in paths]
    backward = [np.prod([1 / live.in_degree(v) for v in path[1:]]) for path in paths]
    edges = list(live.edges)
    lengths = [len(path) - 1 for path in paths]

    def distances(path_end: int, reverse: bool):
        seen = live.reverse() if reverse else live
        routes = {v: [len(p) - 1 for p in networkx.all_simple_paths(seen, path_end, v)] for v in inner}
        return {v: min(r) for v, r in routes.items()}, {v: max(r) for v, r in routes.items()}

    near, far = distances(source, reverse=False)
    near_back, far_back = distances(target, reverse=True)
    found = {
        "live_nodes": len(inner),
        "live_edges": len(edges),
        "output_degree": live.in_degree(target),
        "output_share": 1 / max(live.in_degree(target), 1),
        "input_degree": live.out_degree(source),
        "shortest": 1 / min(lengths) if paths else 0,
        "depth": max(lengths, default=0),
        "log_paths": np.log(1 + len(paths)),
    }

    def mean(values):
        values = list(values)
        return sum(values) / len(values) if values else 0

    def expected(probabilities, counts):
        return sum(p * c for p, c in zip(probabilities, counts, strict=True))

    for op in kinds:
        at = [v for v in inner if operation[v] == op]
        passed = [len(set(path) & set(at)) for path in paths]
        found[f"count[{op}]"] = sum(other == op for other in operation.values())
        found[f"paths_through[{op}]"] = mean(passed)
        found[f"from_input[{op}]"] = mean(near[v] for v in at)
        found[f"to_output[{op}]"] = mean(near_back[v] for v in at)
        found[f"late_from_input[{op}]"] = max((far[v] for v in at), default=0)
        found[f"late_to_output[{op}]"] = max((far_back[v] for v in at), default=0)
        found[f"walk_from_input[{op}]"] = expected(forward, passed)
        found[f"walk_to_output[{op}]"] = expected(backward, passed)
    for subset in operation_subsets(vocabulary):
        label = "+".join(subset)
        at = [v for v in inner if operation[v] in subset]
        passed = [len(set(path) & set(at)) for path in paths]
        pure = [set(path[1:-1]) <= set(at) for path in paths]
        found[f"live[{label}]"] = len(at)
        found[f"shortest[{label}]"] = 1 / min((n for n, p in zip(lengths, pure, strict=True) if p), default=np.inf)
        found[f"most_on_path[{label}]"] = max(passed, default=0)
        found[f"fewest_on_path[{label}]"] = min(passed, default=0)
        moments = [expected(backward, [c**k for c in passed]) for k in (1, 2)]
        found[f"spread_on_walk[{label}]"] = np.sqrt(max(moments[1] - moments[0] ** 2, 0))
        found[f"walk_within[{label}]"] = expected(forward, pure)
        found[f"walk_back_within[{label}]"] = expected(backward, pure)
        found[f"log_paths[{label}]"] = np.log(1 + sum(pure))
        found[f"into_output[{label}]"] = sum(i in at for i, j in edges if j == target)
        found[f"out_of_input[{label}]"] = sum(j in at for i, j in edges if i == source)
        found[f"mean_in[{label}]"] = mean(live.in_degree(v) for v in at)
        found[f"mean_out[{label}]"] = mean(live.out_degree(v) for v in at)

    def role(v):
        return "input" if v == source else "output" if v == target else operation[v]

    for first, second in itertools.product([*kinds, "input"], [*kinds, "output"]):
        steps = [
            sum((role(i), role(j)) == (first, second) for i, j in itertools.pairwise(path)) for path in paths
        ]  # on each path
        found[f"step_out[{first}>{second}]"] = expected(forward, steps)
        found[f"step_back[{first}>{second}]"] = expected(backward, steps)
    return found


def assert_columns(rows, names, expected):
    """Each column of each graph; spreads are roots of differences in single precision."""
    assert len(set(names)) == len(names)
    for row, wanted in zip(rows, expected, strict=True):
        assert set(names) == set(wanted)
        for name, value in zip(names, row, strict=True):
            tolerance = 2e-3 if "spread_on_walk" in name else 2e-5
            assert value == pytest.approx(wanted[name], abs=tolerance, rel=2e-5), name


@pytest.mark.parametrize("name", ["nas-bench-101", "nas-bench-201", "random"])
def test_every_column_equals_enumeration_of_paths(name, rng):
    if name == "random":
        vocabulary: tuple[str, ...] = VOCABULARY
        graphs = [random_graph(rng, nodes) for nodes in (4, 6, 8) for _ in range(12)]
        graphs.append(OpGraph(("input", "none", "output"), np.triu(np.ones((3, 3), bool), 2)))  # one edge, no nodes
    else:
        space = load_space(name)
        vocabulary, graphs = space.vocabulary, sampled(space, 30, rng)
    rows, names = path_features(as_table(graphs, vocabulary))
    assert rows.dtype == np.float32
    assert_columns(rows, names, [by_enumeration(g.to_networkx(), vocabulary, 0, len(g) - 1) for g in graphs])
    if name != "nas-bench-101":
        assert (rows[:, names.index("log_paths")] == 0).any()  # a graph without a path was among them


def test_cells_of_darts_have_columns_of_their_own(rng):
    space = load_space("darts")
    graphs = sampled(space, 3, rng)
    rows, names = path_features(as_table(graphs, space.vocabulary))
    expected = []
    for graph in graphs:
        drawn = graph.to_networkx()
        wanted: dict[str, float] = {}
        for cell in ("normal", "reduce"):
            nodes = [v for v, part in drawn.nodes(data="part") if part in (cell, "both")]
            columns = by_enumeration(drawn.subgraph(nodes), space.vocabulary, 0, len(graph) - 1)
            wanted |= {f"{cell}.{name}": value for name, value in columns.items()}
        expected.append(wanted)
    assert_columns(rows, names, expected)


def renumbered(graph, rng):
    """The same graph with its nodes in another topological order, drawn at random."""
    order = [0]
    waiting = set(range(1, len(graph) - 1))
    while waiting:
        free = sorted(v for v in waiting if not waiting & set(np.flatnonzero(graph.adjacency[:, v])))
        order.append(free[rng.integers(len(free))])
        waiting.remove(order[-1])
    order.append(len(graph) - 1)
    adjacency = graph.adjacency[np.ix_(order, order)]
    return OpGraph(tuple(graph.ops[i] for i in order), adjacency, tuple(graph.parts[i] for i in order))


@pytest.mark.parametrize("name", ["nas-bench-101", "nas-bench-201", "darts"])
def test_the_numbering_of_nodes_does_not_matter(name, rng):
    space = load_space(name)
    graphs = sampled(space, 80 if name == "nas-bench-101" else 15, rng)
    others = [renumbered(graph, rng) for graph in graphs]
    assert sum(a != b for a, b in zip(graphs, others, strict=True)) > 10
    both, names = path_features(as_table(graphs + others, space.vocabulary))
    rows, again = np.split(both, 2)
    spread = np.array(["spread_on_walk" in name for name in names])
    np.testing.assert_allclose(again[:, ~spread], rows[:, ~spread], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(again[:, spread], rows[:, spread], atol=2e-3)


def test_neither_chunks_nor_padding_nor_company_change_a_row(rng, monkeypatch):
    graphs = [random_graph(rng, nodes) for nodes in (3, 5, 8) for _ in range(10)]
    table = as_table(graphs, VOCABULARY)
    rows, _ = path_features(table)
    np.testing.assert_array_equal(path_features(table.padded(11))[0], rows)
    monkeypatch.setattr(predictors.path_features, "CHUNK", 7)
    np.testing.assert_array_equal(path_features(table)[0], rows)
    np.testing.assert_array_equal(path_features(as_table(graphs[:1], VOCABULARY))[0], rows[:1])


def test_graphs_without_edges_or_without_the_cell_have_rows_too(rng):
    """A predictor of DARTS' cells and NAS-Bench-201's may be given graphs of one of the spaces alone."""
    empty = OpGraph(("input", "a", "output"), np.zeros((3, 3), bool))
    rows, names = path_features(as_table([empty], VOCABULARY))
    assert_columns(rows, names, [by_enumeration(empty.to_networkx(), VOCABULARY, 0, 2)])
    space = load_space("nas-bench-201")
    table = as_table(sampled(space, 5, rng), space.vocabulary)
    mixed, names = path_features(table, ("cell", "both", "normal", "reduce"))
    alone, own = path_features(table)
    np.testing.assert_array_equal(mixed[:, [names.index(f"cell.{name}") for name in own]], alone)
    away = [i for i, name in enumerate(names) if name.startswith("normal.")]
    shares = [i for i in away if "output_share" not in names[i]]
    assert not mixed[:, shares].any()


def test_subsets_are_all_of_up_to_five_operations_and_few_of_more():
    five, seven = tuple("abcde"), tuple("abcdefg")
    ends = ("input", "output", "none")
    assert len(set(map(frozenset, operation_subsets((*ends, *five))))) == 2**5 - 1
    many = set(map(frozenset, operation_subsets((*ends, *seven))))
    expected = {frozenset(s) for size in (1, 2, 6, 7) for s in itertools.combinations(seven, size)}
    assert many == expected
