"""Proxies of the input Jacobian J [B, D]: the gradient of the summed logits to each sample."""

from __future__ import annotations

import torch

from zero_cost.captured import Captured
from zero_cost.definition import proxy
from zero_cost.errors import NoValue

K = 1e-5


def correlation_matrix(rows: torch.Tensor) -> torch.Tensor:
    """Pearson correlations of rows in float64; NoValue if a row is constant or not finite."""
    rows = rows.double()
    matrix = torch.atleast_2d(torch.corrcoef(rows))
    if not torch.isfinite(matrix).all():
        raise NoValue("the input gradient of a sample is constant or not finite")
    return matrix


def eigenvalue_score(matrix: torch.Tensor) -> torch.Tensor:
    """-sum(log(v + k) + 1 / (v + k)) over the eigenvalues of a correlation matrix."""
    values = torch.linalg.eigvalsh(matrix).clamp(min=0) + K
    return -(values.log() + 1 / values).sum()


@proxy(
    "jacov",
    needs=("jacobian",),
    formula="-sum(log(v + k) + 1 / (v + k)), v: eigenvalues of corr(J), at least 0, k = 1e-5",
    source="Mellor et al., Neural Architecture Search without Training, arXiv 2006.04647v1, section 3",
    min_samples=2,
)
def jacov(captured: Captured) -> torch.Tensor:
    return eigenvalue_score(correlation_matrix(captured.jacobian))


@proxy(
    "epe-nas",
    needs=("jacobian", "logits"),
    formula="E_c = sum log(|corr(J of class c)| + k); sum_c |E_c|, or for more than 100 classes "
    "sum_cd |E_c / n_c - E_d / n_d| / classes present; classes with one sample have no correlation and are left out",
    source="Lopes et al., EPE-NAS, ICANN 2021, equations 3 to 6 and released code",
    min_samples=2,
    reads_labels=True,
)
def epe_nas(captured: Captured) -> torch.Tensor:
    labels = captured.labels
    if labels is None or labels.dim() != 1 or labels.is_floating_point():
        raise NoValue("needs one class label per sample")
    groups = [captured.jacobian[labels == c] for c in labels.unique()]
    matrices = [correlation_matrix(rows) for rows in groups if len(rows) > 1]
    if not matrices:
        raise NoValue("no class has two samples in the batch")
    values = torch.stack([(matrix.abs() + K).log().sum() for matrix in matrices])
    if captured.logits.shape[1] <= 100:
        return values.abs().sum()
    values = values / torch.tensor([float(len(m)) for m in matrices], device=values.device)
    return (values[:, None] - values[None, :]).abs().sum() / len(values)
