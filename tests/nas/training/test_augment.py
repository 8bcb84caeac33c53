"""Augmentation: the numbers behind it, independence of the batch, and kornia's answers to the same parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from nas.training.augment import Compose, CropFlip, CutMix, Cutout, Mixup
from nas.training.draws import Draws, split_mix
from search_spaces.common.errors import UserError


def draws(count: int, seed: int = 0, epoch: int = 0) -> Draws:
    return Draws(seed, epoch, np.arange(count))


# -- random numbers ----------------------------------------------------------------------------------------------


def test_split_mix_gives_the_published_words():
    """The first outputs from the state 1234567, as Rosetta Code gives them (task Pseudo-random numbers/Splitmix64)."""
    found = split_mix(np.array([1234567], np.uint64), 5)
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert found.tolist() == expected


def test_draws_belong_to_seed_epoch_row_and_name():
    rows = np.array([7, 3, 50_000, 3])
    found = Draws(5, 2, rows).uniform("a", 4)
    assert found.shape == (4, 4)
    assert (found[1] == found[3]).all()
    assert (Draws(5, 2, rows[::-1]).uniform("a", 4)[::-1] == found).all()
    assert (Draws(5, 2, rows[2:3]).uniform("a", 2) == found[2:3, :2]).all()
    for other in (Draws(6, 2, rows), Draws(5, 3, rows), Draws(5, 2, rows + 1), Draws(52, 0, rows)):
        assert not np.isin(other.uniform("a", 4), found).any()
    assert not np.isin(Draws(5, 2, rows).uniform("b", 4), found).any()
    assert np.isfinite(Draws(-3, 2**70, rows).uniform("a")).all()


@pytest.mark.parametrize("axis", ["rows", "seeds", "epochs", "names", "numbers"])
def test_draws_are_uniform_and_independent_along_every_axis(axis):
    """Kolmogorov-Smirnov, correlation of neighbours, and the balance of each of the upper bits."""
    count = 20_000 if axis in ("rows", "numbers") else 3_000
    if axis == "rows":
        found = draws(count).words("x")[:, 0]
    elif axis == "numbers":
        found = draws(1).words("x", count)[0]
    elif axis == "seeds":
        found = np.array([draws(1, seed=k).words("x")[0, 0] for k in range(count)])
    elif axis == "epochs":
        found = np.array([draws(1, epoch=k).words("x")[0, 0] for k in range(count)])
    else:
        found = np.array([draws(1).words(f"x{k}")[0, 0] for k in range(count)])
    values = (found >> np.uint64(11)) * 2.0**-53
    assert 0 <= values.min() < values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 1e-4
    for lag in (1, 2, 7):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 4 / np.sqrt(count)
    bits = (found[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(0) - 0.5).max() < 4.5 * 0.5 / np.sqrt(count)
    pairs = np.abs(np.corrcoef(bits.T.astype(float)) - np.eye(64))
    assert pairs.max() < 5.5 / np.sqrt(count)


# -- one image at a time -----------------------------------------------------------------------------------------

SINGLE = [CropFlip(3), CropFlip(0), CropFlip(2, flip=False), Cutout(5), Compose((CropFlip(1), Cutout(3)))]


@pytest.mark.parametrize("augment", SINGLE, ids=repr)
def test_what_happens_to_an_image_does_not_depend_on_its_batch(augment):
    images = torch.rand(40, 2, 9, 7)
    rows = np.arange(40) * 11
    whole = augment(images, Draws(3, 8, rows))
    assert whole.shape == images.shape
    order = np.random.default_rng(0).permutation(40)
    for chosen in (order, order[:7], order[:1], order[:0]):
        again = augment(images[chosen], Draws(3, 8, rows[chosen]))
        assert torch.equal(again, whole[chosen])
    assert not torch.equal(augment(images, Draws(3, 9, rows)), whole)
    assert not torch.equal(augment(images, Draws(4, 8, rows)), whole)


def test_crop_and_flip_give_shifted_mirrored_images():
    images = torch.arange(1, 101, dtype=torch.uint8).view(1, 1, 10, 10).repeat(5000, 2, 1, 1)
    before = images.clone()
    out = CropFlip(padding=2)(images, draws(5000))
    assert out.dtype == torch.uint8
    assert torch.equal(images, before)
    padded = torch.nn.functional.pad(images[0], [2] * 4)
    possible = {}
    for dy in range(5):
        for dx in range(5):
            window = padded[:, dy : dy + 10, dx : dx + 10]
            possible[window.numpy().tobytes()] = (dy, dx, False)
            possible[window.flip(2).numpy().tobytes()] = (dy, dx, True)
    drawn = [possible[image.contiguous().numpy().tobytes()] for image in out]  # KeyError: an image that cannot be
    counts = [drawn.count(kind) for kind in possible.values()]
    assert stats.chisquare(counts).pvalue > 1e-4


def test_crop_and_flip_are_those_of_kornia(importable):
    """kornia's RandomCrop and RandomHorizontalFlip, given the corners and mirrors that ours drew."""
    kornia = importable("kornia.augmentation")
    images, some = torch.rand(32, 3, 12, 10), draws(32)
    corners = torch.from_numpy((some.uniform("crop", 2) * 7).astype(int))
    left, top = corners[:, 1], corners[:, 0]
    right, bottom = left + 9, top + 11
    box = torch.stack([torch.stack(p, 1) for p in ((left, top), (right, top), (right, bottom), (left, bottom))], 1)
    crop = kornia.RandomCrop((12, 10), padding=3, cropping_mode="slice")
    theirs = crop(images, params={**crop.forward_parameters(images.shape), "src": box.float(), "dst": box.float()})
    mirrored = torch.from_numpy(some.uniform("flip")[:, 0] < 0.5).float()
    flip = kornia.RandomHorizontalFlip()
    theirs = flip(theirs, params={**flip.forward_parameters(images.shape), "batch_prob": mirrored})
    assert 5 < mirrored.sum() < 27
    assert torch.equal(CropFlip(3)(images, some), theirs)


