"""DARTS against published genotypes and sizes, the autograd graph of built networks and counting."""

import itertools
import pickle

import networkx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from search_spaces.cells.darts import DARTS_V1, DARTS_V2, PCDARTS, Darts, Genotype
from search_spaces.cells.darts_genotype import CHOOSABLE, PARTS
from search_spaces.cells.darts_network import OPERATIONS, FactorizedReduce
from search_spaces.choice import find_choices, select, selected_state_dict
from search_spaces.common.errors import UserError
from search_spaces.graph import live
from search_spaces.registry import load_space

SPACE = Darts()
# As printed in quark0/darts, cnn/genotypes.py and its README.
DARTS_V2_TEXT = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), "
    "('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], "
    "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), "
    "('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])"
)
IMAGENET = {"channels": 48, "layers": 14, "num_classes": 1000, "stem": "imagenet"}


@pytest.fixture(scope="module")
def sampled():
    rng = np.random.default_rng(1)
    return [SPACE.sample(rng) for _ in range(1000)]


def test_published_parameter_count_is_exact():
    """A training log of the published code has `param size = 3.349342MB` for DARTS_V2 (auxiliary head excluded)."""
    assert SPACE.cost(DARTS_V2)["params"] == 3_349_342
    assert sum(p.numel() for p in SPACE.build(DARTS_V2).parameters()) == 3_349_342


def test_published_sizes_in_millions():
    """The tables of the DARTS and PC-DARTS papers: 3.3 and 3.6 on CIFAR-10, 4.7 and 5.3 on ImageNet."""
    sizes = [
        SPACE.cost(DARTS_V2)["params"],
        SPACE.cost(PCDARTS)["params"],
        SPACE.cost(DARTS_V2, **IMAGENET)["params"],
        SPACE.cost(PCDARTS, **IMAGENET)["params"],
    ]
    assert [round(size / 1e6, 1) for size in sizes] == [3.3, 3.6, 4.7, 5.3]


def test_published_notation_is_read_in_any_order():
    assert SPACE.decode(DARTS_V2_TEXT) == DARTS_V2
    assert SPACE.decode(f"  {DARTS_V2_TEXT}\n") == DARTS_V2
    assert SPACE.decode(DARTS_V2_TEXT.replace("[2, 3, 4, 5]", "range(2, 6)")) == DARTS_V2
    assert SPACE.decode(DARTS_V2_TEXT.replace("normal=", "").replace("normal_concat=", "")) == DARTS_V2
    text = SPACE.encode(DARTS_V2)
    assert "('skip_connect', 0), ('sep_conv_3x3', 1)" in text
    assert eval(text, {"Genotype": Genotype, "range": range}) == DARTS_V2


def test_round_trip(sampled):
    for arch in (DARTS_V1, DARTS_V2, PCDARTS, *sampled):
        text = SPACE.encode(arch)
        assert SPACE.decode(text) == arch
        assert SPACE.encode(SPACE.decode(text)) == text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (DARTS_V2_TEXT, "", "Genotype(normal="),
        (DARTS_V2_TEXT, "Genotype(normal=[", "Genotype(normal="),
        (DARTS_V2_TEXT, "__import__('os').system('true')", "Genotype(normal="),
        (DARTS_V2_TEXT, "(" * 5000, "Genotype(normal="),
        ("Genotype(", "Genotyp(", "Genotype(normal="),
        ("reduce=", "reduction=", "did you mean 'reduce'"),
        ("reduce_concat=[2, 3, 4, 5]", "", "each of normal, normal_concat"),
        ("normal_concat=[2, 3, 4, 5]", "normal_concat=range(2, 5)", "normal_concat=range(2, 6)"),
        ("normal_concat=[2, 3, 4, 5]", "normal_concat=range(10**9)", "a list, a tuple or range(2, 6)"),
        ("normal_concat=[2, 3, 4, 5]", "normal_concat=print(1)", "a list, a tuple or range(2, 6)"),
        ("'dil_conv_3x3'", "'dil_conv_3_3'", "did you mean 'dil_conv_3x3'"),
        ("'dil_conv_3x3'", "'none'", "an operation of darts"),
        ("'dil_conv_3x3'", "['none']", "an operation of darts"),
        ("('dil_conv_3x3', 2)", "('dil_conv_3x3', 5)", "inputs from 0 to 4 for node 5"),
        ("('dil_conv_3x3', 2)", "('dil_conv_3x3', -1)", "inputs from 0 to 4 for node 5"),
        ("('dil_conv_3x3', 2)", "('dil_conv_3x3', 0)", "two different inputs for node 5 of normal"),
        ("('dil_conv_3x3', 2)", "('dil_conv_3x3', 2.0)", "an integer as the input"),
        ("('dil_conv_3x3', 2)", "('dil_conv_3x3',)", "a pair (operation, input)"),
        (", ('dil_conv_3x3', 2)", "", "8 pairs (operation, input) in normal"),
    ],
)
def test_nonsense_is_named(old, new, message):
    assert old in DARTS_V2_TEXT
    with pytest.raises(UserError) as error:
        SPACE.decode(DARTS_V2_TEXT.replace(old, new))
    assert message in str(error.value)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(DARTS_V2_TEXT)), st.integers(0, 12), st.text(max_size=12))
