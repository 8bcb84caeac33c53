"""Path encoding against paths enumerated one by one."""

import time

import networkx
import numpy as np
import pytest

from predictors.graphs import GraphTable, as_table
from predictors.path_encoding import path_columns, path_depth, path_encoding, path_operations
from search_spaces.registry import load_space


def sampled(name, count, seed=0):
    space, rng = load_space(name), np.random.default_rng(seed)
    return as_table([space.graph(space.sample(rng)) for _ in range(count)], space.vocabulary)


def spelled(graph, cell):
    """Every path from input to output through nodes of the cell, as operations; cut by none, silent on sums."""
    whole = graph.to_networkx()
    kept = [i for i, d in whole.nodes(data=True) if d["op"] != "none" and d["part"] in (cell, "both")]
    part = whole.subgraph(kept)
    found = set()
    for path in networkx.all_simple_paths(part, 0, len(graph) - 1):
        found.add(tuple(graph.ops[i] for i in path[1:-1] if graph.ops[i] != "sum"))
    return found


@pytest.mark.parametrize(
    ("space", "cells", "longest"),
    [
        ("nas-bench-101", ("cell",), 3),
        ("nas-bench-101", ("cell",), 5),
        ("nas-bench-101", ("cell",), 0),
        ("nas-bench-201", ("cell",), 2),
        ("nas-bench-201", ("cell",), 3),
        ("darts", ("normal", "reduce"), 3),
    ],
)
def test_columns_are_the_paths_found_one_by_one(space, cells, longest):
    table = sampled(space, 120)
    columns = path_columns(table.vocabulary, longest)
    encoding = path_encoding(table, longest, cells)
    assert encoding.shape == (120, len(cells) * len(columns))
    for graph, row in zip(table, encoding, strict=True):
        for cell, bits in zip(cells, row.reshape(len(cells), -1), strict=True):
            expected = {path for path in spelled(graph, cell) if len(path) <= longest}
            assert {path for path, bit in zip(columns, bits, strict=True) if bit} == expected


def test_columns_of_the_paper():
    """NAS-Bench-101 has 364 paths, the first 40 with at most 3 operations (BANANAS, sections 4 and 5)."""
    vocabulary = load_space("nas-bench-101").vocabulary
    assert len(path_columns(vocabulary, 5)) == sum(3**i for i in range(6)) == 364
    assert len(path_columns(vocabulary)) == 40
    assert path_columns(vocabulary)[0] == ()
    assert path_operations(load_space("nas-bench-201").vocabulary) == (
        "skip_connect",
        "nor_conv_1x1",
        "nor_conv_3x3",
        "avg_pool_3x3",
    )


def test_large_vocabularies_are_truncated_earlier():
    assert path_depth(3, 5) == 5
    assert path_depth(20, 5) == 2  # 1 + 20 + 400; with 8,000 more it would be over 4,096
    assert path_depth(10_000, 5) == 0


def test_chunks_and_padding_change_nothing(monkeypatch):
    table = sampled("nas-bench-101", 50)
    expected = path_encoding(table)
    monkeypatch.setattr("predictors.path_encoding.CHUNK", 7)
    np.testing.assert_array_equal(path_encoding(table.padded(10)), expected)


@pytest.mark.slow
def test_a_space_of_423624_cells_takes_seconds():
    some = sampled("nas-bench-101", 4237)
    table = some.take(np.tile(np.arange(len(some)), 100)[:423_624])
    assert isinstance(table, GraphTable)
    start = time.perf_counter()
    path_encoding(table)
    assert time.perf_counter() - start < 15
