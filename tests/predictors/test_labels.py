"""Labels, graph tables and duplicates: against scipy's ranks and quantiles, dictionaries and networkx."""

import logging

import networkx
import numpy as np
import pytest
from scipy import stats

from predictors.graphs import MOST_NODES, as_table, concatenate
from predictors.labels import checked_labels, scaled, without_duplicates
from search_spaces.common.errors import UserError
from search_spaces.graph import OpGraph, live
from search_spaces.registry import load_space

VOCABULARY = ("input", "output", "none", "a", "b")


def random_graph(rng, nodes):
    ops = ("input", *(VOCABULARY[i] for i in rng.integers(2, len(VOCABULARY), nodes - 2)), "output")
    return OpGraph(ops, np.triu(rng.random((nodes, nodes)) < 0.4, 1))


@pytest.fixture
def graphs(rng):
    """60 graphs of 2 to 9 nodes; the small ones repeat."""
    return [random_graph(rng, int(n)) for n in rng.integers(2, 10, 60)]


def none_extra(count):
    return np.zeros((count, 0))


# ------------------------------------------------------------------------------------------------------------- targets


def test_normal_scores_are_quantiles_of_mid_ranks(rng):
    labels = rng.integers(0, 15, 40).astype(float)  # with many ties
    expected = stats.norm.ppf((stats.rankdata(labels) - 0.5) / 40)
    np.testing.assert_allclose(scaled(labels, "normal-score"), expected, atol=1e-12)
    np.testing.assert_allclose(scaled(labels**3 - 7, "normal-score"), expected, atol=1e-12)  # only ranks matter


def test_z_scores_are_those_of_scipy(rng):
    labels = rng.normal(90, 3, 30)
    np.testing.assert_allclose(scaled(labels, "z-score"), stats.zscore(labels), atol=1e-12)


