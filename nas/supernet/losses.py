"""The losses of a search."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from nas.supernet import regularizers
from nas.supernet.network import Supernet
from nas.supernet.recipe import Recipe
from nas.training.batches import Batch

if TYPE_CHECKING:
    from nas.supernet.state import SearchState


def cross_entropy(outputs: Tensor, batch: Batch, recipe: Recipe) -> Tensor:
    """The mean loss of a batch, smoothed as the recipe says."""
    return nn.functional.cross_entropy(outputs.float(), batch.targets, label_smoothing=recipe.training.label_smoothing)


def alphas_loss(loss: Tensor, state: SearchState, recipe: Recipe, epoch: int) -> Tensor:
    """The loss that the alphas descend in an epoch: `loss`, their cross-entropy, as parts change it, and the term."""
    for part in state.parts.values():
        loss = part.alphas_loss(loss)
    term = regularization(state.supernet, recipe, epoch)
    return loss if term is None else loss + term


def regularization(supernet: Supernet, recipe: Recipe, epoch: int) -> Tensor | None:
    """The weighted term of the alphas' loss in an epoch, from 0; None for recipes without one."""
    if recipe.regularizer is None:
        return None
    weight = recipe.regularizer_weight
    if recipe.regularizer_ramp:
        weight = regularizers.linear(0.0, weight, epoch, recipe.epochs)
    alphas = [alpha[list(supernet.candidates_of(label))] for label, alpha in supernet.alphas.items()]
    terms = {"beta-decay": regularizers.beta_decay, "zero-one": regularizers.zero_one, "entropy": regularizers.entropy}
    return weight * terms[recipe.regularizer](alphas)
