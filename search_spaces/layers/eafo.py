"""The correction of an activation function by the entropy of its outputs, and ReLU's: x exp(-x^2 / 2).

Sun et al., A Method on Searching Better Activation Functions, 2024 (arXiv 2405.12954) propose to move an activation
function along the gradient of the entropy of its outputs. The derivation here is our own, from that idea:

Let x have the density p, f be increasing and y its inverse. The output has the density p(y) y', its entropy is
H = -integral of p(y) y' ln(p(y) y'). The Euler-Lagrange expression of H with respect to y is

    dH/dy = p'(y) y' + p(y) y'' / y'.

With y' = 1/f' and y'' = -f''/f'^3 a step of y against this gradient moves f by -f' dy, that is in the direction

    correction(x) = p'(x) - p(x) f''(x) / f'(x).

It vanishes where f' is proportional to p: the distribution function of x has the largest entropy among the functions
onto an interval (the paper's worst function with boundary conditions). Pieces on which f is affine have f'' = 0, and a
flat piece is the limit of ever smaller slopes, so that for ReLU the correction is p' on both sides: -x exp(-x^2 / 2)
for a standard normal x up to a factor, which a trained coefficient takes up. That the paper treats the flat side of
ReLU so, and its coefficient of 0.01, are recollection.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from search_spaces.common.errors import UserError
from search_spaces.layers.gauss_hermite import Function, function_of
from search_spaces.layers.graph import LayerGraph


def gaussian_density(x: Tensor) -> Tensor:
    """The standard normal density."""
    return (-x * x / 2).exp() / math.sqrt(2 * math.pi)


def sampled_density(samples: Tensor, bandwidth: float | None = None) -> Function:
    """The density of samples [N] by Gaussian kernels, in float64.

    bandwidth: of a kernel; default Scott's rule, N^(-1/5) standard deviations (Scott 1992). The estimate is that of
    the samples with noise of this size added: it widens the density. Errors: UserError for fewer than two samples.
    """
    samples = samples.detach().flatten().to(torch.float64)
    if len(samples) < 2 or not samples.std() > 0:
        raise UserError(f"{len(samples)} samples", "at least two different samples")
    width = float(samples.std()) * len(samples) ** -0.2 if bandwidth is None else bandwidth
    if not width > 0:
        raise UserError(bandwidth, "a positive bandwidth")
    return lambda x: gaussian_density((x.reshape(-1, 1) - samples) / width).mean(1).reshape(x.shape) / width


def correction(
    function: Function | LayerGraph, x: Tensor, density: Function = gaussian_density, *, flat: float = 1e-10
) -> Tensor:
    """p'(x) - p(x) f''(x) / f'(x) at the points x, in float64.

    density: p, differentiable. flat: below this size of f' a piece counts as flat, with f''/f' = 0. f must not
    decrease. Errors: UserError where f decreases.
    """
    call = function_of(function) if isinstance(function, LayerGraph) else function
    x = x.detach().to(torch.float64).requires_grad_()
    p = density(x)
    (p_slope,) = torch.autograd.grad(p.sum(), x)
    value = call(x)
    first = torch.autograd.grad(value.sum(), x, create_graph=True)[0] if value.requires_grad else torch.zeros_like(x)
    second = torch.autograd.grad(first.sum(), x, allow_unused=True)[0] if first.requires_grad else None
    first, second = first.detach(), torch.zeros_like(first) if second is None else second.detach()
    if bool((first < -flat).any()):
        bad = float(x.detach()[first < -flat][0])
        raise UserError(f"f'({bad:.4g}) < 0", "a function that does not decrease")
    curvature = torch.where(first.abs() > flat, second / torch.where(first.abs() > flat, first, 1.0), 0.0)
    return (p_slope - p * curvature).detach()


def corrected(function: Function | LayerGraph, strength: float, density: Function = gaussian_density) -> Function:
    """x -> f(x) + strength * correction(x), whose outputs have less entropy for a small positive strength.

    For ReLU and a standard normal input, CRReLU's coefficient is -strength / sqrt(2 pi).
    """
    call = function_of(function) if isinstance(function, LayerGraph) else function
    return lambda x: call(x) + strength * correction(call, x, density).to(x.dtype)
