"""Proxies of recurrent networks: their hidden states, and the gradients that reach them."""

from __future__ import annotations

import torch

from zero_cost.captured import Captured
from zero_cost.definition import proxy
from zero_cost.errors import NoValue
from zero_cost.proxies.gradients import total
from zero_cost.proxies.jacobian import eigenvalue_score
from zero_cost.proxies.transformers import SERIANNI

EXPONENT = 1 / 20


def _covariance(states: list[torch.Tensor]) -> torch.Tensor:
    rows = torch.cat([h.reshape(-1, h.shape[-1]) for h in states]).double().T
    matrix = torch.atleast_2d(torch.corrcoef(rows))
    if not torch.isfinite(matrix).all():
        raise NoValue("a hidden unit is constant or not finite")
    return eigenvalue_score(matrix)


HIDDEN = (
    "-sum(log(v + k) + 1 / (v + k)), v: eigenvalues of the correlation matrix of hidden units over samples and steps"
)


@proxy("hidden-covariance", needs=("hidden",), formula=f"{HIDDEN}, first recurrent layer, k = 1e-5", source=SERIANNI)
def hidden_covariance(captured: Captured) -> torch.Tensor:
    return _covariance(captured.hidden[0])


@proxy(
    "hidden-covariance-last", needs=("hidden",), formula=f"{HIDDEN}, last recurrent layer, k = 1e-5", source=SERIANNI
)
def hidden_covariance_last(captured: Captured) -> torch.Tensor:
    return _covariance(captured.hidden[-1])


@proxy(
    "hidden-saliency",
    needs=("hidden_gradients",),
    formula="sum over layers and steps of sum |h dS/dh|, S = half the squared norm of the outputs; h after each step",
    source=f"{SERIANNI}, released code",
)
def hidden_saliency(captured: Captured) -> torch.Tensor:
    return total([(h.double() * g).abs().sum() for h, g in captured.hidden_gradients[1]])


@proxy(
    "recurrent-saliency",
    needs=("hidden_gradients",),
    formula="sum_l sum |W_l dS/dW_l|, S = half the squared norm of the outputs",
    source=f"{SERIANNI}, synaptic saliency of RNNs in released code",
)
def recurrent_saliency(captured: Captured) -> torch.Tensor:
    gradients = captured.hidden_gradients[0]
    if not gradients:
        raise NoValue("the model has no weights of recurrent or linear layers")
    return total([(captured.weights[name].double() * g).abs().sum() for name, g in gradients.items()])


@proxy(
    "jacobian-cosine",
    needs=("jacobian",),
    formula="1 - sum over i != j of |cos(J_i, J_j)|^(1/20) / (2 (B^2 - B)), J_i: gradient of the summed logits to "
    "sample i (to its embeddings)",
    source=f"{SERIANNI}; jacov is its Jacobian covariance",
    min_samples=2,
)
def jacobian_cosine(captured: Captured) -> torch.Tensor:
    rows = captured.jacobian.double()
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if not (norms > 0).all():
        raise NoValue("the input gradient of a sample is zero or not finite")
    cosines = (rows / norms) @ (rows / norms).T
    cosines.fill_diagonal_(0)  # 1 - 1 in floating point, to the power 1/20, is not 0
    count = len(rows)
    return 1 - cosines.abs().pow(EXPONENT).sum() / (2 * (count**2 - count))
