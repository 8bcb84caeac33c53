"""Proxies of the binary code: on which side of zero each ReLU input lies."""

from __future__ import annotations

import math

import torch

from zero_cost.captured import Captured
from zero_cost.definition import proxy
from zero_cost.errors import NoValue

MELLOR = "Mellor et al., Neural Architecture Search without Training, ICML 2021, section 3"
HASH = "He et al., Neural networks behave as hash encoders, arXiv 2101.06490"


def log_determinant(agreement: torch.Tensor) -> torch.Tensor:
    """log |det K|; NoValue for a singular kernel."""
    sign, value = torch.linalg.slogdet(agreement)
    if value == -math.inf or sign <= 0:
        raise NoValue("the kernel is singular: two samples have the same code, or there are too few units")
    return value


@proxy(
    "nwot",
    needs=("codes",),
    formula="log |det K|, K_ij: units of all ReLU calls that are both active or both inactive",
    source=f"{MELLOR}; all ReLUs as in NAS-Bench-Suite-Zero",
    min_samples=2,
)
def nwot(captured: Captured) -> torch.Tensor:
    return log_determinant(captured.codes.agreement())


@proxy(
    "nwot-live",
    needs=("codes", "live_codes"),
    formula="log |det K| over the ReLU calls that a backward pass reaches",
    source=f"{MELLOR} and released code",
    min_samples=2,
)
def nwot_live(captured: Captured) -> torch.Tensor:
    return log_determinant(captured.codes.agreement(live_only=True))


def _regions(captured: Captured) -> torch.Tensor:
    """[B] number of samples in each sample's linear region: those that agree in every unit."""
    agreement = captured.codes.agreement()
    return (agreement == agreement.diagonal()).sum(1)


@proxy(
    "linear-regions",
    needs=("codes",),
    formula="number of different codes among the samples; at most B, so give many small inputs to a thin network",
    source="Chen et al., TE-NAS, ICLR 2021, section 3.1.2",
    min_samples=2,
)
def linear_regions(captured: Captured) -> torch.Tensor:
    return (1.0 / _regions(captured)).sum().round()


@proxy(
    "hash-redundancy",
    needs=("codes",),
    formula="-(share of the occupied linear regions that hold more than one sample)",
    source=HASH,
    sign=-1,
    min_samples=2,
)
def hash_redundancy(captured: Captured) -> torch.Tensor:
    shared = _regions(captured)
    return -((shared > 1) / shared).sum() / (1.0 / shared).sum()


@proxy(
    "hash-accuracy",
    needs=("codes",),
    formula="percentage of samples whose nearest other code (Hamming) has the same label, ties shared evenly",
    source=f"{HASH}, the nearest-neighbour measure, left one out",
    min_samples=2,
    reads_labels=True,
)
def hash_accuracy(captured: Captured) -> torch.Tensor:
    labels = captured.labels
    if labels is None or labels.dim() != 1:
        raise NoValue("needs one class label per sample")
    agreement = captured.codes.agreement().fill_diagonal_(-1)
    nearest = agreement == agreement.amax(1, keepdim=True)
    same = labels[:, None] == labels[None, :]
    return 100 * ((nearest & same).sum(1) / nearest.sum(1)).double().mean()


@proxy(
    "swap",
    needs=("codes",),
    formula="number of different rows when each unit of a feature map is described by its signs over the first "
    "samples (16, at most 24); saturates at 2^samples",
    source="Peng et al., SWAP-NAS, ICLR 2024, definition 3.3 (the release draws weights and inputs anew)",
    min_samples=2,
)
def swap(captured: Captured) -> float:
    patterns = captured.codes.patterns
    if not len(patterns):
        raise NoValue("the model calls no ReLU on feature maps")
    seen = torch.zeros(1 << min(captured.codes.pattern_samples, 24), dtype=torch.bool, device=patterns.device)
    seen[patterns.long()] = True
    return float(seen.sum())


@proxy(
    "reg-swap",
    needs=("codes", "params"),
    formula="swap exp(-(params - mu)^2 / sigma), mu and sigma by the space",
    source="Peng et al., SWAP-NAS, ICLR 2024, definition 3.4",
    min_samples=2,
)
def reg_swap(captured: Captured) -> float:
    if captured.regularisation is None:
        raise NoValue("needs regularisation=(mu, sigma), in parameters and parameters squared")
    mu, sigma = captured.regularisation
    return float(swap.compute(captured)) * math.exp(-((captured.params - mu) ** 2) / sigma)  # type: ignore[arg-type]
