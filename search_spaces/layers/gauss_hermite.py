"""What a point-wise function does to Gaussian inputs: moments, Hermite coefficients, signal propagation, gain.

Integrals against the Gaussian density are sums over Gauss-Legendre panels that begin at 0 and are halved where the
function is not smooth, so that kinks (ReLU's, hard sigmoid's, a max of two functions) cost no digits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from search_spaces.common.errors import UserError
from search_spaces.layers.evaluate import evaluate
from search_spaces.layers.graph import LayerGraph

Function = Callable[[torch.Tensor], torch.Tensor]  # element-wise, differentiable, in float64
_REACH = 14.0  # the density is 1e-43 there
_POINTS = 24
_DEEPEST = 45  # halvings of a panel: far below the distance of neighbouring numbers
_TOLERANCE = 1e-14


@dataclass(frozen=True)
class Moments:
    """Of f(z) for z ~ N(0, q). second: E[f^2]. slope: E[f'(z)]. chi: E[f'(z)^2]."""

    q: float
    mean: float
    second: float
    slope: float
    chi: float

    @property
    def variance(self) -> float:
        """Var f(z)."""
        return max(self.second - self.mean**2, 0.0)


def function_of(graph: LayerGraph) -> Function:
    """The function that a graph without aggregates computes with initial parameters. Errors: UserError."""
    if any(node.aggregate for _, node in graph.live_nodes):
        raise UserError("layer", "a function without aggregates: what it gives depends on one number only")
    return lambda x: evaluate(graph, x.reshape(-1, 1)).reshape(x.shape)


def values(function: Function | LayerGraph, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(f(x), f'(x)) in float64. Errors: UserError where f is not finite."""
    call = function_of(function) if isinstance(function, LayerGraph) else function
    point = torch.from_numpy(np.ascontiguousarray(x, np.float64)).requires_grad_()
    value = call(point)
    slope = torch.autograd.grad(value.sum(), point)[0] if value.requires_grad else torch.zeros_like(point)
    found = value.detach().numpy(), slope.numpy()
    if not all(np.isfinite(part).all() for part in found):
        bad = x[~(np.isfinite(found[0]) & np.isfinite(found[1]))][0]
        raise UserError(f"f({bad:.4g})", "a function that is finite with its derivative on the whole line")
    return found


def moments(function: Function | LayerGraph, q: float = 1.0) -> Moments:
    """Moments of f(z), z ~ N(0, q), to about twelve digits. Errors: UserError for q <= 0, where f is not finite, and
    for a pole."""
    if not (q > 0 and math.isfinite(q)):
        raise UserError(q, "a positive variance of the inputs", "1")
    z, weight = _rule(function, q)
    value, slope = values(function, math.sqrt(q) * z)
    sums = [float(weight @ part) for part in (value, value * value, slope, slope * slope)]
    return Moments(q, *sums)


def hermite_coefficients(function: Function | LayerGraph, count: int = 16, q: float = 1.0) -> np.ndarray:
    """a_n = E[f(sqrt(q) z) h_n(z)] for n < count with the normalised polynomials h_n = He_n / sqrt(n!).

    E[f^2] is the sum of all squares, E[f'^2] at q = 1 that of n a_n^2. Errors: UserError for count < 1.
    """
    if count < 1:
        raise UserError(count, "at least one coefficient")
    z, weight = _rule(function, q)
    value, _ = values(function, math.sqrt(q) * z)
    return normalised_hermite(z, count) @ (weight * value)


def normalised_hermite(z: np.ndarray, count: int) -> np.ndarray:
    """h_0 to h_{count-1} at z: [count, N], by the three-term recurrence."""
    rows = [np.ones_like(z), z]
    for n in range(1, count - 1):
        rows.append((z * rows[n] - math.sqrt(n) * rows[n - 1]) / math.sqrt(n + 1))
    return np.stack(rows[:count])


