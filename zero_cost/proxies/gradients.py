"""Proxies of the loss gradient at initialisation. W_l: weights, g_l = dL/dW_l on the first batch."""

from __future__ import annotations

import torch

from zero_cost.captured import Captured
from zero_cost.definition import proxy
from zero_cost.errors import NoValue

ABDELFATTAH = "Abdelfattah et al., Zero-Cost Proxies for Lightweight NAS, ICLR 2021, section 3"


def total(terms: list[torch.Tensor]) -> torch.Tensor:
    """The float64 sum of one number per layer, moved to the host once."""
    return torch.stack(terms).double().sum()


@proxy("grad-norm", needs=("gradients",), formula="sum_l ||g_l||_2", source=ABDELFATTAH)
def grad_norm(captured: Captured) -> torch.Tensor:
    return total([torch.linalg.vector_norm(g) for g in captured.gradients.values()])


@proxy("snip", needs=("gradients",), formula="sum_l sum |W_l g_l|", source=f"Lee et al., ICLR 2019; {ABDELFATTAH}")
def snip(captured: Captured) -> torch.Tensor:
    return total([(captured.weights[name] * g).abs().sum() for name, g in captured.gradients.items()])


@proxy("plain", needs=("gradients",), formula="sum_l sum W_l g_l", source=f"{ABDELFATTAH}, released code")
def plain(captured: Captured) -> torch.Tensor:
    # Terms cancel, so products are summed in float64.
    return total([(captured.weights[name].double() * g).sum() for name, g in captured.gradients.items()])


@proxy(
    "grasp",
    needs=("second_order",),
    formula="-sum_l sum W_l (H g)_l",
    source=f"Wang et al., ICLR 2020, equation 8; sign of the code released with {ABDELFATTAH}",
)
def grasp(captured: Captured) -> torch.Tensor:
    return -total([(captured.weights[name].double() * h).sum() for name, h in captured.second_order.items()])


@proxy(
    "fisher",
    needs=("fisher",),
    formula="sum_l sum_c f_c (weights per channel), f_c = mean_n (sum_positions a dL/da)^2 / 2",
    source=f"Theis et al. 2018; the factor is that of the code released with {ABDELFATTAH}",
)
def fisher(captured: Captured) -> torch.Tensor:
    if not captured.fisher:
        raise NoValue("the model calls no convolution or linear layer")
    return total([s.values.sum() * s.weights_per_channel for s in captured.fisher])


@proxy(
    "fisher-channels",
    needs=("fisher",),
    formula="sum_l sum_c f_c, f_c = mean_n (sum_positions a dL/da)^2 / 2",
    source="Turner et al., BlockSwap, ICLR 2020, equation 2",
)
def fisher_channels(captured: Captured) -> torch.Tensor:
    if not captured.fisher:
        raise NoValue("the model calls no convolution or linear layer")
    return total([s.values.sum() for s in captured.fisher])


@proxy(
    "knas",
    needs=("gradients",),
    formula="mean of the Gram matrix of per-sample gradients, (1/n^2) sum_ij <g_i, g_j> = sum_l ||g_l||_2^2",
    source="Xu et al., KNAS, ICML 2021, equation 9 (the released code samples entries instead)",
)
def knas(captured: Captured) -> torch.Tensor:
    return total([g.double().square().sum() for g in captured.gradients.values()])


@proxy(
    "zico",
    needs=("batch_gradients",),
    formula="sum_l log sum_w mean_b |g_b(w)| / std_b g_b(w), entries with std 0 and layers without any dropped",
    source="Li et al., ZiCo, ICLR 2023, equation 11 and released code",
)
def zico(captured: Captured) -> torch.Tensor:
    batches = captured.batch_gradients
    if len(batches) < 2:
        raise NoValue("needs at least two batches, got one")
    terms = []
    for name in batches[0]:
        gradients = torch.stack([batch[name] for batch in batches]).double()
        if len(batches) == 2:  # mean / population std, in closed form
            first, second = gradients
            mean, deviation = first.abs() + second.abs(), (first - second).abs()
        else:
            mean, deviation = gradients.abs().mean(0), gradients.std(0, correction=0)
        ratio = torch.where(deviation > 0, mean / deviation, 0.0).sum()
        terms.append(torch.where(ratio > 0, ratio.log(), 0.0))
        if not torch.isfinite(gradients).all():
            raise NoValue("a gradient is not finite")
    return total(terms)
