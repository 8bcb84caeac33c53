"""Region Normalization against regions cut out one by one, and against the published trick with BatchNorm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from search_spaces.primitives.region_norm import region_norm_b, region_norm_l, standardise_region


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 6, 5, generator=generator, dtype=torch.float64) * 2 + 1
    return x, (torch.rand(3, 1, 6, 5, generator=generator) < 0.3).double()


def test_the_trick_with_batch_norm_is_per_region_standardisation():
    x, mask = case()
    for region in (mask, 1 - mask):
        n, inside = region.numel(), region.sum()
        mean = (x * region).sum((0, 2, 3)) / inside
        filled = x * region + (1 - region) * mean.view(1, -1, 1, 1)
        trick = F.batch_norm(filled, None, None, training=True) * torch.sqrt(inside / n)
        torch.testing.assert_close(standardise_region(x, region, 1e-5), trick, atol=1e-9, rtol=1e-9)
        chosen = x.permute(1, 0, 2, 3)[:, region[:, 0] == 1].numpy()  # [C, positions of the region]
        expected = (chosen - chosen.mean(1, keepdims=True)) / chosen.std(1, keepdims=True)
        ours = standardise_region(x, region, 0.0).permute(1, 0, 2, 3)[:, region[:, 0] == 1].numpy()
        np.testing.assert_allclose(ours, expected, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_rn_b_has_an_affine_map_in_each_region(training):
    x, mask = case(1)
    module = region_norm_b(4).double().train(training)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    y = module(x, mask)
    for region, gain, shift in (
        (mask, module.gain_inside, module.shift_inside),
        (1 - mask, module.gain_outside, module.shift_outside),
    ):
        expected = standardise_region(x, region, 1e-5) * (1 + gain) + shift
        torch.testing.assert_close(y * region, expected * region)


def test_rn_b_resizes_its_mask_by_nearest():
    x, _ = case()
    coarse = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).view(1, 1, 3, 2).expand(3, 1, 3, 2)
    fine = torch.zeros(3, 1, 6, 5)
    for i in range(6):
        for j in range(5):
            fine[:, :, i, j] = coarse[:, :, i * 3 // 6, j * 2 // 5]
    module = region_norm_b(4).double()
    torch.testing.assert_close(module(x, coarse), module(x, fine))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_one_region_alone_is_batch_norm(value):
    x, mask = case()
    y = region_norm_b(4).double()(x, torch.full_like(mask, value))
    torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True))


def test_rn_l_finds_its_mask():
    x, _ = case(2)
    module = region_norm_l(4).double()
    with torch.no_grad():
        module.importance.weight.mul_(20)  # so that both regions occur
    summary = torch.stack([x.mean(1), x.max(1).values], 1)
    importance = 1 / (1 + torch.exp(-F.conv2d(summary, module.importance.weight, padding=3)))
    mask = (importance >= 0.8).double()
    assert 0 < mask.mean() < 1
    rn = standardise_region(x, mask, 1e-5) + standardise_region(x, 1 - mask, 1e-5)
    gain, shift = (F.conv2d(importance, c.weight, c.bias, padding=3) for c in (module.gain, module.shift))
    torch.testing.assert_close(module(x), rn * (1 + gain) + shift)
