"""Batches: each image once an epoch, a function of the step alone, shares of processes that make up the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_trainings import patterns

from nas.training.batches import Batches, evaluation_batches, make_batches
from nas.training.distributed import Processes
from nas.training.recipe import Recipe
from search_spaces.common.errors import UserError

AUGMENTED = {"padding": 2, "flip": True, "cutout": 3}


def numbered(count: int = 50, size: int = 8, **settings) -> Batches:
    """Images that carry their number, so that a batch tells which they are."""
    images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone()
    return Batches(images, torch.arange(count), size, seed=1, **settings)


@pytest.mark.parametrize("drop_last", [False, True])
def test_every_image_once_an_epoch(drop_last):
    batches = numbered(drop_last=drop_last)
    assert batches.steps_per_epoch == (6 if drop_last else 7)
    epochs = []
    for epoch in range(3):
        found = [batches.batch(epoch * batches.steps_per_epoch + k) for k in range(batches.steps_per_epoch)]
        labels = torch.cat([b.labels for b in found])
        assert torch.equal(torch.cat([b.images[:, 0, 0, 0] for b in found]).long(), labels)
        assert [len(b.labels) for b in found] == [8] * 6 + [2] * (not drop_last)
        assert len(set(labels.tolist())) == len(labels) == (48 if drop_last else 50)
        epochs.append(labels.tolist())
    assert epochs[0] != epochs[1] != epochs[2]


def test_orders_are_uniform():
    """Each of four images comes first in a quarter of 2,000 epochs: within four standard deviations."""
    batches = numbered(count=4, size=1)
    firsts = np.bincount([int(batches.rows(4 * epoch)[0]) for epoch in range(2000)], minlength=4)
    assert (abs(firsts - 500) < 4 * np.sqrt(2000 * 0.25 * 0.75)).all()


@pytest.mark.parametrize("mix", [{}, {"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_a_batch_is_a_function_of_seed_and_step(mix):
    recipe = Recipe(batch_size=32, drop_last=False, **AUGMENTED, **mix)
    forward, other = (make_batches(patterns(), recipe, seed=s) for s in (5, 6))
    in_order = [forward.batch(step) for step in range(12)]
    for step in (11, 3, 7, 3, 0):
        again = make_batches(patterns(), recipe, seed=5)
        for left, right in zip(in_order[step], forward.batch(step), strict=True):
            assert torch.equal(left, right)
        for left, right in zip(in_order[step], again.batch(step), strict=True):
            assert torch.equal(left, right)
    assert not torch.equal(in_order[0].images, other.batch(0).images)
    assert not torch.equal(in_order[0].images, in_order[5].images)


@pytest.mark.parametrize("mix", [{}, {"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
@pytest.mark.parametrize("world", [2, 4])
def test_shares_make_up_the_whole(world, mix):
    """In the last batch of 150 - 4 * 32 = 22 images too, which four processes cannot share evenly."""
    recipe = Recipe(batch_size=32, drop_last=False, **AUGMENTED, **mix)
    whole = make_batches(patterns(), recipe, seed=5)
    shares = [make_batches(patterns(), recipe, seed=5, processes=Processes(r, world)) for r in range(world)]
    for step in (0, 4, 9):
        batch = whole.batch(step)
        for rank, share in enumerate(shares):
            for all_of_it, part in zip(batch, share.batch(step), strict=True):
                assert torch.equal(all_of_it[rank::world], part)
    assert len(whole.batch(4).labels) == 22


def test_mixed_targets_are_shares_of_the_classes_that_were_mixed():
    """Mixup without augmentation: an image is the sum of its two sources, weighted as its targets say."""
    data = patterns()
    recipe = Recipe(batch_size=150, mixup=1.0)
    batch = make_batches(data, recipe, seed=0).batch(0)
    plain = make_batches(data, Recipe(batch_size=150), seed=0).batch(0)
    assert torch.equal(batch.labels, plain.labels)
    torch.testing.assert_close(batch.targets.sum(1), torch.ones(150))
    assert (batch.targets >= 0).all()
    flat = plain.images.flatten(1)
    found = 0
    for k in range(150):
        if plain.labels[k] == batch.targets[k].argmax() and (batch.targets[k] > 0).sum() == 2:
            weight = batch.targets[k, plain.labels[k]]
            rest = (batch.images[k].flatten() - weight * flat[k]) / (1 - weight)
            distance, partner = (flat - rest).abs().amax(1).min(0)
            assert distance < 1e-3
            assert batch.targets[k, plain.labels[partner]] == pytest.approx(1 - weight.item(), abs=1e-6)
            found += 1
    assert found > 20


def test_two_mixes_take_turns():
    """With both, each batch is that of one of them alone, and both occur."""
    both, mixup, cutmix = (
        make_batches(patterns(), Recipe(batch_size=8, **mix), seed=0)
        for mix in ({"mixup": 0.4, "cutmix": 1.0}, {"mixup": 0.4}, {"cutmix": 1.0})
    )
    picks = set()
    for step in range(18):
        found = [torch.equal(both.batch(step).images, m.batch(step).images) for m in (mixup, cutmix)]
        assert sum(found) == 1
        picks.add(tuple(found))
    assert len(picks) == 2


def test_raw_images_are_normalised_before_cutout():
    data = patterns()
    seen = []

    def watch(images, draws):
        seen.append(images.clone())
        return images

    images = (data.train.images - data.train.images.min()) * 10
    Batches(images, data.train.labels, 10, seed=0, normalize=lambda x: x / 2, normalized_augment=watch).batch(0)
    plain = Batches(images, data.train.labels, 10, seed=0).batch(0)
    assert torch.equal(seen[0], plain.images / 2)


def test_batches_that_cannot_be():
    for size in (0, 51):
        with pytest.raises(UserError, match="a batch size from 1 to the number of training images, 50"):
            numbered(size=size)
    with pytest.raises(UserError, match="a batch size that 3 processes can share evenly"):
        numbered(world=3)
    with pytest.raises(UserError, match="a last batch of 2': expected an image for each of 4 processes"):
        numbered(world=4, drop_last=False)
    assert numbered(world=4).steps_per_epoch == 6


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_batches_hold_each_image_once(world):
    data = patterns()
    found = []
    for rank in range(world):
        parts = evaluation_batches(data.val.images, torch.arange(45), 11, rank=rank, world=world)
        found += [int(k) for _, labels in parts for k in labels]
    assert sorted(found) == list(range(45))
    normalized, _ = next(evaluation_batches(data.val.images, data.val.labels, 11, normalize=lambda x: x + 1))
    assert torch.equal(normalized, data.val.images[:11] + 1)
