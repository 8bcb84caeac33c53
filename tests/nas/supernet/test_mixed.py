"""Mixed: against naive transcriptions, what does not run, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nas.supernet.mixed import Mixed, shuffle_channels
from nas.supernet.relaxation import Weights
from search_spaces.cells.darts_network import OPERATIONS, make_operation
from search_spaces.common.errors import UserError
from search_spaces.primitives.registry import norm_factory


def operations(channels: int = 4, stride: int = 1) -> list[nn.Module]:
    torch.manual_seed(0)
    return [make_operation(name, channels, stride).double() for name in OPERATIONS]


def values(count: int = len(OPERATIONS)) -> torch.Tensor:
    return torch.linspace(-1, 2, count, dtype=torch.float64).softmax(0).requires_grad_()


def images(channels: int = 4, size: int = 6) -> torch.Tensor:
    return torch.randn(3, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("stride", [1, 2])
def test_the_mixture_is_the_weighted_sum(stride):
    candidates, weights, x = operations(stride=stride), values(), images()
    mixed = Mixed(candidates, "edge")
    mixed.weights, mixed.scale = Weights(weights), torch.tensor(0.3, dtype=torch.float64)
    expected = torch.zeros_like(x[:, :, ::stride, ::stride])
    for weight, candidate in zip(weights, candidates):
        expected = expected + weight * candidate(x)
    torch.testing.assert_close(mixed(x), 0.3 * expected)
    found = torch.autograd.grad(mixed(x).pow(2).sum(), weights)[0]
    torch.testing.assert_close(found, torch.autograd.grad((0.3 * expected).pow(2).sum(), weights)[0])
    assert found[0] == 0  # `none` adds nothing
    assert (found[1:] != 0).all()


def test_what_is_not_active_does_not_run():
    ran = []
    candidates = operations()
    for k, candidate in enumerate(candidates):
        candidate.register_forward_hook(lambda *_, k=k: ran.append(k))
    mixed, x = Mixed(candidates, "edge"), images()
    mixed.weights = Weights(values(), (4,))
    torch.testing.assert_close(mixed(x), values()[4] * candidates[4](x))
    assert ran == [4, 4]
    ran.clear()
    mixed.weights = Weights(values(), (0,))
    assert not mixed(x).any()
    assert ran == [0]
    ran.clear()
    mixed.weights, mixed.selected = None, 3
    assert torch.equal(mixed(x), x)
    assert ran == [3]


@pytest.mark.parametrize(("stride", "size"), [(1, 6), (2, 6), (2, 7)])
def test_partial_channels_against_a_transcription(stride, size):
    """Channel by channel: the first quarter is mixed, the rest passes by, output channel c comes from a known place."""
    k, channels = 4, 8
    candidates, weights, x = operations(channels // k, stride), values(), images(channels, size)
    mixed = Mixed(candidates, "edge", partial=k)
    mixed.weights = Weights(weights)
    part = sum(weight * candidate(x[:, :2]) for weight, candidate in zip(weights, candidates))
    planes = [part[:, c] for c in range(2)]
    for c in range(2, channels):
        plane = x[:, c]
        if stride == 2:  # maxima of 2 x 2, the last row and column of an odd size by themselves
            plane = torch.stack(
                [
                    torch.stack([plane[:, i : i + 2, j : j + 2].amax((1, 2)) for j in range(0, size, 2)], -1)
                    for i in range(0, size, 2)
                ],
                -2,
            )
        planes.append(plane)
    order = [group * 2 + i for i in range(2) for group in range(k)]
    torch.testing.assert_close(mixed(x), torch.stack([planes[c] for c in order], 1))


def test_shuffle_is_that_of_torch():
    x = images(12)
    assert torch.equal(shuffle_channels(x, 3), nn.ChannelShuffle(3)(x))


def test_partial_channels_of_one_selected_candidate():
    candidates, x = operations(2), images(8)
    mixed = Mixed(candidates, "edge", partial=4)
    mixed.selected = OPERATIONS.index("sep_conv_3x3")
    joined = torch.cat([candidates[4](x[:, :2]), x[:, 2:]], 1)
    torch.testing.assert_close(mixed(x), nn.ChannelShuffle(4)(joined))


class Statistical(nn.Module):
    """Two mixtures, the outer checkpointed, the inner one a choice of normalisations with running statistics."""

    def __init__(self, checkpointed: bool):
        super().__init__()
        torch.manual_seed(0)
        norms = [nn.BatchNorm2d(4), norm_factory("power-norm")(4), nn.InstanceNorm2d(4, track_running_stats=True)]
        self.norm = Mixed(norms, "norm")
        block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), self.norm, nn.Dropout(0.3), nn.Tanh())
        self.edge = Mixed([block, nn.AvgPool2d(3, 1, 1)], "edge", checkpointed=checkpointed)

    def forward(self, x):
        return self.edge(x)


def _trained(checkpointed: bool) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Losses and gradients of two forward passes with other weights, both before either backward."""
    network, x = Statistical(checkpointed).double(), images()
    inner, outer = values(3), values(2)
    torch.manual_seed(2)
    losses = []
    for factor in (1.0, 0.5):
        network.norm.weights, network.edge.weights = Weights(factor * inner), Weights(factor * outer)
        losses.append(network(factor * x).pow(3).sum())
    network.norm.weights = network.edge.weights = None
    wanted = [inner, outer, *network.parameters()]
    gradients = [g for loss in losses for g in torch.autograd.grad(loss, wanted)]
    return [*losses, *gradients], dict(network.named_buffers())


def test_checkpointed_equals_plain_with_its_statistics():
    (plain, plain_buffers), (lean, lean_buffers) = _trained(False), _trained(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, lean, strict=True))
    assert {name: b.tolist() for name, b in plain_buffers.items()} == {n: b.tolist() for n, b in lean_buffers.items()}
    assert plain_buffers["norm.candidates.0.num_batches_tracked"] == 2


def test_checkpointed_mixtures_keep_less_for_backward():
    kept = {}
    for checkpointed in (False, True):
        mixed, x = Mixed(operations(), "edge", checkpointed=checkpointed), images()
        mixed.weights = Weights(values())
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.nbytes), t)[1], lambda t: t):
            mixed(x.requires_grad_())
        kept[checkpointed] = sum(sizes)
    assert kept[True] < 0.1 * kept[False]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_double_backward_under_functional_call(checkpointed):
    """The gradient of an unrolled step, against central differences of the loss after that step."""
    torch.manual_seed(0)
    network = Mixed([nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())], "edge").double()
    network.checkpointed = checkpointed
    names, weights = zip(*network.named_parameters())
    x = images()

    def unrolled(alpha):
        network.weights = Weights(alpha.softmax(0))
        steps = torch.autograd.grad(network(x).pow(2).mean(), weights, create_graph=True)
        moved = {name: w - 0.5 * g for name, w, g in zip(names, weights, steps)}
        return torch.func.functional_call(network, moved, (x,)).sin().mean()

    alpha = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(unrolled(alpha), alpha)
    for k in range(2):
        step = 1e-5 * torch.eye(2, dtype=torch.float64)[k]
        slope = (unrolled(alpha.detach() + step) - unrolled(alpha.detach() - step)) / 2e-5
        torch.testing.assert_close(found[k], slope.detach(), rtol=1e-6, atol=1e-9)


def test_bad_partial_channels_are_refused():
    with pytest.raises(UserError, match="at least 1"):
        Mixed([nn.Identity()], "edge", partial=0)
    with pytest.raises(UserError, match="k = 4 of partial channels"):
        Mixed([nn.Identity()], "edge", partial=4)(images(6))