def test_an_unknown_scale_is_refused():
    with pytest.raises(UserError, match="did you mean 'z-score'"):
        scaled(np.arange(3.0), "zscores")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- labels checked


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2, np.nan, 3, -np.inf], "those at 2, 4 are not"),
        ([np.nan] * 13, r"0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 3 more"),
        ([1, np.nan], "those at 1 are not"),
        ([1, 2], "2: expected at least 3"),
        ([5, 5, 5, 5], "5.0: expected labels that differ; all 4"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(labels, message):
    with pytest.raises(UserError, match=message):
        checked_labels(np.array(labels, float), len(labels))


@pytest.mark.parametrize("labels", [np.arange(4.0), np.ones((5, 1)), np.float64(3)])
def test_labels_of_another_shape_are_refused(labels):
    with pytest.raises(UserError, match="one label for each of the 5 graphs"):
        checked_labels(labels, 5)


# ----------------------------------------------------------------------------------------------------------- duplicates


def test_duplicates_are_averaged_in_order_of_appearance_and_said(graphs, rng, caplog):
    labels, extra = rng.normal(size=60), rng.normal(size=(60, 2))
    groups: dict[OpGraph, list[int]] = {}
    for place, graph in enumerate(graphs):
        groups.setdefault(graph, []).append(place)
    assert len(groups) < 55
    with caplog.at_level(logging.WARNING, "nasforge.predictors"):
        table, y, columns = without_duplicates(as_table(graphs, VOCABULARY), labels, extra)
    assert list(table) == list(groups)
    np.testing.assert_allclose(y, [labels[places].mean() for places in groups.values()])
    np.testing.assert_allclose(columns, [extra[places].mean(0) for places in groups.values()])
    assert f"{60 - len(groups)} of 60 labelled graphs repeat others" in caplog.text


def test_distinct_graphs_pass_silently(graphs, caplog):
    distinct = list(dict.fromkeys(graphs))
    y = np.arange(len(distinct), dtype=float)
    table, labels, _ = without_duplicates(as_table(distinct, VOCABULARY), y, none_extra(len(distinct)))
    assert list(table) == distinct
    np.testing.assert_array_equal(labels, y)
    assert not caplog.text


def test_too_little_may_be_left():
    one, two, three = (OpGraph(("input", op, "output"), np.eye(3, k=1, dtype=bool)) for op in "ab" + "a")
    with pytest.raises(UserError, match="2: expected at least 3 different labelled graphs"):
        without_duplicates(as_table([one, two, three], VOCABULARY), np.arange(3.0), none_extra(3))
    other = OpGraph(("input", "output"), np.zeros((2, 2), bool))
    with pytest.raises(UserError, match="labels that differ"):
        without_duplicates(as_table([one, three, two, other], VOCABULARY), np.array([0.0, 2, 1, 1]), none_extra(4))


# --------------------------------------------------------------------------------------------------------------- tables


def test_a_table_is_a_sequence_of_its_graphs(graphs):
    table = as_table(graphs, VOCABULARY)
    assert len(table) == 60
    assert list(table) == graphs
    assert table[-1] == graphs[-1]
    assert list(table[10:20:3]) == graphs[10:20:3]
    chosen = [5, 5, 0, 59]
    assert list(table.take(np.array(chosen))) == [graphs[i] for i in chosen]
    assert list(table.padded(12)) == graphs
    assert as_table(table, VOCABULARY) is table
    np.testing.assert_array_equal(table.last(), [len(graph) - 1 for graph in graphs])


def test_live_nodes_are_those_of_single_graphs_and_of_networkx(graphs):
    table = as_table(graphs, VOCABULARY)
    for graph, row in zip(graphs, table.live(), strict=True):
        np.testing.assert_array_equal(row[: len(graph)], live(graph))
        assert not row[len(graph) :].any()
        drawn = graph.to_networkx()
        drawn.remove_nodes_from([v for v, op in drawn.nodes(data="op") if op == "none"])
        last = len(graph) - 1
        through = networkx.descendants(drawn, 0) & networkx.ancestors(drawn, last)
        assert set(np.flatnonzero(row)) == through | {0, last}


def test_identities_are_equal_for_equal_graphs_only(graphs):
    identities = as_table(graphs, VOCABULARY).identities()
    for i, first in enumerate(graphs):
        for j, second in enumerate(graphs[:i]):
            assert (identities[i] == identities[j]) == (first == second)


def test_parts_belong_to_the_identity_and_survive_joining():
    adjacency = np.eye(4, k=1, dtype=bool)
    ops = ("input", "a", "b", "output")
    cells = [OpGraph(ops, adjacency, ("both", *middle, "both")) for middle in (("x", "y"), ("y", "x"), ("x", "y"))]
    table = as_table(cells, VOCABULARY)
    first, second, third = table.identities()
    assert first == third != second
    plain = OpGraph(("input", "b", "a", "b", "output"), np.eye(5, k=1, dtype=bool))
    joined = concatenate([as_table([plain], VOCABULARY), table, as_table(cells[1:2], VOCABULARY)])
    assert list(joined) == [plain, *cells, cells[1]]


def test_another_vocabulary_is_translated_or_refused(graphs):
    table = as_table(graphs, VOCABULARY)
    assert list(as_table(table, (*reversed(VOCABULARY), "c"))) == graphs
    small = tuple(op for op in VOCABULARY if op != "b")
    for given in (graphs, table):
        with pytest.raises(UserError, match="'b': expected an operation of the predictor's vocabulary"):
            as_table(given, small)
    without = [graph for graph in graphs if "b" not in graph.ops]
    assert list(as_table(as_table(without, VOCABULARY), small)) == without


def test_nothing_and_too_large_graphs_are_refused():
    with pytest.raises(UserError, match="at least one graph"):
        as_table([], VOCABULARY)
    for nodes in (MOST_NODES, MOST_NODES + 1):
        graph = OpGraph(("input", *["a"] * (nodes - 2), "output"), np.eye(nodes, k=1, dtype=bool))
        if nodes == MOST_NODES:
            assert list(as_table([graph], VOCABULARY)) == [graph]
        else:
            with pytest.raises(UserError, match="65: expected graphs of at most 64 nodes"):
                as_table([graph], VOCABULARY)


def test_both_cells_of_darts_are_one_graph_with_parts(rng):
    space = load_space("darts")
    graphs = [space.graph(space.sample(rng)) for _ in range(5)]
    table = as_table(graphs, space.vocabulary)
    assert set(table.part_names) == {"both", "normal", "reduce"}
    assert list(table) == graphs