def test_damaged_text_is_refused_or_read_as_what_it_says(place, cut, inserted):
    text = DARTS_V2_TEXT[:place] + inserted + DARTS_V2_TEXT[place + cut :]
    try:
        arch = SPACE.decode(text)
    except UserError:
        return
    assert SPACE.decode(SPACE.encode(arch)) == arch


def test_size_and_codes(sampled):
    """Two of 2, 3, 4 and 5 inputs at the four nodes of a cell, seven operations at its eight places."""
    cell = 1 * 3 * 6 * 10 * 7**8
    assert SPACE.size == cell**2 < 2**63
    with pytest.raises(UserError, match="enumerated"):
        len(SPACE)
    with pytest.raises(UserError, match="enumerated"):
        iter(SPACE)
    codes = SPACE.codes(sampled)
    assert codes.dtype == np.int64
    assert [SPACE.from_code(int(code)) for code in codes] == sampled
    for code in (0, 1, cell - 1, cell, cell**2 - 1):
        assert SPACE.codes([SPACE.from_code(code)]).tolist() == [code]


def test_sampling_is_uniform(sampled):
    """Every operation at every place and every pair of inputs of a node, within five standard deviations."""
    for part, place in itertools.product(PARTS, range(8)):
        ops = [getattr(arch, part)[place][0] for arch in sampled]
        _assert_uniform([ops.count(op) for op in CHOOSABLE])
    for part, node in itertools.product(PARTS, range(4)):
        pairs = [tuple(source for _, source in getattr(arch, part)[2 * node : 2 * node + 2]) for arch in sampled]
        _assert_uniform([pairs.count(pair) for pair in itertools.combinations(range(node + 2), 2)])


def test_neighbors_are_all_genotypes_one_change_away(sampled):
    for arch in sampled[:10]:
        neighbors = list(SPACE.neighbors(arch))
        # 16 places with 6 other operations; nodes 3, 4, 5 have 1, 2, 3 other inputs for each of two places.
        assert len(neighbors) == len(set(neighbors)) == 16 * 6 + 2 * 2 * (1 + 2 + 3)
        assert arch not in neighbors
        for neighbor in neighbors:
            assert _distance(arch, neighbor) == 1


def test_mutation_reaches_every_neighbor(sampled):
    rng = np.random.default_rng(2)
    neighbors = set(SPACE.neighbors(sampled[0]))
    reached = {SPACE.mutate(sampled[0], rng) for _ in range(4000)}
    assert reached == neighbors


def test_crossover_takes_whole_nodes(sampled):
    rng = np.random.default_rng(3)
    for first, second in itertools.pairwise(sampled[:100]):
        child = SPACE.crossover(first, second, rng)
        for part, node in itertools.product(PARTS, range(4)):
            place = slice(2 * node, 2 * node + 2)
            assert getattr(child, part)[place] in (getattr(first, part)[place], getattr(second, part)[place])
    children = {SPACE.crossover(DARTS_V1, PCDARTS, rng) for _ in range(50)}
    assert len(children) > 30


