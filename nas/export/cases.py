"""The inputs on which an export is compared with its original."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.common.errors import UserError

SIZES = (1, 3)  # batch sizes (of graphs: see `like`) on which every export is tried
TRAIN_SIZE = 4
VISIBLE = 0.1  # how much of an output's size its dependence on the input should be
NOISE = 1e-3  # a share that may still be rounding or about to grow


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU in float32 and evaluation mode, without gradients; the model itself is left alone."""
    twin = copy.deepcopy(model).cpu().float().eval()
    for parameter in twin.parameters():
        parameter.grad = None
    return twin


def input_names(model: nn.Module, example: Sequence[Tensor]) -> list[str]:
    """The names of the arguments of `forward` that `example` fills. Errors: UserError if there are fewer."""
    names = list(inspect.signature(model.forward).parameters)
    if len(names) < len(example):
        raise UserError(len(example), f"at most {len(names)} inputs in the example, as many as forward takes")
    return names[: len(example)]


def on_graphs(example: Sequence[Tensor]) -> bool:
    """Whether the inputs are node features [nodes, features] and edges [2, edges]."""
    return len(example) == 2 and not example[1].is_floating_point() and example[1].shape[:1] == (2,)


def like(example: Sequence[Tensor], size: int, random: torch.Generator) -> tuple[Tensor, ...]:
    """Normal random inputs with the shapes of `example` but for `size` samples.

    Graphs get `size` + 2 nodes and twice as many edges. Errors: UserError for an example that is neither tensors with
    a batch dimension nor (x, edge_index).
    """
    if on_graphs(example):
        nodes = size + 2
        edges = torch.randint(nodes, (2, 2 * nodes), generator=random)
        return torch.randn(nodes, *example[0].shape[1:], generator=random), edges
    if not all(value.is_floating_point() and value.ndim > 1 for value in example) or not example:
        shapes = [f"{value.dtype} {tuple(value.shape)}" for value in example]
        raise UserError(str(shapes), "an example of tensors with a batch dimension, or (x, edge_index)")
    return tuple(torch.randn(size, *value.shape[1:], generator=random) for value in example)


def make_cases(
    model: nn.Module, example: Sequence[Tensor], *, source: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """(cases, their inputs by `<case>/<input>`) for `isolated.observe`; model: a `plain_copy`.

    Two sizes in evaluation; for source also a training step with its gradients and running statistics, or gradients in
    evaluation where training draws random numbers (dropout). Before training, the outputs of many networks hardly
    depend on their inputs in evaluation, and a comparison would show nothing: inputs are then made larger.
    """
    random = torch.Generator().manual_seed(0)
    names = input_names(model, example)
    factor = _factor(model, like(example, TRAIN_SIZE, random))
    cases: dict[str, dict[str, Any]] = {}
    given: dict[str, Tensor] = {}

    def add(name: str, inputs: Sequence[Tensor], mode: str | None, gradients: bool) -> None:
        cases[name] = {"inputs": names, "mode": mode, "gradients": gradients}
        given.update({f"{name}/{key}": value for key, value in zip(names, inputs, strict=True)})
        if gradients:
            with torch.no_grad():
                given[f"{name}/weights"] = torch.randn(model(*inputs).shape, generator=random)

    for size in SIZES:
        inputs = _scaled(like(example, size, random), factor)
        name = f"{size + 2} nodes" if on_graphs(example) else f"batch of {size}"
        add(name, inputs, "eval" if source else None, False)
    if source:
        inputs = like(example, TRAIN_SIZE, random)
        if _draws(model, inputs):
            add("evaluation", _scaled(inputs, factor), "eval", True)
        else:
            add("training", inputs, "train", True)
    return cases, given


def _scaled(inputs: Sequence[Tensor], factor: float) -> tuple[Tensor, ...]:
    return tuple(value * factor if value.is_floating_point() else value for value in inputs)


def _factor(model: nn.Module, inputs: Sequence[Tensor]) -> float:
    """The power of 16 by which inputs are to be multiplied for the outputs to depend on them visibly."""
    best, best_share = 1.0, 0.0
    for power in range(12):
        with torch.no_grad():
            out = model(*_scaled(inputs, 16.0**power))
        share = float((out - out.mean(0)).abs().max() / out.abs().max().clamp(min=1e-30))
        if not math.isfinite(share) or (best_share > NOISE and share < 1.5 * best_share):
            break  # larger inputs would change no more
        if share > best_share:
            best, best_share = 16.0**power, share
        if share >= VISIBLE:
            break
    return best


def _draws(model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether the model draws random numbers in training."""
    outputs = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for seed in (0, 1):
            torch.manual_seed(seed)
            outputs.append(copy.deepcopy(model).train()(*inputs))
    return not torch.equal(*outputs)
