"""kornia's policies: one image at a time by kornia itself is the reference of ours, which take them together."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from nas.training.draws import Draws
from nas.training.policies import POLICIES, policy
from search_spaces.common.errors import UserError


@pytest.fixture(autouse=True)
def _kornia(importable):
    importable("kornia")


@pytest.fixture
def images(rng) -> torch.Tensor:
    return torch.from_numpy(rng.integers(0, 256, (48, 3, 12, 12), np.uint8))


@pytest.mark.parametrize("name", POLICIES)
def test_each_image_goes_its_own_way_as_kornia_would_take_it(name, images):
    ours, some = policy(name), Draws(3, 1, np.arange(48) * 7)
    state = torch.get_rng_state()
    out = ours(images, some)
    assert torch.equal(torch.get_rng_state(), state)
    assert out.dtype == torch.uint8
    import kornia.augmentation.auto as auto

    theirs = POLICIES[name](auto)
    with torch.random.fork_rng():
        for image, seed, found in zip(images, some.words(name)[:, 0], out, strict=True):
            torch.manual_seed(int(seed) >> 1)
            expected = theirs(image[None].float() / 255)[0].clamp(0, 1)
            assert torch.equal(found, (expected * 255).round().to(torch.uint8))
    changed = (out != images).flatten(1).any(1).float().mean()
    assert changed > 0.6
    order = np.random.default_rng(0).permutation(48)[:20]
    assert torch.equal(ours(images[order], Draws(3, 1, some.rows[order])), out[order])
    assert not torch.equal(ours(images, Draws(3, 2, some.rows)), out)


def test_grey_and_floating_images(images):
    some = Draws(0, 0, np.arange(48))
    grey = images[:, :1]
    ours = policy("rand_augment")
    assert torch.equal(ours(grey, some).expand(-1, 3, -1, -1), ours(grey.expand(-1, 3, -1, -1), some))
    floating = ours(images.float() / 255, some)
    assert floating.dtype == torch.float32
    assert torch.equal((floating * 255).round().to(torch.uint8), ours(images, some))
    assert ours(images[:0], Draws(0, 0, np.arange(0))).shape == (0, 3, 12, 12)


def test_what_is_refused(images, monkeypatch):
    some = Draws(0, 0, np.arange(48))
    with pytest.raises(UserError, match="did you mean 'rand-augment'"):
        policy("randaugment")
    with pytest.raises(UserError, match=r"pixels up to 255.*in \[0, 1\]"):
        policy("trivial-augment")(images.float(), some)
    with pytest.raises(UserError, match="images of 2 channels"):
        policy("trivial-augment")(images[:, :2], some)
    monkeypatch.setitem(sys.modules, "kornia.augmentation.auto", None)
    with pytest.raises(UserError, match=r"pip install 'nasforge\[train\]'"):
        policy("trivial-augment")
