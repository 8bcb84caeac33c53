"""P-DARTS: dropout behind skip connections, so that operations with weights are trained too."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from nas.supernet.mixed import Mixed
from nas.supernet.network import Supernet
from nas.supernet.part import Part

if TYPE_CHECKING:
    from nas.supernet.recipe import Recipe
    from nas.supernet.state import SearchState

DECAY = 0.2  # of the exponential, per epoch


class DroppedIdentity(nn.Identity):
    """The input, in training with each entry dropped with probability `p` and the others scaled by 1 / (1 - p)."""

    p: float = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.p, self.training)


class SkipDropout(Part):
    """Dropout behind every candidate that is the identity; strided skip connections have weights and get none.

    Chen et al., P-DARTS, ICCV 2019 (arXiv 1904.12760), section 3.3.1; code chenxin061/pdarts b880e87, train_search.py.
    """

    def __init__(self, supernet: Supernet):
        self.places: list[DroppedIdentity] = []
        for mixed in supernet.modules():
            if not isinstance(mixed, Mixed):
                continue
            for index, candidate in enumerate(mixed.candidates):
                if type(candidate) is nn.Identity:
                    mixed.candidates[index] = DroppedIdentity()
            self.places += [c for c in mixed.candidates if isinstance(c, DroppedIdentity)]

    def begin_epoch(self, state: SearchState, recipe: Recipe) -> None:
        p = probability(state.epoch, recipe.epochs, recipe.alpha_warmup_epochs, recipe.skip_dropout)
        for place in self.places:
            place.p = p


def probability(epoch: int, epochs: int, warmup: int, rate: float) -> float:
    """Of an epoch from 0: while only weights move, from `rate` in a line that would reach 0 at the end of all
    `epochs`; then from `rate` again as exp(-.2 t), t in epochs since (code: `scale_factor`)."""
    if epoch < warmup:
        return rate * (epochs - epoch - 1) / epochs
    return rate * math.exp(-DECAY * (epoch - warmup))