def test_cutout_is_a_square_around_a_uniform_centre():
    """Against the rectangle written out pixel by pixel, and kornia's erasing of the same rectangle."""
    images, some = torch.rand(200, 2, 9, 11) + 1, draws(200)
    out = Cutout(4)(images, some)
    expected = images.clone()
    for image, (u, v) in zip(expected, some.uniform("cutout", 2), strict=True):
        y, x = int(u * 9), int(v * 11)
        for row in range(9):
            for column in range(11):
                if y - 2 <= row < y + 2 and x - 2 <= column < x + 2:
                    image[:, row, column] = 0
    assert torch.equal(out, expected)
    areas = (out[:, 0] == 0).sum((1, 2))
    assert areas.max() == 16
    assert areas.min() == 4  # a centre in the corner (0, 0)
    assert (Cutout(1)(images, some) == 0).sum() == 2 * 200
    assert (Cutout(40)(images, some) == 0).all()


def test_cutout_covers_every_pixel_as_often_as_the_geometry_says():
    """P(covered) = (centres whose square reaches the pixel) / (all centres): fewer at the border."""
    out = Cutout(3)(torch.ones(20_000, 1, 6, 6), draws(20_000))
    reach = torch.tensor([2, 3, 3, 3, 3, 2]) / 6
    expected = reach[:, None] * reach
    found = (out[:, 0] == 0).float().mean(0)
    assert (found - expected).abs().max() < 0.02


def test_cutout_is_the_erasing_of_kornia(importable):
    kornia = importable("kornia.augmentation")
    images, some = torch.rand(32, 3, 12, 10) + 1, draws(32)
    out = Cutout(4)(images, some)
    top, left = (some.uniform("cutout", 2) * [12, 10]).astype(int).T - 2
    low, high = np.maximum([top, left], 0), np.minimum(np.array([top, left]) + 4, [[12], [10]])
    names = ("ys", "xs", "heights", "widths")
    box = {name: torch.from_numpy(v).float() for name, v in zip(names, [*low, *(high - low)], strict=True)}
    erase = kornia.RandomErasing(p=1.0)
    theirs = erase(images, params={**erase.forward_parameters(images.shape), **box, "values": torch.zeros(32)})
    assert torch.equal(out, theirs)


# -- mixing ------------------------------------------------------------------------------------------------------


def one_hot(count: int, classes: int = 10) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.arange(count) % classes, classes).float()


def partners_of(targets: torch.Tensor) -> torch.Tensor:
    """The partner of every image whose target named itself: the other class, itself where nothing was mixed in."""
    others = targets * (1 - torch.eye(len(targets)))
    return others.argmax(1)


def test_partners_go_once_around_the_batch():
    images = torch.arange(50.0).view(50, 1, 1, 1)
    mixed, targets = Mixup(5.0)(images, torch.eye(50), draws(50))
    partner = partners_of(targets)
    place, seen = 0, []
    for _ in range(50):
        place = int(partner[place])
        seen.append(place)
    assert sorted(seen) == list(range(50))  # one circle: a permutation, and nobody is alone
    assert torch.allclose(mixed.flatten(), targets @ images.flatten())
    other = partners_of(Mixup(5.0)(images, torch.eye(50), draws(50, epoch=1))[1])
    assert (other == partner).float().mean() < 0.2


@pytest.mark.parametrize("mix", [Mixup(1.0), CutMix(1.0)], ids=repr)
def test_mixing_does_not_depend_on_the_order_of_the_batch(mix):
    images, targets, rows = torch.rand(30, 2, 8, 8), torch.eye(30), np.arange(30) * 5
    whole = mix(images, targets, Draws(1, 2, rows))
    order = np.random.default_rng(0).permutation(30)
    again = mix(images[order], targets[order], Draws(1, 2, rows[order]))
    assert torch.equal(again[0], whole[0][order])
    assert torch.equal(again[1], whole[1][order])
    assert whole[1].sum(1).sub(1).abs().max() < 1e-6
    assert (whole[1] >= 0).all()
    alone = mix(images[:1], targets[:1], Draws(1, 2, rows[:1]))
    assert torch.allclose(alone[0], images[:1])
    assert torch.allclose(alone[1], targets[:1])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_weights_are_beta(alpha):
    count = 4000
    images = torch.zeros(count, 1, 1, 1, dtype=torch.float64)
    images[:] = torch.arange(count).view(-1, 1, 1, 1)
    some = draws(count)
    targets = torch.nn.functional.one_hot(torch.arange(count) % 2).double()
    # Only images with a partner of the other class show their weight in the target.
    mixed, soft = Mixup(alpha)(images, targets, some)
    kept = (soft * targets).sum(1)
    shown = kept[kept < 1].numpy()
    assert len(shown) > 0.4 * count
    assert stats.kstest(shown, stats.beta(alpha, alpha).cdf).pvalue > 1e-4
    assert not torch.equal(mixed, images)


