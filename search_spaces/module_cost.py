"""What a network costs, counted while it runs: for modules that no closed formula is known of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def module_cost(network: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """`params`, `macs`, `live_macs`, `depth`, `paths` of one forward pass.

    example: one input, [1, ...]. Multiply-adds are those of convolution and linear modules; live are those whose
    result depends on the input and reaches the output. depth: such modules on the longest way; paths: the ways of data
    from input to output, each module without parts counted as one step. The network stays as it is.
    """
    layers: dict[Any, int] = {}  # node of the graph of gradients: the multiply-adds of its module
    macs = 0

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        nonlocal macs
        if not isinstance(output, torch.Tensor):
            return output
        count = _macs(module, inputs, output)
        macs += count or 0
        tensors = [value for value in inputs if isinstance(value, torch.Tensor) and value.requires_grad]
        if tensors and output.requires_grad and output is not inputs[0]:
            output = _Step.apply(output.detach(), *tensors)
        if count is not None and output.requires_grad:
            layers[output.grad_fn] = count
        return output

    parts = list(network.modules())
    modes = [part.training for part in parts]
    trained = [(p, p.requires_grad) for p in network.parameters()]
    hooks = [part.register_forward_hook(leave) for part in parts if not any(True for _ in part.children())]
    try:
        network.eval()
        for parameter, _ in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            output = network(example.detach().clone().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, before in trained:
            parameter.requires_grad_(before)
        for part, training in zip(parts, modes):
            part.training = training
    params = sum(p.numel() for p, _ in trained)
    found = {"params": params, "macs": macs, "live_macs": 0, "depth": 0, "paths": 0}
    return found | (_walk(output.grad_fn, layers) if output.requires_grad else {})


class _Step(torch.autograd.Function):
    """One node in place of all that a module computes; it has no derivative."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)


def _macs(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> int | None:
    if isinstance(module, _ConvTransposeNd):
        return inputs[0].numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear | _ConvNd):
        return output.numel() * module.weight[0].numel()
    return None


def _walk(last: Any, layers: dict[Any, int]) -> dict[str, int]:
    """`live_macs`, `depth` and `paths` of the graph of gradients that ends in `last`."""
    depth: dict[Any, int] = {}
    paths: dict[Any, int] = {}
    open_nodes = [last]
    while open_nodes:
        node = open_nodes[-1]
        before = [found for found, _ in node.next_functions if found is not None]
        waiting = [found for found in before if found not in depth]
        if waiting:
            open_nodes += waiting
            continue
        open_nodes.pop()
        depth[node] = max((depth[found] for found in before), default=0) + (node in layers)
        paths[node] = sum(paths[found] for found in before) if before else 1
    live = sum(count for node, count in layers.items() if node in depth)
    return {"live_macs": live, "depth": depth[last], "paths": paths[last]}
