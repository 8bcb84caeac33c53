"""Losses of stacks against loops over pairs, and their gradients."""

import math

import numpy as np
import pytest
import torch

from predictors.neural.losses import LOSSES, loss_at
from search_spaces.common.errors import UserError


def loop_mse(s, y):
    return sum((a - b) ** 2 for a, b in zip(s, y, strict=True)) / len(s)


def loop_bpr(s, y):
    n = len(s)
    total = sum(math.log(1 + math.exp(s[j] - s[i])) for i in range(n) for j in range(n) if y[i] > y[j])
    return 2 / n**2 * total


def loop_hinge(s, y):
    n = len(s)
    found = [max(0, 0.1 - (s[i] - s[j])) for i in range(n) for j in range(n) if y[i] > y[j]]
    return sum(found) / max(len(found), 1)


def loop_listmle(s, y):
    order = sorted(range(len(s)), key=lambda i: -y[i])
    likelihood = 1.0
    for k in range(len(order)):
        likelihood *= math.exp(s[order[k]]) / sum(math.exp(s[i]) for i in order[k:])
    return -math.log(likelihood) / len(s)


def loop_mape(s, y):
    top = max(y) + 1
    return sum(abs(a - b) / (top - b) for a, b in zip(s, y, strict=True)) / len(s)


def loop_warp(s, y):
    total = 0.0
    for i in range(len(s)):
        wrong = [0.1 - s[i] + s[j] for j in range(len(s)) if y[i] > y[j] and 0.1 - s[i] + s[j] > 0]
        if wrong:
            total += sum(1 / k for k in range(1, len(wrong) + 1)) * sum(wrong) / len(wrong)
    return total / len(s)


def loop_diffkendall(s, y):
    n = len(s)

    def smooth(d):
        return (math.exp(0.5 * d) - 1) / (math.exp(0.5 * d) + 1)  # the sigmoid form of tanh(d / 4)

    return 1 - sum(smooth(s[i] - s[j]) * smooth(y[i] - y[j]) for i in range(n) for j in range(i)) / (n * (n - 1) / 2)


LOOPS = {
    "mse": loop_mse,
    "bpr": loop_bpr,
    "hinge": loop_hinge,
    "listmle": loop_listmle,
    "mape": loop_mape,
    "warp": loop_warp,
    "diffkendall": loop_diffkendall,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ties", [False, True])
def test_a_stack_of_losses_equals_loops(name, ties, rng):
    scores, targets = rng.normal(size=(4, 9)), rng.normal(size=(4, 9))
    if ties and name != "listmle":  # where targets tie, the likelihood depends on the order given
        targets = np.round(targets)
    found = LOSSES[name](torch.tensor(scores), torch.tensor(targets))
    assert found.shape == (4,)
    expected = [LOOPS[name](list(s), list(y)) for s, y in zip(scores, targets, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_against_finite_differences(name, rng):
    scores = torch.tensor(rng.normal(size=(2, 6)), requires_grad=True)
    targets = torch.tensor(rng.normal(size=(2, 6)))
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, targets), (scores,))


@pytest.mark.parametrize("name", LOSSES)
def test_descent_finds_the_order(name, rng):
    targets = torch.tensor(rng.permutation(8)[None] / 4.0 - 1)
    scores = torch.tensor(rng.normal(size=(1, 8)), requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        LOSSES[name](scores, targets).sum().backward()
        optimizer.step()
    assert (scores.argsort(1) == targets.argsort(1)).all()


def test_diffkendall_runs_from_zero_to_two():
    order = torch.arange(10.0)[None] * 100
    assert LOSSES["diffkendall"](order, order).item() == pytest.approx(0, abs=1e-6)
    assert LOSSES["diffkendall"](order, -order).item() == pytest.approx(2, abs=1e-6)


def test_warm_up_then_switch():
    assert loss_at("hinge>mape", 0.49) is LOSSES["hinge"]
    assert loss_at("hinge>mape", 0.5) is LOSSES["mape"]
    assert loss_at("hinge>mape", 0.3, warm_up=0.25) is LOSSES["mape"]
    assert loss_at("bpr", 0.9) is LOSSES["bpr"]


def test_unknown_losses():
    with pytest.raises(UserError, match="'listmle'"):
        loss_at("list-mle", 0)
    with pytest.raises(UserError, match="first>second"):
        loss_at("mse>bpr>hinge", 0)
