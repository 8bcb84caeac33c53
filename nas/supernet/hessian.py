"""The curvature of the validation loss in alpha, and the early stop that Robust DARTS bases on it.

Zela et al. 2020 (Understanding and Robustifying DARTS, arXiv 1909.09656), section 4; code automl/RobustDARTS 3dec3fe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from nas.supernet.bilevel import Loss
from search_spaces.common.errors import UserError

Product = Callable[[Tensor], Tensor]


def hessian_vector_product(loss: Loss, tensors: Sequence[Tensor]) -> tuple[Product, int]:
    """The Hessian of `loss` in `tensors` as a function of a flat vector [n] in float64 on the CPU, and n.

    `loss` is called once; its graph is held as long as the function. A product is one backward pass.
    """
    tensors = list(tensors)
    sizes = [t.numel() for t in tensors]
    slopes = torch.autograd.grad(loss(), tensors, create_graph=True, allow_unused=True, materialize_grads=True)
    curved = [s for s in slopes if s.requires_grad]  # the others are constant: their rows of the Hessian are 0

    def product(vector: Tensor) -> Tensor:
        parts = [p.view_as(t).to(t) for p, t in zip(vector.split(sizes), tensors)]
        along = sum((s * p).sum() for s, p in zip(slopes, parts) if s.requires_grad)
        if not curved:
            return torch.zeros_like(vector)
        found = torch.autograd.grad(along, tensors, retain_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([f.detach().flatten().to(vector) for f in found])

    return product, sum(sizes)


def extreme_eigenvalues(
    loss: Loss, alphas: Sequence[Tensor], generator: torch.Generator, *, tolerance: float = 1e-4, steps: int = 100
) -> tuple[float, float]:
    """The smallest and the largest eigenvalue of the Hessian of `loss` in `alphas`, signed.

    Robust DARTS watches the largest (its code adds alpha's weight decay to it). Lanczos with full
    reorthogonalisation from a random vector of `generator` (CPU), until both are within `tolerance` times the largest
    magnitude by their residuals, or after `steps` products; exact after as many products as there are different
    eigenvalues. NaN for a loss whose derivatives are not finite. Errors: UserError where there are no alphas.
    """
    product, size = hessian_vector_product(loss, alphas)
    if size == 0:
        raise UserError(size, "at least one alpha")
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    basis: list[Tensor] = [vector / vector.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = product(basis[-1])
        if not bool(image.isfinite().all()):
            return math.nan, math.nan
        diagonal.append(float(basis[-1] @ image))
        frame = torch.stack(basis)
        for _ in range(2):  # once is not enough to stay orthogonal in floating point
            image = image - frame.T @ (frame @ image)
        values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
        rest = float(image.norm())
        scale = max(abs(values[0]), abs(values[-1]))
        residual = rest * max(abs(vectors[-1, 0]), abs(vectors[-1, -1]))
        if residual <= tolerance * scale or len(basis) == min(size, steps):
            return float(values[0]), float(values[-1])
        beside.append(rest)
        basis.append(image / rest)


def early_stop(
    eigenvalues: Sequence[float],
    epochs: Sequence[int] | None = None,
    *,
    window: int = 5,
    lag: int = 4,
    ratio: float = 1.3,
    first_epoch: int = 10,
) -> int | None:
    """The epoch whose architecture to return, if the search should stop after the last of `eigenvalues`; else None.

    The largest eigenvalue is averaged over `window` measurements around each; the search stops once the average grew
    by more than `ratio` over the last `lag` measurements, and returns to the epoch before that growth, which must not
    be earlier than `first_epoch`. epochs: when the eigenvalues were measured (0, 1, 2, ...). Where the earlier average
    is not positive there is no ratio and no stop. Defaults: RobustDARTS, src/search/args.py (its `EVLocalAvg` averages
    over what exists at the beginning, as here). To be asked after every measurement. Errors: UserError for an even
    window or epochs of another length.
    """
    if window < 1 or window % 2 == 0:
        raise UserError(window, "an odd window, so that averages have a middle")
    epochs = range(len(eigenvalues)) if epochs is None else epochs
    if len(epochs) != len(eigenvalues):
        raise UserError(len(epochs), f"one epoch for each of {len(eigenvalues)} eigenvalues")
    half = window // 2
    now = len(eigenvalues) - 1 - half
    before = now - lag
    if before < 0 or epochs[before] < first_epoch:
        return None

    def average(middle: int) -> float:
        return float(np.mean(eigenvalues[max(0, middle - half) : middle + half + 1]))

    grew = average(before) > 0 and average(now) / average(before) > ratio
    return epochs[before] if grew else None
