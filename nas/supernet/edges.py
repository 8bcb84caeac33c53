"""Which labels of a supernet are edges into one node of a cell."""

from __future__ import annotations

import re
from collections.abc import Iterable

EDGE = re.compile(r"(.+)_(\d+)_(\d+)")  # cell, source, node: how NAS-Bench-201 and DARTS label their edges


def edges_into_nodes(labels: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """{`<cell>_<node>`: the labels `<cell>_<source>_<node>`, by source}; other labels are left out.

    A module of one's own has edge normalisation and partial channels where its labels are written so.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for label in labels:
        edge = EDGE.fullmatch(label)
        if edge is not None:
            found.setdefault(f"{edge[1]}_{edge[3]}", []).append((int(edge[2]), label))
    return {node: tuple(label for _, label in sorted(edges)) for node, edges in found.items()}
