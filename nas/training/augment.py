"""Batches of training images, augmented on tensors, with a state that can be saved at any step.

Crop and flip are a few lines of torch: every random number must come from the loop's own generator, so that a run
resumed in the middle of an epoch sees the same images, and nothing heavier is needed for short proxy trainings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from search_spaces.common.errors import UserError

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class CropFlip:
    """Zero padding by `padding` pixels, a random crop of the old size, and a mirror image half the time.

    The usual augmentation of CIFAR-10 with padding 4 (He et al. 2016, arXiv 1512.03385, section 4.2).
    """

    padding: int = 4
    flip: bool = True

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment images [B, C, H, W] of any type; each draws its own crop and flip from `generator` (on the CPU)."""
        count, device = len(images), images.device
        if self.padding:
            offsets = torch.randint(2 * self.padding + 1, (2, count), generator=generator).to(device)
            height, width = images.shape[2:]
            padded = torch.nn.functional.pad(images, [self.padding] * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: no window is copied but the drawn
            images = windows[torch.arange(count, device=device), :, offsets[0], offsets[1]]
        if self.flip:
            mirrored = (torch.rand(count, generator=generator) < 0.5).to(device)
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        return images


class Batches:
    """An endless iterator of (images, labels): epoch after epoch in fresh random order, incomplete batches dropped.

    images: [N, C, H, W], labels: [N]. generator: on the CPU; gives order and augmentation. augment: a function of
    (images, generator), before `normalize`. Errors: UserError if there are fewer images than a batch holds.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        generator: torch.Generator,
        augment: Augment | None = None,
        normalize: Callable[[Tensor], Tensor] | None = None,
    ):
        if not 1 <= batch_size <= len(images):
            raise UserError(batch_size, f"a batch size from 1 to the number of training images, {len(images)}")
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.generator, self.augment, self.normalize = generator, augment, normalize
        self._order = torch.zeros(0, dtype=torch.int64)
        self._position = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self._position + self.batch_size > len(self._order):
            self._order = torch.randperm(len(self.images), generator=self.generator)
            self._position = 0
        rows = self._order[self._position : self._position + self.batch_size].to(self.images.device)
        self._position += self.batch_size
        images = self.images[rows]
        if self.augment is not None:
            images = self.augment(images, self.generator)
        if self.normalize is not None:
            images = self.normalize(images)
        return images, self.labels[rows]

    def state_dict(self) -> dict[str, Any]:
        """Order, position and generator: what `load_state_dict` needs to go on with the same next batch."""
        return {"order": self._order, "position": self._position, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Errors: UserError if it was taken from another number of images."""
        if len(state["order"]) not in (0, len(self.images)):
            raise UserError(len(self.images), f"{len(state['order'])} training images, as in the saved state")
        self._order, self._position = state["order"], int(state["position"])
        self.generator.set_state(state["generator"])


def batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    *,
    generator: torch.Generator,
    augment: Augment | None = None,
    normalize: Callable[[Tensor], Tensor] | None = None,
) -> Batches:
    """`Batches` of these images."""
    return Batches(images, labels, batch_size, generator=generator, augment=augment, normalize=normalize)


def evaluation_batches(
    images: Tensor, labels: Tensor, batch_size: int, *, normalize: Callable[[Tensor], Tensor] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once, in order, the last batch perhaps smaller."""
    for start in range(0, len(images), batch_size):
        chosen = images[start : start + batch_size]
        yield (normalize(chosen) if normalize else chosen), labels[start : start + batch_size]
