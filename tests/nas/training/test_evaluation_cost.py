"""Costs of a network against closed forms and chains computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nas.training.evaluation.cost import (
    count_macs,
    count_params,
    peak_activation_bytes,
    time_model,
    training_activation_bytes,
)
from search_spaces.registry import load_space

SPACES = {
    "nas-bench-101": {"channels": 8, "cells_per_stage": 1},
    "nas-bench-201": {"channels": 4, "cells_per_stage": 1},
    "nas-bench-macro": {},
    "nats-size": {},
    "darts": {"channels": 4, "layers": 3},
}


@pytest.mark.parametrize("name", SPACES)
def test_macs_and_params_are_those_of_the_space(name, rng):
    space = load_space(name)
    for _ in range(2):
        arch = space.sample(rng)
        network = space.build(arch, num_classes=7, **SPACES[name]).eval()
        cost = space.cost(arch, num_classes=7, input_size=16, **SPACES[name])
        assert count_macs(network, torch.zeros(2, 3, 16, 16)) == cost["macs"]
        assert count_params(network) == cost["params"]


def test_macs_by_hand():
    """A depthwise convolution, a grouped one of stride 2, linear layers with and without bias; products of
    activations do not count."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.grouped = nn.Conv2d(4, 6, 1, stride=2, groups=2)
            self.first, self.last = nn.Linear(6, 5, bias=False), nn.Linear(5, 3)

        def forward(self, x):
            x = self.grouped(self.depthwise(x)).flatten(2).transpose(1, 2)
            x = torch.bmm(x, torch.bmm(x.transpose(1, 2), x))
            return self.last(self.first(x.mean(1)))

    expected = 4 * 9 * 64 + 6 * 2 * 16 + 6 * 5 + 5 * 3
    for batch in (1, 3):
        assert count_macs(Model(), torch.zeros(batch, 4, 8, 8)) == expected
    assert count_macs(nn.Flatten(), torch.zeros(1, 2, 2)) == 0


def test_peak_of_a_chain():
    """Linear layers 10 -> 20 -> 30 -> 5 in float32: the most is the result of one beside that of the next."""
    chain = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 30), nn.Linear(30, 5))
    assert peak_activation_bytes(chain, torch.zeros(1, 10)) == 4 * (20 + 30)
    assert peak_activation_bytes(chain, torch.zeros(7, 10)) == 7 * 4 * (20 + 30)
    assert peak_activation_bytes(chain.double(), torch.zeros(1, 10, dtype=torch.float64)) == 8 * (20 + 30)


def test_peak_sees_what_is_alive():
    class Branches(nn.Module):
        """Keeps `wide` while `narrow` is made; views, in-place operations and the input take nothing."""

        def forward(self, x):
            wide = torch.cat([x, x, x])  # 3 n
            narrow = x.view(-1) * 2  # 4 n
            narrow.add_(1)
            wide = wide[: len(x)] + 1  # 5 n while it is made, then 2 n
            return wide.view(-1) + narrow  # 3 n

    x = torch.zeros(16, 8)
    assert peak_activation_bytes(Branches(), x) == 5 * 16 * 8 * 4
    assert peak_activation_bytes(nn.Identity(), x) == 0
    residual = torch.zeros(1, 1)
    square = nn.Sequential(*[nn.Linear(1, 1) for _ in range(50)])  # freed addresses are used again
    assert peak_activation_bytes(square, residual) == 8


def test_bytes_kept_for_training():
    """A linear layer keeps its input; ReLU its result, which the next layer keeps as well (one storage)."""
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    for count in (1, 3):
        assert training_activation_bytes(model, torch.zeros(count, 10)) == 4 * (10 + 20)
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    # The convolution keeps its input, the normalisation the convolution's result; ReLU its own. Statistics of the
    # batch are no part of an image.
    assert training_activation_bytes(pooled, torch.rand(3, 3, 6, 6)) == 4 * 36 * (3 + 4 + 4)


def test_times():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    found = time_model(model, torch.zeros(5, 3, 2, 2), compiled=False)
    assert [(t.mode, t.batch_size, t.reason) for t in found] == [("eager", 1, None), ("eager", 64, None)]
    for timing in found:
        assert timing.latency_ms > 0
        assert np.isclose(timing.images_per_second, timing.batch_size / (timing.latency_ms / 1000))


def test_without_a_compiler_the_reason_is_named(monkeypatch):
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.ReLU()).eval()
    with torch._inductor.config.patch(force_disable_caches=True):
        found = time_model(model, torch.zeros(1, 3, 2, 2), batch_sizes=(2,))
    assert found[0].latency_ms > 0
    assert (found[1].mode, found[1].latency_ms, found[1].images_per_second) == ("compiled", None, None)
    assert "compiler" in found[1].reason.lower()


def test_compiled_outputs_that_differ_have_no_time(monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda x: model(x) + 1)
    found = time_model(model, torch.zeros(1, 3, 2, 2), batch_sizes=(1,))
    assert found[1].latency_ms is None
    assert "differ by 1" in found[1].reason


@pytest.mark.slow
def test_compiled_times():
    space = load_space("nas-bench-201")
    for index in (1, 15624):
        model = space.build(space.from_code(index), channels=4, cells_per_stage=1).eval()
        found = time_model(model, torch.rand(2, 3, 8, 8), batch_sizes=(1, 4))
        assert [t.reason for t in found] == [None] * 4
        assert all(t.latency_ms > 0 for t in found)
