"""Explanations: ablation against its definition, deletion against random, drawings."""

import itertools
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from predictors.explain import (
    Explanation,
    deletion_test,
    draw_explanation,
    explain,
    explain_many,
    masked,
    removable,
)
from predictors.graphs import as_table
from predictors.registry import make_predictor
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

WEIGHTS = {"none": 0.0, "skip_connect": 1.0, "nor_conv_1x1": 2.0, "nor_conv_3x3": 4.0, "avg_pool_3x3": -1.0}
WEIGHTS |= {"conv1x1-bn-relu": 2.0, "conv3x3-bn-relu": 4.0, "maxpool3x3": -1.0}


class Additive:
    """A quality that is a sum over operations (twice for the node `double`) and edges: its importances are known."""

    def __init__(self, space_name, double=None):
        self.space_name, self.vocabulary = space_name, load_space(space_name).vocabulary
        self.double, self.asked = double, 0

    def predict(self, graphs, *, extra=None, return_std=False):
        self.asked += 1
        return np.array([self.value(graph) for graph in graphs])

    def value(self, graph):
        ops = sum(WEIGHTS.get(op, 0.0) * (1 + (i == self.double)) for i, op in enumerate(graph.ops))
        return ops + sum(0.1 * i + 0.01 * j for i, j in graph.edges())


class Critical(Additive):
    """The same with importances of its own, where only node 2 and the edges from node 1 are critical."""

    def importances(self, graphs):
        table = as_table(graphs, self.vocabulary)
        nodes, edges = 0.2 * table.mask.astype(float), 0.1 * table.adjacency.astype(float)
        nodes[:, 2], edges[:, 1] = 0.9, 0.8 * table.adjacency[:, 1]
        return nodes, edges


def cells(name, count, seed=0):
    space, rng = load_space(name), np.random.default_rng(seed)
    return [space.graph(space.sample(rng)) for _ in range(count)]


def test_the_importance_of_an_operation_is_what_none_in_its_place_costs():
    predictor = Additive("nas-bench-201", double=3)
    graphs = cells("nas-bench-201", 12)
    for graph, found in zip(graphs, explain_many(predictor, graphs), strict=True):
        expected = [WEIGHTS.get(op, 0.0) * (2 if i == 3 else 1) for i, op in enumerate(graph.ops)]
        np.testing.assert_allclose(found.nodes, expected, atol=1e-9)
        assert found.method == "ablation"
        assert found.prediction == pytest.approx(predictor.value(graph))


def test_the_importance_of_an_edge_is_what_its_removal_costs():
    graph = cells("nas-bench-101", 1)[0]
    found = explain(Additive("nas-bench-101"), graph)
    assert found.edges == {(i, j): pytest.approx(0.1 * i + 0.01 * j) for i, j in graph.edges()}


def test_without_none_the_other_operations_stand_in():
    """Against the mean over every other operation, one by one."""
    predictor = Additive("nas-bench-101", double=1)
    others = ("conv1x1-bn-relu", "conv3x3-bn-relu", "maxpool3x3")
    for graph in cells("nas-bench-101", 8):
        found = explain(predictor, graph)
        for i in removable(graph):
            alternatives = [WEIGHTS[op] for op in others if op != graph.ops[i]]
            expected = (WEIGHTS[graph.ops[i]] - np.mean(alternatives)) * (2 if i == 1 else 1)
            assert found.nodes[i] == pytest.approx(expected)


def test_masked_nodes_take_on_every_other_operation_once():
    graph = next(g for g in cells("nas-bench-101", 20) if len(removable(g)) >= 3)
    nodes = removable(graph)[:2]
    found = masked(graph, load_space("nas-bench-101").vocabulary, nodes)
    assert len(found) == 2
    for i in range(len(graph)):
        seen = {g.ops[i] for g in found}
        assert (graph.ops[i] not in seen and len(seen) == 2) if i in nodes else seen == {graph.ops[i]}


def test_few_calls_of_the_predictor():
    predictor = Additive("nas-bench-201")
    explain_many(predictor, cells("nas-bench-201", 20))
    assert predictor.asked == 1


def test_critical_parts_are_taken_as_they_are():
    graphs = [g for g in cells("nas-bench-101", 6) if len(g) > 3]
    found = explain_many(Critical("nas-bench-101"), graphs, "critical")
    for graph, one in zip(graphs, found, strict=True):
        assert one.method == "critical"
        assert len(one.nodes) == len(graph)
        assert one.nodes[2] == 0.9
        assert one.edges == {(i, j): 0.8 if i == 1 else 0.1 for i, j in graph.edges()}
    assert explain(Critical("nas-bench-101"), graphs[0]).method == "ablation"


def test_deletion_tells_explanations_that_are_right():
    """Node 2 counts ten times: an explanation by ablation finds it; the change is known for one part."""
    predictor = Additive("nas-bench-201", double=2)
    graphs = [g for g in dict.fromkeys(cells("nas-bench-201", 40)) if len(removable(g)) > 1]
    result = deletion_test(predictor, graphs, 1, np.random.default_rng(0), draws=400)
    effects = [
        [abs(WEIGHTS[g.ops[i]]) * (2 if i == 2 else 1) for i in removable(g)] for g in graphs if len(removable(g)) > 1
    ]
    np.testing.assert_allclose(result.top, [max(e) for e in effects], atol=1e-9)
    np.testing.assert_allclose(result.random, [np.mean(e) for e in effects], atol=0.35)
    assert result.top.mean() > result.random.mean()


