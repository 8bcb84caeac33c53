"""Drawings: valid SVG, nothing lost, nothing on top of anything else."""

import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from scipy.optimize import minimize

from search_spaces.cells.nas_bench_201 import NasBench201
from search_spaces.common import drawing, layout
from search_spaces.common.drawing import draw_graph, operation_colors, operation_label
from search_spaces.common.errors import UserError
from search_spaces.graph import OpGraph, live

SVG = "{http://www.w3.org/2000/svg}"
OPERATIONS = ("conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3", "a_very_long_operation_name_7x7", "x", "none")


def random_graph(rng: np.random.Generator, n: int) -> OpGraph:
    """Any upper triangular adjacency, unreachable nodes included."""
    inner = rng.choice(OPERATIONS, n - 2)
    return OpGraph(("input", *inner, "output"), np.triu(rng.random((n, n)) < rng.uniform(0.2, 0.6), 1))


def nodes_of(text: str) -> dict[int, tuple[float, float, float, float]]:
    """Node number -> (left, top, right, bottom)."""
    found = {}
    for group in ET.fromstring(text).iter(f"{SVG}g"):
        title, rect = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
        if title is not None and rect is not None:
            x, y, width, height = (float(rect.get(k)) for k in ("x", "y", "width", "height"))
            found[int(title.text.partition(":")[0])] = (x, y, x + width, y + height)
    return found


def edge_paths(text: str) -> list[np.ndarray]:
    """Densely sampled points of every edge."""
    lines = []
    for path in ET.fromstring(text).iter(f"{SVG}path"):
        points: list[np.ndarray] = []
        for command, numbers in re.findall(r"([MLC])([^MLC]+)", path.get("d")):
            xy = np.array(numbers.split(), float).reshape(-1, 2)
            if command == "M":
                points.append(xy[0])
                continue
            t = np.linspace(0, 1, 60)[1:, None]
            start = points[-1]
            if command == "L":
                points.extend(start + t * (xy[0] - start))
            else:
                a, b, c = xy
                points.extend((1 - t) ** 3 * start + 3 * (1 - t) ** 2 * t * a + 3 * (1 - t) * t**2 * b + t**3 * c)
        lines.append(np.array(points))
    return lines


@pytest.mark.parametrize("seed", range(12))
def test_no_node_covers_another_and_no_edge_crosses_a_node(seed):
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, int(rng.integers(2, 10)))
    text = draw_graph(graph)
    nodes = nodes_of(text)
    assert set(nodes) == set(range(len(graph)))
    for (a, b, c, d), (e, f, g, h) in itertools.combinations(nodes.values(), 2):
        assert c <= e or g <= a or d <= f or h <= b
    ends = []
    for line in edge_paths(text):
        x, y = line.T
        source = min(nodes, key=lambda i: abs(nodes[i][2] - x[0]) + abs((nodes[i][1] + nodes[i][3]) / 2 - y[0]))
        inside = {i: (a + 0.2 < x) & (x < c - 0.2) & (b < y) & (y < d) for i, (a, b, c, d) in nodes.items()}
        assert not any(hit.any() for hit in inside.values())
        target = [
            i
            for i, (left, top, _, bottom) in nodes.items()
            if abs(left - drawing.ARROW - x[-1]) < 0.2 and top < y[-1] < bottom
        ]
        assert len(target) == 1
        assert (np.diff(x) >= -1e-6).all()
        ends.append((source, target[0]))
    assert sorted(ends) == graph.edges()


def test_what_flows_left_to_right_is_drawn_so(rng):
    graph = random_graph(rng, 9)
    nodes = nodes_of(draw_graph(graph))
    assert all(nodes[i][2] < nodes[j][0] for i, j in graph.edges())
    assert nodes[8][0] == max(box[0] for box in nodes.values())


def test_equal_graphs_give_equal_text():
    space = NasBench201()
    arch = (3, 0, 2, 1, 3, 4)
    assert draw_graph(space.graph(arch), title="a") == draw_graph(NasBench201().graph(arch), title="a")
    assert draw_graph(space.graph(arch)) != draw_graph(space.graph((3, 0, 2, 1, 3, 3)))


def test_labels_titles_and_colors_are_escaped():
    graph = OpGraph(("input", "a<b&\"c'\x00\x1b", "output"), np.eye(3, k=1, dtype=bool))
    text = draw_graph(graph, title="<script>&", node_labels={0: "x\ny<z"}, node_colors={1: 'red"/><script>'})
    root = ET.fromstring(text)
    assert not list(root.iter(f"{SVG}script"))
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert "<script>&" in words
    assert "a<b&\"c'\ufffd\ufffd" in words
    assert {"x", "y<z"} <= set(words)


