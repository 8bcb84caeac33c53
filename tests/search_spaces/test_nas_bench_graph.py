"""NAS-Bench-Graph against the benchmark's own package: integers, tables, parameter counts."""

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from search_spaces import UserError
from search_spaces.cells.nas_bench_graph import (
    DATASETS,
    OPERATIONS,
    PATTERNS,
    GraphArchitecture,
    NasBenchGraph,
    NasBenchGraphProteins,
    normalize,
)

SPACE, PROTEINS = NasBenchGraph(), NasBenchGraphProteins()
LINKS = list(itertools.product(*(range(i + 1) for i in range(4))))
SMALL = {"in_features": 12, "num_classes": 3, "hidden": 8}


@pytest.fixture(scope="module")
def oracle(importable):
    return importable("nas_bench_graph")


@pytest.fixture(scope="module")
def all_archs():
    return list(SPACE)


@pytest.fixture(scope="module")
def table(oracle):
    """A function: data set -> {code: parameters}, from the wheel's files."""

    def read(name: str) -> dict[int, int]:
        with open(Path(oracle.__file__).parent / "light" / f"{name}.bench", "rb") as file:
            return {code: round(float(row["para"]) * 1e6) for code, row in pickle.load(file).items()}

    return read


def _graph(nodes=9, edges=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(nodes, 12, generator=generator), torch.randint(nodes, (2, edges), generator=generator)


def test_the_code_is_the_package_s_for_every_way_to_write_an_architecture(oracle):
    archs = [GraphArchitecture(links, ops) for links in LINKS for ops in itertools.product(OPERATIONS, repeat=4)]
    archs = [arch for arch in archs if set(arch.ops) != {"skip"}][::5]
    expected = [oracle.Arch(list(arch.links), list(arch.ops)).valid_hash() for arch in archs]
    np.testing.assert_array_equal(SPACE.codes(archs), expected)
    assert {arch.links for arch in archs} == set(LINKS)


def test_published_example():
    arch = SPACE.decode("0,1,2,1:gcn,gin,fc,cheb")  # README of the package
    assert SPACE.codes([arch])[0] == 61237
    assert SPACE.key(arch) == SPACE.key(SPACE.decode("0,1,1,3:gcn,cheb,gin,fc"))


def test_enumeration_is_the_table(all_archs, table):
    codes = SPACE.codes(all_archs).tolist()
    assert len(SPACE) == len(codes) == 26_206
    assert set(codes) == set(table("cora"))
    proteins = PROTEINS.codes(list(PROTEINS)).tolist()
    assert len(PROTEINS) == len(proteins) == 2_021
    assert set(proteins) == set(table("proteins"))


def test_codes_lead_back_to_normal_forms(all_archs):
    some = all_archs[::97]
    assert [SPACE.from_code(int(code)) for code in SPACE.codes(some)] == some
    for code in (8888, 88888, 99999, 612370, -1, 10):  # all skip, no such digits, not sorted
        with pytest.raises(UserError):
            SPACE.from_code(code)


@pytest.mark.parametrize("name", [name for name in DATASETS if name not in ("physics", "proteins")])
def test_parameters_are_the_table_s(name, all_archs, table):
    params = table(name)
    archs = all_archs[::4]
    expected = [params[code] for code in SPACE.codes(archs).tolist()]
    assert [SPACE.cost(arch, **DATASETS[name])["params"] for arch in archs] == expected


def test_parameters_on_proteins_and_physics(all_archs, table):
    params = table("proteins")
    assert all(PROTEINS.cost(a)["params"] == params[c] for a, c in zip(PROTEINS, sorted(params), strict=True))
    params = table("physics")  # averages over runs of unequal sizes in some rows
    codes = SPACE.codes(all_archs).tolist()
    equal = [SPACE.cost(a, **DATASETS["physics"])["params"] == params[c] for a, c in zip(all_archs, codes, strict=True)]
    assert np.mean(equal) > 0.9


@pytest.mark.parametrize("name", ["cora", "pubmed", "cs", "computers"])
def test_built_networks_have_the_table_s_parameters(name, all_archs, table, rng):
    params = table(name)
    for i in rng.integers(len(all_archs), size=12):
        with torch.device("meta"):
            network = SPACE.build(all_archs[i], **DATASETS[name])
        assert sum(p.numel() for p in network.parameters()) == params[int(SPACE.codes([all_archs[i]])[0])]


@pytest.mark.parametrize("sizes", [{}, {"pre_layers": 1}, {"post_layers": 0}])
def test_macs_are_the_matrix_products(sizes, rng):
    x, edge_index = _graph()
    chains = [GraphArchitecture(PATTERNS[-1], (op, "fc", op, "skip")) for op in OPERATIONS]
    for arch in chains + [SPACE.sample(rng) for _ in range(10)]:
        network = SPACE.build(arch, **SMALL, **sizes).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x, edge_index)
        assert SPACE.cost(arch, nodes=9, **SMALL, **sizes)["macs"] == counter.get_total_flops() // 2


