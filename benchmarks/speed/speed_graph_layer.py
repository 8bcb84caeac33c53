"""Eager cost of GraphLayer and of exported source, forward and backward, against EvoNorm-S0 written by hand.

    python -m benchmarks.speed.speed_graph_layer [--json] [--device cuda] [--rounds 40]

The hand-written layer takes its variance in two passes, which is the faster way on CPUs; the same with torch.var
stands beside it. All candidates take turns inside one round, so that a machine's mood hits them alike; a time is the
fastest fifth's upper bound over the rounds. On CPUs one thread is timed by the processor's clock, which other processes
do not advance.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from search_spaces.layers.graph import LayerGraph, make_node
from search_spaces.layers.module import GraphLayer
from search_spaces.layers.source import to_source

SHAPES = ((64, 8, 16, 16), (64, 32, 8, 8), (32, 64, 32, 32), (8, 256, 14, 14))
EPS = 1e-5


class HandWritten(nn.Module):
    """EvoNorm-S0 of Liu et al. 2020: x sigmoid(v x) / std over space and group, then weight and bias."""

    def __init__(self, channels: int, groups: int, use_var: bool = False):
        super().__init__()
        self.groups, self.use_var = groups, use_var
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.v = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.reshape(x.shape[0], self.groups, -1)
        if self.use_var:
            variance = grouped.var(2, correction=0, keepdim=True)
        else:
            variance = (grouped - grouped.mean(2, keepdim=True)).square().mean(2, keepdim=True)
        std = (variance + EPS).sqrt().expand(-1, -1, x.shape[1] // self.groups).reshape(*x.shape[:2], 1, 1)
        weight, bias, v = (p.view(1, -1, 1, 1) for p in (self.weight, self.bias, self.v))
        return x * torch.sigmoid(v * x) / std * weight + bias


def evonorm_s0() -> LayerGraph:
    """EvoNorm-S0 as a graph; its division needs no guard, the deviation is at least the root of eps."""
    nodes = (
        make_node("mul", (3, 0)),
        make_node("sigmoid", (4,)),
        make_node("mul", (0, 5)),
        make_node("std-group", (0,), eps=EPS),
        make_node("div", (6, 7), eps=0.0),
    )
    return LayerGraph(nodes, 8)


def exported(graph: LayerGraph, channels: int) -> nn.Module:
    """The module that the exported source defines."""
    namespace: dict = {"__name__": "exported"}
    exec(to_source(graph, "EvoNormS0"), namespace)
    return namespace["EvoNormS0"](channels)


def seconds(layer: nn.Module, x: Tensor, repeats: int) -> float:
    """The time of `repeats` forward and backward passes."""
    synchronise: Callable[[], None] = torch.cuda.synchronize if x.is_cuda else (lambda: None)
    clock = time.perf_counter if x.is_cuda else time.process_time
    synchronise()
    begin = clock()
    for _ in range(repeats):
        layer(x).sum().backward()
    synchronise()
    return clock() - begin


def measure(shape: tuple[int, ...], device: str, rounds: int) -> dict[str, float]:
    """Milliseconds of the hand-written layer and every other's ratio to it."""
    graph, channels = evonorm_s0(), shape[1]
    groups = graph.group_count(channels)
    layers = {
        "hand-written": HandWritten(channels, groups),
        "hand-written with torch.var": HandWritten(channels, groups, use_var=True),
        "GraphLayer": GraphLayer(graph, channels),
        "exported source": exported(graph, channels),
    }
    x = torch.randn(shape, device=device, requires_grad=True)
    for layer in layers.values():
        layer.to(device)
        seconds(layer, x, 3)
    repeats = max(1, int(0.02 / seconds(layers["hand-written"], x, 1)))
    times: dict[str, list[float]] = {name: [] for name in layers}
    for index in range(rounds):
        names = list(layers)
        for name in names[index % 4 :] + names[: index % 4]:
            times[name].append(seconds(layers[name], x, repeats) / repeats)
    typical = {name: statistics.quantiles(found, n=5)[0] for name, found in times.items()}
    reference = typical.pop("hand-written")
    return {"hand-written (ms)": reference * 1e3} | {f"{n} (ratio)": t / reference for n, t in typical.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {"x".join(map(str, shape)): measure(shape, arguments.device, arguments.rounds) for shape in SHAPES}
    if arguments.json:
        print(json.dumps(found))
        return
    for shape, figures in found.items():
        print(f"{shape:15s}" + "".join(f"  {name} {value:.3f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