def test_graph_spells_the_genotype(sampled):
    """Live throughout, one DAG, and the genotype can be read back from it."""
    for arch in sampled[:50]:
        graph = SPACE.graph(arch)
        assert len(graph) == 30
        assert live(graph).all()
        assert set(graph.ops) <= set(SPACE.vocabulary)
        assert graph.parts == ("both", *["normal"] * 14, *["reduce"] * 14, "both")
        cells = {}
        for start, part in ((1, "normal"), (15, "reduce")):
            totals = [v for v in range(start, start + 14) if graph.ops[v] == "sum"]
            states, edges = [start, start + 1, *totals], []
            for total in totals:
                assert graph.adjacency[total, -1]
                for v in np.flatnonzero(graph.adjacency[:, total]):
                    (source,) = np.flatnonzero(graph.adjacency[:, v])
                    edges.append((graph.ops[v], states.index(source)))
            cells[part] = edges
        assert Genotype(cells["normal"], range(2, 6), cells["reduce"], range(2, 6)) == arch
    ops, adjacency, mask = SPACE.graphs(sampled[:5])
    assert ops.shape == (5, 30)
    assert (adjacency[4] == SPACE.graph(sampled[4]).adjacency).all()
    assert mask.all()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_cost_counts_the_built_network(seed, stem):
    """Parameters by counting, MACs by hooks, depth in the autograd graph, paths by listing."""
    arch = SPACE.sample(np.random.default_rng(seed))
    scale = {"channels": 4, "layers": 3 + seed, "stem_stride": 1 + seed % 2, "num_classes": 7, "stem": stem}
    size = 13 if stem == "cifar" else 50
    model = SPACE.build(arch, in_channels=2, auxiliary=seed % 2 == 0, **scale).eval()
    cost = SPACE.cost(arch, in_channels=2, input_size=size, auxiliary=seed % 2 == 0, **scale)
    macs = []

    def count(module, inputs, output):
        positions = output[0, 0].numel() if output.dim() == 4 else 1
        macs.append(module.weight.numel() * positions)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    logits = model(torch.zeros(1, 2, size, size))
    assert logits.shape == (1, 7)
    assert cost["params"] == sum(p.numel() for p in model.parameters())
    assert cost["macs"] == cost["live_macs"] == sum(macs)
    assert cost["depth"] == _layers_on_longest_path(logits)
    graph = SPACE.graph(arch).to_networkx()
    assert cost["paths"] == len(list(networkx.all_simple_paths(graph, 0, 29)))


