"""Path features: what the operations on live paths of a graph are and how they lie, as numbers.

After GRAF (Kadlecova, Lukasik, Pilat, Vidnerova, Safari, Neri and Schrodi, Surprisingly Strong Performance Prediction
with Neural Graph Features, ICML 2024): counts, shortest paths, most operations on a path and degrees, each restricted
to a subset of the operations. Unlike there, everything is taken over live nodes (on a path from input to output that
no `none` cuts), and counts of paths and of positions stand beside them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from predictors.flow import FAR, Flow, most, total
from predictors.graphs import GraphTable

BOTH = "both"  # the part of nodes that belong to every cell
ENDS = ("input", "output", "none")  # never part of a subset
CHUNK = 16_384  # graphs at a time: their vectors stay in the cache
ALL_SUBSETS = 5  # up to so many operations every subset has its columns; beyond, singles, pairs and complements


def path_features(table: GraphTable, parts: Sequence[str] | None = None) -> tuple[np.ndarray, list[str]]:
    """(float32 [N, F], F names); the columns depend on the vocabulary and on `parts` (default: the table's) alone.

    For every cell (a part other than `both`): nodes per operation; depth, paths, live nodes and edges, degree of the
    output; the mean and longest distance of each operation from input and output; and for every subset of the
    operations the shortest path through it alone (its inverse, 0 where there is none), the most and the fewest nodes of
    it on a path (0 where there is none), the logarithm of the number of paths in it alone, and its part of the degrees
    of input, output and all nodes.
    """
    cells = [part for part in (parts or table.part_names) if part != BOTH]
    blocks, names = [], []
    for start in range(0, len(table), CHUNK):
        rows = table.take(np.arange(start, min(start + CHUNK, len(table))))
        found = [
            (f"{cell}.{name}" if len(cells) > 1 else name, values)
            for cell in cells
            for name, values in _columns(_cell(rows, cell) if len(cells) > 1 else rows)
        ]
        names = [name for name, _ in found]
        blocks.append(np.stack([values.astype(np.float32) for _, values in found], 1))
    return np.concatenate(blocks), names


def operation_subsets(vocabulary: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The subsets of the operations that get columns of their own."""
    ops = [op for op in vocabulary if op not in ENDS]
    if len(ops) <= ALL_SUBSETS:
        sizes = range(1, len(ops) + 1)
        return [subset for size in sizes for subset in itertools.combinations(ops, size)]
    without = [tuple(o for o in ops if o != op) for op in ops]
    return [*itertools.combinations(ops, 1), *itertools.combinations(ops, 2), *without, tuple(ops)]


def _columns(table: GraphTable) -> Iterator[tuple[str, np.ndarray]]:
    flow = Flow(table)
    inside, outside = flow.inside, flow.outside
    nothing = np.zeros(len(table), np.float32)  # where no graph has an edge
    yield "live_nodes", total(flow.inner)
    yield "live_edges", total(inside)
    yield "output_degree", flow.at_output(inside)
    yield "output_share", 1 / np.maximum(flow.at_output(inside), 1)
    yield "input_degree", outside[0]
    near, far = flow.shortest_from_input(), flow.longest_from_input()
    near_back, far_back = flow.shortest_to_output(), flow.longest_to_output()
    to, onward = flow.paths_from_input(), flow.paths_to_output()
    through = [a * b for a, b in zip(to, onward, strict=True)]
    paths = flow.at_output(to)
    walk_out, walk_back = flow.walk_from_input(), flow.walk_to_output()
    yield "shortest", _inverse(flow.at_output(near))
    yield "depth", np.maximum(flow.at_output(far), 0)
    yield "log_paths", np.log1p(paths)

    codes = np.ascontiguousarray(table.ops.T)
    at = {}
    for op in (op for op in table.vocabulary if op not in ENDS):
        members = [row == table.vocabulary.index(op) for row in codes]
        at[op] = [member & inner for member, inner in zip(members, flow.inner, strict=True)]
        some = np.maximum(total(at[op]), 1)
        yield f"count[{op}]", total(members)
        yield f"paths_through[{op}]", _over(at[op], through) / np.maximum(paths, 1)
        yield f"from_input[{op}]", _over(at[op], near) / some
        yield f"to_output[{op}]", _over(at[op], near_back) / some
        yield f"late_from_input[{op}]", most(np.where(a, d, 0) for a, d in zip(at[op], far, strict=True))
        yield f"walk_from_input[{op}]", _over(at[op], walk_out)
        yield f"walk_to_output[{op}]", _over(at[op], walk_back)
        yield f"late_to_output[{op}]", most(np.where(a, d, 0) for a, d in zip(at[op], far_back, strict=True))
    for subset in operation_subsets(table.vocabulary):
        label = "+".join(subset)
        chosen = [np.logical_or.reduce([at[op][j] for op in subset]) for j in range(flow.nodes)]
        number = total(chosen)
        some = np.maximum(number, 1)
        yield f"live[{label}]", number
        yield f"shortest[{label}]", _inverse(flow.at_output(flow.shortest_from_input(chosen)))
        yield f"most_on_path[{label}]", np.maximum(flow.at_output(flow.longest_from_input(chosen)), 0)
        fewest = flow.at_output(flow.fewest_from_input(chosen))
        yield f"fewest_on_path[{label}]", np.where(fewest < FAR, fewest, 0)
        yield f"spread_on_walk[{label}]", flow.counted_on_walk(chosen)[1]
        yield f"walk_within[{label}]", flow.at_output(flow.walk_from_input(chosen))
        yield f"walk_back_within[{label}]", flow.walk_to_output(chosen)[0]
        yield f"log_paths[{label}]", np.log1p(flow.at_output(flow.paths_from_input(chosen)))
        yield f"into_output[{label}]", flow.at_output(_inflow(flow, chosen))
        yield (
            f"out_of_input[{label}]",
            total([nothing, *(e & chosen[j] for (i, j), e in flow.edges.items() if i == 0)]),
        )
        yield f"mean_in[{label}]", _over(chosen, inside) / some
        yield f"mean_out[{label}]", _over(chosen, outside) / some
    ends = {"input": [np.full(len(table), j == 0) for j in range(flow.nodes)], "output": flow.is_last}
    for (source, leaves), (target, enters) in itertools.product((at | ends).items(), repeat=2):
        if source == "output" or target == "input":
            continue
        steps = {(i, j): leaves[i] & enters[j] for i, j in flow.edges}
        yield (
            f"step_out[{source}>{target}]",
            total([nothing, *(steps[i, j] * walk_out[i] * flow.leaving[i, j] for i, j in flow.edges)]),
        )
        yield (
            f"step_back[{source}>{target}]",
            total([nothing, *(steps[i, j] * walk_back[j] * flow.entering[i, j] for i, j in flow.edges)]),
        )


def _over(chosen: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> np.ndarray:
    return total(value * at for value, at in zip(values, chosen, strict=True))


def _inflow(flow: Flow, chosen: Sequence[np.ndarray]) -> list[np.ndarray]:
    """How many chosen nodes feed each node."""
    fed = [np.zeros(len(chosen[0]), np.int16) for _ in chosen]
    for (i, j), edge in flow.edges.items():
        fed[j] += edge & chosen[i]
    return fed


def _inverse(distance: np.ndarray) -> np.ndarray:
    return np.where(distance < FAR, 1 / np.maximum(distance, 1), 0)


def _cell(table: GraphTable, part: str) -> GraphTable:
    """The graphs with the nodes of one part and those of both parts only."""
    wanted = [i for i, name in enumerate(table.part_names) if name in (part, BOTH)]
    mask = table.mask & np.isin(table.parts, wanted)
    ops = np.where(mask, table.ops, -1).astype(np.int8)
    adjacency = table.adjacency & mask[:, :, None] & mask[:, None, :]
    return GraphTable(table.vocabulary, ops, adjacency, mask, table.parts, table.part_names)
