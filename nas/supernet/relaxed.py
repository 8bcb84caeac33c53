"""RARTS: two copies of the weights that share their alphas, one for each half of the images."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nas.supernet.bilevel import relaxed_step
from nas.supernet.losses import cross_entropy, regularization
from nas.supernet.network import Supernet
from nas.supernet.part import Part
from nas.training.batches import Batch
from nas.training.optimizers import make_optimizer

if TYPE_CHECKING:
    from nas.supernet.recipe import Recipe
    from nas.supernet.state import SearchState
    from nas.supernet.weight_steps import Totals


class Twin(Part):
    """The second copy of the weights, trained on the images of the alphas.

    supernet: a copy that begins with the same weights and has the alphas, betas and generator of the first one itself.
    optimizer: of the same kind as that of the first copy.
    """

    def __init__(self, supernet: Supernet, recipe: Recipe):
        shared = [*supernet.architecture_parameters(), supernet.generator]
        self.supernet = copy.deepcopy(supernet, {id(one): one for one in shared})
        self.optimizer = make_optimizer(self.supernet.network, recipe.training)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.supernet.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        self.supernet.network.load_state_dict(content["weights"])
        self.optimizer.load_state_dict(content["optimizer"])


def relaxed_iteration(state: SearchState, recipe: Recipe, batch: Batch, epoch: int, totals: Totals) -> float:
    """A step of both copies of the weights and of the alphas (`bilevel.relaxed_step`); the second copy's loss.

    batch: of the first copy, as are the sums in `totals`; a regulariser is a term of the second one's loss.
    """
    twin, settings, supernet = state.parts["twin"], recipe.relaxed, state.supernet
    assert isinstance(twin, Twin)
    assert settings is not None
    assert state.alpha_optimizer is not None
    held_out = state.held_out_batch()
    twin.supernet.train()
    twin.supernet.progress, twin.supernet.kept = supernet.progress, supernet.kept
    for own, first in zip(twin.optimizer.param_groups, state.optimizer.param_groups):
        own["lr"] = first["lr"]
    seen: list[Tensor] = []

    def train_loss() -> Tensor:
        outputs = supernet(batch.images)
        seen.append(outputs.detach())
        return state.share(batch) * cross_entropy(outputs, batch, recipe)

    def val_loss() -> Tensor:
        share = state.share(held_out, state.alpha_batches)
        loss = share * cross_entropy(twin.supernet(held_out.images), held_out, recipe)
        term = regularization(supernet, recipe, epoch)
        return loss if term is None else loss + term

    optimizers = (state.optimizer, twin.optimizer, state.alpha_optimizer)
    train, val = relaxed_step(
        train_loss,
        val_loss,
        *optimizers,
        train_weight=settings.train_weight,
        coupling=settings.coupling,
        clip=recipe.training.clip_norm,
        average=state.processes.average,
    )
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    means = {"training loss": state.mean(train), "loss of the alphas": state.mean(val)}
    for name, value in means.items():
        if not math.isfinite(value):
            state.fail(f"the {name} became {value}")
            break
    before = state.share(batch) * cross_entropy(seen[0], batch, recipe)
    totals.add(state.mean(before), seen[0], batch.labels)
    return means["loss of the alphas"]
