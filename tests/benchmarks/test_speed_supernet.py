"""The speed of supernets is compared with the same algorithm: outputs, gradients and one whole step agree."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.speed import speed_supernet as speed
from nas.supernet.steps import run_epoch


@pytest.mark.parametrize(
    ("name", "space", "depth"),
    [
        ("darts-v1", "nas-bench-201", 1),
        ("pc-darts", "nas-bench-201", 1),
        pytest.param("darts-v1", "darts", 3, marks=pytest.mark.slow),
        ("pc-darts", "darts", 3),
    ],
)
def test_what_is_written_out_is_what_the_search_does(name, space, depth):
    state, found = speed.search(name, space, 8, 8, depth, 6)
    theirs = speed.published(state, found, space, 8, depth)
    apart = speed.difference(state, theirs.network, space)
    assert set(apart) == ({"outputs", "alphas", "betas"} if name == "pc-darts" else {"outputs", "alphas"})
    assert max(apart.values()) < speed.TOLERANCE
    before = [p.detach().clone() for p in theirs.network.parameters()]
    theirs(1)
    run_epoch(state, found, stop=1)
    ours = state.supernet.network.parameters()
    moved = 0.0
    for old, reference, p in zip(before, theirs.network.parameters(), ours, strict=True):
        moved = max(moved, float((reference.detach() - old).abs().max()))
        torch.testing.assert_close(p, reference, rtol=1e-3, atol=1e-5)
    assert moved > 1e-3


def test_bytes_are_those_of_what_is_kept():
    x, layer = torch.randn(8, 3, requires_grad=True), nn.Linear(3, 5, bias=False)
    found: list[int] = []
    with speed.saved_bytes(list(layer.parameters()), found):
        y = layer(x).exp()
        (y * y).sum()
    # The input [8, 3] for the weight's gradient, the exponential [8, 5] once for itself and the product.
    assert found == [4 * (8 * 3 + 8 * 5)]
