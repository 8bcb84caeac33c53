"""Explanations: how much each node and edge of a graph matters to a predictor, tested by deletion, and drawn."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np

from predictors.predictor import Predictor
from search_spaces.common.drawing import FONT, INK, MARGIN, draw_graph, operation_label
from search_spaces.common.errors import UserError
from search_spaces.common.names import match
from search_spaces.graph import OpGraph

METHODS = ("ablation", "critical")
KINDS = ("nodes", "edges")
ENDS = ("input", "output")
Edge = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Explanation:
    """Importance of the parts of one graph to one predictor.

    nodes: float [n], 0 for input and output under `ablation`. edges: by (from, to). method: `critical`, the critical
    probability from 0 to 1 that CARL gives; `ablation`, how far the prediction falls without the part, in the
    predictor's own scale, so that a part which hurts is negative. prediction: of the whole graph.
    """

    nodes: np.ndarray
    edges: dict[Edge, float]
    method: str
    prediction: float


def explain(predictor: Predictor, graph: OpGraph, method: str = "ablation") -> Explanation:
    """What the prediction of `graph` rests on.

    method: `ablation`, of any predictor, or `critical`, what CARL learned (measured: docs/predictors/carl.md).
    """
    return explain_many(predictor, [graph], method)[0]


def explain_many(predictor: Predictor, graphs: Sequence[OpGraph], method: str = "ablation") -> list[Explanation]:
    """`explain` for each graph, with few calls of the predictor.

    Errors: UserError for an unknown method, or `critical` with a predictor that tells no critical parts.
    """
    match(method, METHODS, "a method of explanation")
    graphs = list(graphs)
    split = getattr(predictor, "importances", None)
    if method == "critical" and split is None:
        raise UserError("critical", "a predictor that tells critical parts (carl)", "ablation")
    if method == "ablation":
        return _by_ablation(predictor, graphs)
    predictions = predictor.predict(graphs)
    assert split is not None
    nodes, edges = split(graphs)
    return [
        Explanation(
            np.asarray(nodes[k, : len(graph)], np.float64),
            {(i, j): float(edges[k, i, j]) for i, j in graph.edges()},
            "critical",
            float(predictions[k]),
        )
        for k, graph in enumerate(graphs)
    ]


def masked(
    graph: OpGraph, vocabulary: Sequence[str], nodes: Sequence[int] = (), edges: Sequence[Edge] = ()
) -> list[OpGraph]:
    """The graph without these parts: edges are removed; operations become `none` where the vocabulary has it, else
    there is one graph for every way of moving on by 1, 2, ... in the list of operations, to be averaged over."""
    adjacency = graph.adjacency.copy()
    for i, j in edges:
        adjacency[i, j] = False
    operations = [op for op in vocabulary if op not in ENDS]
    if not nodes:
        return [OpGraph(graph.ops, adjacency, graph.parts)]
    if "none" in vocabulary:
        ops = tuple("none" if i in nodes else op for i, op in enumerate(graph.ops))
        return [OpGraph(ops, adjacency, graph.parts)]
    found = []
    for step in range(1, len(operations)):
        after = {op: operations[(k + step) % len(operations)] for k, op in enumerate(operations)}
        ops = tuple(after.get(op, op) if i in nodes else op for i, op in enumerate(graph.ops))
        found.append(OpGraph(ops, adjacency, graph.parts))
    return found or [OpGraph(graph.ops, adjacency, graph.parts)]


def removable(graph: OpGraph) -> list[int]:
    """The nodes with an operation that can be masked: neither ends nor `none`."""
    return [i for i, op in enumerate(graph.ops) if op not in (*ENDS, "none")]


def _by_ablation(predictor: Predictor, graphs: Sequence[OpGraph]) -> list[Explanation]:
    variants = []
    for graph in graphs:
        variants.append([graph])
        variants += [masked(graph, predictor.vocabulary, nodes=[i]) for i in removable(graph)]
        variants += [masked(graph, predictor.vocabulary, edges=[edge]) for edge in graph.edges()]
    means = iter(_mean_predictions(predictor, variants).tolist())
    found = []
    for graph in graphs:
        whole = next(means)
        nodes = np.zeros(len(graph))
        for i in removable(graph):
            nodes[i] = whole - next(means)
        edges = {edge: whole - next(means) for edge in graph.edges()}
        found.append(Explanation(nodes, edges, "ablation", whole))
    return found


def _mean_predictions(predictor: Predictor, variants: Sequence[Sequence[OpGraph]]) -> np.ndarray:
    """[N]: the mean prediction of each list of graphs."""
    flat = list(itertools.chain.from_iterable(variants))
    distinct = {graph: k for k, graph in enumerate(dict.fromkeys(flat))}  # ablations often meet
    scores = predictor.predict(list(distinct))[[distinct[graph] for graph in flat]]
    starts = np.cumsum([0, *map(len, variants[:-1])])
    return np.add.reduceat(scores, starts) / np.array([len(v) for v in variants])


@dataclass(frozen=True, eq=False)
class DeletionTest:
    """|change of the prediction| of each graph that was tested: [N] without the k most important parts, and [N] without
    k random ones (mean over draws)."""

    top: np.ndarray
    random: np.ndarray


def deletion_test(
    predictor: Predictor,
    graphs: Sequence[OpGraph],
    k: int,
    rng: np.random.Generator,
    *,
    kind: str = "nodes",
    method: str = "ablation",
    draws: int = 10,
) -> DeletionTest:
    """Whether what the explanation calls important moves the prediction more than random parts do.

    kind: `nodes` (operations, `none` left out) or `edges`. Importance is its absolute value. Graphs with no more than k
    such parts tell nothing and are left out. Errors: UserError for k below 1, or where no graph is left.
    """
    match(kind, KINDS, "a kind of part")
    if k < 1:
        raise UserError(k, "at least one part to mask")
    parts = {graph: removable(graph) if kind == "nodes" else graph.edges() for graph in graphs}
    tested = [graph for graph in graphs if len(parts[graph]) > k]
    if not tested:
        raise UserError(k, f"fewer {kind} to mask than the graphs have")
    variants: list[Sequence[OpGraph]] = []
    for graph, found in zip(tested, explain_many(predictor, tested, method), strict=True):
        known: list = parts[graph]
        values = np.array([found.nodes[part] if kind == "nodes" else found.edges[part] for part in known])
        chosen = [np.argsort(-np.abs(values), kind="stable")[:k]]
        chosen += [rng.choice(len(known), k, replace=False) for _ in range(draws)]
        for rows in chosen:
            variants.append(masked(graph, predictor.vocabulary, **{kind: [known[row] for row in rows]}))
    changes = _mean_predictions(predictor, variants).reshape(len(tested), 1 + draws)
    changes = np.abs(changes - predictor.predict(tested)[:, None])
    return DeletionTest(changes[:, 0], changes[:, 1:].mean(1))


# -- drawing -----------------------------------------------------------------------------------------------------

SEQUENTIAL = ("#f1eef6", "#d7b5d8", "#df65b0", "#ce1256")  # from 0 to 1
DIVERGING = ("#b35806", "#f1a340", "#fee0b6", "#f3f4f6", "#d8daeb", "#998ec3", "#542788")  # hurts, nothing, supports
THIN = "#d5dae0"  # edges without importance stay visible on white
LEGEND = 62.0
CODE = 6.7  # width of a character of the title


def draw_explanation(graph: OpGraph, found: Explanation, *, title: str | None = None, note: str | None = None) -> str:
    """`draw_graph` with importance as colour, written below the operations, and a legend; one SVG element.

    title: the architecture's notation, written small above. note: ends the legend's line, such as the predictor's name.
    """
    ablation = found.method == "ablation"
    inner = [i for i, op in enumerate(graph.ops) if op not in ENDS]
    coloured = removable(graph) if ablation else inner
    largest = max([abs(float(found.nodes[i])) for i in coloured] + [abs(v) for v in found.edges.values()] + [1e-9])
    scale = largest if ablation else 1.0

    def color(value: float, faint: str) -> str:
        if not ablation:
            return _mixed((faint, *SEQUENTIAL[1:]), value)
        half = len(DIVERGING) // 2
        return _mixed((*DIVERGING[:half], faint, *DIVERGING[half + 1 :]), (value / scale + 1) / 2)

    def number(value: float) -> str:
        return (f"{value:+.2f}" if ablation else f"{value:.2f}").replace("-", "\u2212")

    drawing = draw_graph(
        graph,
        node_colors={i: color(float(found.nodes[i]), DIVERGING[3] if ablation else SEQUENTIAL[0]) for i in coloured},
        edge_colors={edge: color(value, THIN) for edge, value in found.edges.items()},
        node_labels={i: f"{operation_label(graph.ops[i])}\n{number(float(found.nodes[i]))}" for i in coloured},
    )
    colors = DIVERGING if ablation else SEQUENTIAL
    ends = (number(-scale), number(scale)) if ablation else ("0", "1")
    what = "fall of the prediction without it" if ablation else "critical probability"
    words = ("hurts", "supports") if ablation else ("redundant", "critical")
    return _with_legend(drawing, colors, (f"{words[0]} {ends[0]}", f"{ends[1]} {words[1]}"), what, note, title)


def _with_legend(
    drawing: str, colors: Sequence[str], ends: tuple[str, str], what: str, note: str | None, title: str | None
) -> str:
    size = re.search(r'width="([\d.]+)"\s+height="([\d.]+)"', drawing)
    assert size is not None
    width, height = float(size[1]), float(size[2])
    whole = max(width, 480.0, len(title or "") * CODE + 2 * MARGIN)
    top = 30.0 if title else 0.0
    bar, y = 180.0, top + height + 4.0
    x = (whole - bar) / 2
    stops = "".join(
        f'<stop offset="{k / (len(colors) - 1):.3g}" stop-color="{color}"/>' for k, color in enumerate(colors)
    )
    name = f"importance{len(colors)}"  # one page may hold drawings of both methods
    line = what if note is None else f"{what}, {note}"
    heading = ""
    if title:
        heading = (
            f'<title>{escape(title)}</title>\n<text x="{whole / 2:g}" y="26" text-anchor="middle" font-size="11"'
            f' font-family="ui-monospace, Menlo, Consolas, \'DejaVu Sans Mono\', monospace" fill="{INK}">'
            f"{escape(title)}</text>\n"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole:g} {y + LEGEND - 4:g}" width="{whole:g}"'
        f' height="{y + LEGEND - 4:g}" role="img">\n<rect width="100%" height="100%" rx="8" fill="#ffffff"/>\n'
        f'{heading}<svg x="{(whole - width) / 2:g}" y="{top:g}" {drawing.removeprefix("<svg ").rstrip()}\n'
        f'<defs><linearGradient id="{name}">{stops}</linearGradient></defs>\n'
        f'<g font-family="{_font(drawing)}" font-size="{FONT - 1:g}" fill="{INK}">\n'
        f'<rect x="{x:g}" y="{y:g}" width="{bar:g}" height="12" rx="3" fill="url(#{name})" stroke="#9aa3ad"/>\n'
        f'<text x="{x - 8:g}" y="{y + 10:g}" text-anchor="end">{escape(ends[0])}</text>\n'
        f'<text x="{x + bar + 8:g}" y="{y + 10:g}">{escape(ends[1])}</text>\n'
        f'<text x="{whole / 2:g}" y="{y + 12 + MARGIN:g}" text-anchor="middle" fill="#4b5763">{escape(line)}</text>\n'
        "</g>\n</svg>\n"
    )


def _font(drawing: str) -> str:
    found = re.search(r'font-family="([^"]+)"', drawing)
    return found[1] if found else "sans-serif"


def _mixed(colors: Sequence[str], share: float) -> str:
    """The colour at `share` (0 to 1) of the way along evenly spaced ones, as #rrggbb."""
    place = min(max(share, 0.0), 1.0) * (len(colors) - 1)
    low = min(int(place), len(colors) - 2)
    pair = [[int(color[k : k + 2], 16) for k in (1, 3, 5)] for color in colors[low : low + 2]]
    mixed = [round(a + (b - a) * (place - low)) for a, b in zip(*pair, strict=True)]
    return "#" + "".join(f"{c:02x}" for c in mixed)
