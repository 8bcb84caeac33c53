"""Mixed: the weighted sum of the candidates of a Choice."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nas.supernet.relaxation import Weights
from nas.supernet.weighted import JOINED_CHANNELS, products
from search_spaces.cells.operations import Zero
from search_spaces.choice import Choice
from search_spaces.common.errors import UserError


class Mixed(Choice):
    """A Choice that runs the weighted sum of its candidates while it has `weights`, else the selected one.

    weights: set for one forward pass by the supernet; candidates that are not active do not run. scale: a factor of
    the whole output (edge normalisation), None = 1; a selected candidate that runs alone has none.

    partial: k of partial channels (Xu et al., PC-DARTS, ICLR 2020, section 3.2). The candidates, made for C / k
    channels, see the first C / k of an input [N, C, H, W]; the rest passes by, max-pooled 2 x 2 where the candidates
    halve the size; the result is shuffled in k groups. Errors: UserError where k does not divide C.

    checkpointed: activations of the mixture are computed again during backward instead of being kept. Value, gradient
    and buffers are those of the plain mixture.

    auxiliary: attribute, a module that runs beside the mixed candidates, on what they see, and is added with the factor
    `auxiliary_weight` (DARTS-); None, the default, for none. A selected candidate runs without it.
    """

    def __init__(
        self,
        candidates: Iterable[nn.Module],
        label: str,
        *,
        partial: int = 1,
        checkpointed: bool = False,
        joined: int = JOINED_CHANNELS,
    ):
        super().__init__(candidates, label)
        if partial < 1:
            raise UserError(partial, "k of partial channels: the candidates see one in k channels, k at least 1")
        self.partial, self.checkpointed, self.joined = partial, checkpointed, joined
        self.weights: Weights | None = None
        self.scale: torch.Tensor | None = None
        self.auxiliary: nn.Module | None = None
        self.auxiliary_weight = 1.0

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        if self.weights is None:
            return self._around(self.candidates[self.selected], *inputs)
        mixture = functools.partial(self._around, functools.partial(self._mixture, self.weights))
        if self.checkpointed and torch.is_grad_enabled():
            contexts = contextlib.nullcontext(), _AsNow(self)
            y = checkpoint(mixture, *inputs, use_reentrant=False, context_fn=lambda: contexts)
        else:
            y = mixture(*inputs)
        return y if self.scale is None else self.scale * y

    def _mixture(self, weights: Weights, *inputs: torch.Tensor) -> torch.Tensor:
        values, everything = weights.values, range(len(self.candidates))
        running = everything if weights.active is None else weights.active
        # `none` adds zeros and has no gradient: it runs only where nothing else does.
        adding = [k for k in running if not isinstance(self.candidates[k], Zero)] or running[:1]
        terms = products([self.candidates[k] for k in adding], [values[k] for k in adding], *inputs, narrow=self.joined)
        if weights.gated and values.requires_grad and torch.is_grad_enabled():
            others = [k for k in everything if k not in running and not isinstance(self.candidates[k], Zero)]
            with torch.no_grad():  # of a candidate that adds nothing only the output is kept, not what lies inside it
                outputs = [self.candidates[k](*inputs) for k in others]
            terms += [values[k] * output for k, output in zip(others, outputs)]
        if self.auxiliary is not None and self.auxiliary_weight != 0:
            terms.append(self.auxiliary_weight * self.auxiliary(*inputs))
        return functools.reduce(torch.add, terms)

    def _around(self, function: Any, *inputs: torch.Tensor) -> torch.Tensor:
        """The output of `function`, on part of the channels where there are partial ones."""
        if self.partial == 1:
            return function(*inputs)
        (x,) = inputs
        if x.shape[1] % self.partial:
            raise UserError(x.shape[1], f"channels that k = {self.partial} of partial channels divides")
        seen = x.shape[1] // self.partial
        first, rest = x.split([seen, x.shape[1] - seen], dim=1)
        y = function(first.contiguous())  # once for all candidates
        if y.shape[2:] != rest.shape[2:]:
            rest = F.max_pool2d(rest, 2, ceil_mode=True)  # odd sizes round up, as in strided convolutions
        return shuffled(y, rest, self.partial)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, partial={self.partial}, checkpointed={self.checkpointed}"


def shuffle_channels(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Channel i of `groups` equal groups g goes to place i * groups + g. Zhang et al., ShuffleNet, CVPR 2018."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def shuffled(first: torch.Tensor, rest: torch.Tensor, groups: int) -> torch.Tensor:
    """shuffle_channels of the two side by side, copied once. first: a group of channels; rest: all other groups."""
    others = rest.unflatten(1, (groups - 1, first.shape[1])).transpose(1, 2)
    return torch.cat([first.unsqueeze(2), others], dim=2).flatten(1, 2)


class _AsNow:
    """A context, to be entered any number of times, in which `module` computes what it does when this is made.

    Recomputation must neither count a batch twice in running statistics, nor see other statistics, parameters (under
    `torch.func.functional_call`) or weights of inner choices than the first pass did. Afterwards all is as before.
    """

    def __init__(self, module: Mixed):
        parts = list(module.modules())
        homes: list[dict[str, Any]] = [part._parameters for part in parts]  # type: ignore[misc]
        self.mixtures = [(part, _setting(part)) for part in parts if isinstance(part, Mixed)]
        self.parameters = [(home, name, parameter) for home in homes for name, parameter in home.items()]
        homes = [part._buffers for part in parts]  # type: ignore[misc]
        self.buffers = [(home, name, b.clone()) for home in homes for name, b in home.items() if b is not None]

    def __enter__(self) -> None:
        self.settings = [_setting(part) for part, _ in self.mixtures]
        self.tensors = [home[name] for home, name, _ in (*self.parameters, *self.buffers)]
        self._set([setting for _, setting in self.mixtures])
        for home, name, parameter in self.parameters:
            home[name] = parameter
        for home, name, buffer in self.buffers:
            home[name] = buffer.clone()

    def __exit__(self, *error: object) -> None:
        self._set(self.settings)
        for (home, name, _), tensor in zip((*self.parameters, *self.buffers), self.tensors):
            home[name] = tensor

    def _set(self, settings: list[tuple]) -> None:
        for (part, _), setting in zip(self.mixtures, settings):
            part.weights, part.scale, part.selected, part.auxiliary_weight = setting


def _setting(part: Mixed) -> tuple:
    return part.weights, part.scale, part.selected, part.auxiliary_weight
