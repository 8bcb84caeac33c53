"""SDARTS: train the weights at perturbed mixing weights, so that the loss stays flat around the architecture found.

Chen and Hsieh 2020 (SDARTS, arXiv 2002.05283); code xiangning-chen/SmoothDARTS d3dbfed, attacker/perturb.py. The
`values` perturbed are leaf tensors that the loss reads: there the mixing weights softmax(alpha), projected back to the
simplex; with `project=None` any others, such as alpha itself. They are changed in place for the time of a `with`
block, in which the weights take their step, and have their old bits afterwards:

    with adversarial_perturbation(train_loss, mixing, radius, generator):
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nas.supernet.bilevel import Loss, gradients, kept
from nas.supernet.regularizers import linear
from search_spaces.common.errors import UserError

Projection = Callable[[Tensor], Tensor]


def radius_at(epoch: float, epochs: int, start: float = 0.03, end: float = 0.3) -> float:
    """SDARTS's radius: from .03 linearly towards .3 (sota/cnn/train_search.py)."""
    return linear(start, end, epoch, epochs)


def to_simplex(values: Tensor) -> Tensor:
    """Rows (last dimension) of non-negative numbers that sum to 1, as SDARTS makes them: cut to [0, 1], then divided
    by their sum; where nothing is left, the largest entry gets it all. (Not the nearest point of the simplex.)
    """
    cut = values.clamp(0, 1)
    total = cut.sum(-1, keepdim=True)
    first = torch.zeros_like(values).scatter_(-1, values.argmax(-1, keepdim=True), 1.0)
    return torch.where(total > 0, cut / total.where(total > 0, torch.ones_like(total)), first)


@contextmanager
def random_perturbation(
    values: Sequence[Tensor], radius: float, generator: torch.Generator, *, project: Projection | None = to_simplex
) -> Iterator[None]:
    """SDARTS-RS: inside, `values` plus uniform noise from -radius to radius in each entry."""
    _checked(values, radius)
    with kept(values):
        _shift(values, radius, generator, project)
        yield


@contextmanager
def adversarial_perturbation(
    loss: Loss,
    values: Sequence[Tensor],
    radius: float,
    generator: torch.Generator,
    *,
    steps: int = 7,
    project: Projection | None = to_simplex,
    buffers: Sequence[Tensor] = (),
) -> Iterator[None]:
    """SDARTS-ADV: inside, `values` where projected gradient ascent on `loss` took them, at most `radius` an entry.

    A random start in the box, `steps` steps of 2 radius / steps along the gradient's sign, each cut to the box and then
    projected; kept only if the loss is not below that of the values as they were. `loss` is called steps + 2 times;
    the authors' runs the network in evaluation mode here. As in their code the sign is that of the raw gradient, so a
    loss that rises in all entries of a row moves the row towards uniform. `buffers` (BatchNorm's statistics) are put
    back before the block begins. Errors: UserError for values that are no leaf tensors with gradient, a radius below 0,
    or no step.
    """
    _checked(values, radius)
    if steps < 1:
        raise UserError(steps, "at least one step of ascent")
    centre = [v.detach().clone() for v in values]
    with kept(values):
        with kept(buffers):
            _ascend(loss, values, centre, radius, steps, generator, project)
        yield


def _ascend(
    loss: Loss,
    values: Sequence[Tensor],
    centre: Sequence[Tensor],
    radius: float,
    steps: int,
    generator: torch.Generator,
    project: Projection | None,
) -> None:
    with torch.no_grad():
        before = loss()
    _shift(values, radius, generator, project)
    for _ in range(steps):
        slopes = gradients(loss(), values)
        with torch.no_grad():
            for value, slope, middle in zip(values, slopes, centre):
                offset = (value + 2 * radius / steps * slope.sign() - middle).clamp(-radius, radius)
                value.copy_(_projected(middle + offset, project))
    with torch.no_grad():
        if not loss() >= before:  # also where the loss is no number
            for value, middle in zip(values, centre):
                value.copy_(middle)


@torch.no_grad()
def _shift(values: Sequence[Tensor], radius: float, generator: torch.Generator, project: Projection | None) -> None:
    for value in values:
        noise = torch.rand(value.shape, generator=generator, device=generator.device, dtype=value.dtype)
        value.copy_(_projected(value + radius * (2 * noise - 1).to(value.device), project))


def _projected(value: Tensor, project: Projection | None) -> Tensor:
    return value if project is None else project(value)


def _checked(values: Sequence[Tensor], radius: float) -> None:
    if not radius >= 0:
        raise UserError(radius, "a radius of at least 0")
    for value in values:
        if not (value.is_leaf and value.requires_grad):
            raise UserError(tuple(value.shape), "leaf tensors that require gradients, which the loss reads, to perturb")
