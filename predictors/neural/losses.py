"""Losses of scores against targets: [S, B] x [S, B] -> [S], a higher target is a better architecture."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from search_spaces.common.errors import UserError
from search_spaces.common.names import match

MARGIN = 0.1
Loss = Callable[[Tensor, Tensor], Tensor]


def _pairs(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(s_i - s_j, whether i is the better one), both [S, B, B]."""
    return scores.unsqueeze(2) - scores.unsqueeze(1), targets.unsqueeze(2) > targets.unsqueeze(1)


def mse(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error."""
    return (scores - targets).square().mean(1)


def bpr(scores: Tensor, targets: Tensor) -> Tensor:
    """(2 / B^2) sum over pairs with y_i > y_j of log(1 + exp(s_j - s_i)).

    Rendle and others, BPR: Bayesian Personalized Ranking, UAI 2009, with the normalisation of CAP (Ji, Feng and Sun,
    IJCAI 2024, released code).
    """
    difference, better = _pairs(scores, targets)
    return 2 * (F.softplus(-difference) * better).sum((1, 2)) / scores.shape[1] ** 2


def hinge(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean over pairs with y_i > y_j of max(0, .1 - (s_i - s_j)); margin of GATES (Ning and others, ECCV 2020)."""
    difference, better = _pairs(scores, targets)
    return (torch.relu(MARGIN - difference) * better).sum((1, 2)) / better.sum((1, 2)).clamp(min=1)


def list_mle(scores: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of the order by target under Plackett-Luce, per item.

    Xia, Liu, Wang, Zhang and Li, Listwise Approach to Learning to Rank, ICML 2008, section 4.2.
    """
    order = targets.argsort(stable=True, dim=1, descending=True)
    ordered = scores.gather(1, order)
    rest = ordered.flip(1).logcumsumexp(1).flip(1)
    return (rest - ordered).mean(1)


def mape(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean of |s - y| / (t - y), t = one above the batch's best target: errors on good architectures weigh more.

    BANANAS (White, Neiswanger and Savani, AAAI 2021, section 4) in terms of a quality with an upper bound in place of
    an error with a lower one.
    """
    top = targets.max(1, keepdim=True).values + 1
    return ((scores - targets).abs() / (top - targets)).mean(1)


def warp(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean over i of (1 + 1/2 + ... + 1/v_i) / v_i times the sum of .1 - (s_i - s_j) over the v_i worse architectures
    j that come within the margin: mistakes near the top weigh more.

    Weston, Bengio and Usunier, WSABIE, IJCAI 2011, equations 1 to 3, with all violators in place of sampled ones.
    """
    difference, better = _pairs(scores, targets)
    excess = torch.relu(MARGIN - difference) * better
    violators = (excess > 0).sum(2)
    counts = torch.arange(1, scores.shape[1] + 1, dtype=scores.dtype, device=scores.device)
    harmonic = F.pad((1 / counts).cumsum(0), (1, 0))
    return (harmonic[violators] / violators.clamp(min=1) * excess.sum(2)).mean(1)


def diff_kendall(scores: Tensor, targets: Tensor) -> Tensor:
    """1 - the mean over unordered pairs of tanh(a (s_i - s_j) / 2) tanh(a (y_i - y_j) / 2), a = 1/2: Kendall's tau
    made smooth, from 0 to 2.

    Zheng and others, DiffKendall, NeurIPS 2023; every pair counts once, B (B - 1) / 2 in all (a released form divides
    the doubled sum by it). Wants standardised targets: differences of raw accuracies leave hardly a gradient.
    """
    count = scores.shape[1]
    agreement = _sigmoid_difference(scores) * _sigmoid_difference(targets)
    return 1 - agreement.sum((1, 2)) / max(count * (count - 1), 1)  # ordered pairs: numerator and divisor doubled


def _sigmoid_difference(x: Tensor, alpha: float = 0.5) -> Tensor:
    return torch.tanh(alpha * (x.unsqueeze(2) - x.unsqueeze(1)) / 2)


LOSSES: dict[str, Loss] = {
    "mse": mse,
    "bpr": bpr,
    "hinge": hinge,
    "listmle": list_mle,
    "mape": mape,
    "warp": warp,
    "diffkendall": diff_kendall,
}


def loss_at(text: str, progress: float, warm_up: float = 0.5) -> Loss:
    """The loss at this share of the training: `bpr`, or `hinge>mape`, which changes at `warm_up`.

    Errors: UserError with the nearest name.
    """
    names = [match(name, LOSSES, "a loss, or two as `first>second`") for name in text.split(">")]
    if len(names) > 2:
        raise UserError(text, "one loss, or two as `first>second`")
    return LOSSES[names[-1] if progress >= warm_up else names[0]]
