"""Counts against the closed form of a space, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import zero_cost
from search_spaces import load_space
from zero_cost import static_costs

SPACE = load_space("nas-bench-201")
CONVOLUTIONS = 3 * 1  # cells of a network with one cell per stage


def test_counts_equal_the_closed_form_of_the_space():
    rng = np.random.default_rng(0)
    for arch in [SPACE.sample(rng) for _ in range(25)]:
        expected = SPACE.cost(arch, channels=8, cells_per_stage=1, input_size=16)
        found = static_costs(SPACE.build(arch, channels=8, cells_per_stage=1), torch.zeros(2, 3, 16, 16))
        assert (found.params, found.macs) == (expected["params"], expected["macs"])
        if expected["paths"]:  # the whole network: three cells, and two ways through each of two reductions
            assert (found.live_macs, found.depth) == (expected["live_macs"], expected["depth"])
            assert found.paths == expected["paths"] ** CONVOLUTIONS * 2**2
        else:
            assert (found.live_macs, found.depth, found.paths) == (0, 0, 0)


def test_the_network_of_the_best_cell_has_the_published_counts():
    """153.27 M and 1.073 M in the benchmark's own record."""
    text = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|"
    found = static_costs(SPACE.build(SPACE.decode(text)), torch.zeros(1, 3, 32, 32))
    assert (found.params, found.macs) == (1_073_466, 153_272_960)


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Linear(6, 4), (6,), 24),
        (nn.Linear(6, 4), (5, 6), 5 * 24),  # tokens
        (nn.Conv2d(4, 8, 3, padding=1, groups=2), (4, 5, 5), 25 * 8 * 2 * 9),
        (nn.Conv2d(4, 8, 3, stride=2), (4, 7, 7), 9 * 8 * 4 * 9),
        (nn.Conv1d(4, 8, 3), (4, 7), 5 * 8 * 4 * 3),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 5), 25 * 4 * 6 * 4),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5), 25 * 4 * 3 * 9),
    ],
)
def test_multiply_adds_by_hand(layer, shape, macs):
    found = static_costs(layer, torch.zeros(3, *shape))
    assert (found.macs, found.live_macs, found.depth, found.paths) == (macs, macs, 1, 1)


class Branches(nn.Module):
    """One convolution whose product with 0 is added, one that nothing reads, one plain call of a shared weight."""

    def __init__(self):
        super().__init__()
        self.zeroed, self.unread, self.shared = (nn.Conv2d(3, 3, 1, bias=False) for _ in range(3))

    def forward(self, x):
        self.unread(x)
        x = self.shared(x) + self.zeroed(x).mul(0.0)
        return nn.functional.conv2d(x, self.shared.weight) + x


def test_dead_branches_functional_calls_and_shared_weights():
    found = static_costs(Branches(), torch.zeros(1, 3, 4, 4))
    one = 9 * 16
    assert (found.params, found.macs, found.live_macs, found.depth, found.paths) == (27, 4 * one, 2 * one, 2, 2)


def test_frozen_parameters_are_not_counted():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    model[0].requires_grad_(False)
    assert static_costs(model, torch.zeros(1, 3)).params == 25


def test_a_model_that_cannot_run_without_numbers_runs_with_them():
    class Looks(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum().item() < 1e9 else x

    assert static_costs(Looks(3, 4), torch.zeros(2, 3)).macs == 12


def test_integer_inputs_start_at_the_embedding():
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 10))
    found = static_costs(model, torch.zeros(2, 7, dtype=torch.long))
    assert (found.params, found.macs, found.live_macs, found.depth) == (60 + 70, 7 * 60, 7 * 60, 1)


def test_counts_are_proxies():
    model = SPACE.build(SPACE.decode("|nor_conv_3x3~0|+|none~0|none~1|+|nor_conv_1x1~0|none~1|none~2|"), channels=4)
    images = torch.zeros(2, 3, 16, 16)
    scores, counts = (
        zero_cost.score(model, images, ["params", "macs", "live-macs", "depth"]),
        static_costs(model, images),
    )
    assert dict(scores) == {
        "params": counts.params,
        "macs": counts.macs,
        "live-macs": counts.live_macs,
        "depth": counts.depth,
    }
    assert counts.live_macs < counts.macs
