"""Proxies of transformers: weights of attention and feed-forward layers, and how sure attention is."""

from __future__ import annotations

import torch

from zero_cost.captured import Captured, Named
from zero_cost.definition import proxy
from zero_cost.errors import NoValue
from zero_cost.proxies.activations import log_determinant
from zero_cost.proxies.gradients import total

TF_TAS = "Zhou et al., Training-free Transformer Architecture Search, CVPR 2022, section 3"
SERIANNI = "Serianni and Kalita, Training-free Neural Architecture Search for RNNs and Transformers, ACL 2023"
VARIANCE = 0.99


def nuclear(matrix: torch.Tensor) -> torch.Tensor:
    """The sum of singular values, by the eigenvalues of the smaller Gram matrix in float64."""
    rows = matrix.double()
    rows = rows if rows.shape[0] <= rows.shape[1] else rows.T
    return torch.linalg.eigvalsh(rows @ rows.T).clamp(min=0).sqrt().sum()


def _diversity(weights: Named, gradients: Named, names: frozenset[str]) -> torch.Tensor:
    return total([nuclear(weights[name]) * nuclear(gradients[name]) for name in names if name in weights])


def _saliency(weights: Named, gradients: Named, names: list[str]) -> torch.Tensor:
    return total([(weights[name].double() * gradients[name]).abs().sum() for name in names])


@proxy(
    "dss",
    needs=("layers", "absolute_gradients"),
    formula="sum over matrices of attention ||W||_nuc ||dR/dW||_nuc + sum over other matrices sum |W dR/dW|; absolute "
    "parameters, R = sum of the outputs for an input of ones, normalisation kept, a fused projection is one matrix",
    source=f"{TF_TAS}, and released code",
)
def dss(captured: Captured) -> torch.Tensor:
    attention, gradients = captured.layers.weights, captured.absolute_gradients
    others = [name for name in gradients if name not in attention]
    weights = {name: w.abs() for name, w in captured.weights.items()}
    found = _diversity(weights, gradients, attention)
    return found + _saliency(weights, gradients, others) if others else found


@proxy(
    "synaptic-diversity",
    needs=("layers", "output_gradients"),
    formula="sum over matrices of attention ||W||_nuc ||dR/dW||_nuc, R = sum of the outputs",
    source=f"{TF_TAS}; of R as in {SERIANNI}",
)
def synaptic_diversity(captured: Captured) -> torch.Tensor:
    return _diversity(captured.weights, captured.output_gradients, captured.layers.weights)


@proxy(
    "synaptic-saliency",
    needs=("layers", "output_gradients"),
    formula="sum over matrices of feed-forward pairs sum |W dR/dW|, R = sum of the outputs",
    source=f"{TF_TAS}; of R as in {SERIANNI}",
)
def synaptic_saliency(captured: Captured) -> torch.Tensor:
    names = [name for pair in captured.layers.feed_forward for name in pair]
    if not names:
        raise NoValue("the model has no feed-forward pairs of linear layers")
    return _saliency(captured.weights, captured.output_gradients, names)


@proxy(
    "head-importance",
    needs=("layers", "output_gradients"),
    formula="sum over matrices of attention sum |W dR/dW|, R = sum of the outputs",
    source=SERIANNI,
)
def head_importance(captured: Captured) -> torch.Tensor:
    names = [name for name in captured.layers.weights if name in captured.weights]
    return _saliency(captured.weights, captured.output_gradients, names)


@proxy(
    "attention-confidence",
    needs=("attention",),
    formula="sum over queries, keys and values of all layers of the mean over samples and channels of the maximum over "
    "tokens",
    source=f"{SERIANNI}, head confidence in released code",
)
def attention_confidence(captured: Captured) -> float:
    if not captured.attention.projections:
        raise NoValue("no projection to queries, keys and values was called as a linear layer on [B, tokens, channels]")
    return sum(captured.attention.projections)


@proxy(
    "softmax-confidence",
    needs=("attention",),
    formula="sum over layers of the mean over samples, heads and queries of the greatest attention probability",
    source=f"{SERIANNI} (the released code takes the maximum over heads)",
)
def softmax_confidence(captured: Captured) -> float:
    if not captured.attention.maxima:
        raise NoValue("no attention probabilities were seen")
    return sum(captured.attention.maxima)


@proxy(
    "w-pca",
    needs=("attention", "params"),
    formula="params sum over feed-forward pairs of the number of principal components of the hidden outputs (before "
    "the activation) that hold 99 % of the variance",
    source="Wang et al., W-PCA, ICLR 2025, and released code",
)
def w_pca(captured: Captured) -> float:
    if not captured.attention.spectra:
        raise NoValue("the model has no feed-forward pairs of linear layers")
    count = 0
    for values in captured.attention.spectra:
        shares = values.flip(0).cumsum(0) / values.sum()
        if not torch.isfinite(shares).all():
            raise NoValue("the hidden outputs of a feed-forward layer are constant or not finite")
        count += int((shares <= VARIANCE).sum()) + 1
    return float(captured.params * count)


@proxy(
    "activation-distance",
    needs=("sign_agreement",),
    formula="log |det K|, K_ij: units of all activation functions whose inputs have the same sign for samples i and j",
    source=f"{SERIANNI}, after Mellor et al., ICML 2021",
    min_samples=2,
)
def activation_distance(captured: Captured) -> torch.Tensor:
    return log_determinant(captured.sign_agreement)
