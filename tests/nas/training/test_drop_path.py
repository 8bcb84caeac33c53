"""Drop-path: its expectation, how much it drops, what it never drops."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from small_trainings import network
from torch import nn

from nas.training.drop_path import DropPath
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space


class TwoPaths(nn.Module):
    """A convolution that may be dropped beside an identity that may not."""

    def __init__(self):
        super().__init__()
        self.path, self.identity = nn.Conv2d(1, 1, 1, bias=False), nn.Identity()
        nn.init.ones_(self.path.weight)

    def drop_path_modules(self) -> list[str]:
        return ["path"]

    def forward(self, x):
        return torch.cat([self.path(x), self.identity(x)], 1)


def test_whole_samples_are_dropped_and_the_mean_stays():
    model = TwoPaths()
    drop = DropPath(model)
    drop.set(0.3)
    torch.manual_seed(0)
    found = model(torch.ones(20_000, 1, 2, 2)).detach()
    assert (found[:, 1] == 1).all()
    path = found[:, 0].flatten(1)
    assert (path == path[:, :1]).all()
    assert path.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    deviation = np.sqrt(0.3 * 0.7 / 20_000)
    assert (path[:, 0] == 0).double().mean().item() == pytest.approx(0.3, abs=4 * deviation)
    assert path.double().mean().item() == pytest.approx(1.0, abs=4 * deviation / 0.7)


def test_gradients_flow_through_what_is_kept_only():
    model = TwoPaths()
    DropPath(model).set(0.5)
    x = torch.ones(64, 1, 1, 1, requires_grad=True)
    found = model(x)[:, 0]
    found.sum().backward()
    assert torch.equal(x.grad.flatten(), found.detach().flatten())  # 0 or 1 / 0.5, as the value


def test_off_in_evaluation_at_zero_and_after_removal():
    model, x = TwoPaths(), torch.randn(50, 1, 2, 2)
    drop = DropPath(model)
    drop.set(0.9)
    expected = torch.cat([x, x], 1)
    assert not torch.equal(model(x), expected)
    assert torch.equal(model.eval()(x), expected)
    model.train()
    drop.set(0.0)
    assert torch.equal(model(x), expected)
    drop.set(0.9)
    drop.remove()
    assert torch.equal(model(x), expected)


def test_in_darts_every_edge_but_the_identities():
    space = load_space("darts")
    for seed in range(20):
        arch = space.sample(np.random.default_rng(seed))
        model = space.build(arch, channels=4, layers=3)
        names = {n for n, m in model.named_modules() if n.rpartition(".")[0].endswith("edges")}
        identities = {n for n in names if isinstance(model.get_submodule(n), nn.Identity)}
        dropped = DropPath(model)
        hooked = {n for n, m in model.named_modules() if m._forward_hooks}
        assert hooked == names - identities
        assert len(dropped.handles) == len(hooked)
        kinds = Counter(type(model.get_submodule(n)).__name__ for n in hooked)
        assert "Identity" not in kinds
        if identities:
            return
    pytest.fail("no cell with a skip connection among twenty")


def test_networks_without_edges_are_refused():
    with pytest.raises(UserError, match="drop_path_modules"):
        DropPath(network())