@dataclass(frozen=True)
class HermiteClass:
    """first: the least degree above 0 with a coefficient (the information exponent), None for a constant. last: the
    degree of a polynomial, None for what is none up to the degree that was looked at. limit: what an infinitely deep
    and wide network of f classifies like: `majority-vote`, `nearest-neighbour`, `singular-kernel`, or `linear`.
    exponent: of the singular kernel 1 / distance^exponent; equal to the dimension of the inputs it is optimal."""

    first: int | None
    last: int | None
    limit: str
    exponent: float | None


def hermite_class(
    function: Function | LayerGraph, count: int = 24, tolerance: float = 1e-8, *, centre: bool = False
) -> HermiteClass:
    """The class of f by its coefficients, f scaled to E[f(z)^2] = 1 (and to mean 0 with `centre`).

    Radhakrishnan, Belkin and Uhler, Wide and Deep Neural Networks Achieve Consistency for Classification, PNAS 2023
    (arXiv 2204.14126); the conditions are recollection, checked on the functions that the paper gives for dimensions
    1 to 10: mean not 0 gives a majority vote; mean 0 and a_1 = 0 the nearest neighbour; otherwise a singular kernel of
    exponent -2 ln(a_1^2) / ln(E[f'^2]). Inputs lie on the unit sphere. Errors: UserError for a constant f.
    """
    found = moments(function)
    coefficients = hermite_coefficients(function, count)
    total = found.variance if centre else found.second
    if total <= tolerance**2:
        raise UserError("f", "a function that is not constant" if centre else "a function that is not zero")
    coefficients = coefficients / math.sqrt(total)
    if centre:
        coefficients[0] = 0.0
    present = [n for n in range(count) if abs(coefficients[n]) > tolerance]
    above = [n for n in present if n]
    first = above[0] if above else None
    last = max(present) if present and _is_polynomial(function, coefficients * math.sqrt(total), centre) else None
    if abs(coefficients[0]) > tolerance:
        return HermiteClass(first, last, "majority-vote", None)
    a, b = coefficients[1] ** 2, found.chi / total
    if a <= tolerance:
        return HermiteClass(first, last, "nearest-neighbour", None)
    if b - 1 < tolerance:
        return HermiteClass(first, last, "linear", None)
    return HermiteClass(first, last, "singular-kernel", float(-2 * math.log(a) / math.log(b)))


def _is_polynomial(function: Function | LayerGraph, coefficients: np.ndarray, centre: bool) -> bool:
    """Whether f equals its Hermite sum far out, where what was cut off of a series would show."""
    far = np.array([-8.0, -6.5, -5.0, -3.5, 3.6, 5.1, 6.6, 8.1])
    value, _ = values(function, far)
    offset = moments(function).mean if centre else 0.0
    expected = coefficients @ normalised_hermite(far, len(coefficients))
    return bool(np.abs(value - offset - expected).max() <= 1e-7 * (1 + np.abs(value).max()))


def fixed_point(
    function: Function | LayerGraph,
    weight_variance: float,
    bias_variance: float = 0.0,
    *,
    start: float = 1.0,
    steps: int = 10_000,
) -> tuple[float, float]:
    """(q, chi_1): the variance that q = weight_variance E[f(sqrt(q) z)^2] + bias_variance keeps, and weight_variance
    E[f'(sqrt(q) z)^2] there, below 1 where inputs converge and above 1 where they part.

    Iterated from `start` to ten digits; a variance that vanishes gives q = 0 with the slopes at 0, one that grows
    beyond 1e6 or does not settle raises UserError. Poole et al. 2016 (arXiv 1606.05340), Schoenholz et al. 2017
    (arXiv 1611.01232), equations 3 and 5.
    """
    q = start
    for _ in range(steps):
        found = moments(function, q)
        new = weight_variance * found.second + bias_variance
        if new > 1e6:
            raise UserError(weight_variance, "a variance of the weights under which the signal stays finite")
        if new < 1e-12:
            _, slopes = values(function, np.array([-1e-9, 1e-9]))
            return 0.0, float(weight_variance * (slopes**2).mean())
        if abs(new - q) <= 1e-11 * q:
            return new, weight_variance * moments(function, new).chi
        q = new
    raise UserError(weight_variance, f"a variance of the weights whose signal settles within {steps} layers")


