"""Part: what a recipe adds around the steps of a search, with a memory that goes into the checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from nas.supernet.network import Draw
    from nas.supernet.recipe import Recipe
    from nas.supernet.state import SearchState
    from nas.training.batches import Batch


class Part:
    """Called at fixed places of every epoch; here nothing happens at any of them.

    A part is made for each search by `nas.supernet.parts.parts_of` and may keep what it needs as attributes; what the
    next step depends on is in its `state_dict`.

    wants_held_out_gradients: whether `before_alphas` finds in the weights' `.grad` the gradients of the loss that the
    alphas saw (first-order; they are gone at the weights' step).
    """

    wants_held_out_gradients: bool = False

    def begin_epoch(self, state: SearchState, recipe: Recipe) -> None:
        """Before the first step of epoch `state.epoch`, also after a resume there."""

    def prepare(self, state: SearchState, recipe: Recipe, folder: Path) -> None:
        """A run begins or goes on in `folder`; nothing is loaded yet. What other seeds may share is kept there."""

    def after_outputs(self, state: SearchState, recipe: Recipe, draw: Draw, outputs: Tensor, batch: Batch) -> None:
        """In a step of the weights, after each forward pass with `draw`; outputs: [B, classes], detached."""

    def before_weights(self, state: SearchState, recipe: Recipe, batch: Batch) -> None:
        """The gradients of the weights are there (clipped), their step is not taken yet."""

    def alphas_loss(self, loss: Tensor) -> Tensor:
        """The loss of the alphas, from their cross-entropy."""
        return loss

    def before_alphas(self, state: SearchState, recipe: Recipe, held_out: Batch) -> None:
        """The gradients of the alphas are there, their step is not taken yet."""

    def end_epoch(self, state: SearchState, recipe: Recipe) -> None:
        """After the last step of an epoch; `state.epoch` is the number of epochs that are over."""

    def row(self) -> dict[str, Any]:
        """Plain values for the epoch's row of the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, as tensors and plain values."""
        return {}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
