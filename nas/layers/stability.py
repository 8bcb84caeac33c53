"""Stability test: move the weights so that the gradient of the loss grows, and see whether it explodes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from search_spaces.common.errors import UserError

THRESHOLD = 1e8
FAST_STEPS, FULL_STEPS = 5, 100


@dataclass(frozen=True)
class Stability:
    """reason: None if the layer is kept, else `unstable`. history: gradient norm before the first step and after each.

    Its last entry is the one above the threshold, or not finite, where the layer is rejected.
    """

    reason: str | None
    history: tuple[float, ...]

    @property
    def steps(self) -> int:
        """How many ascent steps were taken."""
        return len(self.history) - 1


def stability(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = FAST_STEPS,
    rate: float = 0.1,
    threshold: float = THRESHOLD,
) -> Stability:
    """Ascend the norm g of the loss's gradient: theta += rate * dg / dtheta, at most `steps` times.

    The layer is rejected as soon as g exceeds `threshold` or is not finite (5 steps find most, 100 are the full test).
    images [B, C, H, W], labels [B]: one small batch. The model must be differentiable twice; it is left as it was,
    buffers included, and runs in training mode. Source: Liu et al. 2020 (arXiv 2004.02967).
    Errors: UserError for a model without parameters or a step count below 1.
    """
    if steps < 1:
        raise UserError(steps, "at least one step")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if not names:
        raise UserError(type(model).__name__, "a model with parameters")
    by_name = dict(model.named_parameters())
    weights = [by_name[name].detach().clone().requires_grad_() for name in names]
    training = model.training
    model.train()
    history: list[float] = []
    try:
        for step in range(steps + 1):
            norm = _gradient_norm(model, names, weights, images, labels)
            history.append(norm.item())
            if not math.isfinite(history[-1]) or history[-1] > threshold:
                return Stability("unstable", tuple(history))
            if step < steps:
                slopes = torch.autograd.grad(norm, weights, allow_unused=True)
                with torch.no_grad():
                    weights = [
                        (w if s is None else w + rate * s).detach().requires_grad_()
                        for w, s in zip(weights, slopes, strict=True)
                    ]
    finally:
        model.train(training)
    return Stability(None, tuple(history))


def _gradient_norm(model: nn.Module, names: list[str], weights: list[Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """The Euclidean norm of the loss's gradient over all weights, itself differentiable."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}  # running statistics change in place
    outputs = torch.func.functional_call(model, {**dict(zip(names, weights, strict=True)), **buffers}, (images,))
    loss = nn.functional.cross_entropy(outputs, labels)
    gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    squares = [g.square().sum() for g in gradients if g is not None]
    return torch.stack(squares).sum().sqrt()
