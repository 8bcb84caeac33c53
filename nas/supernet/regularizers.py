"""Terms added to the loss that alpha descends, and how their weights change over a search.

`alphas` is a sequence of tensors [..., candidates], one row an edge (or a place); every row counts alike, wherever it
lies. All terms are differentiable scalars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest

# Shapes in which the factor of an auxiliary skip connection falls from 1 to 0 while progress goes from 0 to 1.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,  # half a period
    "slow-cosine": lambda progress: math.cos(math.pi / 2 * progress),  # a quarter
}


def beta_decay(alphas: Sequence[Tensor]) -> Tensor:
    """The mean over edges of log sum exp(alpha): keeps the softmax from being driven by ever larger alphas.

    Ye et al. 2022 (beta-DARTS, arXiv 2203.01665); code Sunshine-Ye/Beta-DARTS 874d00f, optimizers/darts/architect.py.
    """
    return torch.cat([torch.logsumexp(a, dim=-1).flatten() for a in _some(alphas)]).mean()


def zero_one(alphas: Sequence[Tensor], form: str = "l2") -> Tensor:
    """Pushes gates sigmoid(alpha) away from one half: minus the mean of (gate - .5)^2, or of |gate - .5| for "l1".

    Chu et al. 2020 (Fair DARTS, arXiv 1911.12126); code xiaomi-automl/FairDARTS 675a0c8, fairdarts/separate_loss.py,
    which adds it with weight 10. From -.25 ("l1": -.5), all decided, to 0. Errors: UserError for another form.
    """
    gates = torch.sigmoid(torch.cat([a.flatten() for a in _some(alphas)]))
    if form == "l2":
        return -(gates - 0.5).square().mean()
    if form == "l1":
        return -(gates - 0.5).abs().mean()
    raise UserError(form, one_of(("l2", "l1")), nearest(form, ("l2", "l1")))


def entropy(alphas: Sequence[Tensor]) -> Tensor:
    """The mean over edges of the Shannon entropy of softmax(alpha), in nats: 0 where one candidate has it all."""
    rows = [-(a.softmax(-1) * a.log_softmax(-1)).sum(-1).flatten() for a in _some(alphas)]
    return torch.cat(rows).mean()


def linear(start: float, end: float, epoch: float, epochs: int) -> float:
    """From `start` at epoch 0 towards `end`, which would be reached at `epochs`, one after the last epoch.

    The ramp of beta-DARTS, SDARTS and DARTS-. Errors: UserError for an epoch outside 0 to `epochs`.
    """
    return start + (end - start) * _progress(epoch, epochs)


def auxiliary_skip_weight(epoch: float, epochs: int = 50, start: float = 1.0, decay: str = "linear") -> float:
    """The factor of the skip connection that DARTS- adds to every mixed operation: from `start` to 0.

    decay: a name in DECAYS. Chu et al. 2021 (DARTS-, arXiv 2009.01027);
    code Meituan-AutoML/DARTS- 66ec8a5, src/utils.py. Errors: UserError for another decay or an epoch out of range.
    """
    progress = _progress(epoch, epochs)
    if decay not in DECAYS:
        raise UserError(decay, one_of(DECAYS), nearest(decay, DECAYS))
    return start * DECAYS[decay](progress)


def _progress(epoch: float, epochs: int) -> float:
    if not 0 <= epoch <= epochs or epochs < 1:
        raise UserError(epoch, f"an epoch from 0 to {epochs}")
    return epoch / epochs


def _some(alphas: Sequence[Tensor]) -> Sequence[Tensor]:
    if not alphas or any(a.ndim == 0 or a.numel() == 0 for a in alphas):
        raise UserError([tuple(a.shape) for a in alphas], "at least one tensor of alphas [..., candidates], none empty")
    return alphas