@pytest.mark.parametrize("size", [8, 32])
def test_networks_run_at_small_sizes(size):
    x = torch.randn(2, 3, size, size)
    for arch in (DARTS_V1, DARTS_V2, PCDARTS):
        model = SPACE.build(arch, channels=4, layers=5)
        assert model(x).shape == (2, 10)
        assert model.forward_features(x).shape == (2, 64)
        assert model.stages() == [f"cells.{i}" for i in range(5)]
        assert isinstance(model.classifier, nn.Linear)
        reduced = [_output_size(model, name, x) for name in model.stages()]
        assert reduced == [size, size // 2, size // 2, size // 4, size // 4]


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 2)])
def test_factorized_reduce_sees_every_pixel(size):
    """Any size halves upward; two of every four pixels count, one for each half of the channels."""
    module = FactorizedReduce(1, 2, lambda c: nn.Identity(), lambda c: nn.Identity())
    with torch.no_grad():
        module.conv_a.weight.fill_(1)
        module.conv_b.weight.fill_(1)
    x = torch.arange(float(size[0] * size[1])).reshape(1, 1, *size) + 1
    y = module(x)
    assert y.shape[2:] == (-(-size[0] // 2), -(-size[1] // 2))
    assert torch.equal(y[:, :1], x[:, :, ::2, ::2])
    shifted = x[:, :, 1::2, 1::2]
    assert torch.equal(y[:, 1:, : shifted.shape[2], : shifted.shape[3]], shifted)


def test_auxiliary_head():
    """768 features at the published map size; the main logits do not depend on it."""
    model = SPACE.build(DARTS_V2, channels=4, layers=3, auxiliary=True).eval()
    x = torch.randn(2, 3, 32, 32)
    logits, auxiliary = model.forward_with_auxiliary(x)
    torch.testing.assert_close(logits, model(x))
    maps = torch.randn(2, model.auxiliary_head.features[0].in_channels, 8, 8)
    head = model.auxiliary_head
    by_hand = head.features(nn.AvgPool2d(5, stride=3, count_include_pad=False)(maps.relu()))
    assert by_hand.shape == (2, 768, 1, 1)
    torch.testing.assert_close(head(maps), head.classifier(by_hand.flatten(1)))
    assert auxiliary.shape == model.forward_with_auxiliary(x[:, :, :8, :8])[1].shape == (2, 10)
    with pytest.raises(UserError, match="auxiliary=True"):
        SPACE.build(DARTS_V2, channels=4, layers=3).forward_with_auxiliary(x)
    imagenet = SPACE.build(DARTS_V2, channels=4, layers=3, auxiliary=True, stem="imagenet").auxiliary_head
    assert sum(isinstance(m, nn.BatchNorm2d) for m in imagenet.modules()) == 1


@pytest.mark.parametrize("scale", [{}, {"stem": "imagenet", "auxiliary": True}])
def test_factories_replace_every_norm_and_activation(sampled, scale):
    for arch in (PCDARTS, *sampled[:3]):
        plain = SPACE.build(arch, channels=4, layers=4, **scale)
        model = SPACE.build(
            arch, channels=4, layers=4, norm=lambda c: nn.GroupNorm(1, c), act=lambda c: nn.PReLU(c), **scale
        )
        kinds = [type(m) for m in model.modules()]
        assert nn.BatchNorm2d not in kinds
        assert nn.ReLU not in kinds
        assert kinds.count(nn.GroupNorm) == sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules()) > 0
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_choices_become_build(sampled):
    """The weights of a selection load into build(arch) by name, all of them, and compute the same."""
    torch.manual_seed(0)
    network = SPACE.choices(channels=4, layers=5).eval()
    choices = find_choices(network)
    assert len(choices) == 28
    assert all(len(choice.candidates) == len(OPERATIONS) for found in choices.values() for choice in found)
    x = torch.randn(2, 3, 8, 8)
    for arch in (DARTS_V2, *sampled[:3]):
        assert sum(index > 0 for index in SPACE.select(arch).values()) == 16
        select(network, SPACE.select(arch))
        model = SPACE.build(arch, channels=4, layers=5).eval()
        model.load_state_dict(selected_state_dict(network), strict=True)
        torch.testing.assert_close(network(x), model(x))


def test_scales_are_checked():
    for scale, message in [
        ({"layer": 3}, "did you mean 'layers'"),
        ({"channels": 5}, "an even number of channels"),
        ({"layers": 0}, "at least one layer"),
        ({"stem": "imagnet"}, "did you mean 'imagenet'"),
    ]:
        with pytest.raises(UserError, match=message):
            SPACE.build(DARTS_V1, **scale)
    for layers in (1, 2):
        assert SPACE.build(DARTS_V1, channels=2, layers=layers)(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_registry_and_pickling():
    assert isinstance(load_space("Darts"), Darts)
    space, arch = pickle.loads(pickle.dumps((SPACE, PCDARTS)))
    assert arch == PCDARTS
    assert hash(arch) == hash(PCDARTS)
    assert space.encode(arch) == space.key(arch) == SPACE.encode(PCDARTS)


def _assert_uniform(counts):
    total, share = sum(counts), 1 / len(counts)
    deviation = np.sqrt(total * share * (1 - share))
    assert (np.abs(np.array(counts) - total * share) <= 5 * deviation).all()


def _distance(first, second):
    """The fewest (operation, input) changes between two genotypes."""
    changes = 0
    for part, node in itertools.product(PARTS, range(4)):
        (a, b), (c, d) = (getattr(arch, part)[2 * node : 2 * node + 2] for arch in (first, second))
        straight = (a[0] != c[0]) + (a[1] != c[1]) + (b[0] != d[0]) + (b[1] != d[1])
        crossed = (a[0] != d[0]) + (a[1] != d[1]) + (b[0] != c[0]) + (b[1] != c[1])
        changes += min(straight, crossed)
    return changes


def _output_size(model, name, x):
    sizes = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, y: sizes.append(y.shape[-1]))
    model(x)
    handle.remove()
    return sizes[0]


def _layers_on_longest_path(y):
    """Convolutions and linear layers on the longest path of the autograd graph."""
    depth: dict = {}
    stack = [y.grad_fn]
    while stack:
        node = stack[-1]
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        waiting = [parent for parent in parents if parent not in depth]
        if waiting:
            stack += waiting
            continue
        stack.pop()
        own = node.name() in ("ConvolutionBackward0", "AddmmBackward0")
        depth[node] = own + max((depth[parent] for parent in parents), default=0)
    return depth[y.grad_fn]
