"""Attacks: closed forms on linear classifiers, bounds, seeds, and how attacks are written."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nas.training.evaluation.attack import Attack, parse_attack, perturb, pixels
from search_spaces.common.errors import RunError, UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2)).eval()


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(1)
    hidden = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    return nn.Sequential(hidden, nn.Linear(8 * 4 * 4, 5)).eval()


def images(count: int = 32, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return low + (high - low) * torch.rand(count, 3, 4, 4, generator=generator(9))


@pytest.mark.parametrize("text", ["pgd:epsilon=4/255", "fgsm:epsilon=4/255", "pgd:epsilon=4/255,steps=40,restarts=3"])
def test_a_linear_classifier_meets_its_optimum(linear, text):
    """With two classes the loss falls with the margin (w_y - w_other) x, so the worst image in the ball is
    x - epsilon sign(w_y - w_other), clipped to valid pixels, for every x."""
    x, y = images(), torch.arange(32) % 2
    found = perturb(linear, x, y, parse_attack(text), generator=generator())
    weight = linear[1].weight
    towards = (weight[1 - y] - weight[y]).sign().view_as(x)
    assert torch.allclose(found, (x + 4 / 255 * towards).clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize(
    "attack", [Attack(), Attack("fgsm", epsilon=0.3), Attack(epsilon=0.2, step_size=1, restarts=2)]
)
def test_changes_stay_within_epsilon_and_valid_pixels(network, attack):
    x, y = images().round(decimals=1), torch.arange(32) % 5
    found = perturb(network, x, y, attack, generator=generator())
    assert (found - x).abs().max() <= attack.epsilon + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found - x).abs().max() > 0.5 * attack.epsilon


def test_more_steps_and_restarts_do_not_lower_the_loss(network):
    x, y = images(128), torch.arange(128) % 5

    def loss(attack: Attack) -> float:
        changed = perturb(network, x, y, attack, generator=generator())
        return nn.functional.cross_entropy(network(changed), y).item()

    clean = nn.functional.cross_entropy(network(x), y).item()
    by_steps = [loss(Attack(epsilon=0.1, step_size=0.02, steps=steps)) for steps in (1, 3, 10, 30)]
    assert clean < by_steps[1]
    assert by_steps == sorted(by_steps)
    assert loss(Attack(epsilon=0.1, step_size=0.02, steps=3, restarts=4)) >= by_steps[1]


def test_restarts_keep_the_worst_of_each_image(network):
    """The same draws, run by run: the kept image is wrong if any run's is, and has the greatest loss among those."""
    x, y = images(64), torch.arange(64) % 5
    one = Attack(epsilon=0.05, step_size=0.03, steps=2)
    shared = generator(4)
    runs = torch.stack([perturb(network, x, y, one, generator=shared) for _ in range(3)])
    logits = torch.stack([network(run) for run in runs])
    losses = torch.stack([nn.functional.cross_entropy(found, y, reduction="none") for found in logits])
    wrong = logits.argmax(2) != y
    expected = []
    for k in range(64):
        choices = [r for r in range(3) if wrong[r, k]] or [0, 1, 2]
        expected.append(max(choices, key=lambda r: losses[r, k].item()))
    assert len(set(expected)) == 3
    attack = Attack(epsilon=0.05, step_size=0.03, steps=2, restarts=3)
    found = perturb(network, x, y, attack, generator=generator(4))
    assert torch.equal(found, runs[expected, torch.arange(64)])


def test_the_seed_decides_and_the_model_keeps_its_gradients(network):
    x, y = images(), torch.arange(32) % 5
    first = perturb(network, x, y, Attack(steps=1), generator=generator(1))
    assert torch.equal(first, perturb(network, x, y, Attack(steps=1), generator=generator(1)))
    assert not torch.equal(first, perturb(network, x, y, Attack(steps=1), generator=generator(2)))
    with torch.no_grad():  # gradients are switched on where they are needed
        assert torch.equal(first, perturb(network, x, y, Attack(steps=1), generator=generator(1)))
    assert all(p.grad is None for p in network.parameters())
    assert torch.equal(perturb(network, x, y, Attack(epsilon=0.0), generator=generator()), x)


def test_a_model_without_gradients(network):
    with pytest.raises(RunError, match="passes no gradient"):
        perturb(lambda x: network(x).detach(), images(), torch.arange(32) % 5, Attack(), generator=generator())


def test_pixels():
    assert torch.equal(pixels(torch.tensor([[0, 51, 255]], dtype=torch.uint8)), torch.tensor([[0.0, 0.2, 1.0]]))
    with pytest.raises(UserError, match="pixels from -1 to 2"):
        pixels(torch.tensor([-1.0, 2.0]))


def test_texts():
    assert parse_attack("pgd") == Attack()
    assert parse_attack("PGD:epsilon=4/255, steps=20") == Attack(epsilon=4 / 255, steps=20)
    assert parse_attack("pgd:step-size=1e-2,restarts=2,count=7") == Attack(step_size=0.01, restarts=2, count=7)
    fgsm = parse_attack("fgsm:epsilon=1/16,count=5")
    assert (fgsm.steps, fgsm.step_size, fgsm.epsilon, fgsm.count) == (1, 1 / 16, 1 / 16, 5)
    assert Attack().describe() == "pgd, epsilon 8/255, 10 steps of 2/255"
    assert fgsm.describe() == "fgsm, epsilon 0.0625"
    assert math.isclose(Attack().epsilon * 255, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pdg", "did you mean 'pgd'"),
        ("pgd:epsilo=1/255", "did you mean 'epsilon'"),
        ("fgsm:steps=3", "an option of fgsm"),
        ("pgd:epsilon", "NAME=VALUE"),
        ("pgd:epsilon=4/0", "4/255"),
        ("pgd:epsilon=2", "epsilon=2.0"),
        ("pgd:epsilon=nan", "distance of pixels"),
        ("pgd:step_size=0", "a positive distance"),
        ("pgd:steps=1.5", "a whole number"),
        ("pgd:steps=0", "at least 1"),
        ("pgd:count=-3", "at least 1"),
    ],
)
def test_texts_that_are_none(text, message):
    with pytest.raises(UserError, match=message):
        parse_attack(text)


def test_fgsm_has_no_steps():
    with pytest.raises(UserError, match="one step"):
        Attack("fgsm", steps=3)
