"""What `kernels.fuse` costs where no kernel can run: a training step of fused models against the same unfused.

    python -m benchmarks.speed.speed_fused_cpu [--json] [--rounds 30]

Both take turns; a ratio of 1 is no cost. One thread, timed by the processor's clock (see `kernels.timing`). A second
copy of the unfused model takes part as well: its ratio is the noise.
"""

from __future__ import annotations

import argparse
import copy
import json

import torch
from torch import Tensor, nn

import kernels
from kernels.timing import compare
from search_spaces.layers import catalog
from search_spaces.layers.module import GraphLayer

CASES = {  # channels, side, batch
    "small": (8, 8, 4),
    "middle": (16, 16, 16),
    "large": (32, 32, 16),
}


def models(channels: int) -> dict[str, nn.Module]:
    """Convolutions with what `fuse` replaces between them."""

    def network(*layers: nn.Module) -> nn.Module:
        parts = (part for layer in layers for part in (nn.Conv2d(channels, channels, 3, padding=1), layer))
        return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), *parts)

    def graph(name: str) -> nn.Module:
        return GraphLayer(catalog.layer(name), channels)

    return {
        "evonorm-s0": network(graph("evonorm-s0"), graph("evonorm-s0")),
        "evonorm-b0": network(graph("evonorm-b0"), graph("evonorm-b0")),
        "batch norm, relu": network(
            nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()), nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        ),
        "layers alone": nn.Sequential(nn.Conv2d(3, channels, 1), *(graph("silu") for _ in range(8))),
    }


def step(model: nn.Module, x: Tensor):
    """Forward and backward."""
    return lambda: model(x).square().mean().backward()


def measure(rounds: int) -> list[dict[str, object]]:
    """Ratios of every model on every size."""
    found: list[dict[str, object]] = []
    for size, (channels, side, batch) in CASES.items():
        x = torch.randn(batch, 3, side, side)
        for name, model in models(channels).items():
            fused = kernels.fuse(model)
            assert fused.count
            runs = {"plain": model, "again": copy.deepcopy(model), "fused": fused.model}
            seconds = compare({k: step(m, x) for k, m in runs.items()}, torch.device("cpu"), rounds)
            ratios = {k: seconds[k] / seconds["plain"] for k in ("fused", "again")}
            found.append({"model": name, "size": size, "plain_ms": 1e3 * seconds["plain"], **ratios})
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = measure(arguments.rounds)
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"{'model':18s}{'size':8s}{'plain (ms)':>11s}{'fused':>8s}{'noise':>8s}")
    for row in found:
        print("{model:18s}{size:8s}{plain_ms:11.3f}{fused:8.3f}{again:8.3f}".format(**row))


if __name__ == "__main__":
    main()
