"""A training of the normalisation layers alone, as a score: everything else stays as it was initialised."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn

from nas.training.data import Dataset
from nas.training.loop import advance, evaluate_split, late_loss, start
from nas.training.recipe import Recipe
from search_spaces.common.errors import UserError

RECIPE = Recipe(
    steps=40,
    batch_size=64,
    weight_decay=0.0,
    warmup_steps=5,
    kernels="eager",
    source="Frankle et al., Training BatchNorm and Only BatchNorm, ICLR 2021, shortened",
)


@dataclass(frozen=True)
class BatchNormOnly:
    """What a training of scales and shifts alone gave.

    loss: mean training loss over the last half of the steps. val_acc: percent, None without validation images.
    trained: how many scalars were trained. failed: why it stopped early, or None; then the loss is not finite.
    """

    loss: float
    val_acc: float | None
    trained: int
    failed: str | None

    @property
    def score(self) -> float:
        """Higher is better: the negative loss."""
        return -self.loss


def train_batch_norm_only(model: nn.Module, data: Dataset, recipe: Recipe = RECIPE, *, seed: int) -> BatchNormOnly:
    """Train the scales and shifts of a copy of `model` by the common loop; the model stays as it is.

    Frankle et al., ICLR 2021, section 3: random features with trained normalisation classify well; Chen et al., BN-NAS,
    ICCV 2021, rank architectures by such trainings (there by the scales of a supernet). Every normalisation layer with
    scale or shift counts. Errors: UserError if there is none, or the data do not fit the recipe.
    """
    copied = copy.deepcopy(model).requires_grad_(False)
    trained = normalisation_parameters(copied)
    if not trained:
        raise UserError(type(model).__name__, "a model with normalisation layers that have scales and shifts")
    for parameter in trained:
        parameter.requires_grad_()
    state = advance(start(copied, data, recipe, seed=seed), recipe)
    if state.failed:
        return BatchNormOnly(float("nan"), None, sum(p.numel() for p in trained), state.stopped)
    accuracy = evaluate_split(copied, data, data.val, recipe)["acc"] if len(data.val) else None
    return BatchNormOnly(late_loss(state.losses), accuracy, sum(p.numel() for p in trained), None)


def normalisation_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Scales and shifts of BatchNorm and other normalisations, each once."""
    kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, kinds):
            found |= {id(p): p for p in module.parameters(recurse=False)}
    return list(found.values())