def test_mixup_is_that_of_kornia(importable):
    kornia = importable("kornia.augmentation")
    images, targets, some = torch.randn(16, 3, 8, 8), torch.eye(16), draws(16)
    mixed, soft = Mixup(1.0)(images, targets, some)
    partner = partners_of(soft)
    theirs = kornia.RandomMixUpV2(data_keys=["input", "class"])
    given = {
        **theirs.forward_parameters(images.shape),
        "mixup_pairs": partner,
        "mixup_lambdas": 1 - soft.diagonal(),  # kornia's lambda is the partner's share
    }
    found = theirs.apply_transform(images, given, {})
    assert torch.allclose(mixed, found, atol=1e-6)


def test_cutmix_is_that_of_kornia(importable):
    """The boxes are read off our images; kornia pastes the same boxes and counts the same shares."""
    kornia = importable("kornia.augmentation")
    images = torch.arange(24.0).view(24, 1, 1, 1).expand(24, 2, 10, 14).contiguous()
    mixed, soft = CutMix(1.0)(images, torch.eye(24), draws(24))
    pasted = mixed[:, 0] != images[:, 0]
    partner = torch.where(pasted.any(2).any(1), mixed[:, 0].flatten(1).sub(images[:, 0].flatten(1)).abs().argmax(1), 0)
    partner = mixed[:, 0].flatten(1).gather(1, partner[:, None])[:, 0].long()
    corners = []
    for box in pasted:
        rows, columns = box.any(1).nonzero().flatten(), box.any(0).nonzero().flatten()
        if len(rows) == 0:
            corners.append([[0, 0], [-1, 0], [-1, -1], [0, -1]])
            continue
        top, bottom, left, right = int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])
        assert box.sum() == (bottom - top + 1) * (right - left + 1)  # a full rectangle
        corners.append([[left, top], [right, top], [right, bottom], [left, bottom]])
    theirs = kornia.RandomCutMixV2(data_keys=["input", "class"], use_correct_lambda=True)
    given = {
        "mix_pairs": partner[None],
        "crop_src": torch.tensor(corners).float()[None],
        "image_shape": torch.tensor([10.0, 14.0]),
        "dtype": torch.tensor(importable("kornia.constants").DType.FLOAT32.value),
    }
    assert torch.equal(mixed, theirs.apply_transform(images, given))
    shares = theirs.apply_transform_class(torch.arange(24.0), given, {})[0, :, 2]
    assert torch.allclose(soft.diagonal(), shares, atol=1e-6)
    assert soft.diagonal().min() < 0.5


def test_cutmix_areas_are_clipped_boxes():
    """Mean kept share against the integral over lambda and centre, pixel by pixel."""
    count, size = 20_000, 16
    some = draws(count)
    images = torch.from_numpy(some.rows.astype(np.float32)).view(-1, 1, 1, 1).expand(count, 1, size, size)
    mixed, soft = CutMix(1.0)(images, torch.arange(count, dtype=torch.float64)[:, None], some)
    kept = (mixed == images).double().mean((1, 2, 3))
    expected = 0.0
    levels = (np.arange(2000) + 0.5) / 2000  # lambda is uniform for alpha 1
    for level in levels:
        side = int(np.sqrt(1 - level) * size)
        covered = [min(c - side // 2 + side, size) - max(c - side // 2, 0) for c in range(size)]
        expected += 1 - np.mean(covered) ** 2 / size**2
    assert kept.mean().item() == pytest.approx(expected / len(levels), abs=0.008)
    # A target mixed like a pixel that is (kept share) its own: the share is that of the pixels.
    partner = torch.where(
        (mixed != images).flatten(1).any(1), mixed.flatten(1).sub(images.flatten(1)).abs().argmax(1), 0
    )
    other = mixed.flatten(1).gather(1, partner[:, None])[:, 0].double()
    own = torch.arange(count, dtype=torch.float64)
    assert torch.allclose(soft[:, 0], kept * own + (1 - kept) * other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CropFlip(-1), "-1: expected a padding"),
        (lambda: Cutout(0), "0: expected a length"),
        (lambda: Mixup(0.0), "a positive alpha"),
        (lambda: CutMix(float("nan")), "a positive alpha"),
    ],
)
def test_settings_that_are_none(make, message):
    with pytest.raises(UserError, match=message):
        make()
