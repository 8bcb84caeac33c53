"""OpGraph: validity, identity, conversions, batches."""

from __future__ import annotations

import networkx
import numpy as np
import pytest

from search_spaces.common.errors import UserError
from search_spaces.graph import OpGraph, live, stack_graphs

CHAIN = OpGraph(("input", "a", "output"), np.eye(3, k=1))
VOCABULARY = ("input", "output", "a", "b", "none")


def random_graph(rng, n):
    ops = ("input", *rng.choice(["a", "b", "none"], n - 2), "output")
    return OpGraph(tuple(map(str, ops)), np.triu(rng.random((n, n)) < 0.4, 1))


def test_is_a_value():
    assert OpGraph(("input", "a", "output"), np.eye(3, k=1)) == CHAIN
    assert len({CHAIN, OpGraph(("input", "b", "output"), np.eye(3, k=1)), OpGraph(CHAIN.ops, CHAIN.adjacency)}) == 2
    with pytest.raises(ValueError, match="read-only"):
        CHAIN.adjacency[0, 1] = False
    assert OpGraph(CHAIN.ops, CHAIN.adjacency, ("x", "y", "z")) != CHAIN


@pytest.mark.parametrize(
    ("ops", "adjacency"),
    [
        (("input", "a", "output"), np.eye(3)),
        (("input", "a", "output"), np.eye(3, k=-1)),
        (("input", "output"), np.eye(3, k=1)),
        (("a", "input", "output"), np.eye(3, k=1)),
        (("input",), np.zeros((1, 1))),
    ],
)
def test_what_is_no_graph_is_refused(ops, adjacency):
    with pytest.raises(UserError):
        OpGraph(ops, adjacency)


def test_live_agrees_with_reachability(rng):
    for _ in range(200):
        graph = random_graph(rng, int(rng.integers(2, 9)))
        directed = graph.to_networkx()
        directed.remove_nodes_from([i for i, op in enumerate(graph.ops) if op == "none"])
        last = len(graph) - 1
        forward = {0} | networkx.descendants(directed, 0)
        backward = {last} | networkx.ancestors(directed, last)
        assert set(np.flatnonzero(live(graph))) == (forward & backward) | {0, last}


def test_conversions_keep_everything():
    graph = OpGraph(("input", "a", "b", "output"), np.triu(np.ones((4, 4)), 1), ("n", "n", "r", "r"))
    directed = graph.to_networkx()
    assert [directed.nodes[i]["op"] for i in range(4)] == list(graph.ops)
    assert [directed.nodes[i]["part"] for i in range(4)] == list(graph.parts)
    data = graph.to_pyg(VOCABULARY)
    assert data.x.tolist() == [0, 2, 3, 1]
    assert list(map(tuple, data.edge_index.t().tolist())) == graph.edges()


def test_batches_pad_behind_a_mask(rng):
    graphs = [random_graph(rng, n) for n in (3, 6, 2)]
    ops, adjacency, mask = stack_graphs(graphs, VOCABULARY)
    assert ops.shape == (3, 6)
    assert ops.dtype == np.int8
    for i, graph in enumerate(graphs):
        n = len(graph)
        assert mask[i].sum() == n
        assert [VOCABULARY[o] for o in ops[i, :n]] == list(graph.ops)
        assert (adjacency[i, :n, :n] == graph.adjacency).all()
        assert not adjacency[i, n:].any()
        assert (ops[i, n:] == -1).all()
