"""Optimisers: against torch's own, TensorFlow's RMSProp against its equations, and which parameters decay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_trainings import network, patterns, same, weights
from torch import nn

from nas.training.loop import start, train
from nas.training.optimizers import TensorFlowRMSprop, make_optimizer
from nas.training.recipe import Recipe
from search_spaces.common.errors import UserError

PLAIN = {"steps": 6, "batch_size": 32, "schedule": "constant", "warmup_steps": 0, "decay": "all"}


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        (
            {"nesterov": True, "learning_rate": 0.05, "weight_decay": 0.02},
            lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.02),
        ),
        ({"momentum": 0.0, "weight_decay": 0.0}, lambda p: torch.optim.SGD(p, 0.1)),
        (
            {"optimizer": "adamw", "learning_rate": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1},
            lambda p: torch.optim.AdamW(p, 0.01, betas=(0.8, 0.99), weight_decay=0.1),
        ),
    ],
)
def test_steps_are_those_of_torch(settings, make):
    recipe = Recipe(**PLAIN, **settings)
    ours, theirs = network(dropout=0.0), network(dropout=0.0)
    train(ours, patterns(), recipe, seed=3)
    stream = start(network(), patterns(), recipe, seed=3).batches
    optimizer = make(theirs.parameters())
    theirs.train()
    for step in range(6):
        images, labels, _ = stream.batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(images), labels).backward()
        optimizer.step()
    assert same(weights(ours), weights(theirs))


def test_rmsprop_is_tensorflows():
    """ms = .9 ms + .1 g^2 from 1; mom = m mom + lr g / sqrt(ms + eps); p = p - mom, with g of the loss and its L2."""
    generator = np.random.default_rng(0)
    value = generator.standard_normal((4, 3))
    gradients = generator.standard_normal((8, 4, 3)) * 3
    parameter = nn.Parameter(torch.tensor(value))
    optimizer = TensorFlowRMSprop([{"params": [parameter], "weight_decay": 0.05}], lr=0.2, momentum=0.7)
    square, momentum = np.ones((4, 3)), np.zeros((4, 3))
    for raw in gradients:
        parameter.grad = torch.tensor(raw)
        optimizer.step()
        gradient = raw + 0.05 * value
        square = 0.9 * square + 0.1 * gradient**2
        momentum = 0.7 * momentum + 0.2 * gradient / np.sqrt(square + 1.0)
        value = value - momentum
        np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-12)


def test_with_eps_1_torchs_rmsprop_is_another_method():
    """The first step from g = 1: TensorFlow divides by sqrt(.9 + .1 + 1), PyTorch by sqrt(.1) + 1."""
    steps = []
    for make in (
        lambda p: TensorFlowRMSprop([p], lr=1.0, momentum=0.0),
        lambda p: torch.optim.RMSprop([p], lr=1.0, alpha=0.9, eps=1.0),
    ):
        parameter = nn.Parameter(torch.zeros(1))
        parameter.grad = torch.ones(1)
        make(parameter).step()
        steps.append(-parameter.item())
    assert steps == pytest.approx([1 / 2**0.5, 1 / (0.1**0.5 + 1)], rel=1e-6)


def test_rmsprop_leaves_parameters_without_gradient_alone_and_takes_a_closure():
    still, moving = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = TensorFlowRMSprop([{"params": [still, moving], "weight_decay": 0.1}], lr=0.1)

    def closure():
        loss = moving.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert still.tolist() == [1, 1]
    assert (moving < 1).all()


def test_only_weights_of_convolutions_and_linear_layers_decay():
    model = network()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = make_optimizer(model, Recipe(weight_decay=0.01)).param_groups
    decays = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert {n for n, d in decays.items() if d} == {"0.weight", "4.weight", "8.weight"}
    assert set(decays) == set(names.values())
    groups = make_optimizer(model, Recipe(weight_decay=0.01, decay="all")).param_groups
    assert [g["weight_decay"] for g in groups] == [0.01]
    assert len(groups[0]["params"]) == len(names)


def test_frozen_parameters_stay():
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    train(model, patterns(), Recipe(**PLAIN), seed=0)
    assert torch.equal(before, model[0].weight)
    for decay in ("all", "weights"):
        with pytest.raises(UserError, match="a model with parameters to train"):
            make_optimizer(model.requires_grad_(False), Recipe(decay=decay))
