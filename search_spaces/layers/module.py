"""GraphLayer: an nn.Module that runs a LayerGraph, as `search_spaces.layers.evaluate` defines it.

The graph becomes a plan, a short list of tensor functions, when the module is made; `forward` only walks it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.common.errors import UserError
from search_spaces.layers.evaluate import LAYOUTS, finish
from search_spaces.layers.graph import LayerGraph
from search_spaces.layers.ops import PARAMETERS
from search_spaces.layers.plan import Step, buffer_names, make_plan, parameter_names, widened

RANKS = {"channels-first": (2, 3, 4, 5), "tokens": (3,)}
INITIAL = {"mean": 0.0, "std": 1.0, "rms": 1.0, "l1": 1.0}


class GraphLayer(nn.Module):
    """The layer that `graph` describes, for inputs of `channels` channels.

    layout: `channels-first` [B, C, ...] (up to three space dimensions) or `tokens` [B, N, C]. zero_init_gamma: the
    weight begins as zeros (last layer of a residual block). track_running_stats: batch aggregates keep running
    statistics and use them in evaluation; without, they always take those of the batch. synchronize: batch statistics
    are those of all processes when torch.distributed is initialised.

    Parameters of shape [channels], only where the graph uses them: `weight` (ones), `bias` (zeros), `v0` (zeros),
    `v1` (ones), and `alpha`, `beta`, `gamma`, `delta`, `epsilon`, `zeta` (ones). Buffers, one for each live batch
    aggregate: `running_mean`, `running_var` (std), `running_square` (rms), `running_abs` (l1); a second of its kind is
    `running_mean_2`, in the order of the graph. With momentum None also `num_batches_tracked`. State dicts of
    BatchNorm and of timm's EvoNorm layers load.

    Statistics of half precision values are taken in float32 and cast back; the output has the input's dtype. An
    unbiased running variance counts the numbers that the aggregate really sees (with one, it stays biased).
    Errors: UserError for channels below 1, an unknown layout, and an input that does not fit.
    """

    weight: Tensor
    bias: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        graph: LayerGraph,
        channels: int,
        *,
        layout: str = "channels-first",
        zero_init_gamma: bool = False,
        track_running_stats: bool = True,
        synchronize: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if channels < 1:
            raise UserError(channels, "at least one channel")
        if layout not in LAYOUTS:
            raise UserError(layout, f"a layout: {' or '.join(LAYOUTS)}")
        self.graph, self.channels, self.layout = graph, channels, layout
        self.zero_init_gamma, self.track_running_stats = zero_init_gamma, track_running_stats
        self.synchronize = synchronize
        vector = partial(torch.empty, channels, device=device, dtype=dtype)
        for name in parameter_names(graph):
            self.register_parameter(name, nn.Parameter(vector()))
        if track_running_stats:
            for name in buffer_names(graph).values():
                self.register_buffer(name, vector())
            if graph.momentum is None and buffer_names(graph):
                self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))
        self.reset_parameters()
        self._make_plans()

    def reset_parameters(self) -> None:
        """All parameters and running statistics as they begin."""
        for name, parameter in self.named_parameters(recurse=False):
            nn.init.constant_(parameter, _initial(name, self.zero_init_gamma))
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Running means become zeros, the other running moments ones."""
        if not self.track_running_stats:
            return
        for id, name in buffer_names(self.graph).items():
            self.get_buffer(name).fill_(INITIAL[self.graph.node(id).op])
        if "num_batches_tracked" in self._buffers:
            self.get_buffer("num_batches_tracked").zero_()

    def forward(self, x: Tensor) -> Tensor:
        plan = self._plans.get(x.ndim)
        if plan is None or x.shape[plan.channel] != self.channels or not x.is_floating_point():
            raise self._misfit(x)
        values: list[Any] = [None] * plan.slots
        values[0] = x
        for slot, name in plan.vectors:
            values[slot] = getattr(self, name).to(x.dtype).view(plan.shape)
        if plan.zero is not None:
            values[plan.zero] = x.new_zeros((1,) * x.ndim)
        for step in plan.steps:
            if step.buffer:
                values[step.target] = self._batch_value(step, values[step.sources[0]], plan.shape)
            else:
                values[step.target] = step.run(*[values[slot] for slot in step.sources])
        out = values[plan.output]
        if out.shape != x.shape:
            out = out.expand_as(x)
        if self.graph.affine:
            out = out * self.weight.to(x.dtype).view(plan.shape) + self.bias.to(x.dtype).view(plan.shape)
        return out.to(x.dtype)

    def _batch_value(self, step: Step, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.track_running_stats and not self.training:
            running = widened(getattr(self, step.buffer))
            return finish(step.node, running).to(value.dtype).view(shape)
        moment, count = step.run(widened(value))
        if self.track_running_stats:
            self._update(step, moment.detach().flatten(), count)
        return finish(step.node, moment).to(value.dtype)

    def _update(self, step: Step, moment: Tensor, count: Any) -> None:
        running: Tensor = getattr(self, step.buffer)
        if self.graph.unbiased and step.node.op == "std":
            rest = (count - 1).clamp(min=1) if isinstance(count, Tensor) else max(count - 1, 1)
            moment = moment * (count / rest)
        moment = moment.to(running.dtype)
        if self.graph.momentum is None:
            if step.first:
                self.num_batches_tracked.add_(1)
            running += (moment - running) / self.num_batches_tracked
        else:
            running += (moment - running) * self.graph.momentum

    def _misfit(self, x: Tensor) -> UserError:
        shape = str(tuple(x.shape))
        if not x.is_floating_point():
            return UserError(str(x.dtype), "an input of floating-point numbers")
        if self.layout == "tokens":
            return UserError(shape, f"tokens of shape [B, N, {self.channels}]")
        return UserError(shape, f"an input of shape [B, {self.channels}, ...] with at most three space dimensions")

    def _make_plans(self) -> None:
        self._plans = {
            rank: make_plan(self.graph, self.channels, rank, self.layout, self.synchronize)
            for rank in RANKS[self.layout]
        }

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_plans"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._make_plans()

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        if prefix + "v" in state_dict and "v1" in self._parameters:  # timm's name
            state_dict[prefix + "v1"] = state_dict.pop(prefix + "v")
        if "num_batches_tracked" not in self._buffers:  # BatchNorm always has one
            state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        nodes = " ".join(node.name for _, node in self.graph.live_nodes)
        return f"{self.channels}, {nodes}" + (", layout='tokens'" if self.layout == "tokens" else "")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of `model` for an optimiser: weights with `weight_decay`, vectors without.

    Vectors are a layer's weight, bias, v0, v1 and further parameters, and all biases; EvoNorm's authors exclude the
    layer's too.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter.ndim <= 1]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def _initial(name: str, zero_init_gamma: bool) -> float:
    return float(name == "v1" or name in PARAMETERS or (name == "weight" and not zero_init_gamma))
