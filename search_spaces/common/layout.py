"""Layered layout of a small directed acyclic graph, from left to right.

Layers by longest path, few crossings by barycentre sweeps, straight long edges (Sugiyama, Tagawa and Toda 1981;
edge weights of Gansner et al. 1993, section 4); heights are least squares under fixed distances, solved exactly.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

NODE_GAP, EDGE_GAP = 20.0, 16.0  # vertical room between two nodes, beside a passing edge
STRAIGHT = 20.0  # how much more a long edge is kept straight than an edge between neighbouring columns


@dataclass
class Box:
    """A node with its text and size, or (`node` None) the place where a long edge passes a column."""

    node: int | None = None
    text: list[str] = field(default_factory=list)
    width: float = 0.0
    height: float = 0.0
    layer: int = 0
    x: float = 0.0  # left side
    y: float = 0.0  # middle
    column: tuple[float, float] = (0.0, 0.0)  # left and right side of its column


Chains = Mapping[tuple[int, int], list[Box]]  # (from, to) -> the boxes that the edge visits


def arrange(boxes: Mapping[int, Box], edges: Sequence[tuple[int, int]]) -> tuple[Chains, float, float]:
    """Set layer, x, y and column of the boxes (node -> box, numbers in topological order).

    Returns the way of every edge, from its source over passages to its target, and the width and height of the whole.
    """
    for node, layer in _layers(sorted(boxes), edges).items():
        boxes[node].layer = layer
    chains = {(i, j): [boxes[i], *_passages(boxes[i].layer, boxes[j].layer), boxes[j]] for i, j in edges}
    columns = _columns(list(boxes.values()), chains)
    _set_heights(columns, chains)
    _straighten(columns, chains)
    return chains, *_set_columns(columns, chains)


def _layers(nodes: Sequence[int], edges: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Longest path from the left; sources stand just before what they feed, the last node stands last."""
    layer = dict.fromkeys(nodes, 0)
    for i, j in sorted(edges, key=lambda e: (e[1], e[0])):  # node numbers are a topological order
        layer[j] = max(layer[j], layer[i] + 1)
    for i in nodes[1:]:
        if not any(j == i for _, j in edges):
            layer[i] = max(min((layer[j] for k, j in edges if k == i), default=1) - 1, 0)
    layer[nodes[-1]] = max([layer[nodes[-1]], *(layer[i] + (len(nodes) > 1) for i in nodes[:-1])])
    return layer


def _passages(start: int, end: int) -> list[Box]:
    return [Box(layer=layer) for layer in range(start + 1, end)]


# -- order within columns ----------------------------------------------------------------------------------------


def _columns(boxes: list[Box], chains: Chains) -> list[list[Box]]:
    """Boxes by layer, ordered such that few edges cross."""
    everything = boxes + [box for chain in chains.values() for box in chain[1:-1]]
    columns: list[list[Box]] = [[] for _ in range(max(b.layer for b in everything) + 1)]
    for box in everything:
        columns[box.layer].append(box)
    links = [(a, b) for chain in chains.values() for a, b in itertools.pairwise(chain)]
    best, fewest = [list(c) for c in columns], _crossings(columns, links)
    for sweep in range(12):
        forward = sweep % 2 == 0
        for column in columns[1:] if forward else columns[-2::-1]:
            _sort_by_barycentre(column, columns, links, forward)
        _swap_neighbours(columns, links)
        found = _crossings(columns, links)
        if found < fewest:
            best, fewest = [list(c) for c in columns], found
    return best


def _positions(columns: Sequence[Sequence[Box]]) -> dict[int, int]:
    return {id(box): place for column in columns for place, box in enumerate(column)}


def _sort_by_barycentre(
    column: list[Box], columns: list[list[Box]], links: list[tuple[Box, Box]], forward: bool
) -> None:
    place = _positions(columns)
    centre = {}
    for box in column:
        near = [place[id(a)] for a, b in links if b is box] if forward else [place[id(b)] for a, b in links if a is box]
        # Fractions of equal value must compare equal for ties to keep their order.
        centre[id(box)] = round(float(np.mean(near)), 6) if near else float(place[id(box)])
    column.sort(key=lambda box: centre[id(box)])


def _swap_neighbours(columns: list[list[Box]], links: list[tuple[Box, Box]]) -> None:
    fewest = _crossings(columns, links)
    for column in columns:
        for i in range(len(column) - 1):
            column[i], column[i + 1] = column[i + 1], column[i]
            found = _crossings(columns, links)
            if found < fewest:
                fewest = found
            else:
                column[i], column[i + 1] = column[i + 1], column[i]


