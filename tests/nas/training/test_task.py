"""Tasks: which network they make, from which seed, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from small_trainings import DEAD_EDGE, own_task, patterns, same, weights
from torch import nn

from nas.training.recipe import Recipe
from nas.training.task import Task
from search_spaces.common.errors import UserError
from search_spaces.layers.module import GraphLayer
from search_spaces.registry import load_space

SCALE = {"channels": 4, "cells_per_stage": 1}


def cell_task(**changes) -> Task:
    return Task(Recipe(), **{"space": "nas-bench-201", "arch": DEAD_EDGE, "network": SCALE, **changes})


def test_the_network_is_the_spaces_with_weights_of_the_seed():
    space = load_space("nas-bench-201")
    torch.manual_seed(7)
    expected = space.build(space.decode(DEAD_EDGE), in_channels=2, num_classes=3, **SCALE)
    before = torch.get_rng_state()
    found, other = (cell_task().make_network(patterns(), seed=s) for s in (7, 8))
    assert same(weights(found), weights(expected))
    assert not same(weights(found), weights(other))
    assert torch.equal(before, torch.get_rng_state())


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(m, kind) for m in model.modules())


def test_names_replace_every_normalisation_and_activation():
    plain = cell_task().make_network(patterns(), seed=0)
    norms, acts = count(plain, nn.BatchNorm2d), count(plain, nn.ReLU)
    found = cell_task(norm="group_norm", act="silu").make_network(patterns(), seed=0)
    assert (count(found, nn.BatchNorm2d), count(found, nn.ReLU)) == (0, 0)
    assert count(found, nn.SiLU) == acts
    found = cell_task(layer="evonorm-s0").make_network(patterns(), seed=0)
    assert (count(found, GraphLayer), count(found, nn.BatchNorm2d), count(found, nn.ReLU)) == (norms, 0, 0)


@pytest.mark.parametrize("task", [cell_task(layer="evonorm-b0"), own_task(Recipe(betas=(0.5, 0.6)))])
def test_tasks_come_back_from_json(task):
    found = Task.from_json(json.loads(json.dumps(task.as_json())))
    assert task.differences(found) == []
    assert found.recipe == task.recipe
    assert same(*(weights(t.make_network(patterns(), seed=3)) for t in (task, found)))


def not_a_model() -> int:
    return 3


ready = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Task(Recipe()), "a space with an architecture, or a factory"),
        (lambda: Task(Recipe(), space="darts", arch="x", factory="a:b"), "a space with an architecture, or a factory"),
        (lambda: Task(Recipe(), space="darts"), "an architecture with the space"),
        (lambda: cell_task(layer="evonorm-b0", norm="batch-norm"), "a layer, or norm and act, but not both"),
        (lambda: own_task(Recipe(), norm="batch-norm"), "a layer, which can replace"),
        (lambda: cell_task(norm="batchnrm").make_network(patterns(), seed=0), "did you mean"),
        (lambda: cell_task(act="rellu").make_network(patterns(), seed=0), "did you mean"),
        (lambda: cell_task(network={"chanels": 4}).make_network(patterns(), seed=0), "did you mean 'channels'"),
        (lambda: own_task(Recipe(), factory=f"{__name__}:not_a_model").make_network(patterns(), seed=0), "gave a int"),
        (lambda: own_task(Recipe(), factory=f"{__name__}:ready").make_network(patterns(), seed=0), "not one model"),
        (lambda: own_task(Recipe(), network={"depth": 4}).make_network(patterns(), seed=0), "a function that takes"),
    ],
)
def test_tasks_that_are_none(make, message):
    with pytest.raises(UserError, match=message):
        make()
