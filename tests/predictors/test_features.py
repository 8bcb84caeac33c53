"""Feature sets: one-hot and projections by hand, Weisfeiler-Lehman colours against dictionaries and networkx."""

import itertools
from collections import Counter

import networkx
import numpy as np
import pytest

from predictors.colours import ColourCounts, node_colours
from predictors.features import Standardizer, feature_matrix, random_projections
from predictors.graphs import as_table
from predictors.path_features import path_features
from search_spaces.common.errors import UserError
from search_spaces.graph import OpGraph

VOCABULARY = ("input", "output", "a", "b", "c")


def random_graph(rng, nodes, vocabulary=VOCABULARY):
    ops = ("input", *(vocabulary[i] for i in rng.integers(2, len(vocabulary), nodes - 2)), "output")
    return OpGraph(ops, np.triu(rng.random((nodes, nodes)) < 0.4, 1))


@pytest.fixture
def graphs(rng):
    return [random_graph(rng, int(n)) for n in rng.integers(3, 8, 50)]


def reordered(graph):
    """The middle nodes the other way round, where no edge forbids it; the same graph with other numbers."""
    for order in itertools.permutations(range(1, len(graph) - 1)):
        full = [0, *order, len(graph) - 1]
        adjacency = graph.adjacency[np.ix_(full, full)]
        if order != tuple(sorted(order)) and not np.tril(adjacency).any():
            return OpGraph(tuple(graph.ops[i] for i in full), adjacency)
    return graph


# -------------------------------------------------------------------------------------------------------------- one-hot


