"""NAS-Bench-101 against its published hashes and parameter counts, the shared table and brute force."""

import itertools
import pickle

import networkx
import numpy as np
import pytest
import torch
from networkx.algorithms.isomorphism import categorical_node_match
from torch import nn

from search_spaces.cells.nas_bench_101 import MAX_EDGES, MAX_VERTICES, OPERATIONS, Cell, NasBench101
from search_spaces.cells.nas_bench_101_network import vertex_channels
from search_spaces.common.errors import UserError
from search_spaces.graph import live
from search_spaces.registry import load_space

SPACE = NasBench101()
CONV3, CONV1, POOL = OPERATIONS
# The Inception-like cell of google-research/nasbench's README.
INCEPTION = Cell(
    [
        [0, 1, 1, 1, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 0],
    ],
    ["input", CONV1, CONV3, CONV3, CONV3, POOL, "output"],
)
# The first record of nasbench_only108.tfrecord; NNI's documentation prints its hash and parameters.
FIRST_RECORD = "100110100001001010101:" + ",".join([CONV3, POOL, CONV3, CONV3, CONV1])


@pytest.fixture(scope="module")
def table_texts(shared_table):
    import pyarrow.parquet

    path = shared_table("nas-bench-101/accuracy.parquet")
    return pyarrow.parquet.read_table(path, columns=["arch"])["arch"].to_pylist()


@pytest.fixture(scope="module")
def sampled():
    rng = np.random.default_rng(1)
    return [SPACE.sample(rng) for _ in range(2000)]


@pytest.mark.parametrize(
    ("text", "digest"),
    [
        # google-research's unified_functional_hashing tests state this one for the Inception-like cell.
        (SPACE.encode(INCEPTION), "28cfc7874f6d200472e1a9dcd8650aa0"),
        (FIRST_RECORD, "00005c142e6f48ac74fdcf73e3439874"),
        # The benchmark's smallest cells and its best cell by mean test accuracy, under the hashes users quote.
        ("1:", "043721b9c7fe8c5fad811d47d83132ec"),
        ("101:conv1x1-bn-relu", "d1269d9156ddc027c40473008192958a"),
        ("111:conv3x3-bn-relu", "d32d0b26d534203b48d866facd98cc3e"),
        (f"110011000101000100101:{CONV1},{CONV3},{POOL},{CONV3},{CONV3}", "02e5a0247bbdcf2860b7e96f74961594"),
    ],
)
def test_published_hashes(text, digest):
    assert SPACE.key(SPACE.decode(text)) == digest


@pytest.mark.parametrize(("text", "params"), [(SPACE.encode(INCEPTION), 2_694_282), (FIRST_RECORD, 8_555_530)])
def test_published_parameter_counts(text, params):
    """2,694,282 stands in the benchmark's notebook, 8,555,530 in its first record (trainable_parameters)."""
    cell = SPACE.decode(text)
    assert SPACE.cost(cell)["params"] == params
    assert sum(p.numel() for p in SPACE.build(cell).parameters()) == params


def test_published_vertex_channels():
    """The cases of nasbench/tests/model_builder_test.py."""
    fork = ((0, 1, 1, 0), (0, 0, 0, 1), (0, 0, 0, 1), (0, 0, 0, 0))
    wide = ((0, 1, 1, 1, 0), (0, 0, 0, 0, 1), (0, 0, 0, 0, 1), (0, 0, 0, 0, 1), (0, 0, 0, 0, 0))
    later = ((0, 1, 0, 0, 0), (0, 0, 1, 1, 0), (0, 0, 0, 0, 1), (0, 0, 0, 0, 1), (0, 0, 0, 0, 0))
    mixed = ((0, 1, 0, 1, 0), (0, 0, 1, 0, 1), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1), (0, 0, 0, 0, 0))
    assert vertex_channels(((0, 1), (0, 0)), 5, 1) == [5, 1]
    assert vertex_channels(fork, 8, 15) == [8, 8, 7, 15]
    assert vertex_channels(wide, 8, 8) == [8, 3, 3, 2, 8]
    assert vertex_channels(later, 8, 9) == [8, 5, 5, 4, 9]
    assert vertex_channels(mixed, 8, 15) == [8, 8, 7, 7, 15]
    with pytest.raises(UserError, match="at least 3 channels"):
        vertex_channels(wide, 8, 2)


def test_table_rows_round_trip_with_distinct_keys(table_texts):
    rows = np.random.default_rng(0).choice(len(table_texts), 3000, replace=False)
    cells = [SPACE.decode(table_texts[row]) for row in rows]
    assert [SPACE.encode(cell) for cell in cells] == [table_texts[row] for row in rows]
    assert len({SPACE.key(cell) for cell in cells}) == len(set(SPACE.codes(cells).tolist())) == 3000


