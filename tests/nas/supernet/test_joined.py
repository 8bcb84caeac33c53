"""Narrow convolutions of an edge computed together: against the sum of each alone, and which are not joined."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nas.supernet.mixed import Mixed, shuffle_channels, shuffled
from nas.supernet.relaxation import Weights
from nas.supernet.weighted import JOINED_CHANNELS, prepare, products
from search_spaces.cells.operations import ActConvNorm, batch_norm, relu

PLAIN = lambda width: nn.BatchNorm2d(width, affine=False)  # noqa: E731
NORMS = {
    "plain": PLAIN,
    "affine": batch_norm,
    "untracked": lambda width: nn.BatchNorm2d(width, track_running_stats=False),
    "slow": lambda width: nn.BatchNorm2d(width, eps=1e-2, momentum=0.02, affine=False),
}


def convolutions(norm, kernels=(1, 3), stride=1, channels=4) -> list[nn.Module]:
    torch.manual_seed(0)
    found = [ActConvNorm(channels, channels, kernel, stride, norm, relu).double() for kernel in kernels]
    for part in nn.ModuleList(found).modules():
        if isinstance(part, nn.BatchNorm2d) and part.affine:
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    return found


def factors(count: int) -> list[torch.Tensor]:
    return list(torch.linspace(-0.4, 0.9, count, dtype=torch.float64).requires_grad_().unbind())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kernels", "stride"), [((1, 3), 1), ((3, 1, 5), 2)])
def test_the_joint_convolution_is_the_sum(norm, training, kernels, stride):
    reference = nn.ModuleList(convolutions(NORMS[norm], kernels, stride)).train(training)
    joined = nn.ModuleList([prepare(m) for m in copy.deepcopy(reference)])
    weights = torch.linspace(-0.4, 0.9, len(kernels), dtype=torch.float64).requires_grad_()
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    for _ in range(2):  # running statistics of the second pass depend on the first
        (found,) = products(list(joined), list(weights), x)
        expected = sum(w * module(x) for w, module in zip(weights, reference))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(joined.state_dict(), reference.state_dict())
    direction = torch.randn_like(expected)
    inputs = [[x, weights, *modules.parameters()] for modules in (joined, reference)]
    slopes = [
        torch.autograd.grad((y * direction).sum(), v, create_graph=True) for y, v in zip((found, expected), inputs)
    ]
    torch.testing.assert_close(*slopes)
    bends = [torch.autograd.grad(s[0].square().sum() + s[1].sum(), v[:3]) for s, v in zip(slopes, inputs)]
    torch.testing.assert_close(*bends)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("partial", [1, 2])
def test_mixtures_of_them_are_the_plain_mixtures(checkpointed, partial):
    candidates = [*convolutions(PLAIN), nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Identity()]
    reference = nn.ModuleList(copy.deepcopy(candidates))
    mixed = Mixed([prepare(m) for m in candidates], "edge", partial=partial, checkpointed=checkpointed)
    values = torch.linspace(-1, 1, 4, dtype=torch.float64).softmax(0).requires_grad_()
    x = torch.randn(3, 4 * partial, 5, 5, dtype=torch.float64, requires_grad=True)
    mixed.weights = Weights(values)
    found = mixed(x)
    expected = sum(value * module(x[:, :4]) for value, module in zip(values, reference))
    if partial > 1:
        expected = nn.ChannelShuffle(partial)(torch.cat([expected, x[:, 4:]], 1))
    torch.testing.assert_close(found, expected)
    inputs = [[x, values, *modules.parameters()] for modules in (mixed, reference)]
    direction = torch.randn_like(expected)
    slopes = [torch.autograd.grad((y * direction).sum(), v) for y, v in zip((found, expected), inputs)]
    torch.testing.assert_close(*slopes)
    ours, theirs = (dict(m.named_buffers()) for m in (mixed.candidates, reference))
    torch.testing.assert_close(ours, theirs)


def count_of(modules: list[nn.Module], monkeypatch) -> int:
    """How many convolutions torch computes for the sum of the modules' products."""
    calls, real = [], nn.functional.conv2d

    def counted(*given, **more):
        calls.append(1)
        return real(*given, **more)

    monkeypatch.setattr(nn.functional, "conv2d", counted)
    channels = modules[0].conv.in_channels
    products(modules, factors(len(modules)), torch.randn(2, channels, 6, 6, dtype=torch.float64))
    return len(calls)


def test_they_are_one_convolution(monkeypatch):
    assert count_of([prepare(m) for m in convolutions(PLAIN)], monkeypatch) == 1


def other_activation(modules):
    modules[1].act = nn.Tanh()


def random_activation(modules):
    for module in modules:
        module.act = nn.RReLU()


def circular(modules):
    modules[1].conv.padding_mode = "circular"


def other_momentum(modules):
    modules[1].norm.momentum = 0.5


def frozen_statistics(modules):
    modules[1].norm.eval()


def cumulative(modules):
    for module in modules:
        module.norm.momentum = None


def other_norm(modules):
    modules[1].norm = nn.GroupNorm(2, 4).double()


def hooked(modules):
    modules[1].conv.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "change",
    [other_activation, random_activation, circular, other_momentum, frozen_statistics, cumulative, other_norm, hooked],
)
def test_what_differs_stays_apart_and_is_right(change, monkeypatch):
    modules = [prepare(m) for m in convolutions(PLAIN)]
    change(modules)
    reference, x = copy.deepcopy(modules), torch.randn(3, 4, 6, 6, dtype=torch.float64)
    weights = factors(2)
    torch.manual_seed(1)
    found = sum(products(modules, weights, x))
    torch.manual_seed(1)
    torch.testing.assert_close(found, sum(w * m(x) for w, m in zip(weights, reference)))
    assert count_of(modules, monkeypatch) == 2


def test_wide_ones_stay_apart(monkeypatch):
    modules = [prepare(m) for m in convolutions(PLAIN, channels=2 * JOINED_CHANNELS)]
    assert count_of(modules, monkeypatch) == 2


def test_shuffling_side_by_side_is_shuffling_the_whole():
    first, rest = torch.randn(2, 3, 4, 4), torch.randn(2, 9, 4, 4)
    assert torch.equal(shuffled(first, rest, 4), shuffle_channels(torch.cat([first, rest], 1), 4))


def test_joining_can_be_turned_off():
    modules, x = [prepare(m) for m in convolutions(PLAIN)], torch.randn(2, 4, 6, 6, dtype=torch.float64)
    weights = factors(len(modules))
    assert len(products(modules, weights, x)) < len(products(modules, weights, x, narrow=0)) == len(modules)
