"""FreSh: whether an untrained implicit network's output has the frequencies of the signal that it shall fit."""

from __future__ import annotations

import math

import torch

from zero_cost.captured import Captured
from zero_cost.definition import proxy
from zero_cost.errors import NoValue


def grid_order(coordinates: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """(order of the rows of [N, d] that runs along a regular grid, the grid's shape); NoValue for other inputs."""
    if not coordinates.is_floating_point() or coordinates.dim() != 2 or coordinates.shape[1] > 3:
        raise NoValue("the inputs are no coordinates [N, up to 3] of a signal")
    places = [torch.unique(column, return_inverse=True) for column in coordinates.T]
    shape = tuple(len(values) for values, _ in places)
    index = torch.zeros(len(coordinates), dtype=torch.long, device=coordinates.device)
    for (_, place), size in zip(places, shape, strict=True):
        index = index * size + place
    order = index.argsort()
    whole = torch.arange(math.prod(shape), device=index.device)
    if len(index) != len(whole) or not torch.equal(index[order], whole) or min(shape) < 3:
        raise NoValue("the coordinates of the batch are no whole regular grid of at least 3 in each direction")
    return order, shape


def spectrum(signal: torch.Tensor) -> torch.Tensor:
    """[R] shares of amplitude at frequency |f_1| + ... + |f_d| = 1, 2, ..., R of a signal [n_1, ..., n_d, C]."""
    axes = list(range(signal.dim() - 1))
    amplitude = torch.fft.fftn(signal.double(), dim=axes).abs().sum(-1)
    radius = torch.zeros(amplitude.shape, dtype=torch.long, device=signal.device)
    for axis, size in enumerate(amplitude.shape):
        frequency = (torch.fft.fftfreq(size, device=signal.device) * size).round().long().abs()
        radius += frequency.view([-1 if a == axis else 1 for a in axes])
    found = torch.bincount(radius.flatten(), amplitude.flatten())[1:]
    # Rounding alone is no signal: beside the mean (frequency 0) it has a share of at most about 1e-7 in float32.
    if not torch.isfinite(found).all() or found.sum() <= 1e-6 * amplitude.sum():
        raise NoValue("the signal or the output is constant or not finite")
    return found / found.sum()


@proxy(
    "spectrum",
    needs=("logits", "inputs"),
    formula="-(Wasserstein distance of the spectra of output and target, amplitudes by |f_1| + ... + |f_d|, mean left "
    "out, in cycles); inputs are the coordinates of a grid, labels its values",
    source="Kania et al., FreSh, ICLR 2025, and released code (which reads negative frequencies as high ones)",
    sign=-1,
    reads_labels=True,
)
def spectrum_distance(captured: Captured) -> torch.Tensor:
    order, shape = grid_order(captured.inputs)
    target, output = captured.labels, captured.logits
    if target is None or not target.is_floating_point():
        raise NoValue("the labels are not the values of a signal")
    target = target.reshape(len(order), -1)
    if output.shape[0] != len(order) or output.reshape(len(order), -1).shape != target.shape:
        raise NoValue("the model's output has not the shape of the signal")
    ours, theirs = (spectrum(x.reshape(len(order), -1)[order].reshape(*shape, -1)) for x in (output, target))
    return -(ours - theirs).cumsum(0)[:-1].abs().sum()