@pytest.mark.slow
def test_the_space_is_the_table(table_texts):
    """Brute-force enumeration gives 423,624 classes; their hashes are distinct and those of the table's rows."""
    enumerated = {SPACE.key(cell) for cell in SPACE}
    assert len(enumerated) == len(table_texts) == len(SPACE) == 423_624
    assert {SPACE.key(SPACE.decode(text)) for text in table_texts} == enumerated


def test_enumeration_of_small_cells_is_complete():
    """All labelled matrices of up to four vertices fall into the enumerated classes, each met."""
    small = list(itertools.takewhile(lambda cell: len(cell.ops) <= 4, SPACE))
    found = set()
    for n in (2, 3, 4):
        for bits in itertools.product("01", repeat=n * (n - 1) // 2):
            for ops in itertools.product(OPERATIONS, repeat=n - 2):
                try:
                    found.add(SPACE.key(SPACE.decode("".join(bits) + ":" + ",".join(ops))))
                except UserError:
                    continue
    assert len(small) == len(found)
    assert {SPACE.key(cell) for cell in small} == found


def test_equal_keys_are_isomorphisms(sampled):
    """Against networkx, over all pairs of cells with equal degrees and operations, and over shuffled copies."""
    rng = np.random.default_rng(2)
    groups: dict = {}
    for cell in sampled:
        matrix = np.array(cell.matrix)
        profile = sorted(zip(matrix.sum(0), matrix.sum(1), cell.ops, strict=True))
        groups.setdefault(str(profile), []).append(cell)
    match, pairs, equal = categorical_node_match("op", None), 0, 0
    for cells in groups.values():
        for first, second in itertools.islice(itertools.combinations(cells, 2), 40):
            isomorphic = networkx.is_isomorphic(
                SPACE.graph(first).to_networkx(), SPACE.graph(second).to_networkx(), node_match=match
            )
            assert isomorphic == (SPACE.key(first) == SPACE.key(second))
            pairs, equal = pairs + 1, equal + isomorphic
    assert pairs > equal > 0
    for cell in sampled[:100]:
        other = _shuffled(cell, rng)
        assert SPACE.key(other) == SPACE.key(cell)
        assert SPACE.codes([other]) == SPACE.codes([cell])


def test_function_key_separates_what_the_remainder_separates(sampled):
    """Isomorphic cells whose channels fall differently have different function keys; equal keys cost the same."""
    wide_pool, wide_conv = (
        SPACE.decode(f"1110001011:{POOL},{POOL},{CONV3}"),
        SPACE.decode(f"1110001011:{CONV3},{POOL},{POOL}"),
    )
    assert SPACE.key(wide_pool) == SPACE.key(wide_conv)
    assert SPACE.function_key(wide_pool) != SPACE.function_key(wide_conv)
    assert SPACE.cost(wide_pool)["params"] != SPACE.cost(wide_conv)["params"]
    rng, equal = np.random.default_rng(3), 0
    for cell in sampled[:400]:
        other = _shuffled(cell, rng)
        if other != cell and SPACE.function_key(other) == SPACE.function_key(cell):
            equal += 1
            for channels in (5, 6, 7):
                assert SPACE.cost(other, channels=channels) == SPACE.cost(cell, channels=channels)
    assert equal > 10


def test_sampling_follows_the_published_rule(sampled):
    """Same distribution as a plain rejection loop: random upper triangles, valid if at most nine edges matter."""
    rng, reference = np.random.default_rng(4), []
    while len(reference) < 2000:
        matrix = np.triu(rng.integers(2, size=(7, 7)), 1)
        reach = np.linalg.matrix_power(np.eye(7, dtype=int) + matrix, 6) > 0
        kept = reach[0] & reach[:, 6]
        if kept[0] and matrix[kept][:, kept].sum() <= MAX_EDGES:
            reference.append((kept.sum(), matrix[kept][:, kept].sum()))
    ours = [(len(cell.ops), sum(map(sum, cell.matrix))) for cell in sampled]
    difference = np.mean(ours, axis=0) - np.mean(reference, axis=0)
    deviation = np.sqrt(np.var(ours, axis=0) / len(ours) + np.var(reference, axis=0) / len(reference))
    assert (np.abs(difference) < 5 * deviation).all()
    counts = np.array([[cell.ops.count(op) for op in OPERATIONS] for cell in sampled]).sum(0)
    assert np.abs(counts / counts.sum() - 1 / 3).max() < 0.03


def test_mutation_crossover_and_neighbors_stay_in_the_space(sampled):
    rng = np.random.default_rng(5)
    grown = 0
    for first, second in itertools.pairwise(sampled[:200]):
        child = SPACE.mutate(first, rng)
        _assert_valid(child)
        assert SPACE.key(child) != SPACE.key(first)
        grown += len(child.ops) > len(first.ops)
        _assert_valid(SPACE.crossover(first, second, rng))
    assert grown > 0
    for cell in sampled[:30]:
        neighbors = list(SPACE.neighbors(cell))
        keys = [SPACE.key(neighbor) for neighbor in neighbors]
        assert len(set(keys)) == len(keys) > 0
        assert SPACE.key(cell) not in keys
        for neighbor in neighbors:
            _assert_valid(neighbor)


def test_neighbors_of_the_smallest_cell_by_hand():
    """Input to output alone: the one edge cannot go, a vertex with any operation can come."""
    assert {SPACE.encode(cell) for cell in SPACE.neighbors(SPACE.decode("1:"))} == {f"111:{op}" for op in OPERATIONS}
    texts = {SPACE.encode(cell) for cell in SPACE.neighbors(SPACE.decode(f"101:{CONV3}"))}
    assert {f"101:{CONV1}", f"101:{POOL}", f"111:{CONV3}"} < texts
    assert all(len(SPACE.decode(text).ops) == 4 for text in texts - {f"101:{CONV1}", f"101:{POOL}", f"111:{CONV3}"})


def test_unrelated_parents_cross_over_to_mixtures():
    chain = SPACE.decode(f"100000100001000100101:{','.join([CONV3] * 5)}")
    rng = np.random.default_rng(6)
    assert len({SPACE.key(SPACE.crossover(chain, INCEPTION, rng)) for _ in range(30)}) > 10


def test_cells_are_pruned_when_made():
    cell = Cell(np.array([[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]), ["input", CONV3, POOL, "output"])
    assert cell == Cell(((0, 1, 1), (0, 0, 1), (0, 0, 0)), ("input", CONV3, "output"))
    assert hash(cell) == hash(SPACE.decode(f"111:{CONV3}"))
    assert type(cell.matrix[0][1]) is int


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "bits, a colon and operations"),
        ("101", "bits, a colon and operations"),
        ("1x1:conv3x3-bn-relu", "bits, a colon and operations"),
        ("1011:conv3x3-bn-relu", "not 4"),
        ("101:", "1 operations between input and output"),
        ("101:conv3x3-bn-relu,maxpool3x3", "1 operations between input and output"),
        ("101:conv3x3-bn", "did you mean 'conv3x3-bn-relu'"),
        ("100:conv3x3-bn-relu", "a path from input to output"),
        ("110:conv3x3-bn-relu", "did you mean '1:'"),
        ("1" * 15 + ":" + ",".join([POOL] * 4), "at most 9 edges"),
        ("1000000" + "100000" + "10000" + "1000" + "100" + "10" + "1:" + ",".join([POOL] * 6), "at most 7 vertices"),
    ],
)
def test_nonsense_is_named(text, message):
    with pytest.raises(UserError) as error:
        SPACE.decode(text)
    assert message in str(error.value)


