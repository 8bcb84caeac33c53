"""PA&DA: paths and images that lower the variance of the weights' gradient are drawn more often.

Lu et al., PA&DA, CVPR 2023 (arXiv 2302.14772); ShunLu91/PA-DA 9060c3a, nasbench201/train_panda_201.py. As there, losses
are not weighed by the inverse probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nas.supernet.network import Draw, Supernet
from nas.supernet.part import Part
from nas.supernet.settings import Importance
from nas.training.batches import Batch

if TYPE_CHECKING:
    from nas.supernet.recipe import Recipe
    from nas.supernet.state import SearchState


def mixed_with_uniform(sizes: np.ndarray, share: float) -> np.ndarray:
    """Probabilities [N]: `share` of them in proportion to `sizes` [N], at least 0, the rest uniform; float64.

    All uniform where all sizes are 0.
    """
    uniform, total = np.full(len(sizes), 1 / len(sizes)), float(np.sum(sizes))
    found = (share * np.asarray(sizes, np.float64) / total + (1 - share) * uniform) if total > 0 else uniform
    return found / found.sum()


class ImportanceSampling(Part):
    """Alphas hold the logarithms of the paths' probabilities, set after every epoch; images are drawn likewise.

    norms: {label: [candidates]}, the running means (of the old and the new, as the authors') of a candidate's gradient
    norms in this epoch, each the sum over its tensors, clipped; a label's candidates are averaged with those of the
    other labels of its group that ran the same one. scores: [images], likewise of ||softmax - one-hot||; images that an
    epoch does not draw have 0.
    """

    def __init__(self, supernet: Supernet, settings: Importance):
        self.supernet, self.settings = supernet, settings
        groups: dict[Any, list[str]] = {}
        for label in supernet.labels:
            kinds = tuple(type(c).__name__ for c in supernet._mixed[label][0].candidates)
            groups.setdefault(kinds if settings.shared else label, []).append(label)
        self.groups = list(groups.values())
        self.norms: list[np.ndarray] = []
        self.scores = np.zeros(0)
        self.images: np.ndarray | None = None  # probabilities
        self.draw: Draw | None = None
        with torch.no_grad():
            for alpha in supernet.alphas.values():
                alpha.zero_()

    def begin_epoch(self, state: SearchState, recipe: Recipe) -> None:
        self.norms = [np.zeros(len(self.supernet.alphas[group[0]])) for group in self.groups]
        self.scores = np.zeros(len(state.batches.images))
        state.batches.draw_by(self.images)

    def after_outputs(self, state: SearchState, recipe: Recipe, draw: Draw, outputs: Tensor, batch: Batch) -> None:
        self.draw = draw
        one_hot = nn.functional.one_hot(batch.labels, outputs.shape[1])
        rows, processes = state.batches.rows(state.step), state.processes
        found = torch.zeros(len(rows), device=outputs.device)
        found[processes.rank :: processes.world] = (outputs.float().softmax(1) - one_hot).norm(dim=1)
        for row, score in zip(rows, processes.total(found).tolist(), strict=True):
            self.scores[row] = (self.scores[row] + score) / 2 if self.scores[row] else score

    def before_weights(self, state: SearchState, recipe: Recipe, batch: Batch) -> None:
        assert self.draw is not None
        for group, norms in zip(self.groups, self.norms):
            ran: dict[int, list[float]] = {}
            for label in group:
                for index in self.draw.weights[label].active or () if label in self.draw.weights else ():
                    ran.setdefault(index, []).append(self._norm(label, index))
            for index, found in ran.items():
                new = sum(found) / len(found)
                if new:
                    norms[index] = (norms[index] + new) / 2

    def _norm(self, label: str, index: int) -> float:
        places = self.supernet._mixed[label]
        gradients = [p.grad for place in places for p in place.candidates[index].parameters() if p.grad is not None]
        return float(torch.stack([g.norm() for g in gradients]).sum()) if gradients else 0.0

    def end_epoch(self, state: SearchState, recipe: Recipe) -> None:
        share = (state.epoch - 1) / recipe.epochs
        if self.settings.paths:
            with torch.no_grad():
                for group, norms in zip(self.groups, self.norms):
                    logarithms = torch.from_numpy(np.log(mixed_with_uniform(norms, share)))
                    for label in group:
                        self.supernet.alphas[label].copy_(logarithms)
        if self.settings.images:
            self.images = mixed_with_uniform(self.scores, share)

    def row(self) -> dict[str, Any]:
        """Probabilities of candidates, and 1 / sum p^2 of the images: so many would have equal ones."""
        paths = {label: a.detach().softmax(0).tolist() for label, a in self.supernet.alphas.items()}
        effective = {} if self.images is None else {"effective_images": float(1 / np.square(self.images).sum())}
        return {"path_probabilities": paths, **effective}

    def state_dict(self) -> dict[str, Any]:
        return {"images": None if self.images is None else torch.from_numpy(self.images)}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        self.images = None if content["images"] is None else content["images"].cpu().numpy()
