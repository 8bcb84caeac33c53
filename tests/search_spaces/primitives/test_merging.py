"""Merged layers compute what norm and layer computed, to 1e-5."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from search_spaces.common.errors import UserError
from search_spaces.primitives.batch_norms import batch_norm, l1_batch_norm, prep_bn, rep_bn
from search_spaces.primitives.merging import evaluation_affine, merge_into_next, merge_into_previous
from search_spaces.primitives.norms import layer_norm
from search_spaces.primitives.power_norms import power_norm, power_norm_v
from search_spaces.primitives.unified_norm import unified_norm

AFFINE = [batch_norm, l1_batch_norm, rep_bn, prep_bn, unified_norm]
SCALED = [power_norm, power_norm_v]


def trained(make, layout: str) -> nn.Module:
    torch.manual_seed(0)
    norm = make(6, layout=layout)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape))
    for _ in range(6):
        norm(torch.randn((4, 6, 5, 5) if layout == "channels-first" else (4, 7, 6)) * 1.5 + 0.5)
    return norm.eval()


@pytest.mark.parametrize("make", AFFINE + SCALED)
@pytest.mark.parametrize("bias", [True, False])
def test_into_the_next_linear(make, bias):
    norm, linear = trained(make, "tokens"), nn.Linear(6, 8, bias=bias)
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(merge_into_next(norm, linear)(x), linear(norm(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", AFFINE + SCALED)
@pytest.mark.parametrize(
    "settings", [{}, {"groups": 3}, {"groups": 2, "bias": False}, {"padding": 1, "padding_mode": "reflect"}]
)
def test_into_the_next_convolution(make, settings):
    norm, conv = trained(make, "channels-first"), nn.Conv2d(6, 12, 3, **settings)
    x = torch.randn(3, 6, 7, 7)
    torch.testing.assert_close(merge_into_next(norm, conv)(x), conv(norm(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", AFFINE)
@pytest.mark.parametrize("bias", [True, False])
def test_into_the_previous_layer(make, bias):
    norm, linear = trained(make, "tokens"), nn.Linear(4, 6, bias=bias)
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(merge_into_previous(linear, norm)(x), norm(linear(x)), atol=1e-5, rtol=1e-5)
    norm, conv = trained(make, "channels-first"), nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=bias)
    x = torch.randn(3, 4, 7, 7)
    torch.testing.assert_close(merge_into_previous(conv, norm)(x), norm(conv(x)), atol=1e-5, rtol=1e-5)


def test_neither_part_is_changed():
    norm, linear = trained(rep_bn, "tokens"), nn.Linear(6, 8)
    before = linear.weight.clone()
    merge_into_next(norm, linear)
    assert torch.equal(linear.weight, before)


def test_zero_padding_is_exact_only_without_shift():
    norm, conv = trained(batch_norm, "channels-first"), nn.Conv2d(6, 4, 3, padding=1)
    with pytest.raises(UserError, match="zero padding"):
        merge_into_next(norm, conv)
    with torch.no_grad():
        norm.bias.zero_()
        norm.running_mean.zero_()
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(merge_into_next(norm, conv)(x), conv(norm(x)), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_merged():
    with pytest.raises(UserError, match="affine map"):
        evaluation_affine(layer_norm(6))
    with pytest.raises(UserError, match="6 input channels"):
        merge_into_next(trained(batch_norm, "tokens"), nn.Linear(5, 8))
    with pytest.raises(UserError, match="6 output channels"):
        merge_into_previous(nn.Linear(5, 8), trained(batch_norm, "tokens"))
    with pytest.raises(UserError, match="next layer"):
        merge_into_previous(nn.Linear(5, 6), trained(power_norm, "tokens"))
