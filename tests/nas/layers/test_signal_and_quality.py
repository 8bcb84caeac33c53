"""Signal propagation against closed forms and known layers; the quality test on data it can and cannot learn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nas.layers.anchors import anchor
from nas.layers.quality import Doomed, quality, verdict
from nas.layers.signal import signal
from nas.training.data import Dataset, Split, load_data
from nas.training.loop import TrainResult
from nas.training.recipe import Recipe
from search_spaces.common.errors import UserError
from search_spaces.layers.catalog import layer
from search_spaces.layers.module import GraphLayer


class Pointwise(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def measure(function, **settings):
    return signal(lambda channels: Pointwise(function), generator=torch.Generator().manual_seed(0), **settings)


def measure_graph(name: str, layout: str, **settings):
    graph = layer(name, **settings)
    generator = torch.Generator().manual_seed(0)
    return signal(lambda channels: GraphLayer(graph, channels, layout=layout), generator=generator, layout=layout)


# -- signal ------------------------------------------------------------------------------------------------------


def test_variances_of_linear_and_relu_tokens():
    """He weights double a linear signal's second moment and keep that of a ReLU of symmetric input (He et al. 2015)."""
    settings = {"layout": "tokens", "channels": 256, "batch": 4, "blocks": 2}
    assert measure(lambda x: x, **settings).variance_ratios[0] == pytest.approx(3, rel=0.05)
    assert measure(torch.relu, **settings).variance_ratios[0] == pytest.approx(2, rel=0.05)
    assert measure(torch.relu, **settings).branch_ratios[0] == pytest.approx(1, rel=0.05)


def test_a_dead_branch_carries_everything_through():
    found = measure(lambda x: x * 0)
    assert found.variance_ratios == pytest.approx([1.0] * 10)
    assert found.gradient_ratio == pytest.approx(1)
    assert abs(found.cosine) < 0.02
    assert found.reason == "no_signal"
    assert "branch of block 1" in found.detail


def test_the_cosine_sees_a_common_part():
    """Two inputs with the constant map c added: cosine var(c) / (var(c) + var(x)) once it dwarfs them."""
    pattern = 300 * torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    found = measure(lambda x: pattern.expand_as(x), blocks=2, channels=16)
    assert found.cosine > 0.9999
    assert found.reason == "no_signal"


@pytest.mark.parametrize("layout", ["channels-first", "tokens"])
@pytest.mark.parametrize("name", ["bn-relu", "gn-silu", "evonorm-b0", "evonorm-s0", "evonorm-s2", "frn-tlu", "relu"])
def test_known_layers_pass(name, layout):
    found = measure_graph(name, layout)
    assert found.reason is None, found.detail
    assert len(found.variance_ratios) == len(found.branch_ratios) == 10


@pytest.mark.parametrize(
    ("function", "detail"),
    [
        (torch.square, "variance inf"),
        (torch.exp, "variance"),
        (lambda x: x * x.std((0, 2, 3), keepdim=True), "variance inf"),
        (lambda x: 1e-4 * x, "branch of block 1"),
        (lambda x: x * math.nan, "variance nan"),
        (lambda x: 100 * x, "variance ratio of block 1"),
    ],
)
def test_layers_that_do_not_carry_a_signal(function, detail):
    found = measure(function)
    assert found.reason == "no_signal"
    assert detail in found.detail


def test_groups_of_one_channel_at_a_token_kill_the_signal():
    """With one channel in a group and no space there is nothing to normalise over: the value is its own mean."""
    assert measure_graph("gn-relu-tokens", "tokens", groups=16).reason == "no_signal"
    assert measure_graph("gn-relu-tokens", "tokens", groups=4).reason is None


def test_too_few_blocks():
    with pytest.raises(UserError, match="at least two blocks"):
        measure(torch.relu, blocks=1)


