"""Augmentation policies of kornia (extra `train`), drawn per image like everything else here.

kornia draws an operation for a whole batch, from torch's global generator. Here each image draws its own path through
the policy, from a generator seeded for it; images that meet the same operation then go through it together, which
leaves their result as it is and costs a fraction of one call per image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nas.training.draws import Draws
from search_spaces.common.errors import UserError
from search_spaces.common.names import match

POLICIES: dict[str, Callable[[Any], Any]] = {
    "trivial-augment": lambda auto: auto.TrivialAugment(),
    "rand-augment": lambda auto: auto.RandAugment(n=2, m=9),
    "auto-augment": lambda auto: auto.AutoAugment("cifar10"),
    "auto-augment-imagenet": lambda auto: auto.AutoAugment("imagenet"),
    "auto-augment-svhn": lambda auto: auto.AutoAugment("svhn"),
}


def policy(name: str) -> Policy:
    """The augmentation policy `name`, for raw images (a name in POLICIES).

    trivial-augment: one operation of random strength (Mueller and Hutter 2021, arXiv 2103.10158). rand-augment: two
    operations at strength 9 of 30 (Cubuk et al. 2020, arXiv 1909.13719). auto-augment: the policies found for
    CIFAR-10, ImageNet and SVHN (Cubuk et al. 2019, arXiv 1805.09501). Operations and their ranges are kornia's,
    which differ from the papers' in places. Errors: UserError for an unknown name, or without kornia.
    """
    return Policy(match(name, POLICIES, "an augmentation policy"))


@dataclass(frozen=True)
class Policy:
    """A policy of kornia as an augmentation of images [B, 1 or 3, H, W]: uint8, or floating in [0, 1].

    Grey images pass as three equal channels. The result has the type of the images. Errors: UserError for other
    images, or without kornia.
    """

    name: str
    _paths: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            import kornia.augmentation.auto as auto
        except ImportError:
            raise UserError(self.name, "kornia to be installed: pip install 'nasforge[train]'") from None
        object.__setattr__(self, "_paths", POLICIES[self.name](auto))

    @torch.no_grad()
    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """The images, each after the operations that it drew."""
        if images.shape[1] not in (1, 3):
            raise UserError(f"images of {images.shape[1]} channels", f"1 or 3 channels for {self.name}")
        scale = 255 if images.dtype == torch.uint8 else 1
        if scale == 1 and len(images) and not (images.min() >= 0 and images.max() <= 1):
            raise UserError(f"pixels up to {images.abs().max():g}", f"uint8 or pixels in [0, 1] for {self.name}")
        found = (images.float() / scale).expand(-1, 3, -1, -1).clone()
        paths = self._draw(found, draws)
        for step in range(max(map(len, paths), default=0)):
            together = defaultdict(list)
            for row, path in enumerate(paths):
                if step < len(path):
                    together[path[step][0]].append(row)
            for operation, rows in together.items():
                drawn = [paths[row][step][1] for row in rows]
                given = {k: v if k == SHAPE else torch.cat([d[k] for d in drawn]) for k, v in drawn[0].items()}
                found[rows] = self._paths.get_submodule(operation)(found[rows], params=given)
        found = found[:, : images.shape[1]].clamp(0, 1)
        return (found * scale).round().to(torch.uint8) if scale == 255 else found.to(images.dtype)

    def _draw(self, images: Tensor, draws: Draws) -> list[list[tuple[str, dict[str, Tensor]]]]:
        """For every image the operations (by name in kornia's module) and what they drew."""
        paths = []
        with torch.random.fork_rng(devices=[]):
            for seed in draws.words(self.name)[:, 0].tolist():
                torch.manual_seed(seed >> 1)  # torch takes 63 bits without a sign
                chosen = self._paths.forward_parameters(torch.Size((1, *images.shape[1:])))
                paths.append([(f"{part.name}.{op.name}", op.data) for part in chosen for op in part.data])
        return paths


SHAPE = "forward_input_shape"  # of the batch, the one value that is not drawn by image
