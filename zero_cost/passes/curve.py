"""The curve that the logits draw while the input runs around a circle: first and second derivatives by the angle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from zero_cost.captured import Probe
from zero_cost.errors import NoValue
from zero_cost.watch import BATCH_NORM_CALLS, Watch, argument


def curve_pass(probe: Probe) -> None:
    """Inputs x cos t + y sin t at evenly spaced t: x is sample 0, y random, orthogonal to it and as long."""
    if not probe.wants("curve"):
        return
    with probe.step("curve", "curve"):
        sample = probe.batches[0][0][0]
        if not sample.is_floating_point():
            raise NoValue("integer inputs do not run around a circle")
        other = torch.randn(sample.shape, generator=probe.network.generator()).to(sample)
        other -= sample * ((other * sample).sum() / sample.square().sum())
        other *= torch.linalg.vector_norm(sample) / torch.linalg.vector_norm(other)
        angles = torch.arange(probe.few, device=sample.device, dtype=sample.dtype) * (2 * math.pi / probe.few)
        angles = angles.view(-1, *[1] * sample.dim())

        def logits(angles: torch.Tensor) -> torch.Tensor:
            with Watch(_without_statistics):
                return probe.network.forward(sample * angles.cos() + other * angles.sin()).flatten(1)

        def velocity(angles: torch.Tensor) -> torch.Tensor:
            return torch.func.jvp(logits, (angles,), (torch.ones_like(angles),))[1]

        first, second = torch.func.jvp(velocity, (angles,), (torch.ones_like(angles),))[:2]
        probe.captured.curve = first.detach(), second.detach()


def _without_statistics(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """BatchNorm on the batch alone, from elementary functions: the second forward derivative of torch's own is wrong
    (2.13), and running statistics cannot be written inside a derivative."""
    if func not in BATCH_NORM_CALLS:
        return func(*args, **kwargs)
    x, weight, bias = args[0], argument("weight", 3, args, kwargs), argument("bias", 4, args, kwargs)
    others, shape = [d for d in range(x.dim()) if d != 1], [1, -1, *[1] * (x.dim() - 2)]
    x = x - x.mean(others, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(others, keepdim=True) + argument("eps", 7, args, kwargs, 1e-5))
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)
