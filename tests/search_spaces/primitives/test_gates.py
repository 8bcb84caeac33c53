"""Gates and PowLU: identities, published values, monotonicity, numbers of weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import allow_timm_without_torchvision
from torch import nn

from search_spaces.common.errors import UserError
from search_spaces.primitives.gates import GATES, PRIMITIVES, GatedFeedForward, gated_width, powlu, powlu_gate

BY_NAME = {p.name: p for p in PRIMITIVES}
IDENTITIES = {
    "glu": lambda a, b: a * torch.sigmoid(b),
    "bilinear": lambda a, b: a * b,
    "reglu": lambda a, b: (a + a.abs()) / 2 * b,
    "geglu": lambda a, b: a * (1 + torch.erf(a / math.sqrt(2))) / 2 * b,
    "swiglu": lambda a, b: F.silu(a) * b,
    "swiglu-clip": lambda a, b: a.clamp(max=7) * torch.sigmoid(1.702 * a.clamp(max=7)) * (b.clamp(-7, 7) + 1),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", IDENTITIES)
@pytest.mark.parametrize("layout", ["channels-first", "tokens"])
def test_gate_identities(name, layout):
    a, b = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64) * 6
    dim = 1 if layout == "channels-first" else -1
    y = BY_NAME[name].make(2 * a.shape[dim], layout=layout)(torch.cat([a, b], dim))
    torch.testing.assert_close(y, IDENTITIES[name](a, b))


def test_powlu_published_values():
    z = torch.tensor([-3, -1, 0, 0.5, 1, 2, 4, 10], dtype=torch.float64)
    expected = [-0.142278, -0.268941, 0, 0.184117, 0.731059, 2.084241, 3.928055, 5.257018]
    np.testing.assert_allclose(powlu_gate(z).numpy(), expected, atol=5e-7)
    grid = torch.linspace(0, 100, 200001, dtype=torch.float64)
    gate = powlu_gate(grid)
    assert gate.max().item() == pytest.approx(5.316, abs=5e-4)
    assert grid[gate.argmax()].item() == pytest.approx(12.90, abs=5e-3)


def test_powlu_gate_against_pow():
    z = np.linspace(0.01, 60, 999)
    for m in (1.0, 3.0, 7.5):
        expected = z ** (m / (np.sqrt(z) + 1)) / (1 + np.exp(-z))
        np.testing.assert_allclose(powlu_gate(torch.tensor(z), m).numpy(), expected, rtol=1e-10)
        np.testing.assert_allclose(powlu(torch.tensor(z), m).numpy(), z * expected, rtol=1e-10)


@pytest.mark.parametrize(("m", "increasing"), [(1, True), (3, True), (5, True), (9.9, True), (10.1, False)])
def test_powlu_is_increasing_below_10(m, increasing):
    x = torch.linspace(1e-3, 400, 400001, dtype=torch.float64)
    assert bool((torch.diff(powlu(x, m)) > 0).all()) == increasing


def test_powlu_is_smooth_at_0_and_its_gate_is_not():
    step = 1e-5

    def slope(function, side):
        x = torch.tensor([0.0, side * step], dtype=torch.float64)
        y = function(x)
        return ((y[1] - y[0]) / (x[1] - x[0])).item()

    assert slope(powlu, 1) == pytest.approx(0, abs=1e-4)
    assert slope(powlu, -1) == pytest.approx(0, abs=1e-4)
    assert slope(powlu_gate, -1) == pytest.approx(0.5, abs=1e-4)
    assert slope(powlu_gate, 1) == pytest.approx(0, abs=1e-4)


def test_powlu_grows_slower_than_swiglu_and_stays_finite_in_half_precision():
    hundred = torch.full((1, 2), 100.0)
    assert BY_NAME["powlu-glu"].make(2, layout="tokens")(hundred).item() == pytest.approx(
        100 * 100 ** (3 / 11), rel=1e-5
    )
    large = torch.tensor([1000.0, 60000.0], dtype=torch.float16)
    assert torch.isfinite(powlu_gate(large)).all()
    x = torch.tensor(1e6, dtype=torch.float64)
    assert powlu(x).item() < 1.1 * x.item()  # nearly linear, where x * silu(x) is a square
    assert BY_NAME["powlu-glu"].make(8, layout="tokens")(torch.full((8,), 300.0).half()).isfinite().all()
    assert not BY_NAME["swiglu"].make(8, layout="tokens")(torch.full((8,), 300.0).half()).isfinite().all()


def test_swiglu_is_timms(importable):
    allow_timm_without_torchvision()
    mlp = importable("timm.layers.mlp")
    theirs = mlp.GluMlp(12, hidden_features=32, act_layer=nn.SiLU, gate_last=False, bias=True)
    ours = GatedFeedForward(12, hidden=16, gate="swiglu", bias=True)
    ours.gate_and_value.load_state_dict(theirs.fc1.state_dict())
    ours.project.load_state_dict(theirs.fc2.state_dict())
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 48, 64, 768])
def test_gated_width_keeps_the_weights_of_a_plain_block(channels):
    plain = nn.Sequential(nn.Linear(channels, 4 * channels, bias=False), nn.Linear(4 * channels, channels, bias=False))
    budget = sum(p.numel() for p in plain.parameters())
    gated = sum(p.numel() for p in GatedFeedForward(channels).parameters())
    assert budget - 3 * channels < gated <= budget
    wide = gated_width(channels, multiple_of=32)
    assert wide % 32 == 0
    assert 0 <= wide - gated_width(channels) < 32


def test_gated_width_of_llama():
    """Llama 7B: 4096 channels, multiple of 256, 11008 hidden units."""
    assert gated_width(4096, multiple_of=256) == 11008


@pytest.mark.parametrize("gate", GATES)
def test_feed_forward_of_every_gate(gate):
    block = GatedFeedForward(6, gate=gate)
    x = torch.randn(2, 3, 6, requires_grad=True)
    a, b = F.linear(x, block.gate_and_value.weight).chunk(2, -1)
    if gate in IDENTITIES:
        torch.testing.assert_close(block(x), F.linear(IDENTITIES[gate](a, b), block.project.weight))
    else:
        torch.testing.assert_close(block(x), F.linear(powlu_gate(a) * b, block.project.weight))
    block(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in block.parameters())


def test_user_errors():
    with pytest.raises(UserError, match="swiglu"):
        GatedFeedForward(8, gate="swigl")
    with pytest.raises(UserError, match="even"):
        BY_NAME["swiglu"].make(7)
    with pytest.raises(UserError):
        GatedFeedForward(8, multiple_of=0)
    with pytest.raises(UserError):
        GatedFeedForward(8, hidden=0)
