"""The auxiliary skip connections of DARTS-: beside every mixture, fading out during the search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from nas.supernet.mixed import Mixed
from nas.supernet.network import Supernet
from nas.supernet.part import Part
from nas.supernet.recipe import Recipe
from nas.supernet.regularizers import auxiliary_skip_weight
from search_spaces.cells.darts_network import FactorizedReduce
from search_spaces.cells.operations import relu
from search_spaces.common.errors import UserError

if TYPE_CHECKING:
    from nas.supernet.state import SearchState


def add_auxiliary_skips(supernet: Supernet, factor: float) -> None:
    """Put a skip connection with `factor` beside every mixture that has one among its candidates.

    It is the identity; where the candidates halve the size, a FactorizedReduce of their widths whose normalisation has
    no weights (its convolutions are trained). It belongs to no architecture: a selected candidate runs without it.
    Chu et al. 2021 (DARTS-, arXiv 2009.01027), section 3.3. Errors: UserError for a supernet without such a mixture.
    """
    places = [part for part in supernet.network.modules() if isinstance(part, Mixed)]
    for place in places:
        skips = [module for module in place.candidates if isinstance(module, nn.Identity | FactorizedReduce)]
        if skips:
            place.auxiliary, place.auxiliary_weight = _skip_like(skips[0]), factor
    if not skipped(supernet):
        raise UserError(list(supernet.labels), "a Choice with a skip connection among its candidates", "nas-bench-201")


def skipped(supernet: Supernet) -> list[Mixed]:
    """The mixtures with an auxiliary skip connection."""
    return [part for part in supernet.network.modules() if isinstance(part, Mixed) and part.auxiliary is not None]


class AuxiliarySkip(Part):
    """Lowers the factor of the auxiliary skip connections at the beginning of every epoch."""

    def __init__(self, supernet: Supernet, recipe: Recipe):
        self.places, self.factor = skipped(supernet), recipe.auxiliary_skip

    def begin_epoch(self, state: SearchState, recipe: Recipe) -> None:
        self._set(auxiliary_skip_weight(state.epoch, recipe.epochs, recipe.auxiliary_skip, recipe.auxiliary_skip_decay))

    def row(self) -> dict[str, Any]:
        return {"auxiliary_skip": self.factor}

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        self._set(content["factor"])

    def _set(self, factor: float) -> None:
        self.factor = factor
        for place in self.places:
            place.auxiliary_weight = factor


def _skip_like(skip: nn.Module) -> nn.Module:
    if not isinstance(skip, FactorizedReduce):
        return nn.Identity()
    outputs = skip.conv_a.out_channels + skip.conv_b.out_channels
    made = FactorizedReduce(skip.conv_a.in_channels, outputs, lambda width: nn.BatchNorm2d(width, affine=False), relu)
    return made.train(skip.training)
