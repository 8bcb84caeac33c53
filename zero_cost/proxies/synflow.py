"""Proxies of the synaptic flow: absolute weights, an input of ones, no normalisation, float64."""

from __future__ import annotations

import torch

from zero_cost.captured import Captured
from zero_cost.definition import proxy
from zero_cost.errors import NoValue
from zero_cost.proxies.gradients import total

TANAKA = "Tanaka et al., Pruning neural networks without any data, NeurIPS 2020, equation 2"


def _pairs(captured: Captured) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if not captured.synflow.weights:
        raise NoValue("the model has no weights of convolutions or linear layers")
    return list(zip(captured.synflow.weights, captured.synflow.gradients, strict=True))


@proxy("synflow", needs=("synflow",), formula="sum_l sum |W_l dR/dW_l|", source=TANAKA)
def synflow(captured: Captured) -> torch.Tensor:
    return total([(w * g).abs().sum() for w, g in _pairs(captured)])


@proxy(
    "logsynflow",
    needs=("synflow",),
    formula="sum_l sum |W_l log(1 + dR/dW_l)|",
    source="Cavagnero et al., FreeREA, WACV 2023, equation 2",
)
def logsynflow(captured: Captured) -> torch.Tensor:
    return total([(w * g.log1p()).abs().sum() for w, g in _pairs(captured)])


@proxy(
    "synflow-forward",
    needs=("synflow_forward",),
    formula="log R; without biases each layer's sum in synflow is R times its share, so it ranks almost alike",
    source=f"{TANAKA}, with Euler's theorem for homogeneous functions",
)
def synflow_forward(captured: Captured) -> float:
    return captured.synflow_forward
