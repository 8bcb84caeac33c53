"""What the processes of the distributed test do; spawned, so it lives in a module that can be imported by name."""

from __future__ import annotations

import torch
import torch.distributed
from torch import nn

from search_spaces.layers.catalog import layer
from search_spaces.layers.module import GraphLayer

SIZES = (3, 5)  # samples of each process
STEPS = 2


def network() -> nn.Sequential:
    """Convolutions with EvoNorm-B0 and BatchNorm-ReLU; the same weights at every call."""
    torch.manual_seed(0)
    first, second = GraphLayer(layer("evonorm-b0", "timm"), 6), GraphLayer(layer("bn-relu"), 6)
    return nn.Sequential(nn.Conv2d(2, 6, 3), first, nn.Conv2d(6, 6, 3), second).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, whose mean differs between the processes' shares, and weights of the outputs."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(sum(SIZES), 2, 7, 7, generator=random, dtype=torch.double)
    x[SIZES[0] :] = x[SIZES[0] :] * 2 + 1
    return x, torch.randn(sum(SIZES), 6, 3, 3, generator=random, dtype=torch.double)


def train(model: nn.Module, x: torch.Tensor, weights: torch.Tensor, scale: float) -> dict[str, torch.Tensor]:
    """Two steps; outputs, gradients, input gradient and state after them."""
    x = x.clone().requires_grad_()
    for _ in range(STEPS):
        model.zero_grad()
        x.grad = None
        out = model(x)
        (out * weights).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-3 * scale * parameter.grad
    found = {"out": out.detach(), "input gradient": x.grad}
    for name, parameter in model.named_parameters():
        found["gradient " + name.removeprefix("module.")] = parameter.grad * scale
    return found | {name.removeprefix("module."): value for name, value in model.state_dict().items()}


def process(rank: int, folder: str) -> None:
    """One of the processes: its share of the data, under DistributedDataParallel."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(SIZES))
    x, weights = data()
    begin = sum(SIZES[:rank])
    share = slice(begin, begin + SIZES[rank])
    model = nn.parallel.DistributedDataParallel(network())
    # DistributedDataParallel averages gradients over processes; one process with the whole batch sums them.
    torch.save(train(model, x[share], weights[share], float(len(SIZES))), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
