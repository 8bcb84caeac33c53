"""NAS-Bench-Macro against its table: parameters, MACs and which architectures are one network."""

import pyarrow.parquet as pq
import pytest
import torch

from search_spaces.cells.nas_bench_macro import InvertedBottleneck, NasBenchMacro

SPACE = NasBenchMacro()


@pytest.fixture(scope="module")
def table(shared_table):
    return pq.read_table(shared_table("nas-bench-macro/accuracy.parquet")).to_pydict()


def test_iteration_is_the_table(table):
    assert {SPACE.encode(arch) for arch in SPACE} == set(table["arch"])


def test_every_cost_is_the_table_s(table):
    costs = [SPACE.cost(SPACE.decode(text)) for text in table["arch"]]
    assert [cost["params"] for cost in costs] == table["params"]
    assert [cost["macs"] for cost in costs] == table["flops"]


@pytest.mark.parametrize("text", ["00000000", "22212220", "02012100", "10201021"])
def test_built_networks_have_the_table_s_parameters(table, text):
    with torch.device("meta"):
        network = SPACE.build(SPACE.decode(text))
    params = sum(p.numel() for p in network.parameters())
    assert params == table["params"][table["arch"].index(text)]


def test_equal_keys_are_exactly_the_rows_with_equal_results(table):
    """The benchmark trained one network per class, so three accuracies to two decimals agree within a class only."""
    columns = (table[f"cifar10_test_acc_seed{seed}"] for seed in range(3))
    results = dict(zip(table["arch"], zip(*columns, table["params"], table["flops"], strict=True), strict=True))
    keys = {text: SPACE.key(SPACE.decode(text)) for text in table["arch"]}
    assert all(results[text] == results[key] for text, key in keys.items())
    assert len(set(keys.values())) == len(set(results.values()))


def test_identities_may_move_within_a_stage_without_changing_the_function():
    first, second = (SPACE.decode(text) for text in ("02010120", "02100120"))
    other = SPACE.decode("02001102")
    assert SPACE.function_key(first) == SPACE.function_key(other) != SPACE.function_key(second)
    networks = [SPACE.build(arch, channels=4).eval() for arch in (first, other)]
    networks[1].load_state_dict(dict(zip(networks[1].state_dict(), networks[0].state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(networks[0](x), networks[1](x))


def test_a_block_is_residual_only_where_its_shape_stays():
    network = SPACE.build((1,) * 8, channels=4)
    assert all(isinstance(layer, InvertedBottleneck) for layer in network.cells)
    assert [layer.residual for layer in network.cells] == [False, True, False, True, True, False, True, True]
    assert SPACE.cost((1,) * 8)["paths"] == 2**5
