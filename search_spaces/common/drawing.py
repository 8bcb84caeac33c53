"""OpGraph to SVG: a layered drawing from left to right, as text, without any library (`layout` places the nodes)."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from search_spaces.common.errors import UserError
from search_spaces.common.layout import Box, Chains, arrange

if TYPE_CHECKING:
    from search_spaces.graph import OpGraph

FONT = 13.0
LINE, PAD_X, PAD_Y = 16.0, 12.0, 9.0  # line height and padding of a node's text
MARGIN, ARROW = 18.0, 7.0
INK, EDGE_INK, PALE, PALE_INK = "#1f2933", "#66727f", "#f3f4f6", "#9aa3ad"
FONTS = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"

# (fill, border) by kind of operation; the first pattern that is found in the name decides.
KINDS: tuple[tuple[str, tuple[str, str]], ...] = (
    (r"^(input|output)$", ("#37475a", "#37475a")),
    (r"^(none|zero|zeroize|noise)$", ("#f3f4f6", "#9aa3ad")),
    (r"skip|identity", ("#fdeccb", "#c98a12")),
    (r"sep_?conv", ("#e7defb", "#7a52c7")),
    (r"dil_?conv", ("#fbdcec", "#c2407f")),
    (r"conv_?1x1", ("#d3f0f2", "#138a94")),
    (r"conv_?[5-9]x|conv_?1[1-9]x", ("#cfd6fb", "#4453c4")),
    (r"conv|^mb", ("#d9e7fc", "#2c6bc9")),
    (r"max_?pool", ("#e6f2c4", "#6f8f14")),
    (r"pool", ("#d4f1dc", "#2b9150")),
    (r"^(add|sum|mul|mean|concat|cat)$|^c_", ("#e4e8ed", "#66727f")),
    (r"^gat$", ("#fbdcec", "#c2407f")),
    (r"^gcn$", ("#d9e7fc", "#2c6bc9")),
    (r"^gin$", ("#d4f1dc", "#2b9150")),
    (r"^cheb$", ("#e7defb", "#7a52c7")),
    (r"^sage$", ("#e6f2c4", "#6f8f14")),
    (r"^arma$", ("#fadcd3", "#c4522c")),
    (r"^graph$", ("#d3f0f2", "#138a94")),
    (r"^(fc|linear)$", ("#e4e8ed", "#66727f")),
)
# Names without a kind keep one of these in every drawing.
OTHER_KINDS = tuple(dict.fromkeys(colors for _, colors in KINDS[2:] if colors[1] != EDGE_INK))


def operation_colors(operation: str) -> tuple[str, str]:
    """(fill, border) of an operation; the same in every drawing."""
    for pattern, colors in KINDS:
        if re.search(pattern, operation):
            return colors
    return OTHER_KINDS[zlib.crc32(operation.encode()) % len(OTHER_KINDS)]


def operation_label(operation: str) -> str:
    """`nor_conv_3x3` -> `conv 3×3`, `conv3x3-bn-relu` -> `conv 3×3`, `skip_connect` -> `skip`."""
    label = re.sub(r"^c_\{?k-(\d)\}?$", "c[k\u2212\\1]", operation)
    label = re.sub(r"^nor_|[-_]bn[-_]relu$|_connect$", "", label)
    label = re.sub(r"(?<=\d)x(?=\d)", "\u00d7", label)
    label = re.sub(r"(?<=conv|pool)(?=\d)|(?<=max|avg)(?=pool)", " ", label)
    return re.sub(r"(?<=\w)_(?=\w)", " ", label)


def draw_graph(
    graph: OpGraph,
    *,
    title: str | None = None,
    node_colors: Mapping[int, str] | Sequence[str | None] | None = None,
    edge_colors: Mapping[tuple[int, int], str] | None = None,
    node_labels: Mapping[int, str] | Sequence[str | None] | None = None,
) -> str:
    """The graph as one SVG element; equal input gives equal text.

    node_colors, node_labels: by node, as a mapping or one entry per node (None = the operation's own); a label may
    have several lines. edge_colors: by (from, to). Colours are CSS colours. Nodes without effect (`live`) are grey
    and dashed unless coloured. Cells (`parts`) get a panel each; what crosses between them appears there as a port.
    Errors: UserError for a node or edge that the graph does not have.
    """

    style = _Style(
        graph,
        _with_effect(graph),
        _by_node(node_colors, len(graph), "node_colors"),
        dict(edge_colors or {}),
        _by_node(node_labels, len(graph), "node_labels"),
    )
    for edge in style.edge_colors:
        if tuple(edge) not in set(graph.edges()):
            raise UserError(str(edge), "edge_colors of edges (from, to) that the graph has")
    names = _panel_names(graph)
    panels = [_panel(graph, style, name if len(names) > 1 else None) for name in names]
    return _page(panels, names if len(names) > 1 else [], title)


def _with_effect(graph: OpGraph) -> np.ndarray:
    """bool [n]: live nodes, and constants and parameters (nodes without inputs) with all that they feed live nodes."""
    from search_spaces.graph import OpGraph, live

    sources: np.ndarray = ~np.asarray(graph.adjacency.any(axis=0))
    sources[[0, -1]] = False
    if not sources.any():
        return live(graph)
    adjacency = graph.adjacency.copy()
    adjacency[0] |= sources  # as if they came from the input
    return live(OpGraph(graph.ops, adjacency, graph.parts))


def _by_node(values: Mapping[int, str] | Sequence[str | None] | None, n: int, name: str) -> dict[int, str]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        if len(values) != n:
            raise UserError(len(values), f"{name} with one entry for each of {n} nodes")
        return {i: v for i, v in enumerate(values) if v is not None}
    for i in values:
        if not 0 <= i < n:
            raise UserError(i, f"{name} by node (0 to {n - 1})")
    return dict(values)


@dataclass(frozen=True)
class _Style:
    graph: OpGraph
    live: np.ndarray
    node_colors: dict[int, str]
    edge_colors: dict[tuple[int, int], str]
    labels: dict[int, str]

    def label(self, node: int) -> str:
        return self.labels.get(node, operation_label(self.graph.ops[node]))


# -- panels ------------------------------------------------------------------------------------------------------


def _panel_names(graph: OpGraph) -> list[str]:
    """The cells in order of first appearance; a part that holds only input and output is no cell."""
    inner = [part for op, part in zip(graph.ops, graph.parts, strict=True) if op not in ("input", "output")]
    return list(dict.fromkeys(inner or graph.parts))


@dataclass
class _Panel:
    markup: str
    width: float
    height: float


def _panel(graph: OpGraph, style: _Style, name: str | None) -> _Panel:
    nodes = [i for i in range(len(graph)) if name is None or graph.parts[i] == name]
    inside = set(nodes)
    edges = [(i, j) for i, j in graph.edges() if i in inside or j in inside]
    ports = sorted({i for edge in edges for i in edge} - inside)
    shown = sorted(inside | set(ports))
    boxes = {i: _node_box(style, i, i not in inside) for i in shown}
    chains, width, height = arrange(boxes, edges)
    tips = _tips(chains)
    markup = [
        _edge(style, edge, chain, tips[edge])
        for edge, chain in sorted(chains.items(), key=lambda c: _rank(style, c[0]))
    ]
    markup += [_node(style, box, box.node not in inside) for box in boxes.values()]
    return _Panel("\n".join(markup), width, height)


def _rank(style: _Style, edge: tuple[int, int]) -> tuple:
    """Drawing order: dead edges below live ones, coloured ones on top."""
    return edge in style.edge_colors, bool(style.live[list(edge)].all()), edge


def _node_box(style: _Style, node: int, port: bool) -> Box:
    text = style.label(node)
    if port and style.graph.ops[node] not in ("input", "output"):
        text = style.graph.parts[node].replace("_", " ") + f"\n{text}"
    lines = text.split("\n")
    width = max(max(map(_text_width, lines)) + 2 * PAD_X, 34.0)
    return Box(node, lines, width, len(lines) * LINE + 2 * PAD_Y)


def _text_width(text: str) -> float:
    narrow = sum(c in " .,:;|!iljtfrI()[]'-" for c in text)
    return FONT * (0.36 * narrow + 0.62 * (len(text) - narrow))


# -- markup ------------------------------------------------------------------------------------------------------


def _clean(text: str) -> str:
    """Text without the characters that XML does not admit, escaped."""
    return escape(re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


def _f(number: float) -> str:
    return f"{round(number, 1) + 0.0:g}"


def _tips(chains: Chains) -> dict[tuple[int, int], float]:
    """Where each edge meets its target: side by side in the order in which they come, so that arrows stay apart."""
    tips = {}
    for target in {j for _, j in chains}:
        arriving = sorted((e for e in chains if e[1] == target), key=lambda e: (chains[e][-2].y, e))
        box = chains[arriving[0]][-1]
        step = min(9.0, 0.62 * box.height / len(arriving))
        for k, edge in enumerate(arriving):
            tips[edge] = box.y + (k - (len(arriving) - 1) / 2) * step
    return tips


def _edge(style: _Style, edge: tuple[int, int], chain: list[Box], tip_y: float) -> str:
    first, last = chain[0], chain[-1]
    path = [f"M{_f(first.x + first.width)} {_f(first.y)}"]
    y = first.y
    for before, box in itertools.pairwise(chain):
        # Straight beside nodes, bent only between columns, so that no edge crosses a node.
        start, end = before.column[1], box.column[0] - (ARROW if box is last else 0)
        goal = tip_y if box is last else box.y
        if abs(goal - y) >= 0.5:
            bend = (end - start) / 2
            path.append(f"L{_f(start)} {_f(y)}")
            path.append(f"C{_f(start + bend)} {_f(y)} {_f(end - bend)} {_f(goal)} {_f(end)} {_f(goal)}")
        y = goal
    path.append(f"L{_f(last.x - ARROW)} {_f(y)}")
    alive = style.live[edge[0]] and style.live[edge[1]]
    color = quoteattr(style.edge_colors.get(edge, EDGE_INK if alive else "#c9cfd6"))
    dash = ' stroke-dasharray="4 3"' if not alive and edge not in style.edge_colors else ""
    wide = 2.4 if edge in style.edge_colors else 1.5
    tip, half = last.x - 0.5, ARROW * 0.55
    arrow = f"{_f(tip)},{_f(tip_y)} {_f(tip - ARROW)},{_f(tip_y - half)} {_f(tip - ARROW)},{_f(tip_y + half)}"
    return (
        f'<path d="{" ".join(path)}" fill="none" stroke={color} stroke-width="{wide}"{dash}/>'
        f'<polygon points="{arrow}" fill={color}/>'
    )


def _node(style: _Style, box: Box, port: bool) -> str:
    node = box.node
    assert node is not None
    operation = style.graph.ops[node]
    end = operation in ("input", "output")
    fill, border = operation_colors(operation)
    ink, dash = ("#ffffff" if end else INK), ""
    if node in style.node_colors:
        fill = style.node_colors[node]
        border, ink = EDGE_INK, _ink_on(fill)
    elif not style.live[node]:
        fill, border, ink, dash = PALE, PALE_INK, "#7b8591", ' stroke-dasharray="4 3"'
    elif port and not end:
        fill, ink, dash = "#ffffff", "#4b5763", ' stroke-dasharray="2 2"'
    radius = box.height / 2 if end else 7.0
    y = box.y - box.height / 2
    lines = []
    for k, line in enumerate(box.text):
        base = box.y + (k - (len(box.text) - 1) / 2) * LINE + FONT * 0.35
        size = "" if k == 0 else f' font-size="{FONT - 1.5:g}"'
        lines.append(f'<text x="{_f(box.x + box.width / 2)}" y="{_f(base)}" fill="{ink}"{size}>{_clean(line)}</text>')
    dead = "" if style.live[node] else " (no effect)"
    return (
        f"<g><title>{node}: {_clean(operation)}{dead}</title>"
        f'<rect x="{_f(box.x)}" y="{_f(y)}" width="{_f(box.width)}" height="{_f(box.height)}" rx="{_f(radius)}"'
        f' fill={quoteattr(fill)} stroke={quoteattr(border)} stroke-width="1.4"{dash}/>{"".join(lines)}</g>'
    )


def _ink_on(color: str) -> str:
    """Dark or white text, whichever is readable on a #rgb or #rrggbb colour."""
    digits = color.removeprefix("#")
    if len(digits) == 3:
        digits = "".join(2 * d for d in digits)
    if not re.fullmatch(r"[0-9a-fA-F]{6}", digits):
        return INK
    red, green, blue = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "#ffffff"


def _page(panels: list[_Panel], names: list[str], title: str | None) -> str:
    """Panels side by side where they are narrow, else one below the other, under the title."""
    heading, caption, gap = (30.0 if title else 0.0), (26.0 if names else 0.0), 34.0
    beside = sum(p.width for p in panels) + gap * (len(panels) - 1) <= 900
    widest = max([p.width for p in panels] + [_text_width(title or "") * 1.2])
    width = (sum(p.width for p in panels) + gap * (len(panels) - 1)) if beside else widest
    width = max(width, widest) + 2 * MARGIN
    tallest = max(p.height for p in panels)
    height = tallest + caption if beside else sum(p.height + caption for p in panels) + gap * (len(panels) - 1)
    height += heading + 2 * MARGIN
    body, x, y = [], MARGIN, MARGIN + heading
    for k, panel in enumerate(panels):
        if names:
            body.append(
                f'<text x="{_f(x)}" y="{_f(y + 12)}" text-anchor="start" font-weight="600" fill="#4b5763">'
                f"{_clean(names[k].replace('_', ' '))}</text>"
            )
        drop = (tallest - panel.height) / 2 if beside else 0.0
        inset = 0.0 if beside and len(panels) > 1 else (width - 2 * MARGIN - panel.width) / 2 * (not names)
        body.append(f'<g transform="translate({_f(x + inset)} {_f(y + caption + drop)})">\n{panel.markup}\n</g>')
        if beside:
            x += panel.width + gap
        else:
            y += panel.height + caption + gap
    head = ""
    if title:
        head = (
            f'<text x="{_f(width / 2)}" y="{_f(MARGIN + 13)}" font-size="{FONT + 2:g}" font-weight="600"'
            f' fill="{INK}">{_clean(title)}</text>\n'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_f(width)} {_f(height)}" width="{_f(width)}"'
        f' height="{_f(height)}" role="img" font-family="{FONTS}" font-size="{FONT:g}" text-anchor="middle">\n'
        f"<title>{_clean(title or 'architecture')}</title>\n"
        f'<rect width="100%" height="100%" rx="8" fill="#ffffff"/>\n{head}' + "\n".join(body) + "\n</svg>\n"
    )