def test_nodes_read_their_link_and_leaves_are_concatenated():
    """A network of linear maps by hand: node 2 reads node 1, nodes 2 and 3 and 4 are leaves."""
    network = SPACE.build(GraphArchitecture((0, 1, 0, 0), ("fc", "fc", "fc", "gcn")), **SMALL).eval()
    x, edge_index = _graph()
    # Normal form: 0,0,0,1 with the chain first and the two other leaves in the order of operations.
    assert network.links == (0, 0, 0, 1)
    first, gcn, fc, second = (node.operation for node in network.nodes)
    hidden = network.nodes[3].norm(first(x)[:, :, None, None])[:, :, 0, 0].relu()  # running statistics: eval mode
    features = torch.cat([gcn(x, edge_index), fc(x), second(hidden)], 1).relu()
    torch.testing.assert_close(network(x, edge_index), network.classifier(network.merge(features)))


def test_relabelled_nodes_give_relabelled_outputs(rng):
    x, edge_index = _graph()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    inverse = torch.argsort(order)
    for op in OPERATIONS[:-1]:
        network = SPACE.build(GraphArchitecture(PATTERNS[3], (op,) * 4), **SMALL).eval()
        torch.testing.assert_close(network(x[order], inverse[edge_index]), network(x, edge_index)[order])


def test_normal_forms_are_fixed_points_and_all_samples_build(rng):
    x, edge_index = _graph()
    for _ in range(300):
        arch = SPACE.sample(rng)
        assert normalize(normalize(arch)) == normalize(arch)
    for arch in (GraphArchitecture((0, 0, 0, 0), ("skip", "skip", "skip", "gcn")), SPACE.sample(rng)):
        assert SPACE.build(arch, **SMALL)(x, edge_index).shape == (9, 3)


def test_graph_is_the_tree_with_its_leaves_on_the_output():
    graph = SPACE.graph(SPACE.decode("0,1,1,2:gcn,cheb,gin,fc"))
    assert sorted((graph.ops[i], graph.ops[j]) for i, j in graph.edges()) == sorted(
        [
            ("input", "gcn"),
            ("gcn", "cheb"),
            ("gcn", "gin"),
            ("cheb", "fc"),
            ("gin", "output"),
            ("fc", "output"),
        ]
    )


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [("0,1,2,1:gcn,gin,fc,chev", "cheb"), ("0,2,2,1:gcn,gin,fc,fc", None), ("0,0,0,0:skip,skip,skip,skip", None)],
)
def test_nonsense_is_refused(text, suggestion):
    with pytest.raises(UserError) as caught:
        SPACE.decode(text)
    assert caught.value.suggestion == suggestion
    with pytest.raises(UserError):
        PROTEINS.decode("0,0,0,0:gcn,gcn,gcn,gat")


@pytest.mark.parametrize("wrong", [{"hidden": 6}, {"post_layers": 2}, {"hiden": 8}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(UserError):
        SPACE.build(SPACE.decode("0,1,2,3:gcn,gcn,gcn,gcn"), **wrong)


def test_gradients_in_training_are_those_of_finite_differences():
    """The norms see nodes as an image; a transposed view of it once gave wrong gradients on a CPU."""
    space = NasBenchGraph()
    arch = space.sample(np.random.default_rng(0))
    network = space.build(arch, in_features=5, num_classes=3, hidden=8, dropout=0.0).double()
    x = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 0]])
    weights = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(x):
        return (network(x, edges) * weights).sum()

    direction = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    moved = x.clone().requires_grad_()
    slope = (torch.autograd.grad(loss(moved), moved)[0] * direction).sum()
    step = 1e-6
    difference = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert slope.item() == pytest.approx(difference.item(), rel=1e-4)
