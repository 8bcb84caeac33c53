"""Augmentation on tensors: crop and flip, Cutout, and the mixing of labelled images by Mixup and CutMix.

Every number comes from `Draws`, so that an image meets the same fate in any batch. That is why these few lines are
here: kornia, which serves the policies of `nas.training.policies`, draws from torch's global generator, and
`python -m benchmarks.speed.speed_augment` measures its crop and flip against `CropFlip`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nas.training.draws import Draws
from search_spaces.common.errors import UserError

Augment = Callable[[Tensor, Draws], Tensor]
Mix = Callable[[Tensor, Tensor, Draws], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Compose:
    """Augmentations one after the other."""

    steps: tuple[Augment, ...]

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        for step in self.steps:
            images = step(images, draws)
        return images


@dataclass(frozen=True)
class CropFlip:
    """Zero padding by `padding` pixels, a random crop of the old size, and a mirror image half the time.

    The usual augmentation of CIFAR-10 with padding 4 (He et al. 2016, arXiv 1512.03385, section 4.2), for raw images.
    Errors: UserError for a negative padding.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise UserError(self.padding, "a padding of 0 pixels or more")

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Augment images [B, C, H, W] of any type and device."""
        if self.padding:
            corners = _pixel(draws.uniform("crop", 2), 2 * self.padding + 1, images.device)
            height, width = images.shape[2:]
            padded = torch.nn.functional.pad(images, [self.padding] * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: no window is copied but the drawn
            images = windows[torch.arange(len(images), device=images.device), :, corners[:, 0], corners[:, 1]]
        if self.flip:
            mirrored = torch.from_numpy(np.flatnonzero(draws.uniform("flip") < 0.5)).to(images.device)
            images = images.index_copy(0, mirrored, images.index_select(0, mirrored).flip(3))
        return images


@dataclass(frozen=True)
class Cutout:
    """One square of zeros with sides of `length` pixels, for images that are normalised, where zero is the mean.

    The centre is uniform over the pixels, and the square is clipped at the border (DeVries and Taylor 2017, arXiv
    1708.04552, section 3.2; DARTS takes 16 on 32x32). Pixels `centre - length // 2` up to `+ length` are covered.
    Errors: UserError for a length below 1.
    """

    length: int = 16

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(self.length, "a length of 1 pixel or more")

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Images [B, C, H, W], each with its own square of zeros."""
        height, width = images.shape[2:]
        centres, sides = draws.uniform("cutout", 2), np.full(len(images), self.length)
        rows = _stripes(centres[:, 0], sides, height)
        columns = _stripes(centres[:, 1], sides, width)
        return images.masked_fill(_boxes(rows, columns).to(images.device), 0)


# -- mixing ------------------------------------------------------------------------------------------------------
# Both mix an image with a partner of its batch. The partner is the next image in the order of one number drawn for
# each, around the circle: a permutation without fixed points that depends on which images are in the batch, but not
# on their order. Every image draws its own weight, as the vicinal distribution of mixup's section 2 has it (released
# codes draw one for the batch, which has the same expectation and a larger variance); an image's weight is then the
# same in any batch, only its partner is not.


@dataclass(frozen=True)
class Mixup:
    """lambda * image + (1 - lambda) * partner, targets alike, lambda ~ Beta(alpha, alpha) for each image.

    Zhang et al. 2018, arXiv 1710.09412, section 2. The partner depends on the other images of the batch. Errors:
    UserError for an alpha that is not positive.
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        _check_alpha(self.alpha)

    def __call__(self, images: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Mixed images [B, C, H, W] (normalised, floating) and targets [B, classes] (shares that sum to 1)."""
        partners = _partners(draws).to(images.device)
        weights = torch.from_numpy(_beta(draws.uniform("mixup-weight")[:, 0], self.alpha))
        weights = weights.to(images.device, images.dtype).view(-1, 1, 1, 1)
        mixed = weights * images + (1 - weights) * images[partners]
        return mixed, _mix_targets(targets, partners, weights)


@dataclass(frozen=True)
class CutMix:
    """A rectangle of the image is the partner's, and targets are mixed by area.

    The box has sqrt(1 - lambda) of height and width (rounded down to pixels), lambda ~ Beta(alpha, alpha) for each
    image, and a centre uniform over the pixels; it is clipped at the border, and lambda becomes the share of pixels
    that the image kept (Yun et al. 2019, arXiv 1905.04899, section 3.1 and the authors' release). The partner depends
    on the other images of the batch. Errors: UserError for an alpha that is not positive.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check_alpha(self.alpha)

    def __call__(self, images: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Mixed images [B, C, H, W] and targets [B, classes] (shares that sum to 1)."""
        height, width = images.shape[2:]
        partners = _partners(draws).to(images.device)
        side = np.sqrt(1 - _beta(draws.uniform("cutmix-weight")[:, 0], self.alpha))
        centres = draws.uniform("cutmix-centre", 2)
        rows = _stripes(centres[:, 0], (side * height).astype(np.int64), height)
        columns = _stripes(centres[:, 1], (side * width).astype(np.int64), width)
        kept = 1 - rows.sum(1, dtype=torch.float64) * columns.sum(1, dtype=torch.float64) / (height * width)
        mixed = torch.where(_boxes(rows, columns).to(images.device), images[partners], images)
        return mixed, _mix_targets(targets, partners, kept.to(images.device))


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < float("inf"):
        raise UserError(alpha, "a positive alpha of the Beta distribution")


def _partners(draws: Draws) -> Tensor:
    order = np.argsort(draws.words("partner")[:, 0], kind="stable")
    partners = np.empty(len(order), np.int64)
    partners[order] = np.roll(order, -1)
    return torch.from_numpy(partners)


def _beta(uniform: np.ndarray, alpha: float) -> np.ndarray:
    """Beta(alpha, alpha) from uniform numbers, by the inverse of its distribution function."""
    from scipy.special import betaincinv

    return betaincinv(alpha, alpha, uniform)


def _mix_targets(targets: Tensor, partners: Tensor, weights: Tensor) -> Tensor:
    weights = weights.to(targets.dtype).view(-1, 1)
    return weights * targets + (1 - weights) * targets[partners]


def _pixel(uniform: np.ndarray, count: int, device: torch.device) -> Tensor:
    return torch.from_numpy((uniform * count).astype(np.int64)).to(device)


def _stripes(centre: np.ndarray, length: np.ndarray, size: int) -> Tensor:
    """Boolean [B, size]: `length` pixels around a uniform centre, less those beyond the border."""
    first = (centre * size).astype(np.int64) - length // 2
    pixels = np.arange(size)
    return torch.from_numpy((pixels >= first[:, None]) & (pixels < (first + length)[:, None]))


def _boxes(rows: Tensor, columns: Tensor) -> Tensor:
    """Boolean [B, 1, H, W] from the stripes of rows and columns."""
    return (rows[:, :, None] & columns[:, None, :])[:, None]
