"""Proxies of the gradients of single samples: the empirical neural tangent kernel, and the agreement of signs."""

from __future__ import annotations

import torch

from zero_cost.captured import Captured
from zero_cost.definition import proxy
from zero_cost.errors import NoValue


@proxy(
    "ntk-condition",
    needs=("ntk",),
    formula="-(largest / least eigenvalue) of the Gram matrix of the gradients of each sample's summed logits; the "
    "least one is at least n 2^-23 times the largest, the resolution of float32 gradients",
    source="Chen et al., TE-NAS, ICLR 2021, section 3.1.1",
    sign=-1,
    min_samples=2,
)
def ntk_condition(captured: Captured) -> torch.Tensor:
    values = torch.linalg.eigvalsh(captured.ntk)
    if values[-1] <= 0:
        raise NoValue("the gradients of all samples are zero")
    return -values[-1] / values[0].clamp(min=float(values[-1]) * len(values) * 2.0**-23)


@proxy(
    "ntk-trace",
    needs=("ntk",),
    formula="sqrt(trace / n) of the Gram matrix of the gradients of each sample's summed logits",
    source="Shu et al., Unifying and Boosting Gradient-Based Training-Free NAS (HNAS), NeurIPS 2022",
)
def ntk_trace(captured: Captured) -> torch.Tensor:
    return (captured.ntk.trace() / len(captured.ntk)).sqrt()


@proxy(
    "gradsign",
    needs=("sign_sums",),
    formula="sum_l sum_w |sum_n sign(g_n(w))|, g_n: loss gradient of sample n forwarded by itself",
    source="Zhang and Jia, GradSign, ICLR 2022, equation 8 and algorithm 1",
)
def gradsign(captured: Captured) -> float:
    return sum(captured.sign_sums.values())
