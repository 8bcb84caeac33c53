"""NAS-Bench-201 against published counts, the shared table, brute force and the built network."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from search_spaces import load_space, select, selected_state_dict
from search_spaces.cells.nas_bench_201 import CONV_1X1, CONV_3X3, EDGES, NONE, SKIP, NasBench201
from search_spaces.common.errors import UserError
from search_spaces.graph import live

SPACE = NasBench201()
BEST = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"


def compute(arch, convolutions, pool, x):
    """The cell with opaque operations: `convolutions[edge]` and `pool` are functions."""
    nodes = [x]
    for node in (1, 2, 3):
        total = np.zeros_like(x)
        for edge, (i, j) in enumerate(EDGES):
            if j != node or arch[edge] == NONE:
                continue
            value = nodes[i]
            if arch[edge] in (CONV_1X1, CONV_3X3):
                value = convolutions[edge][arch[edge]](value) if value.any() else value
            elif arch[edge] != SKIP:
                value = pool(value) if value.any() else value
            total = total + value
        nodes.append(total)
    return nodes[-1]


def opaque(rng):
    """A function without any identity but f(0) = 0, which `compute` sees to."""
    weight, bias = rng.normal(size=(5, 5)), rng.normal(size=5)
    return lambda v: np.sin(weight @ v + bias)


def test_published_counts():
    archs = list(SPACE)
    assert len(SPACE) == len(archs) == len(set(archs)) == 15_625
    assert len({SPACE.key(a) for a in archs}) == 6_466  # NAS-Bench-201, appendix


def test_notation_of_the_whole_space_round_trips(shared_table):
    texts = pq.read_table(shared_table("nas-bench-201/accuracy.parquet"), columns=["arch"])["arch"].to_pylist()
    decoded = [SPACE.decode(t) for t in texts]
    assert [SPACE.encode(a) for a in decoded] == texts
    assert set(decoded) == set(SPACE)
    assert sorted(SPACE.codes(decoded)) == list(range(15_625))
    assert [SPACE.from_code(c) for c in SPACE.codes(decoded[:50])] == decoded[:50]


@pytest.mark.parametrize(("column", "classes"), [("cifar10", 10), ("cifar100", 100), ("imagenet16", 120)])
def test_parameters_of_every_architecture_equal_the_table(shared_table, column, classes):
    name = f"{column}_params"
    table = pq.read_table(shared_table("nas-bench-201/accuracy.parquet"), columns=["arch", name]).to_pydict()
    costs = [SPACE.cost(SPACE.decode(t), num_classes=classes)["params"] for t in table["arch"]]
    assert costs == table[name]


def test_function_key_by_brute_force():
    """Same key if and only if some renaming of the convolutions makes the values equal."""
    rng = np.random.default_rng(0)
    functions = {op: [opaque(rng) for _ in EDGES] for op in (CONV_1X1, CONV_3X3)}
    pool, x = opaque(rng), rng.normal(size=5)

    def fingerprint(arch):
        convolutions = [e for e in range(6) if arch[e] in functions]
        values = set()
        for order in itertools.permutations(range(3), len(convolutions)):
            named = {e: {op: f[k] for op, f in functions.items()} for e, k in zip(convolutions, order, strict=True)}
            values.add(tuple(np.round(compute(arch, named, pool, x), 9)))
        return min(values)

    sample = [a for a in SPACE if sum(o in functions for o in a) <= 3][::5]
    by_key: dict[str, set] = {}
    by_value: dict[tuple, set] = {}
    for arch in sample:
        by_key.setdefault(SPACE.function_key(arch), set()).add(fingerprint(arch))
        by_value.setdefault(fingerprint(arch), set()).add(SPACE.function_key(arch))
    assert len(sample) > 2_000
    assert all(len(values) == 1 for values in by_key.values())
    assert all(len(keys) == 1 for keys in by_value.values())


def test_function_keys_without_regard_to_shared_weights():
    """One opaque function for each kind of operation: 4,930 distinct functions; told apart by weights, more."""
    rng = np.random.default_rng(1)
    kinds = {op: opaque(rng) for op in (CONV_1X1, CONV_3X3)}
    pool, x = opaque(rng), rng.normal(size=5)
    values = {tuple(np.round(compute(a, [kinds] * 6, pool, x), 9)) for a in SPACE}
    assert len(values) == 4_930
    assert len({SPACE.function_key(a) for a in SPACE}) == 5_260


def test_equal_function_keys_give_equal_networks():
    """Two cells of one function, with the weights moved along, give the same outputs."""
    first, second = (3, 2, 0, 0, 1, 1), (2, 3, 0, 0, 1, 1)  # the middle nodes swapped
    assert SPACE.function_key(first) == SPACE.function_key(second)
    networks = [SPACE.build(a, channels=4, cells_per_stage=1).double() for a in (first, second)]
    swap = {"edges.0.": "edges.1.", "edges.1.": "edges.0."}
    state = {}
    for name, value in networks[0].state_dict().items():
        found = next((k for k in swap if k in name), None)
        state[name.replace(found, swap[found]) if found else name] = value
    networks[1].load_state_dict(state)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(networks[0](x), networks[1](x), rtol=1e-12, atol=1e-12)


def test_choices_hold_the_weights_of_every_architecture(rng):
    supernet = SPACE.choices(channels=4, cells_per_stage=1).eval()
    x = torch.randn(2, 3, 8, 8)
    for _ in range(5):
        arch = SPACE.sample(rng)
        select(supernet, SPACE.select(arch))
        network = SPACE.build(arch, channels=4, cells_per_stage=1).eval()
        network.load_state_dict(selected_state_dict(supernet))
        torch.testing.assert_close(network(x), supernet(x), rtol=0, atol=0)


def test_mutation_and_neighbours_change_one_edge(rng):
    arch = SPACE.sample(rng)
    neighbours = list(SPACE.neighbors(arch))
    assert len(neighbours) == len(set(neighbours)) == 24
    assert all(sum(a != b for a, b in zip(arch, n, strict=True)) == 1 for n in neighbours)
    counts = dict.fromkeys(neighbours, 0)
    for _ in range(4_800):
        counts[SPACE.mutate(arch, rng)] += 1
    assert min(counts.values()) > 130  # uniform: 200 expected, standard deviation 14
    assert max(counts.values()) < 270


def test_sampling_is_uniform_over_operations(rng):
    drawn = np.array([SPACE.sample(rng) for _ in range(5_000)])
    shares = np.stack([(drawn == o).mean(axis=0) for o in range(5)])
    assert abs(shares - 0.2).max() < 0.03


def test_graph_has_the_edges_of_the_cell():
    graph = SPACE.graph(SPACE.decode(BEST))
    assert graph.ops == ("input", *["nor_conv_3x3"] * 3, "skip_connect", *["nor_conv_3x3"] * 2, "output")
    assert graph.edges() == [(0, 1), (0, 2), (0, 4), (1, 3), (1, 5), (2, 6), (3, 6), (4, 7), (5, 7), (6, 7)]
    assert live(graph).all()
    dead = SPACE.graph((3, 0, 0, 3, 0, 3))  # node 1 leads nowhere, node 2 has no input
    assert list(np.flatnonzero(live(dead))) == [0, 4, 7]


def test_live_macs_and_paths_agree_with_the_graph(rng):
    for arch in [SPACE.sample(rng) for _ in range(200)]:
        graph = SPACE.graph(arch)
        alive = live(graph)
        kept = graph.adjacency * np.outer(alive, alive) * np.outer(*[[o != "none" for o in graph.ops]] * 2)
        walks = sum(np.linalg.matrix_power(kept.astype(int), k)[0, 7] for k in range(1, 8))
        cost = SPACE.cost(arch, channels=4, cells_per_stage=1, input_size=8)
        assert cost["paths"] == walks
        pruned = tuple(o if alive[e + 1] else NONE for e, o in enumerate(arch))
        assert cost["live_macs"] == SPACE.cost(pruned, channels=4, cells_per_stage=1, input_size=8)["macs"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        BEST[:-1],
        BEST + "|none~3|",
        BEST.replace("~1", "~2", 1),
        BEST.replace("skip_connect", "skip"),
        "|||+||",
    ],
)
def test_malformed_notation_is_refused(text):
    with pytest.raises(UserError):
        SPACE.decode(text)


def test_unknown_scale_is_refused():
    with pytest.raises(UserError, match="did you mean 'channels'"):
        SPACE.build((0,) * 6, chanels=3)


def test_the_space_travels():
    assert pickle.loads(pickle.dumps(load_space("nas_bench_201"))).encode((1,) * 6) == SPACE.encode((1,) * 6)
