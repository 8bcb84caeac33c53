"""OLES: operations whose gradients of the two losses no longer agree keep the weights they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nas.supernet.network import Supernet
from nas.supernet.part import Part
from nas.supernet.recipe import Recipe
from nas.supernet.settings import Freezing
from search_spaces.cells.darts_network import FactorizedReduce
from search_spaces.choice import Choice
from search_spaces.common.errors import UserError

if TYPE_CHECKING:
    from nas.supernet.state import SearchState
    from nas.training.batches import Batch


class OperationFreezing(Part):
    """Freezes the weights of operations that overfit (Jiang et al., OLES, NeurIPS 2023).

    An operation is a candidate with weights at one place of the network: the same candidate of an edge in two cells is
    two operations. In every iteration in which alphas move, the `agreement` of the gradients of the validation loss
    (from the alphas' step) and of the training loss, both at the weights before their step, goes into its mean; after
    `steps` of them, an operation whose mean is below `threshold` is frozen for good, and the means begin anew. Frozen
    weights do not decay either; statistics go on. PasaLab/oles 20ecf3e, train_search.py, where the training loss is
    that of the iteration before; that a strided skip connection is not frozen is as there.
    """

    wants_held_out_gradients = True

    def __init__(self, supernet: Supernet, settings: Freezing):
        self.settings, self.operations = settings, operations(supernet)
        if not self.operations:
            raise UserError(list(supernet.labels), "a Choice with weights in its candidates, to be frozen")
        self.sums = torch.zeros(len(self.operations), dtype=torch.float64)
        self.steps = 0
        self.frozen = [False] * len(self.operations)
        self.held_out: list[list[Tensor | None]] | None = None

    def before_alphas(self, state: SearchState, recipe: Recipe, held_out: Batch) -> None:
        self.held_out = [[p.grad for p in weights] for weights in self.operations.values()]

    def before_weights(self, state: SearchState, recipe: Recipe, batch: Batch) -> None:
        if self.held_out is None:  # alphas did not move
            return
        pairs = zip(self.held_out, self.operations.values())
        found = [agreement(other, [p.grad for p in weights]) for other, weights in pairs]
        self.held_out = None
        self.sums += torch.stack(found).double().cpu()
        self.steps += 1
        if self.steps == self.settings.steps:
            over = (self.sums / self.steps < self.settings.threshold).tolist()
            self._freeze([before or now for before, now in zip(self.frozen, over)])
            self.sums.zero_()
            self.steps = 0

    def row(self) -> dict[str, Any]:
        return {"frozen": sum(self.frozen)}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums.clone(), "steps": self.steps, "frozen": list(self.frozen)}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        self.sums, self.steps, self.held_out = content["sums"], content["steps"], None
        self._freeze(content["frozen"])

    def _freeze(self, frozen: Sequence[bool]) -> None:
        self.frozen = list(frozen)
        for still, weights in zip(self.frozen, self.operations.values(), strict=True):
            for p in weights:
                p.requires_grad_(not still)
                if still:
                    p.grad = None


def operations(supernet: Supernet) -> dict[str, list[nn.Parameter]]:
    """{place of a candidate in the network: its weights}, for candidates that have some and are no skip connections.

    Inner choices are part of the candidate that they lie in.
    """
    found: dict[str, list[nn.Parameter]] = {}
    for name, place in supernet.network.named_modules():
        if isinstance(place, Choice) and not any(name.startswith(f"{outer}.") for outer in found):
            for index, candidate in enumerate(place.candidates):
                weights = list(candidate.parameters())
                if weights and not isinstance(candidate, FactorizedReduce):
                    found[f"{name}.candidates.{index}"] = weights
    return found


def agreement(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Tensor:
    """From -1 to 1: how alike two gradients are in direction, each given by one tensor for every weight.

    Of every weight the cosine along its first axis (output channels) is averaged over the others, then the weights; a
    cosine with zeros is 0, as are weights without a gradient (None) altogether.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if not pairs:
        return torch.zeros(())
    return torch.stack([torch.nn.functional.cosine_similarity(a, b, dim=0).mean() for a, b in pairs]).mean()
