"""Whatever is scored, the model, its random state and its gradients come back as they were."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import zero_cost


class Busy(nn.Module):
    """Everything that a pass could leave traces in: statistics, dropout, in-place ReLU, frozen and shared weights."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.shared = nn.Conv2d(4, 4, 1)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 10)
        self.register_buffer("seen", torch.zeros(1))
        self.head.bias.requires_grad_(False)

    def stages(self) -> list[str]:
        return ["norm", "shared"]

    def forward(self, x):
        self.seen += 1
        x = self.relu(self.norm(self.stem(x)))
        x = self.shared(self.relu(self.shared(x)))
        return self.head(self.drop(x.mean((2, 3))))


class Fails(Busy):
    def forward(self, x):
        self.relu(self.norm(self.stem(x)))
        raise RuntimeError("broken on purpose")


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)


def hooks(model: nn.Module) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


@pytest.mark.parametrize("kind", [Busy, Fails])
def test_nothing_of_the_model_changes(kind):
    torch.manual_seed(0)
    model = kind()
    model.eval()
    model.norm.train()
    model.stem.register_forward_hook(lambda *_: None)
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    state, modes, before = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], hooks(model)
    needs = [p.requires_grad for p in model.parameters()]
    inputs, labels = batch()
    kept, pointers = inputs.clone(), [p.data_ptr() for p in model.parameters()]

    scores = zero_cost.score(model, [(inputs, labels), batch(1)])

    assert bool(scores.reasons.get("grad-norm")) == (kind is Fails)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert [m.training for m in model.modules()] == modes
    assert hooks(model) == before
    assert [p.requires_grad for p in model.parameters()] == needs
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert torch.equal(model.stem.weight.grad, torch.ones_like(model.stem.weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "stem.weight")
    assert torch.equal(inputs, kept)
    assert not inputs.requires_grad
    assert torch.is_grad_enabled()


def test_random_states_are_as_before():
    model = Busy()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    zero_cost.score(model, [batch(), batch(1)])
    zero_cost.static_costs(model, batch()[0])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_the_seed_decides_and_nothing_else():
    model = Busy()
    first = zero_cost.score(model, [batch(), batch(1)], seed=3)
    torch.manual_seed(99)
    again = zero_cost.score(model, [batch(), batch(1)], seed=3)
    other = zero_cost.score(model, [batch(), batch(1)], seed=4)
    for name in first:
        assert first[name] == pytest.approx(again[name], nan_ok=True), name
    assert other["zen"] != first["zen"]
    assert other["grad-norm"] != first["grad-norm"]  # dropout
    assert other["synflow"] == first["synflow"]  # which leaves dropout out


def test_a_subset_has_the_values_of_the_whole():
    """What is requested together does not change what comes out."""
    model = Busy()
    data = [batch(), batch(1)]
    whole = zero_cost.score(model, data)
    for name in whole:
        alone = zero_cost.score(model, data, name)
        assert alone[name] == pytest.approx(whole[name], rel=1e-6, nan_ok=True), name
        assert alone.reasons.get(name) == whole.reasons.get(name)