def test_bad_matrices_are_named():
    ops = ("input", CONV3, "output")
    for matrix, message in [
        (((0, 1), (0, 0, 1), (0, 0, 0)), "square"),
        (((0, 1, 0), (1, 0, 1), (0, 0, 0)), "row 1, column 0"),
        (((0, 2, 0), (0, 0, 1), (0, 0, 0)), "row 0, column 1"),
    ]:
        with pytest.raises(UserError, match=message):
            Cell(matrix, ops)
    with pytest.raises(UserError, match="begin with 'input'"):
        Cell(((0, 1, 0), (0, 0, 1), (0, 0, 0)), (CONV3, CONV3, "output"))


def test_graph_is_live_and_stacks(sampled):
    graphs = [SPACE.graph(cell) for cell in sampled[:200]]
    assert all(live(graph).all() for graph in graphs)
    ops, adjacency, mask = SPACE.graphs(sampled[:200])
    for row, graph in enumerate(graphs):
        n = len(graph)
        assert tuple(SPACE.vocabulary[i] for i in ops[row, :n]) == graph.ops
        assert (adjacency[row, :n, :n] == graph.adjacency).all()
        assert mask[row].sum() == n
        assert set(graph.ops) <= set(SPACE.vocabulary)


@pytest.mark.parametrize("seed", range(6))
def test_cost_counts_the_built_network(seed):
    """Parameters by counting, MACs by hooks, paths and depth by listing all paths."""
    cell = SPACE.sample(np.random.default_rng(seed))
    scale = {"channels": 6 + seed % 3, "cells_per_stage": 1 + seed % 2, "stem_stride": 1 + seed % 2, "num_classes": 7}
    model = SPACE.build(cell, in_channels=2, **scale).eval()
    cost = SPACE.cost(cell, in_channels=2, input_size=15, **scale)
    macs = []

    def count(module, inputs, output):
        positions = output[0, 0].numel() if output.dim() == 4 else 1
        macs.append(module.weight.numel() * positions)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    assert model(torch.zeros(1, 2, 15, 15)).shape == (1, 7)
    assert cost["params"] == sum(p.numel() for p in model.parameters())
    assert cost["macs"] == cost["live_macs"] == sum(macs)
    graph = SPACE.graph(cell).to_networkx()
    paths = list(networkx.all_simple_paths(graph, 0, len(cell.ops) - 1))
    assert cost["paths"] == len(paths)
    longest = max(1 + sum(cell.ops[v].startswith("conv") for v in path) for path in paths)
    assert cost["depth"] == 2 + 3 * scale["cells_per_stage"] * longest


