"""Weighted candidates against the product with their output, and pooling by matrices against torch's."""

import pytest
import torch
from torch import nn

from nas.supernet.pooling import average_pool
from nas.supernet.weighted import WeightedBatchNorm2d, prepare, times
from search_spaces.cells.darts_network import DepthwiseBlock, FactorizedReduce
from search_spaces.cells.operations import ActConvNorm, batch_norm, relu


def plain_norm(channels):
    return nn.BatchNorm2d(channels, affine=False)


CANDIDATES = {
    "conv": lambda: ActConvNorm(4, 4, 3, 1, plain_norm, relu),
    "affine conv": lambda: ActConvNorm(4, 4, 1, 1, batch_norm, relu),
    "cumulative": lambda: ActConvNorm(4, 4, 3, 2, lambda c: nn.BatchNorm2d(c, momentum=None), relu),
    "untracked": lambda: ActConvNorm(4, 4, 3, 2, lambda c: nn.BatchNorm2d(c, track_running_stats=False), relu),
    "depthwise": lambda: nn.Sequential(*(DepthwiseBlock(4, 3, 1, 1, plain_norm, relu) for _ in range(2))),
    "reduce": lambda: FactorizedReduce(4, 4, batch_norm, relu),
    "pool": lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.BatchNorm2d(4, affine=False)),
    "group norm": lambda: ActConvNorm(4, 4, 3, 1, lambda c: nn.GroupNorm(2, c), relu),
    "identity": nn.Identity,
    "bare pool": lambda: nn.AvgPool2d(3, 1, 1),
}


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("mode", [True, False])
def test_the_factor_within_the_candidate_is_a_product_with_its_output(name, mode):
    torch.manual_seed(0)
    reference = CANDIDATES[name]().double().train(mode)
    for part in reference.modules():
        if isinstance(part, nn.BatchNorm2d) and part.affine:
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    torch.manual_seed(0)
    candidate = CANDIDATES[name]().double().train(mode)
    candidate.load_state_dict(reference.state_dict())
    candidate = prepare(candidate)
    assert candidate.state_dict().keys() == reference.state_dict().keys()
    x = torch.randn(3, 4, 7, 9, dtype=torch.float64, requires_grad=True)
    factor = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for _ in range(2):  # running statistics of the second pass depend on the first
        found, expected = times(candidate, factor, x), factor * reference(x)
    torch.testing.assert_close(found, expected)
    inputs = [x, factor, *candidate.parameters()], [x, factor, *reference.parameters()]
    weights = torch.randn_like(expected)
    slopes = [torch.autograd.grad((y * weights).sum(), v, create_graph=True) for y, v in zip((found, expected), inputs)]
    torch.testing.assert_close(slopes[0], slopes[1])
    bends = [torch.autograd.grad(s[0].square().sum() + s[1], v[:2]) for s, v in zip(slopes, inputs)]
    torch.testing.assert_close(bends[0], bends[1])
    torch.testing.assert_close(candidate.state_dict(), reference.state_dict())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(17, 4, 1, 1), (2, 4, 5, 5)])
def test_the_factor_is_right_in_every_layout(layout, shape):
    torch.manual_seed(0)
    norm = WeightedBatchNorm2d.like(nn.BatchNorm2d(4, affine=False))
    x = torch.randn(shape).to(memory_format=layout).requires_grad_()
    factor = torch.tensor(0.3, requires_grad=True)
    norm.factor = factor
    centred = x - x.mean((0, 2, 3), keepdim=True)
    expected = factor * centred / (centred.square().mean((0, 2, 3), keepdim=True) + norm.eps).sqrt()
    found, weights = norm(x), torch.randn(shape)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad((y * weights).sum(), [x, factor]) for y in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)


def test_without_a_factor_the_candidate_is_what_it_was():
    torch.manual_seed(0)
    reference = CANDIDATES["conv"]()
    candidate = CANDIDATES["conv"]()
    candidate.load_state_dict(reference.state_dict())
    x = torch.randn(3, 4, 7, 9)
    assert torch.equal(prepare(candidate)(x), reference(x))


def test_a_factor_is_gone_after_an_error():
    candidate = prepare(CANDIDATES["conv"]())
    with pytest.raises(RuntimeError):
        times(candidate, torch.tensor(0.5), torch.randn(3, 5, 7, 7))
    assert candidate.norm.factor is None


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (2, 2, 0), ((3, 5), (1, 2), (1, 2)), (4, 3, 2)]
)
def test_matrix_pooling_equals_torch(size, stride, padding, include):
    module = nn.AvgPool2d(size, stride, padding, count_include_pad=include)
    for shape in ((2, 3, 8, 8), (2, 3, 7, 10)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        found, expected = average_pool(module, x), module(x)
        torch.testing.assert_close(found, expected)
        weights = torch.randn_like(expected)
        slopes = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected)]
        torch.testing.assert_close(*slopes)


def test_pooling_modes_that_are_no_products_are_torchs():
    x = torch.randn(2, 3, 7, 7)
    for module in (nn.AvgPool2d(2, 2, ceil_mode=True), nn.AvgPool2d(3, 1, divisor_override=5)):
        assert torch.equal(average_pool(module, x), module(x))


def test_hooks_of_candidates_run():
    seen = []
    candidate = nn.Sequential(nn.AvgPool2d(2), nn.BatchNorm2d(3))
    candidate[0].register_forward_hook(lambda *_: seen.append("pool"))
    candidate.register_forward_hook(lambda *_: seen.append("whole"))
    times(prepare(candidate), torch.tensor(0.5), torch.randn(2, 3, 4, 4))
    assert seen == ["pool", "whole"]
