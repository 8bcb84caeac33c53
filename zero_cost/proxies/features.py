"""Proxies of feature maps: correlations of their channels, spectra from stage to stage, change under noise."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from zero_cost.captured import Captured
from zero_cost.definition import proxy
from zero_cost.errors import NoValue

MECO = "Jiang et al., MeCo, NeurIPS 2023, section 4"
AZ_NAS = "Lee and Ham, AZ-NAS, CVPR 2024, section 3, with the stem's output as first feature as in the released code"


def smallest_correlation(feature: torch.Tensor) -> torch.Tensor:
    """Least eigenvalue of the Pearson correlation matrix of channels [C, positions]; a constant channel correlates
    with nothing, not even itself."""
    rows = feature.double()
    rows = rows - rows.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows = torch.where(norms > 0, rows / norms, 0.0)
    if len(rows) >= rows.shape[1]:
        return rows.new_zeros(())  # not more positions than channels: the matrix is singular
    return torch.linalg.eigvalsh(rows @ rows.T)[0]


def _maps(captured: Captured) -> list[torch.Tensor]:
    if not captured.features:
        raise NoValue("no leaf module returns a feature map")
    return captured.features


@proxy(
    "meco",
    needs=("features",),
    formula="sum over leaf modules of the least eigenvalue of the channels' correlation matrix, sample 0",
    source=f"{MECO} (the release also counts containers)",
)
def meco(captured: Captured) -> torch.Tensor:
    return torch.stack([smallest_correlation(feature) for feature in _maps(captured)]).sum()


@proxy(
    "meco-opt",
    needs=("features",),
    formula="meco on 8 evenly spaced channels of C, times C / 8",
    source=f"{MECO} (8 random channels in the release)",
)
def meco_opt(captured: Captured) -> torch.Tensor:
    terms = []
    for feature in _maps(captured):
        count = min(8, len(feature))
        chosen = torch.arange(count, device=feature.device) * len(feature) // count
        terms.append(smallest_correlation(feature[chosen]) * len(feature) / count)
    return torch.stack(terms).sum()


@proxy(
    "zen",
    needs=("zen",),
    formula="mean over repeats of log E|F(x) - F(x + x'/100)| + sum_BatchNorm log sqrt(mean running variance)",
    source="Lin et al., Zen-NAS, ICCV 2021, algorithm 1 and released code",
)
def zen(captured: Captured) -> float:
    scores = []
    for difference, variances in zip(captured.zen.differences, captured.zen.variances, strict=True):
        if not (difference > 0 and all(v > 0 for v in variances)):
            raise NoValue("the features do not change with the input, or are not finite")
        scores.append(math.log(difference) + sum(0.5 * math.log(v) for v in variances))
    return sum(scores) / len(scores)


def entropies(captured: Captured) -> Iterator[torch.Tensor]:
    """Per stage, the entropy of the covariance's eigenvalues, scaled to sum 1."""
    for values in captured.stages.eigenvalues:
        if values.sum() <= 0:
            raise NoValue("the features of a stage are constant")
        share = values / values.sum()
        yield -(share * (share + 1e-8).log()).sum()


@proxy(
    "az-expressivity",
    needs=("stages",),
    formula="sum_l H_l, H_l = entropy of the eigenvalues of the channel covariance of stage l, scaled to sum 1",
    source=AZ_NAS,
)
def az_expressivity(captured: Captured) -> torch.Tensor:
    return torch.stack(list(entropies(captured))).sum()


@proxy("az-progressivity", needs=("stages",), formula="min_l (H_l - H_(l-1))", source=AZ_NAS)
def az_progressivity(captured: Captured) -> torch.Tensor:
    return torch.stack(list(entropies(captured))).diff().min()


@proxy(
    "az-trainability",
    needs=("stages",),
    formula="mean_l (2 - s_l - 1 / (s_l + 1e-6)), s_l: largest singular value of the correlation of random signs at "
    "stage l with their vector-Jacobian product before it",
    source=AZ_NAS,
)
def az_trainability(captured: Captured) -> float:
    found = captured.stages.singular_values
    values = [s for s in found if s is not None]
    if len(values) < len(found):
        raise NoValue("a stage is the identity")
    return sum(2 - s - 1 / (s + 1e-6) for s in values) / len(values)


@proxy(
    "dextr",
    needs=("features", "curve"),
    formula="s k / (s + k), s = log(1 + sum over leaf modules of least / largest singular value of sample 0's map), "
    "k = log(1 + mean over a circle of inputs of sqrt(|v|^2 |a|^2 - (v a)^2) / |v|^3), v and a: first and second "
    "derivative of the logits by the angle",
    source="Asthana et al., Dextr, 2025; extrinsic curvature as in Poole et al., NeurIPS 2016, section 3",
)
def dextr(captured: Captured) -> float:
    ratios = 0.0
    for feature in _maps(captured):
        values = torch.linalg.svdvals(feature.double())
        ratios += float(values[-1] / values[0]) if values[0] > 0 else 0.0
    v, a = (derivative.double() for derivative in captured.curve)
    speed = v.square().sum(1)
    if not (speed > 0).all():
        raise NoValue("the output does not move with the input")
    area = (speed * a.square().sum(1) - (v * a).sum(1).square()).clamp(min=0).sqrt()
    s, k = math.log1p(ratios), math.log1p(float((area / speed**1.5).mean()))
    return s * k / (s + k) if s + k else 0.0
