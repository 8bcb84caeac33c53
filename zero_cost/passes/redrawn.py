"""Passes with redrawn weights on N(0, 1) inputs: the two forwards of Zen-score, the stage features of AZ-NAS."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from zero_cost.captured import Named, Probe, Stages, Zen
from zero_cost.errors import NoValue
from zero_cost.network import CONVOLUTIONS, Network
from zero_cost.watch import BATCH_NORM_CALLS, LINEAR_CALLS, MEAN_CALLS, POOLING_CALLS, Watch, argument

MIX = 1e-2  # gamma of Zen-score
BATCH_NORMS = nn.modules.batchnorm._BatchNorm


def redrawn(network: Network, generator: torch.Generator, deviation: Callable[[int], float]) -> Named:
    """Parameters with weights of convolutions and linear layers ~ N(0, deviation(fan in)^2), their biases 0, BatchNorm
    scale 1 and shift 0; others as they are."""
    parameters = {name: p.detach() for name, p in network.parameters.items()}
    for prefix, module in network.model.named_modules():
        for kind, old in module.named_parameters(prefix, recurse=False):
            if kind not in parameters:
                continue  # shared: drawn under its first name
            if isinstance(module, CONVOLUTIONS | nn.Linear) and old.dim() > 1:
                draw = torch.randn(old.shape, generator=generator) * deviation(old[0].numel())
                parameters[kind] = draw.to(network.device, old.dtype)
            elif isinstance(module, CONVOLUTIONS | nn.Linear | BATCH_NORMS):
                scale = isinstance(module, BATCH_NORMS) and kind.endswith("weight")
                parameters[kind] = torch.full_like(parameters[kind], float(scale))
    return parameters


def gaussian_like(probe: Probe, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` N(0, 1) inputs of the shape of the first batch's samples."""
    inputs = probe.batches[0][0]
    if not inputs.is_floating_point():
        raise NoValue("integer inputs cannot be drawn from N(0, 1)")
    return torch.randn((count, *inputs.shape[1:]), generator=generator).to(inputs)


def zen_pass(probe: Probe) -> None:
    """Features before global pooling at x and x + gamma x', and BatchNorm's running variances after the two forwards.

    The variances start from 1 and follow each layer's momentum, also where a layer keeps no statistics of its own.
    """
    if not probe.wants("zen"):
        return
    with probe.step("zen", "zen"), torch.no_grad():
        generator, watched = probe.network.generator(), _ZenWatch()
        differences, variances = [], []
        for _ in range(probe.repeats):
            parameters = redrawn(probe.network, generator, lambda fan_in: 1.0)
            x, other = (gaussian_like(probe, min(len(probe.batches[0][0]), probe.few), generator) for _ in range(2))
            features = [watched.features(probe.network, parameters, inputs) for inputs in (x, x + MIX * other)]
            change = (features[0] - features[1]).abs().flatten(1)
            differences.append(change.double().sum(1).mean().item())
            variances.append([v.double().mean().item() for _, v in watched.statistics])
        probe.captured.zen = Zen(differences, variances)


