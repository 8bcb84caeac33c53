"""The spectrum of an implicit network's output against a Fourier matrix and scipy's distance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from zero_cost import score


def grid(*sizes: int) -> torch.Tensor:
    axes = [torch.arange(n, dtype=torch.float64) / n for n in sizes]
    return torch.cartesian_prod(*axes).reshape(-1, len(sizes))


class Waves(nn.Module):
    """sin(2 pi f x), no weights that matter."""

    def __init__(self, *frequency: int):
        super().__init__()
        self.frequency = torch.tensor(frequency, dtype=torch.float64)

    def forward(self, x):
        return torch.sin(2 * math.pi * (x @ self.frequency))[:, None]


@pytest.mark.parametrize(
    ("ours", "theirs", "distance"),
    [((3,), (5,), 2), ((4,), (4,), 0), ((1, 2), (3, 4), 4), ((2, 0, 1), (1, 1, 1), 0)],
)
def test_waves_are_as_far_apart_as_their_frequencies(ours, theirs, distance):
    x = grid(*[16] * len(ours))
    found = score(Waves(*ours), (x, Waves(*theirs)(x)), "spectrum")
    assert found["spectrum"] == pytest.approx(-distance, abs=1e-6), found.reasons


def test_against_a_fourier_matrix_and_scipy():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 3)).double()
    x, target = grid(8, 9), torch.rand(72, 3).double()
    found = score(model, (x, target), "spectrum")["spectrum"]

    def shares(signal):
        weights: dict[int, float] = {}
        for a in range(-4, 4):
            for b in range(-4, 5):
                wave = np.exp(-2j * np.pi * (np.arange(8)[:, None] * a / 8 + np.arange(9)[None, :] * b / 9))
                amplitude = np.abs(np.einsum("ijc,ij->c", signal, wave)).sum()
                weights[abs(a) + abs(b)] = weights.get(abs(a) + abs(b), 0.0) + amplitude
        return weights

    a, b = (shares(v.detach().numpy().reshape(8, 9, 3)) for v in (model(x), target))
    radii = range(1, 9)
    expected = scipy.stats.wasserstein_distance(radii, radii, [a[r] for r in radii], [b[r] for r in radii])
    assert found == pytest.approx(-expected, rel=1e-9)
    order = torch.randperm(72)
    assert score(model, (x[order], target[order]), "spectrum")["spectrum"] == pytest.approx(found)


def test_what_is_no_signal_says_so():
    x = grid(8, 8)
    cases = [
        (torch.randn(64, 2).double(), torch.randn(64, 1).double(), "grid"),
        (torch.randn(4, 3, 8, 8).double(), torch.arange(4), "coordinates"),
        (x, torch.zeros(64).long(), "values of a signal"),
        (x, torch.randn(64, 2).double(), "shape of the signal"),
        (x, torch.full((64, 1), 0.3).double(), "constant"),
    ]
    for inputs, labels, reason in cases:
        model = Waves(1, 2) if inputs.dim() == 2 else nn.Sequential(nn.Flatten(), nn.Linear(192, 10).double())
        assert reason in score(model, (inputs, labels), "spectrum").reasons["spectrum"]
    assert score(Waves(1, 2), x, "spectrum").reasons["spectrum"] == "needs labels"
