"""NATS size: the published parameter counts, the network's shape, the notation."""

import itertools

import numpy as np
import pytest
import torch

from search_spaces import UserError
from search_spaces.cells.nats_size import NatsSize

SPACE = NatsSize()
# Parameters that the benchmark's own file states for CIFAR-10 (`params` of hp 90).
PUBLISHED = {"8:8:8:8:8": 11_714, "8:8:16:40:40": 107_826, "64:64:64:64:64": 713_674}


@pytest.mark.parametrize(("text", "params"), PUBLISHED.items())
def test_parameters_are_the_published_ones(text, params):
    arch = SPACE.decode(text)
    assert SPACE.cost(arch)["params"] == params
    assert sum(p.numel() for p in SPACE.build(arch).parameters()) == params


def test_two_cells_change_width_and_each_reduction_halves_the_resolution():
    network = SPACE.build(SPACE.decode("8:16:24:32:40"))
    shapes = []
    for cell in network.cells:
        cell.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    network(torch.zeros(2, 3, 32, 32))
    assert shapes == [(8, 32, 32), (16, 16, 16), (24, 16, 16), (32, 8, 8), (40, 8, 8)]


def test_the_skip_is_an_identity_only_where_the_width_stays():
    network = SPACE.build(SPACE.decode("8:16:16:32:40"))
    skips = [network.cells[i].edges[3] for i in (0, 2, 4)]
    assert [isinstance(skip, torch.nn.Identity) for skip in skips] == [True, True, False]


def test_iteration_covers_the_product_in_the_order_of_the_codes():
    expected = list(itertools.product(range(8, 65, 8), repeat=5))
    assert list(SPACE) == expected
    assert len(SPACE) == 32_768
    some = expected[::997]
    np.testing.assert_array_equal(SPACE.codes(some), np.arange(32_768)[::997])
    assert [SPACE.from_code(int(code)) for code in SPACE.codes(some)] == some


def test_neighbors_are_all_architectures_at_one_other_width():
    arch = (8, 64, 32, 16, 40)
    found = set(SPACE.neighbors(arch))
    expected = {other for other in SPACE if sum(a != b for a, b in zip(arch, other, strict=True)) == 1}
    assert found == expected


def test_mutations_reach_every_neighbour(rng):
    arch = (8, 64, 32, 16, 40)
    assert {SPACE.mutate(arch, rng) for _ in range(600)} == set(SPACE.neighbors(arch))


@pytest.mark.parametrize(("text", "suggestion"), [("8:16:25:32:64", "24"), ("0:8:8:8:8", "8"), ("8:8:8:8:72", "64")])
def test_a_width_off_the_grid_names_the_nearest(text, suggestion):
    with pytest.raises(UserError) as caught:
        SPACE.decode(text)
    assert caught.value.suggestion == suggestion