def _crossings(columns: list[list[Box]], links: list[tuple[Box, Box]]) -> int:
    if not links:
        return 0
    place = _positions(columns)
    ends = np.array([(a.layer, place[id(a)], place[id(b)]) for a, b in links])
    layer, start, end = ends.T
    crossed = (start[:, None] < start) & (end[:, None] > end) & (layer[:, None] == layer)
    return int(crossed.sum())


# -- coordinates -------------------------------------------------------------------------------------------------


def _set_heights(columns: list[list[Box]], chains: Chains) -> None:
    """Every box near its neighbours: sweeps of least squares, looking left, right and both ways."""
    near: dict[int, tuple[list, list]] = {id(box): ([], []) for column in columns for box in column}
    leaving, entering = Counter(i for i, _ in chains), Counter(j for _, j in chains)
    for (i, j), chain in chains.items():
        for a, b in itertools.pairwise(chain):
            # A passing edge stays straight; it bends where it meets the end that has more edges.
            start = STRAIGHT / leaving[i] ** 2 if a.node is not None else STRAIGHT
            end = STRAIGHT / entering[j] ** 2 if b.node is not None else STRAIGHT
            weight = 1.0 if len(chain) == 2 else min(start, end)
            near[id(a)][1].append((b, weight))
            near[id(b)][0].append((a, weight))
    for column in columns:
        _spread(column, [0.0] * len(column), [1.0] * len(column))
    for sweep in range(60):
        sides = ((0,), (1,), (0, 1))[sweep % 3 if sweep < 45 else 2]
        for column in columns if sweep % 2 == 0 else columns[::-1]:
            wishes, weights = [], []
            for box in column:
                pulls = [pull for side in sides for pull in near[id(box)][side]]
                total = sum(w for _, w in pulls)
                wishes.append(sum(other.y * w for other, w in pulls) / total if pulls else box.y)
                weights.append(total or 0.1)
            _spread(column, wishes, weights)


def _set_columns(columns: list[list[Box]], chains: Chains) -> tuple[float, float]:
    """Columns side by side, further apart where edges are steep; returns width and height."""
    boxes = [box for column in columns for box in column]
    top = min(box.y - box.height / 2 for box in boxes)
    for box in boxes:
        box.y -= top
    x = 0.0
    for k, column in enumerate(columns):
        width = max(box.width for box in column)
        for box in column:
            box.width = box.width or width
            box.x, box.column = x + (width - box.width) / 2, (x, x + width)
        steps = [abs(a.y - b.y) for c in chains.values() for a, b in itertools.pairwise(c) if a.layer == k]
        x += width + min(36.0 + 0.22 * max(steps, default=0.0), 80.0) * (k < len(columns) - 1)
    return x, max(box.y + box.height / 2 for box in boxes)


def _straighten(columns: list[list[Box]], chains: Chains) -> None:
    """Move the passages of an edge to one height where their columns have room."""
    leaving = Counter(i for i, _ in chains)
    for (i, _), chain in chains.items():
        passages = chain[1:-1]
        if not passages:
            continue
        heights = [chain[0].y] if leaving[i] == 1 else []
        for height in (*heights, *sorted((box.y for box in passages), key=lambda y: abs(y - chain[0].y))):
            if all(_has_room(box, columns[box.layer], height) for box in passages):
                for box in passages:
                    box.y = height
                break


def _has_room(box: Box, column: list[Box], height: float) -> bool:
    k = next(k for k, other in enumerate(column) if other is box)
    above, below = column[k - 1 : k] if k else [], column[k + 1 : k + 2]
    return all(height - a.y >= _distance(a, box) for a in above) and all(
        b.y - height >= _distance(box, b) for b in below
    )


def _distance(above: Box, below: Box) -> float:
    gap = NODE_GAP if above.node is not None and below.node is not None else EDGE_GAP
    return (above.height + below.height) / 2 + gap


def _spread(column: list[Box], wishes: list[float], weights: list[float]) -> None:
    """Heights nearest to `wishes` in weighted squares that keep order and distance: isotonic regression."""
    offsets = [0.0]
    for above, below in itertools.pairwise(column):
        offsets.append(offsets[-1] + _distance(above, below))
    blocks: list[list[float]] = []  # [mean, weight, count], pooled while out of order
    for wish, offset, weight in zip(wishes, offsets, weights, strict=True):
        blocks.append([wish - offset, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            mean, w, count = blocks.pop()
            other, v, more = blocks[-1]
            blocks[-1] = [(other * v + mean * w) / (v + w), v + w, more + count]
    levels = [mean for mean, _, count in blocks for _ in range(int(count))]
    for box, level, offset in zip(column, levels, offsets, strict=True):
        box.y = level + offset