def test_one_hot_says_operations_and_edges(graphs):
    nodes = 7
    rows = feature_matrix(as_table(graphs, VOCABULARY), ("one-hot",), ("cell",), nodes)
    assert rows.shape == (len(graphs), nodes * len(VOCABULARY) + nodes * (nodes - 1) // 2)
    for graph, row in zip(graphs, rows, strict=True):
        expected = [float(i < len(graph) and graph.ops[i] == op) for i in range(nodes) for op in VOCABULARY]
        pairs = itertools.combinations(range(nodes), 2)
        expected += [float(j < len(graph) and graph.adjacency[i, j]) for i, j in pairs]
        assert row.tolist() == expected


def test_columns_keep_their_meaning_for_smaller_and_larger_pools(graphs):
    whole = feature_matrix(as_table(graphs, VOCABULARY), ("one-hot",), ("cell",), 7)
    small = [i for i, graph in enumerate(graphs) if len(graph) < 5]
    alone = feature_matrix(as_table([graphs[i] for i in small], VOCABULARY), ("one-hot",), ("cell",), 7)
    np.testing.assert_array_equal(alone, whole[small])
    larger = OpGraph(("input", *"aaaaaaaa", "output"), np.eye(10, k=1, dtype=bool))
    assert feature_matrix(as_table([larger], VOCABULARY), ("one-hot",), ("cell",), 7).shape[1] == whole.shape[1]


def test_sets_stand_side_by_side_and_unknown_ones_are_refused(graphs):
    table = as_table(graphs, VOCABULARY)
    both = feature_matrix(table, ("graf", "one-hot"), table.part_names, table.nodes)
    parts = [feature_matrix(table, (name,), table.part_names, table.nodes) for name in ("graf", "one-hot")]
    np.testing.assert_array_equal(both, np.concatenate(parts, 1))
    np.testing.assert_array_equal(parts[0], path_features(table)[0])
    with pytest.raises(UserError, match="did you mean 'one-hot'"):
        feature_matrix(table, ("one-hots",), table.part_names, table.nodes)


# --------------------------------------------------------------------------------------------------- random projections


def neighbourhood_profiles(graph, steps):
    """Mean over the nodes of the shares of operations `k` steps away on a walk that ignores directions."""
    both = (graph.adjacency | graph.adjacency.T).astype(float)
    walk = both / np.maximum(both.sum(1, keepdims=True), 1)
    ops = np.array([[op == other for other in VOCABULARY] for op in graph.ops], float)
    return [(np.linalg.matrix_power(walk, k) @ ops).mean(0) for k in range(steps + 1)]


def test_projections_are_linear_in_the_profiles_of_neighbourhoods(graphs):
    width, steps = 32, 3
    rows = random_projections(as_table(graphs, VOCABULARY), width=width, steps=steps)
    assert rows.shape == (len(graphs), (steps + 1) * width)
    profiles = np.array([neighbourhood_profiles(graph, steps) for graph in graphs])
    stacked = profiles.transpose(1, 0, 2).reshape(-1, len(VOCABULARY))
    values = rows.reshape(len(graphs), steps + 1, width).transpose(1, 0, 2).reshape(-1, width)
    projection, *_ = np.linalg.lstsq(stacked, values, rcond=None)
    np.testing.assert_allclose(stacked @ projection, values, atol=1e-5)
    np.testing.assert_allclose(projection, np.round(projection), atol=1e-4)  # its entries are -1, 0 and 1
    assert set(np.round(projection).ravel()) == {-1, 0, 1}


def test_projections_preserve_distances_on_average(graphs):
    """E |Px - Py|^2 = width / 3 |x - y|^2 for entries of -1 and 1 with a sixth each (Achlioptas, 2003)."""
    width = 6000
    rows = random_projections(as_table(graphs, VOCABULARY), width=width, steps=1)
    profiles = np.concatenate([np.array(neighbourhood_profiles(graph, 1)).reshape(1, -1) for graph in graphs])
    pairs = [(i, j) for i in range(0, 50, 3) for j in range(i) if np.abs(profiles[i] - profiles[j]).max() > 1e-6]
    for i, j in pairs:
        expected = width / 3 * ((profiles[i] - profiles[j]) ** 2).sum()
        assert ((rows[i] - rows[j]) ** 2).sum() == pytest.approx(expected, rel=0.15)


def test_projections_know_neither_padding_nor_numbering(graphs):
    table = as_table(graphs, VOCABULARY)
    rows = random_projections(table)
    np.testing.assert_allclose(random_projections(table.padded(12)), rows, atol=1e-5)
    others = [reordered(graph) for graph in graphs]
    assert others != graphs
    np.testing.assert_allclose(random_projections(as_table(others, VOCABULARY)), rows, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- colours


def refined(graphs, rounds):
    """For each graph and round the colours as nested tuples: own, sorted before, sorted behind."""
    result = []
    for graph in graphs:
        colours: list = [(op, part) for op, part in zip(graph.ops, graph.parts, strict=True)]
        history = [colours]
        for _ in range(rounds):
            colours = [
                (
                    colours[v],
                    tuple(sorted(repr(colours[u]) for u in np.flatnonzero(graph.adjacency[:, v]))),
                    tuple(sorted(repr(colours[u]) for u in np.flatnonzero(graph.adjacency[v]))),
                )
                for v in range(len(graph))
            ]
            history.append(colours)
        result.append(history)
    return result


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_colours_distinguish_what_refinement_by_dictionaries_does(graphs, rounds):
    """One to one: a hash for each nested tuple, another for every other."""
    table = as_table(graphs, VOCABULARY)
    found = node_colours(table, rounds)
    assert len(found) == rounds + 1
    names: dict = {}
    for row, history in enumerate(refined(graphs, rounds)):
        for k, colours in enumerate(history):
            for v, colour in enumerate(colours):
                names.setdefault((k, colour), set()).add(int(found[k][row, v]))
    assert all(len(hashes) == 1 for hashes in names.values())
    assert len(set.union(*names.values())) == len(names)


@pytest.mark.filterwarnings("ignore:The hashes produced for directed graphs changed")
def test_graphs_with_equal_counts_are_those_that_networkx_hashes_alike(rng):
    """networkx refines by predecessors and successors apart since 3.5, as here."""
    vocabulary = ("input", "output", "a", "b")
    graphs = [random_graph(rng, int(n), vocabulary) for n in rng.integers(4, 6, 120)]
    drawn = [graph.to_networkx() for graph in graphs]
    rows = ColourCounts.of(as_table(graphs, vocabulary), 3).rows(as_table(graphs, vocabulary))
    hashes = [networkx.weisfeiler_lehman_graph_hash(g, node_attr="op", iterations=3) for g in drawn]
    alike = 0
    for i, j in itertools.combinations(range(len(graphs)), 2):
        same = (rows[i] == rows[j]).all()
        assert same == (hashes[i] == hashes[j])
        alike += same
    assert alike > 5


def test_rows_count_the_known_colours(graphs):
    seen, others = graphs[:30], graphs[30:]
    counts = ColourCounts.of(as_table(seen, VOCABULARY), 2)
    names = {(k, colour) for history in refined(seen, 2) for k, colours in enumerate(history) for colour in colours}
    assert len(counts.colours) == len(names)
    for part in (seen, others):
        rows = counts.rows(as_table(part, VOCABULARY))
        for row, history in zip(rows, refined(part, 2), strict=True):
            own = Counter((k, colour) for k, colours in enumerate(history) for colour in colours)
            expected = sorted(number for colour, number in own.items() if colour in names)
            assert sorted(row[row > 0]) == expected
    first = counts.rows(as_table(seen, VOCABULARY))
    histories = [Counter(c for colours in history for c in colours) for history in refined(seen, 2)]
    for i, j in itertools.combinations(range(30), 2):
        inner = sum(n * histories[j][colour] for colour, n in histories[i].items())
        assert first[i] @ first[j] == inner  # Shervashidze et al., 2011: the subtree kernel


def test_cells_have_colours_of_their_own():
    ops, adjacency = ("input", "a", "b", "output"), np.zeros((4, 4), bool)
    adjacency[0, 1:3] = adjacency[1:3, 3] = True
    cells = [OpGraph(ops, adjacency, ("both", *middle, "both")) for middle in (("n", "r"), ("r", "n"))]
    table = as_table(cells, VOCABULARY)
    counts = ColourCounts.of(table, 1)
    rows = counts.rows(table)
    assert (rows[0] != rows[1]).any()
    alone = as_table(cells[1:], VOCABULARY)  # whose parts are numbered the other way round
    assert alone.part_names != table.part_names
    np.testing.assert_array_equal(counts.rows(alone), rows[1:])


# --------------------------------------------------------------------------------------------------------- standardizer


def test_columns_are_standardised_and_constant_ones_dropped(rng):
    rows = np.concatenate([rng.normal(50, 3, (40, 4)), np.full((40, 1), 0.1), np.zeros((40, 1))], 1)
    standardizer = Standardizer(rows.astype(np.float32))
    found = standardizer(rows.astype(np.float32))
    kept = rows[:, :4].astype(np.float32)
    np.testing.assert_allclose(found, (kept - kept.mean(0)) / kept.std(0), atol=1e-3)
    assert standardizer(np.full((2, 6), 7.0)).shape == (2, 4)
    np.testing.assert_array_equal(Standardizer(np.full((3, 2), 7.0))(np.full((2, 2), 9.0)), np.zeros((2, 1)))
