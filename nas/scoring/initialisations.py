"""Forward-only proxies of one architecture at several seeds, by one forward pass over stacked weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state

from nas.scoring.task import ScoringTask, find_proxy
from search_spaces.common.errors import UserError
from zero_cost.captured import Captured, Codes
from zero_cost.network import first_tensor, weight_names
from zero_cost.scoring import refusal, value_of
from zero_cost.watch import BATCH_NORM_CALLS, DROPOUT_CALLS, Watch, argument, is_relu

NEEDS = frozenset({"params", "weights", "codes", "features", "logits"})


def score_initialisations(
    task: ScoringTask, arch: Any, seeds: Sequence[int], proxies: Iterable[str]
) -> list[tuple[dict[str, float], dict[str, str]]]:
    """Per seed ({proxy: value}, {proxy: reason where it is NaN}), as `task.score` gives them one by one.

    The networks' weights are stacked and `torch.vmap` runs them together, each on the images of its seed: few launches
    on a GPU, about the same time on a CPU. Errors: UserError for a proxy that needs more than one forward pass, or a
    network with dropout.
    """
    chosen = {name: find_proxy(name) for name in proxies}
    for name, proxy in chosen.items():
        if not NEEDS.issuperset(proxy.needs):
            raise UserError(name, "a proxy that reads one forward pass, such as nwot, swap or meco")
    models = [task.model(arch, seed).to(task.device).train() for seed in seeds]
    batches = [[part.to(task.device) for part in task.batch(seed)[0]] for seed in seeds]
    parameters, buffers = stack_module_state(models)
    empty = copy.deepcopy(models[0]).to("meta")
    units: list[int] = []  # per ReLU call, the same for all seeds
    names, few = weight_names(models[0]), min(task.few, len(batches[0][0]))

    def forward(parameters: Any, buffers: Any, inputs: torch.Tensor) -> Any:
        seen = _Seen(few)
        handles = [m.register_forward_hook(seen.leaf) for m in empty.modules() if next(m.children(), None) is None]
        try:
            with Watch(seen):
                logits = first_tensor(functional_call(empty, (parameters, buffers), (inputs,)))
        finally:
            for handle in handles:
                handle.remove()
        units[:] = seen.units
        return logits, seen.agreements, seen.patterns, seen.maps

    with torch.no_grad():
        inputs = torch.stack([batch[0] for batch in batches])
        logits, agreements, patterns, maps = torch.vmap(forward)(parameters, buffers, inputs)
    found = []
    for k, (_, labels) in enumerate(batches):
        captured = Captured()
        captured.params = sum(p.numel() for p in models[k].parameters())
        captured.weights = {name: parameters[name][k].detach() for name in names}
        captured.logits, captured.labels, captured.samples = logits[k], labels, len(labels)
        captured.features, captured.regularisation = [m[k] for m in maps], task.regularisation
        both = [a[k].double() for a in agreements]
        signs = torch.cat([torch.empty(0, dtype=torch.int32, device=inputs.device), *(p[k] for p in patterns)])
        captured.codes = Codes(both, units, [False] * len(both), signs, few)
        reasons = {name: refusal(p, len(labels), labels) for name, p in chosen.items()}
        values = dict.fromkeys(chosen, math.nan)
        for name, p in chosen.items():
            if not reasons[name]:
                values[name], reasons[name] = value_of(p, captured, {})
        found.append((values, {name: why for name, why in reasons.items() if why}))
    return found


class _Seen:
    """Handler of a Watch that notes codes and maps in calls that `vmap` knows."""

    def __init__(self, few: int):
        self.few = few
        self.agreements: list[torch.Tensor] = []
        self.units: list[int] = []
        self.patterns: list[torch.Tensor] = []
        self.maps: list[torch.Tensor] = []

    def __call__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in DROPOUT_CALLS:
            raise UserError("dropout", "a network without it: its masks would not be those of a seed")
        if func in BATCH_NORM_CALLS:  # running statistics cannot be written under vmap
            weight, bias = argument("weight", 3, args, kwargs), argument("bias", 4, args, kwargs)
            return F.batch_norm(args[0], None, None, weight, bias, True, 0.0, argument("eps", 7, args, kwargs, 1e-5))
        if is_relu(func, args, kwargs):
            self._see(argument("input", 0, args, kwargs))
        return func(*args, **kwargs)

    def _see(self, x: torch.Tensor) -> None:
        signs = (x.flatten(1) > 0).float()  # whole numbers below 2^24 are exact
        both = signs @ signs.T
        active = signs.sum(1)
        self.units.append(signs.shape[1])
        self.agreements.append(2 * both + signs.shape[1] - active[:, None] - active[None, :])
        if x.dim() >= 4:
            bits = 2.0 ** torch.arange(min(self.few, 24), device=x.device)
            self.patterns.append((bits @ signs[: len(bits)]).to(torch.int32))

    def leaf(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.dim() >= 3:
            self.maps.append(output[0].flatten(1).clone())
