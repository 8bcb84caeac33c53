"""Batches of training images: the batch of a step is a function of seed and step alone.

So a resumed run needs no state of the loader, and processes that share a batch need no messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nas.training.augment import Augment, Compose, CropFlip, CutMix, Cutout, Mix, Mixup
from nas.training.data import Dataset
from nas.training.distributed import ALONE, Processes
from nas.training.draws import Draws
from nas.training.recipe import Recipe
from search_spaces.common.errors import UserError


class Batch(NamedTuple):
    """images float32 [B, C, H, W], normalised; labels int64 [B]; targets: the labels, or with mixing float32
    [B, classes] that sum to 1."""

    images: Tensor
    labels: Tensor
    targets: Tensor


class Batches:
    """Endless batches, epoch after epoch in fresh random order.

    images [N, C, H, W], labels int64 [N]. seed: of order and augmentation. augment: on raw images; after
    normalisation `normalized_augment`, then `mix` on images and one-hot targets of `num_classes`. drop_last: leave
    an incomplete last batch out. rank, world: this process takes every `world`-th image of a batch from `rank`.
    Errors: UserError if the images do not fill a batch, or a batch cannot be shared evenly.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        seed: int,
        augment: Augment | None = None,
        normalize: Callable[[Tensor], Tensor] | None = None,
        normalized_augment: Augment | None = None,
        mix: Mix | None = None,
        num_classes: int = 0,
        drop_last: bool = True,
        rank: int = 0,
        world: int = 1,
    ):
        if not 1 <= batch_size <= len(images):
            raise UserError(batch_size, f"a batch size from 1 to the number of training images, {len(images)}")
        if batch_size % world:
            raise UserError(batch_size, f"a batch size that {world} processes can share evenly")
        self.images, self.labels, self.batch_size, self.seed = images, labels, batch_size, seed
        self.augment, self.normalize, self.normalized_augment, self.mix = augment, normalize, normalized_augment, mix
        self.num_classes, self.rank, self.world = num_classes, rank, world
        whole, rest = divmod(len(images), batch_size)
        self.last_size = rest if rest and not drop_last else batch_size
        self.steps_per_epoch = whole + (rest > 0 and not drop_last)
        if self.last_size < world:
            expected = f"an image for each of {world} processes; drop_last leaves the last batch out"
            raise UserError(f"a last batch of {self.last_size}", expected)
        self.probabilities: np.ndarray | None = None
        self._known, self._order = (-1, -1), np.zeros(0, np.int64)

    def draw_by(self, probabilities: np.ndarray | None) -> None:
        """From now on an epoch's images are as many draws with these probabilities [N]; None: each image once.

        An image that is drawn twice in an epoch is augmented alike.
        """
        self.probabilities, self._known = probabilities, (-1, -1)

    def rows(self, step: int) -> np.ndarray:
        """The indices of the images of step `step`, from 0, over all processes."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if (self.seed, epoch) != self._known:
            self._known = (self.seed, epoch)
            rng, count = np.random.default_rng(self._known), len(self.images)
            if self.probabilities is None:
                self._order = rng.permutation(count)
            else:
                self._order = rng.choice(count, count, p=self.probabilities)
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]

    def batch(self, step: int) -> Batch:
        """This process's part of the batch of step `step`; the parts of all processes make up the whole batch."""
        rows = self.rows(step)
        # Mixing takes partners from the whole batch, so that the result does not depend on the number of processes.
        mine = slice(None) if self.mix is not None else slice(self.rank, None, self.world)
        rows = rows[mine]
        where = torch.from_numpy(rows).to(self.images.device)
        draws = Draws(self.seed, step // self.steps_per_epoch, rows)
        images, labels = self.images[where], self.labels[where]
        if self.augment is not None:
            images = self.augment(images, draws)
        if self.normalize is not None:
            images = self.normalize(images)
        if self.normalized_augment is not None:
            images = self.normalized_augment(images, draws)
        targets = labels
        if self.mix is not None:
            one_hot = nn.functional.one_hot(labels, self.num_classes).float()
            images, targets = self.mix(images, one_hot, draws)
            mine = slice(self.rank, None, self.world)
            images, labels, targets = images[mine], labels[mine], targets[mine]
        return Batch(images, labels, targets)

    def __iter__(self) -> Iterator[Batch]:
        step = 0
        while True:
            yield self.batch(step)
            step += 1


def make_batches(data: Dataset, recipe: Recipe, *, seed: int, processes: Processes = ALONE) -> Batches:
    """The training batches of a data set, augmented as the recipe says. Errors: UserError."""
    raw: list[Augment] = []
    if recipe.padding or recipe.flip:
        raw.append(CropFlip(recipe.padding, recipe.flip))
    if recipe.policy is not None:
        from nas.training.policies import policy

        raw.append(policy(recipe.policy))
    mixes: list[Mix] = []
    if recipe.mixup:
        mixes.append(Mixup(recipe.mixup))
    if recipe.cutmix:
        mixes.append(CutMix(recipe.cutmix))
    return Batches(
        data.train.images,
        data.train.labels,
        recipe.batch_size,
        seed=seed,
        augment=Compose(tuple(raw)) if raw else None,
        normalize=data.normalize,
        normalized_augment=Cutout(recipe.cutout) if recipe.cutout else None,
        mix=_one_of(mixes) if mixes else None,
        num_classes=data.num_classes,
        drop_last=recipe.drop_last,
        rank=processes.rank,
        world=processes.world,
    )


def _one_of(mixes: list[Mix]) -> Mix:
    """One of them for each batch, drawn by its first image."""

    def mix(images: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        which = int(draws.uniform("which mix")[0, 0] * len(mixes))
        return mixes[which](images, targets, draws)

    return mix


def evaluation_batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    *,
    normalize: Callable[[Tensor], Tensor] | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once, in order, the last batch perhaps smaller; of every batch this process's share."""
    for start in range(0, len(images), batch_size):
        part = slice(start + rank, min(start + batch_size, len(images)), world)
        if len(images[part]):
            chosen = images[part]
            yield (normalize(chosen) if normalize else chosen), labels[part]