@pytest.mark.parametrize("size", [8, 32])
def test_networks_run_at_small_sizes(size, sampled):
    x = torch.randn(2, 3, size, size)
    for cell in sampled[:6]:
        model = SPACE.build(cell, channels=4, cells_per_stage=1)
        assert model(x).shape == (2, 10)
        assert model.forward_features(x).shape == (2, 16)
        assert model.stages() == ["cells.0", "cells.1", "cells.2"]
        assert all(model.get_submodule(name) is cell for name, cell in zip(model.stages(), model.cells, strict=True))
        assert isinstance(model.classifier, nn.Linear)


def test_cell_module_against_the_paper_by_hand():
    """One cell, computed vertex by vertex with the published rules: project, cut, add, concatenate, add."""
    cell = SPACE.decode(f"110010110011011:{CONV1},{POOL},{CONV3},{CONV3}")
    module = SPACE.build(cell, channels=7, cells_per_stage=1).eval().cells[0]
    assert module.channels == [7, 2, 3, 2, 2, 7]  # vertex 4 reads two of the three channels of vertex 2
    x = torch.randn(2, 7, 6, 6)
    matrix, n = np.array(cell.matrix), len(cell.ops)
    widths = [module.channels[v] for v in range(n)]
    values = {0: x}
    for v in range(1, n - 1):
        total = torch.zeros(2, widths[v], 6, 6)
        for w in np.flatnonzero(matrix[:, v]):
            total = total + (module.project[str(v)](x) if w == 0 else values[w][:, : widths[v]])
        values[v] = module.vertices[str(v)](total)
    expected = torch.cat([values[w] for w in range(1, n - 1) if matrix[w, -1]], dim=1)
    if matrix[0, -1]:
        expected = expected + module.project[str(n - 1)](x)
    torch.testing.assert_close(module(x), expected)


def test_default_normalisation_is_the_benchmarks():
    norms = [m for m in SPACE.build(INCEPTION, channels=4).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-5, 0.003)}


def test_factories_replace_every_norm_and_activation(sampled):
    for cell in sampled[:5]:
        plain = SPACE.build(cell, channels=4)
        model = SPACE.build(cell, channels=4, norm=lambda c: nn.GroupNorm(1, c), act=lambda c: nn.PReLU(c))
        kinds = [type(m) for m in model.modules()]
        assert nn.BatchNorm2d not in kinds
        assert nn.ReLU not in kinds
        assert kinds.count(nn.GroupNorm) == sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
        assert model(torch.randn(1, 3, 8, 8)).shape == (1, 10)


def test_unknown_scales_and_registry():
    with pytest.raises(UserError, match="did you mean 'channels'"):
        SPACE.build(INCEPTION, chanels=8)
    assert isinstance(load_space("NAS_Bench_101"), NasBench101)
    copy = pickle.loads(pickle.dumps((SPACE, INCEPTION)))
    assert copy[1] == INCEPTION
    assert copy[0].key(copy[1]) == SPACE.key(INCEPTION)


def _assert_valid(cell):
    assert 2 <= len(cell.ops) <= MAX_VERTICES
    assert sum(map(sum, cell.matrix)) <= MAX_EDGES
    assert SPACE.decode(SPACE.encode(cell)) == cell


def _shuffled(cell, rng):
    """The cell under a random permutation of its inner vertices that keeps it upper triangular."""
    graph, n = networkx.DiGraph(np.argwhere(cell.matrix).tolist()), len(cell.ops)
    order = []
    while graph:
        ready = [v for v in graph if graph.in_degree(v) == 0]
        order.append(int(rng.choice(ready)))
        graph.remove_node(order[-1])
    assert order[0] == 0
    assert order[-1] == n - 1
    return Cell(np.array(cell.matrix)[np.ix_(order, order)], [cell.ops[v] for v in order])