def gain(function: Function | LayerGraph, *, q: float = 1.0, centre: bool = False) -> tuple[float, float]:
    """(gain, offset): weights of variance gain^2 / fan_in keep the variance q of pre-activations behind f - offset.

    offset: E[f] with `centre`, else 0. ReLU has the gain sqrt(2) (He et al. 2015, arXiv 1502.01852). In the manner of
    AutoInit (Bingham and Miikkulainen 2023, arXiv 2109.08958). Errors: UserError where f has no variance.
    """
    found = moments(function, q)
    size = found.variance if centre else found.second
    if size <= 1e-24:
        raise UserError("f", "a function that passes some of its input's variance")
    return math.sqrt(q / size), found.mean if centre else 0.0


def initialize_for(
    network: nn.Module, function: Function | LayerGraph, generator: torch.Generator, *, skip: tuple[str, ...] = ()
) -> float:
    """Normal weights of variance gain^2 / fan_in for every linear layer and convolution, biases zero; the gain.

    The first one reads inputs, not activations: its gain is 1. skip: names of modules that stay as they are.
    """
    scale, _ = gain(function)
    first = True
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and name not in skip:
            fan_in = module.weight[0].numel()
            with torch.no_grad():
                drawn = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(drawn * ((1.0 if first else scale) / math.sqrt(fan_in)))
                if module.bias is not None:
                    module.bias.zero_()
            first = False
    return scale


# -- integration -------------------------------------------------------------------------------------------------


def _rule(function: Function | LayerGraph, q: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes z and weights with the Gaussian density in them, on panels halved until f, f^2 and f'^2 are resolved."""
    points, weights = _legendre()
    edges = np.concatenate([-np.arange(_REACH, 0, -1), np.arange(0, _REACH)])
    panels = np.stack([edges, edges + 1], 1)
    nodes, parts = [], []
    for depth in range(_DEEPEST):
        middle, half = panels.mean(1), np.diff(panels, axis=1)[:, 0] / 2
        z, weight = _panel(middle, half, points, weights)
        whole = _integrals(function, q, z, weight)
        shift = half[:, None] * np.array([-0.5, 0.5])
        fine_z, fine_weight = _panel((middle[:, None] + shift).ravel(), np.repeat(half / 2, 2), points, weights)
        fine = _integrals(function, q, fine_z, fine_weight)
        halves = fine.reshape(fine.shape[0], -1, 2).sum(2)
        done = (np.abs(halves - whole) <= _TOLERANCE * (1 + np.abs(whole).sum(1, keepdims=True))).all(0)
        if depth == _DEEPEST - 1:
            rest = np.abs(halves)[:, ~done].max(initial=0.0)
            if rest > 1e-6 * (1 + np.abs(whole).sum()):
                raise UserError(
                    f"f near {math.sqrt(q) * middle[~done][0]:.4g}", "a function whose square is integrable"
                )
            done[:] = True
        nodes.append(fine_z.reshape(len(panels), -1)[done].ravel())
        parts.append(fine_weight.reshape(len(panels), -1)[done].ravel())
        if done.all():
            break
        left = panels[~done]
        cut = left.mean(1)
        panels = np.concatenate([np.stack([left[:, 0], cut], 1), np.stack([cut, left[:, 1]], 1)])
    return np.concatenate(nodes), np.concatenate(parts)


def _integrals(function: Function | LayerGraph, q: float, z: np.ndarray, weight: np.ndarray) -> np.ndarray:
    value, slope = values(function, math.sqrt(q) * z)
    return np.stack([(weight * part).sum(1) for part in (value, value * value, slope, slope * slope)])


def _panel(
    middle: np.ndarray, half: np.ndarray, points: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    z = middle[:, None] + half[:, None] * points
    return z, half[:, None] * weights * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


@functools.cache
def _legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(_POINTS)