def test_deletion_of_several_against_all_subsets():
    predictor = Critical("nas-bench-201")
    graphs = [g for g in dict.fromkeys(cells("nas-bench-201", 30)) if len(removable(g)) == 4][:5]
    result = deletion_test(predictor, graphs, 2, np.random.default_rng(1), draws=600)
    for graph, value in zip(graphs, result.random, strict=True):
        pairs = itertools.combinations(removable(graph), 2)
        exact = [abs(sum(WEIGHTS[graph.ops[i]] for i in pair)) for pair in pairs]
        assert value == pytest.approx(np.mean(exact), abs=0.35)


def test_deletion_of_edges():
    """Edges weigh .1 i + .01 j, so the two most important have the largest i, then j."""
    graphs = [g for g in dict.fromkeys(cells("nas-bench-101", 10)) if len(g.edges()) > 2]
    result = deletion_test(Additive("nas-bench-101"), graphs, 2, np.random.default_rng(0), kind="edges")
    expected = [sum(sorted(0.1 * i + 0.01 * j for i, j in g.edges())[-2:]) for g in graphs]
    np.testing.assert_allclose(result.top, expected, atol=1e-9)
    assert (result.random < result.top + 1e-9).all()


def test_a_gaussian_process_is_explained():
    space = load_space("nas-bench-201")
    graphs = list(dict.fromkeys(cells("nas-bench-201", 60)))
    y = np.array([Additive("nas-bench-201").value(g) for g in graphs]) + 0.01 * np.arange(len(graphs))
    predictor = make_predictor("gp-graf", "nas-bench-201", space.vocabulary)
    predictor.fit(graphs, y, rng=np.random.default_rng(0))
    found = explain(predictor, graphs[5])
    only = predictor.predict([graphs[5], *masked(graphs[5], space.vocabulary, [removable(graphs[5])[0]])])
    assert found.nodes[removable(graphs[5])[0]] == pytest.approx(only[0] - only[1], abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, g: explain(p, g, "ablatio"), "'ablation'"),
        (lambda p, g: explain(p, g, "critical"), "critical parts"),
        (lambda p, g: deletion_test(p, [g], 0, np.random.default_rng(0)), "at least one"),
        (lambda p, g: deletion_test(p, [g], 40, np.random.default_rng(0)), "40"),
        (lambda p, g: deletion_test(p, [g], 1, np.random.default_rng(0), kind="node"), "'nodes'"),
    ],
)
def test_bad_questions_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call(Additive("nas-bench-201"), cells("nas-bench-201", 1)[0])


def drawn(found, graph, **more):
    text = draw_explanation(graph, found, **more)
    return text, ElementTree.fromstring(text)


def test_drawings_are_one_svg_with_a_legend():
    for name in ("nas-bench-201", "nas-bench-101", "darts"):
        graph = cells(name, 1)[0]
        nodes = np.linspace(-1, 1, len(graph))
        found = Explanation(nodes, dict.fromkeys(graph.edges(), 0.5), "ablation", 0.0)
        text, root = drawn(found, graph, title="a < b", note="by gp & co")
        assert root.tag.endswith("svg")
        assert text == draw_explanation(graph, found, title="a < b", note="by gp & co")
        words = " ".join("".join(node.itertext()) for node in root.iter() if node.tag.endswith("}text"))
        assert "hurts" in words
        assert "supports" in words
        assert "by gp & co" in words
        assert "a < b" in words
        inner = next(node for node in list(root) if node.tag.endswith("}svg"))
        right = float(inner.get("x")) + float(inner.get("width"))
        assert 0 <= float(inner.get("x")) <= right <= float(root.get("width"))
        assert float(inner.get("y")) + float(inner.get("height")) < float(root.get("height"))


def test_colour_follows_importance():
    """The fill of the operations: monotone along a direction, and each sign on its side of the scale."""
    graph = next(g for g in cells("nas-bench-201", 50) if len(removable(g)) == 6)
    nodes = np.array([0, -1.0, -0.5, 0, 0.25, 0.5, 1.0, 0])
    _, root = drawn(Explanation(nodes, {}, "ablation", 0.0), graph)
    fills = {}
    for group in root.iter("{http://www.w3.org/2000/svg}g"):
        name, box = (group.find("{http://www.w3.org/2000/svg}" + tag) for tag in ("title", "rect"))
        if name is not None and box is not None:
            fills[int(re.match(r"\d+", name.text)[0])] = box.get("fill")
    red, blue = ({i: int(f[k : k + 2], 16) for i, f in fills.items()} for k in (1, 5))
    brightness = {i: sum(int(f[k : k + 2], 16) for k in (1, 3, 5)) for i, f in fills.items()}
    assert red[1] > blue[1]
    assert red[2] > blue[2]
    assert red[5] < blue[5]
    assert red[6] < blue[6]
    assert brightness[6] < brightness[5] < brightness[4] < brightness[3] > brightness[2] > brightness[1]


def test_importance_is_written_below_the_operation():
    graph = next(g for g in cells("nas-bench-201", 50) if len(removable(g)) == 6)
    nodes = np.array([0, 0.123, 0.5, 0.5, 0.5, 0.5, 0.987, 0])
    text, _ = drawn(Explanation(nodes, dict.fromkeys(graph.edges(), 0.1), "critical", 0.0), graph)
    assert ">0.12<" in text
    assert ">0.99<" in text
    assert "redundant 0" in text
    assert "1 critical" in text