class _ZenWatch:
    """Keeps the input of the last global average pooling (else of the last linear layer) and running statistics."""

    def __init__(self) -> None:
        self.statistics: list[tuple[torch.Tensor, torch.Tensor]] = []  # per BatchNorm call
        self.pooled: torch.Tensor | None = None
        self.linear: torch.Tensor | None = None
        self.calls = 0

    def features(self, network: Network, parameters: Named, inputs: torch.Tensor) -> torch.Tensor:
        self.pooled = self.linear = None
        self.calls = 0
        with Watch(self):
            network.forward(inputs, parameters)
        found = self.linear if self.pooled is None else self.pooled
        if found is None:
            raise NoValue("neither global average pooling nor a linear layer: where the features end is unknown")
        return found

    def __call__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in BATCH_NORM_CALLS:
            return self._batch_norm(args, kwargs)
        result = func(*args, **kwargs)
        if func in LINEAR_CALLS:
            self.linear = argument("input", 0, args, kwargs).clone()
        elif func in POOLING_CALLS or func in MEAN_CALLS:
            x = argument("input", 0, args, kwargs)
            if x.dim() > 2 and result.shape[:2] == x.shape[:2] and result.numel() == x.shape[0] * x.shape[1]:
                self.pooled = x.clone()
        return result

    def _batch_norm(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        x, weight = args[0], argument("weight", 3, args, kwargs)
        if self.calls == len(self.statistics):
            self.statistics.append((x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])))
        mean, variance = self.statistics[self.calls]
        self.calls += 1
        momentum, eps = argument("momentum", 6, args, kwargs, 0.1), argument("eps", 7, args, kwargs, 1e-5)
        bias = argument("bias", 4, args, kwargs)
        return F.batch_norm(x, mean, variance, weight, bias, True, 0.1 if momentum is None else momentum, eps)


def stages_pass(probe: Probe) -> None:
    """Channel covariances of the stage features, and each stage's vector-Jacobian product of random signs."""
    if not probe.wants("stages"):
        return
    with probe.step("stages", "stages"), torch.enable_grad():
        if not probe.stage_names:
            raise NoValue("needs the names of the stages: the model has no stages(), and none were given")
        generator = probe.network.generator()
        parameters = redrawn(probe.network, generator, lambda fan_in: (2.0 / fan_in) ** 0.5)
        inputs = gaussian_like(probe, len(probe.batches[0][0]), generator).requires_grad_()
        with _stage_features(probe.network.model, probe.stage_names) as features:
            probe.network.forward(inputs.clone(), parameters)
        eigenvalues = [covariance_eigenvalues(feature.detach()) for feature in features]
        signs = [torch.randint(2, f.shape, generator=generator).to(f) * 2 - 1 for f in features[1:]]
        gains = [_gain(*triple) for triple in zip(features, features[1:], signs, strict=False)]
        probe.captured.stages = Stages(eigenvalues, gains)


@contextlib.contextmanager
def _stage_features(model: nn.Module, names: tuple[str, ...] | Any) -> Iterator[list[torch.Tensor]]:
    """A list that fills with the input of the first stage and the output of every stage, in order."""
    found: list[torch.Tensor] = []
    modules = [model.get_submodule(name) for name in names]

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found.append(args[-1])
        return (*args[:-1], args[-1] * 1)  # the stage may overwrite its input

    def leave(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        found.append(output)
        return output * 1  # what follows may overwrite its input

    handles = [modules[0].register_forward_pre_hook(enter), *(m.register_forward_hook(leave) for m in modules)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[samples and positions, channels] of [B, C, ...] maps or [B, T, C] tokens."""
    return x.flatten(0, 1) if x.dim() == 3 else x.movedim(1, -1).reshape(-1, x.shape[1])


def covariance_eigenvalues(feature: torch.Tensor) -> torch.Tensor:
    """[C] eigenvalues of the covariance of a stage's channels over samples and positions, in float64."""
    rows = _rows(feature).double()
    rows = rows - rows.mean(0)
    return torch.linalg.eigvalsh(rows.T @ rows / len(rows))


def _gain(before: torch.Tensor, after: torch.Tensor, sign: torch.Tensor) -> float | None:
    """Largest singular value of (cotangents before)^T (cotangents after) / positions; None for the identity."""
    received = None
    if after.requires_grad:
        (received,) = torch.autograd.grad(after, before, sign, retain_graph=True, allow_unused=True)
    if received is None:
        return 0.0
    if received.shape == sign.shape and torch.equal(received, sign):
        return None
    if received.dim() == 4 and received.shape[2:] != sign.shape[2:]:
        received = F.pixel_unshuffle(received, received.shape[2] // sign.shape[2])
    into, out = _rows(received).double(), _rows(sign).double()
    return torch.linalg.matrix_norm(into.T @ out / len(out), 2).item()
