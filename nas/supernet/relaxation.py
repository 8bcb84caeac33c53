"""Relaxations: how the architecture parameters of one label become the weights of its candidates.

Each is a frozen dataclass with one method, `draw(alpha, generator, progress)`. alpha: [K], one parameter per candidate.
Random numbers are drawn on the CPU from `generator` and moved to alpha's device, so that a seed means the same draw on
every device. progress: the share of the search that is done, 0 to 1, for schedules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from search_spaces.common.errors import UserError


@dataclass(frozen=True)
class Weights:
    """values: [K], a weight per candidate, with gradient. active: the candidates that must run, None = all.

    gated: where values have a gradient, candidates that are not active run too, for that gradient alone.
    """

    values: torch.Tensor
    active: tuple[int, ...] | None = None
    gated: bool = False


class Relaxation(Protocol):
    """What a supernet asks for the weights of one label."""

    def draw(self, alpha: torch.Tensor, generator: torch.Generator, progress: float) -> Weights: ...


@dataclass(frozen=True)
class Softmax:
    """softmax(alpha); nothing is random. Liu et al., DARTS, ICLR 2019, equation 2."""

    def draw(self, alpha: torch.Tensor, generator: torch.Generator, progress: float) -> Weights:
        return Weights(alpha.softmax(0))


@dataclass(frozen=True)
class Sigmoid:
    """sigmoid(alpha): candidates do not compete; nothing is random. Chu et al., Fair DARTS, ECCV 2020."""

    def draw(self, alpha: torch.Tensor, generator: torch.Generator, progress: float) -> Weights:
        return Weights(alpha.sigmoid())


@dataclass(frozen=True)
class GumbelSoft:
    """softmax((log softmax(alpha) + Gumbel noise) / temperature). Xie et al., SNAS, ICLR 2019.

    The temperature goes from `start` to `end` linearly with progress. Errors: UserError where one is not positive.
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        _check_temperatures(self.start, self.end)

    def draw(self, alpha: torch.Tensor, generator: torch.Generator, progress: float) -> Weights:
        return Weights(_gumbel_softmax(alpha, generator, _linear(self.start, self.end, progress)))


@dataclass(frozen=True)
class GumbelHard:
    """One candidate, sampled with probability softmax(alpha). Dong and Yang, GDAS, CVPR 2019.

    Its weight is 1 - p + p with the first p detached, where p is its entry of GumbelSoft: one in value, p in gradient.
    Temperatures as the authors' configuration for NAS-Bench-201 has them (10 to 0.1, linear).
    """

    start: float = 10.0
    end: float = 0.1

    def __post_init__(self) -> None:
        _check_temperatures(self.start, self.end)

    def draw(self, alpha: torch.Tensor, generator: torch.Generator, progress: float) -> Weights:
        soft = _gumbel_softmax(alpha, generator, _linear(self.start, self.end, progress))
        chosen = int(soft.argmax())
        # The bracket is zero in value; written so that the weight is exactly one.
        return Weights(_one_hot(alpha, chosen) * (1 + (soft - soft.detach())), (chosen,))


@dataclass(frozen=True)
class Dirichlet:
    """A sample of Dirichlet(elu(alpha) + 1) with its pathwise gradient. Chen et al., DrNAS, ICLR 2021."""

    def draw(self, alpha: torch.Tensor, generator: torch.Generator, progress: float) -> Weights:
        # In double: near zero, elu + 1 cancels.
        concentration = F.elu(alpha.double().cpu()) + 1
        # Gamma(a) = Gamma(a + 1) U^(1/a), in logarithms: samples at small a would underflow. Torch differentiates the
        # Gamma sample along its quantiles; the public class takes no generator.
        gamma = torch._standard_gamma(concentration + 1, generator=generator)
        uniform = 1 - torch.rand(concentration.shape, generator=generator, dtype=torch.float64)
        return Weights((gamma.log() + uniform.log() / concentration).softmax(0).to(alpha))


@dataclass(frozen=True)
class DirichletMean:
    """The mean of Dirichlet's samples; nothing is random."""

    def draw(self, alpha: torch.Tensor, generator: torch.Generator, progress: float) -> Weights:
        concentration = F.elu(alpha) + 1
        return Weights(concentration / concentration.sum())


@dataclass(frozen=True)
class UniformPath:
    """One candidate, all equally likely; no gradient. Guo et al., SPOS, ECCV 2020."""

    def draw(self, alpha: torch.Tensor, generator: torch.Generator, progress: float) -> Weights:
        chosen = int(torch.randint(len(alpha), (), generator=generator))
        return Weights(_one_hot(alpha, chosen), (chosen,))


@dataclass(frozen=True)
class SampledPath:
    """One candidate, sampled with probability softmax(alpha); no gradient. Lu et al., PA&DA, CVPR 2023."""

    def draw(self, alpha: torch.Tensor, generator: torch.Generator, progress: float) -> Weights:
        chosen = _sample(alpha, generator)
        return Weights(_one_hot(alpha, chosen), (chosen,))


@dataclass(frozen=True)
class BinaryGates:
    """One candidate, sampled with probability p = softmax(alpha). Cai et al., ProxylessNAS, ICLR 2019, section 3.2.

    The gates g are one-hot in value; their gradient goes on to alpha as if they were p:
    dL/dalpha_i = sum_j dL/dg_j p_j (delta_ij - p_i), with dL/dg_j from the outputs of all candidates (equation 4; the
    mode full_v2 of mit-han-lab/proxylessnas bf58b5c, search/modules/mix_op.py).
    """

    def draw(self, alpha: torch.Tensor, generator: torch.Generator, progress: float) -> Weights:
        chosen, share = _sample(alpha, generator), alpha.softmax(0)
        return Weights(_one_hot(alpha, chosen) + (share - share.detach()), (chosen,), gated=True)


def _sample(alpha: torch.Tensor, generator: torch.Generator) -> int:
    share = alpha.detach().cpu().double().softmax(0)
    return int(torch.multinomial(share, 1, generator=generator))


def noiseless(relaxation: Relaxation) -> Relaxation:
    """The smooth mixture an architecture is read off from: means of Dirichlet samples, softmax for other noise."""
    if isinstance(relaxation, Sigmoid):
        return relaxation
    return DirichletMean() if isinstance(relaxation, Dirichlet) else Softmax()


def _gumbel_softmax(alpha: torch.Tensor, generator: torch.Generator, temperature: float) -> torch.Tensor:
    noise = -torch.empty(alpha.shape, dtype=alpha.dtype).exponential_(generator=generator).log()
    return ((alpha.log_softmax(0) + noise.to(alpha.device)) / temperature).softmax(0)


def _one_hot(alpha: torch.Tensor, chosen: int) -> torch.Tensor:
    values = torch.zeros_like(alpha, requires_grad=False)
    values[chosen] = 1
    return values


def _linear(start: float, end: float, progress: float) -> float:
    if not 0 <= progress <= 1:
        raise UserError(progress, "the share of the search that is done, from 0 to 1")
    return start + (end - start) * progress


def _check_temperatures(*temperatures: float) -> None:
    for temperature in temperatures:
        if not temperature > 0:
            raise UserError(temperature, "a temperature above zero")