@pytest.mark.parametrize("arch", [(3, 0, 2, 1, 0, 4), (0, 0, 0, 1, 3, 3), (0,) * 6, (3,) * 6])
def test_nodes_without_effect_are_dashed(arch):
    graph = NasBench201().graph(arch)
    dashed = {
        int(group.find(f"{SVG}title").text.partition(":")[0])
        for group in ET.fromstring(draw_graph(graph)).iter(f"{SVG}g")
        if group.find(f"{SVG}rect") is not None and group.find(f"{SVG}rect").get("stroke-dasharray")
    }
    assert dashed == set(np.flatnonzero(~live(graph)).tolist())


def test_given_colors_win():
    graph = NasBench201().graph((0, 0, 0, 1, 3, 3))
    text = draw_graph(graph, node_colors=["#000000"] + [None] * 6 + ["#ffffff"], edge_colors={(0, 1): "#ff0000"})
    assert text.count('stroke="#ff0000"') == 1
    assert text.count('<polygon points="') == len(graph.edges())
    fills = [rect.get("fill") for rect in ET.fromstring(text).iter(f"{SVG}rect")]
    assert "#000000" in fills


def test_unknown_nodes_and_edges_are_refused():
    graph = NasBench201().graph((3,) * 6)
    with pytest.raises(UserError, match="0 to 7"):
        draw_graph(graph, node_colors={8: "red"})
    with pytest.raises(UserError, match="each of 8 nodes"):
        draw_graph(graph, node_labels=["a"])
    with pytest.raises(UserError, match="edge_colors"):
        draw_graph(graph, edge_colors={(1, 0): "red"})


def test_two_cells_get_a_panel_each():
    edges = [(0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 5), (3, 4)]
    adjacency = np.zeros((6, 6), bool)
    adjacency[tuple(zip(*edges))] = True
    ops = ("input", "sep_conv_3x3", "max_pool_3x3", "skip_connect", "dil_conv_5x5", "output")
    graph = OpGraph(ops, adjacency, ("both", "normal", "reduce", "normal", "reduce", "both"))
    root = ET.fromstring(draw_graph(graph))
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert words.count("normal") == 2  # its title, and the port of the cell it feeds
    assert words.count("input") == words.count("output") == 2
    assert "both" not in words
    # every edge inside a cell once, what crosses between two cells in both panels
    assert len(list(root.iter(f"{SVG}path"))) == len(edges) + 1


def test_labels_are_short_and_kinds_apart():
    assert operation_label("nor_conv_3x3") == operation_label("conv3x3-bn-relu") == "conv 3\u00d73"
    assert operation_label("maxpool3x3") == operation_label("max_pool_3x3") == "max pool 3\u00d73"
    assert operation_label("skip_connect") == "skip"
    kinds = ["nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3", "skip_connect", "none", "sep_conv_3x3", "dil_conv_3x3"]
    assert len({operation_colors(kind) for kind in kinds}) == len(kinds)
    gnn = ["gat", "gcn", "gin", "cheb", "sage", "arma", "graph", "fc", "skip"]
    assert len({operation_colors(kind) for kind in gnn}) == len(gnn)


def test_heights_are_the_least_squares_solution(rng):
    column = [layout.Box(node, height=float(h)) for node, h in enumerate(rng.uniform(10, 40, 6))]
    wishes, weights = rng.uniform(0, 120, 6).tolist(), rng.uniform(0.2, 3, 6).tolist()
    layout._spread(column, wishes, weights)
    found = np.array([box.y for box in column])
    room = np.array([layout._distance(a, b) for a, b in itertools.pairwise(column)])
    assert (np.diff(found) >= room - 1e-9).all()

    def loss(y):
        return float(np.dot(weights, (y - wishes) ** 2))

    start = np.concatenate(([0.0], np.cumsum(room)))
    best = minimize(loss, start, constraints={"type": "ineq", "fun": lambda y: np.diff(y) - room}, method="SLSQP")
    assert loss(found) <= best.fun * (1 + 1e-6)
    assert np.allclose(found, best.x, atol=1e-2)


def test_few_crossings(rng):
    """Against all orders of all columns, of graphs small enough to try them."""
    excess = 0
    for _ in range(15):
        layers = [rng.integers(1, 4) for _ in range(3)]
        boxes = [[layout.Box(10 * k + i, layer=k) for i in range(n)] for k, n in enumerate(layers)]
        chains = {
            (a.node, b.node): [a, b]
            for left, right in itertools.pairwise(boxes)
            for a in left
            for b in right
            if rng.random() < 0.6
        }
        links = [tuple(chain) for chain in chains.values()]
        fewest = min(
            layout._crossings([list(c) for c in order], links)
            for order in itertools.product(*(itertools.permutations(column) for column in boxes))
        )
        excess += layout._crossings(layout._columns([b for column in boxes for b in column], chains), links) - fewest
    assert excess == 0