# -- quality -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patterns() -> Dataset:
    """Four classes of 8x8 images, easy to tell apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(320) % 4
    images = torch.randn(4, 3, 8, 8, generator=generator)[labels] + 0.5 * torch.randn(320, 3, 8, 8, generator=generator)
    parts = [Split(images[rows], labels[rows]) for rows in (slice(200), slice(200, 260), slice(260, 320))]
    return Dataset("patterns", *parts, tuple("abcd"), (0.0,) * 3, (1.0,) * 3)


def noise(data: Dataset) -> Dataset:
    """The same images with labels that have nothing to do with them."""
    shuffled = data.val.labels[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    return Dataset("noise", data.train, Split(data.val.images, shuffled), data.test, data.classes, data.mean, data.std)


def resnet(function=None) -> nn.Module:
    if function is not None:
        return anchor("resnet", lambda channels: Pointwise(function), num_classes=4)
    graph = layer("bn-relu")
    return anchor("resnet", lambda channels: GraphLayer(graph, channels), num_classes=4)


RECIPE = Recipe(steps=30, batch_size=32)


def test_a_good_layer_passes_on_data_and_fails_on_noise(patterns):
    found = quality(resnet(), patterns, RECIPE, seed=0)
    assert found.reason is None
    assert found.limit == 50.0
    assert found.training.steps == 30
    assert found.training.metrics["val_acc"] > 90
    assert quality(resnet(), noise(patterns), RECIPE, seed=0).reason == "low_accuracy"


@pytest.mark.slow
def test_a_hundred_steps_on_cifar10(shared_table):
    """Another implementation of this anchor and recipe, on 16x16 images: 33.7 % with BN-ReLU, deviation 1.8."""
    data = load_data("cifar10", root=shared_table("cifar10/train.parquet").parent, size=16)
    graph = layer("bn-relu")
    accuracies = [
        quality(
            anchor("resnet", lambda c: GraphLayer(graph, c), generator=torch.Generator().manual_seed(seed)),
            data,
            seed=seed,
        ).training.metrics["val_acc"]
        for seed in range(4)
    ]
    assert sum(accuracies) / 4 == pytest.approx(33.7, abs=3.0)


def test_a_layer_that_breaks_down(patterns):
    found = quality(resnet(torch.exp), patterns, RECIPE, seed=0)
    assert found.reason == "non_finite"
    assert found.training.failed


def test_the_doomed_are_stopped_early(patterns):
    stuck = quality(resnet(lambda x: x * 0), patterns, Recipe(steps=100, batch_size=32), seed=0, doomed=Doomed(4))
    assert stuck.reason == "low_accuracy"
    assert stuck.training.steps == 30
    assert stuck.training.stopped == "the training loss is still that of guessing at step 30"
    assert quality(resnet(), patterns, RECIPE, seed=0, doomed=Doomed(4)).training.stopped is None


def test_the_limit_of_the_doomed():
    """2.29 with ten classes, over the mean of steps 21 to 30."""
    for loss, stops in ((2.2899, False), (2.2901, True)):
        doomed = Doomed(10)
        answers = [doomed(step, {"train_loss": 9.0 if step < 21 else loss}) for step in range(1, 60)]
        assert [k + 1 for k, answer in enumerate(answers) if answer] == ([30] if stops else [])
    with pytest.raises(UserError):
        Doomed(1)


def test_verdicts():
    def trained(accuracy, loss, failed=False, stopped=None):
        return TrainResult(9, (1.0,), {"val_acc": accuracy, "val_loss": loss}, stopped, failed, 0.0)

    assert verdict(trained(20.0, 2.0), 20.0) is None
    assert verdict(trained(19.9, 2.0), 20.0) == "low_accuracy"
    assert verdict(trained(90.0, math.nan), 20.0) == "non_finite"
    assert verdict(trained(90.0, 0.1, stopped="early"), 20.0) == "low_accuracy"
    assert verdict(trained(90.0, 0.1, failed=True), 20.0) == "non_finite"


def test_a_limit_that_nothing_meets(patterns):
    with pytest.raises(UserError, match="a multiple of chance between 0 and 4"):
        quality(resnet(), patterns, RECIPE, seed=0, times_chance=4)
