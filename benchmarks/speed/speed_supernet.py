"""A step of darts-v1 and of pc-darts (alphas, then weights) against the published algorithm written out here.

    python -m benchmarks.speed.speed_supernet [--json] [--cases small,full,darts] [--repeats 7] [--saved-batch 8]

Written out as the published code has it: every candidate runs, outputs times mixing weights are summed (`none` is the
input times 0), normalisations of candidates have no weights, backward of the alphas' loss goes through everything,
gradients of the weights are clipped; PC-DARTS sends the first of k groups of channels through the candidates, pools
the rest where these halve the size, shuffles, and scales edges by a softmax. Both get the same weights, and outputs and
the alphas' gradients are compared before anything is timed. Cases, at batch 64:

    small   nas-bench-201, 8 channels, a cell a stage, 16x16
    full    nas-bench-201, 16 channels, five cells a stage, 32x32
    darts   the space darts, 8 channels, three cells, 16x16

Steps are taken in turn in one process on one thread, in seconds of the processor (--blocks-of steps at a time); a ratio
is that of the medians. Then: bytes that are kept for backward (saved-tensor hooks; parameters not counted) by pc-darts
and darts-v1 in the space darts at full width and depth and the same batch, over 20 steps, and the times of their steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.supernet.building import make_supernet
from nas.supernet.recipe import Recipe
from nas.supernet.recipes import recipe
from nas.supernet.state import SearchState, start
from nas.supernet.steps import run_epoch
from nas.training.data import Dataset, Split
from search_spaces.registry import load_space

# name: space, side of the images, channels, cells a stage or layers
CASES = {
    "small": ("nas-bench-201", 16, 8, 1),
    "full": ("nas-bench-201", 32, 16, 5),
    "darts": ("darts", 16, 8, 3),
}
RECIPES = ("darts-v1", "pc-darts")
BATCH, CLASSES = 64, 10
BAR, WISH = 1.0, 1.3  # theirs / ours: never slower; where batching allows
SAVED_BAR, STEP_AIM = 0.45, 0.55
TOLERANCE = 1e-9


# -- the published algorithm ---------------------------------------------------------------------------------------


def bn(channels: int, affine: bool = False) -> nn.Module:
    return nn.BatchNorm2d(channels, affine=affine)


def relu_conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, affine: bool = False) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, bn(outputs, affine))


def depthwise(channels: int, kernel: int, stride: int, dilation: int) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    wide = nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False)
    return [nn.ReLU(), wide, nn.Conv2d(channels, channels, 1, bias=False), bn(channels)]


class Zero(nn.Module):
    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x.mul(0.0) if self.stride == 1 else x[:, :, :: self.stride, :: self.stride].mul(0.0)


class FactorizedReduce(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs // 2, 1, 2, bias=False)
        self.second = nn.Conv2d(inputs, outputs - outputs // 2, 1, 2, bias=False)
        self.norm = bn(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return self.norm(torch.cat([self.first(x), self.second(x[:, :, 1:, 1:])], 1))


def operations(space: str, channels: int, stride: int) -> list[nn.Module]:
    average = nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    if space == "nas-bench-201":
        ones, threes = relu_conv_bn(channels, channels, 1), relu_conv_bn(channels, channels, 3)
        return [Zero(1), nn.Identity(), ones, threes, average]
    skip = nn.Identity() if stride == 1 else FactorizedReduce(channels, channels)
    found = [
        Zero(stride),
        nn.Sequential(nn.MaxPool2d(3, stride, 1), bn(channels)),
        nn.Sequential(average, bn(channels)),
        skip,
    ]
    for kernel in (3, 5):
        first, second = depthwise(channels, kernel, stride, 1), depthwise(channels, kernel, 1, 1)
        found.append(nn.Sequential(*first, *second))
    return found + [nn.Sequential(*depthwise(channels, kernel, stride, 2)) for kernel in (3, 5)]


class MixedOperation(nn.Module):
    def __init__(self, space: str, channels: int, stride: int, k: int):
        super().__init__()
        self.k, self.pool = k, nn.MaxPool2d(2, 2)
        self.operations = nn.ModuleList(operations(space, channels // k, stride))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        if self.k == 1:
            return sum(w * op(x) for w, op in zip(weights, self.operations))  # type: ignore[return-value]
        seen = x.shape[1] // self.k
        first, rest = x[:, :seen], x[:, seen:]
        mixed = sum(w * op(first) for w, op in zip(weights, self.operations))
        if mixed.shape[2] != x.shape[2]:  # type: ignore[union-attr]
            rest = self.pool(rest)
        joined = torch.cat([mixed, rest], 1)  # type: ignore[list-item]
        n, c, h, w = joined.shape
        return joined.view(n, self.k, c // self.k, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class Cell(nn.Module):
    """A cell of either space: the nodes' sums, edge by edge; weights [edges, operations], scales [edges] or None."""

    def __init__(self, space: str, inputs: tuple[int, ...], channels: int, reduction: bool, after: bool, k: int):
        super().__init__()
        self.darts = space == "darts"
        self.first = 2 if self.darts else 1
        if self.darts:
            self.before = FactorizedReduce(inputs[0], channels) if after else relu_conv_bn(inputs[0], channels, 1)
            self.last = relu_conv_bn(inputs[1], channels, 1)
        pairs = [(i, j) for j in range(self.first, self.first + (4 if self.darts else 3)) for i in range(j)]
        self.edges = nn.ModuleList(
            MixedOperation(space, channels, 2 if reduction and i < 2 else 1, k) for i, _ in pairs
        )

    def forward(self, states: Sequence[Tensor], weights: Tensor, scales: Tensor | None) -> Tensor:
        nodes = [self.before(states[0]), self.last(states[1])] if self.darts else list(states)
        place = 0
        while place < len(self.edges):
            outputs = []
            for x in list(nodes):
                y = self.edges[place](x, weights[place])
                outputs.append(y if scales is None else scales[place] * y)
                place += 1
            nodes.append(sum(outputs))  # type: ignore[arg-type]
        return torch.cat(nodes[2:], 1) if self.darts else nodes[-1]


class Residual(nn.Module):
    """The block between the stages of NAS-Bench-201."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.a = relu_conv_bn(inputs, outputs, 3, 2, affine=True)
        self.b = relu_conv_bn(outputs, outputs, 3, affine=True)
        self.down = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(inputs, outputs, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x) + self.b(self.a(x))


class Network(nn.Module):
    """The network of a search with its alphas: a table for each kind of cell, and betas for PC-DARTS (k > 1)."""

    def __init__(self, space: str, channels: int, depth: int, k: int):
        super().__init__()
        self.darts, self.k = space == "darts", k
        width = 3 * channels if self.darts else channels
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), bn(width, True))
        self.cells = nn.ModuleList()
        if self.darts:
            inputs, after = (width, width), False
            for layer in range(depth):
                reduction = layer in (depth // 3, 2 * depth // 3)
                channels *= 1 + reduction
                self.cells.append(Cell(space, inputs, channels, reduction, after, k))
                inputs, after = (inputs[1], 4 * channels), reduction
            self.reductions = {depth // 3, 2 * depth // 3}
            width, self.head = inputs[1], nn.Sequential()
        else:
            for stage in range(3):
                if stage:
                    self.cells.append(Residual(channels, 2 * channels))
                    channels *= 2
                self.cells += [Cell(space, (), channels, False, False, k) for _ in range(depth)]
            self.reductions, width, self.head = set(), channels, nn.Sequential(bn(channels, True), nn.ReLU())
        self.classifier = nn.Linear(width, CLASSES)
        kinds, edges, count = (2, 14, 8) if self.darts else (1, 6, 5)
        self.alphas = [nn.Parameter(1e-3 * torch.randn(edges, count)) for _ in range(kinds)]
        self.betas = [nn.Parameter(1e-3 * torch.randn(edges)) for _ in range(kinds)] if k > 1 else []
        self.fans = (2, 3, 4, 5) if self.darts else (1, 2, 3)
        # Lists are no modules: alphas and betas are no parameters of the network.

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        states = [x, x]
        for index, cell in enumerate(self.cells):
            if isinstance(cell, Residual):
                states = [states[1], cell(states[1])]
                continue
            kind = int(index in self.reductions)
            weights, scales = self.alphas[kind].softmax(-1), None
            if self.betas:
                scales = torch.cat([part.softmax(-1) for part in self.betas[kind].split(self.fans)])
            states = [states[1], cell(states if self.darts else states[1:], weights, scales)]
        return self.classifier(F.adaptive_avg_pool2d(self.head(states[1]), 1).flatten(1))


class Published:
    """The published loop on the batches of a search."""

    def __init__(self, network: Network, found: Recipe, batches: SearchState):
        training = found.training
        self.network, self.batches, self.step = network, batches, 0
        self.optimizer = torch.optim.SGD(
            network.parameters(), training.learning_rate, momentum=0.9, weight_decay=training.weight_decay
        )
        self.architect = torch.optim.Adam(
            [*network.alphas, *network.betas], found.alpha_rate, (0.5, 0.999), weight_decay=found.alpha_decay
        )

    def __call__(self, steps: int) -> None:
        self.network.train()
        for _ in range(steps):
            held_out = self.batches.alpha_batches.batch(self.step)
            self.architect.zero_grad()
            F.cross_entropy(self.network(held_out.images), held_out.labels).backward()
            self.architect.step()
            batch = self.batches.batches.batch(self.step)
            self.optimizer.zero_grad()
            outputs = self.network(batch.images)
            loss = F.cross_entropy(outputs, batch.labels)
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
            self.optimizer.step()
            (outputs.argmax(1) == batch.labels).float().mean().item(), loss.item()
            self.step += 1


# -- ours ----------------------------------------------------------------------------------------------------------


def noise(side: int, batch: int) -> Dataset:
    """Random images, 64 batches for the weights and as many for the alphas."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(256, size=(64 * batch, 3, side, side), dtype=np.uint8))
    part = Split(pixels, torch.arange(64 * batch) % CLASSES)
    return Dataset("noise", part, part, part, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3)


def search(name: str, space: str, side: int, channels: int, depth: int, batch: int) -> tuple[SearchState, Recipe]:
    """A search with `name`'s recipe, alphas moving from the first step."""
    changes = {"channels": channels, "layers": depth, "cells_per_stage": depth, "batch_size": batch}
    found = recipe(name).replaced({**changes, "alpha_warmup_epochs": 0})
    data = noise(side, batch)
    return start(make_supernet(load_space(space), found, data, seed=0), data, found, seed=0), found


def steps_of(state: SearchState, found: Recipe) -> Callable[[int], None]:
    """So many more steps of a search."""

    def advance(count: int) -> None:
        last = state.step + count
        while state.step < last and not state.failed:
            run_epoch(state, found, stop=last)

    return advance


def published(state: SearchState, found: Recipe, space: str, channels: int, depth: int) -> Published:
    """The network written out with the weights, alphas and betas of the search."""
    network = Network(space, channels, depth, found.partial)
    supernet = state.supernet
    with torch.no_grad():
        for theirs, ours in zip(network.parameters(), supernet.network.parameters(), strict=True):
            assert theirs.shape == ours.shape
            theirs.copy_(ours)
        kinds = ("normal_", "reduce_") if space == "darts" else ("edge_",)
        for kind, prefix in enumerate(kinds):
            labels = edges(supernet.labels, prefix)
            network.alphas[kind].copy_(torch.stack([supernet.alphas[label] for label in labels]))
            if network.betas:
                nodes = sorted((node for node in supernet.betas if node.startswith(prefix)), key=_numbers)
                network.betas[kind].copy_(torch.cat([supernet.betas[node] for node in nodes]))
    return Published(network, found, state)


def edges(labels: Sequence[str], prefix: str) -> list[str]:
    """The labels of a kind of cell, node by node."""
    return sorted((label for label in labels if label.startswith(prefix)), key=_numbers)


def _numbers(label: str) -> tuple[int, ...]:
    return tuple(int(part) for part in reversed(label.split("_")[1:]))


def difference(state: SearchState, theirs: Network, space: str) -> dict[str, float]:
    """The largest differences of outputs and of alphas' and betas' gradients, in shares of the largest entry.

    In double precision: in single, rounding reaches some thousandths of the gradients through fifteen cells.
    """
    batch, supernet = state.alpha_batches.batch(0), state.supernet
    images, tables = batch.images.double(), [*theirs.alphas, *theirs.betas]
    supernet.double().train()
    theirs.double().train()
    for table in tables:
        table.data = table.data.double()
    ours_out, their_out = supernet(images), theirs(images)
    labels = [label for prefix in ("normal_", "reduce_", "edge_") for label in edges(supernet.labels, prefix)]
    nodes = [
        n
        for prefix in ("normal_", "reduce_", "edge_")
        for n in sorted(supernet.betas, key=_numbers)
        if n.startswith(prefix)
    ]
    own = [*(supernet.alphas[label] for label in labels), *(supernet.betas[node] for node in nodes)]
    slopes = torch.autograd.grad(F.cross_entropy(ours_out, batch.labels), own)
    others = torch.autograd.grad(F.cross_entropy(their_out, batch.labels), tables)
    supernet.float()
    theirs.float()
    for table in tables:
        table.data = table.data.float()
    kinds = len(theirs.alphas)
    pairs = {
        "outputs": (ours_out, their_out),
        "alphas": (torch.stack(slopes[: len(labels)]), torch.cat(others[:kinds])),
    }
    if nodes:
        pairs["betas"] = (torch.cat(slopes[len(labels) :]), torch.cat(others[kinds:]))
    return {name: float((a - b).detach().abs().max() / b.detach().abs().max()) for name, (a, b) in pairs.items()}


# -- measurements --------------------------------------------------------------------------------------------------


def in_turn(actions: dict[str, Callable[[int], None]], steps: int, repeats: int) -> dict[str, float]:
    """The median seconds of the processor that a step of each takes, after a block of each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            begin = time.process_time()
            action(steps)
            if repeat:
                times[name].append((time.process_time() - begin) / steps)
    return {name: statistics.median(found) for name, found in times.items()}


@contextmanager
def saved_bytes(parameters: Sequence[Tensor], found: list[int]) -> Iterator[None]:
    """Appends the bytes of all storages that are kept for backward inside the block, each once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield
    found.append(sum(seen.values()))


def memory(batch: int, steps: int = 20) -> dict[str, Any]:
    """Bytes kept for the backward pass of the weights' loss, and seconds of a whole step, in the space darts."""
    kept: dict[str, list[int]] = {name: [] for name in RECIPES}
    blocks, states = {}, {}
    for name in RECIPES:
        states[name], found = search(name, "darts", 32, 16, 8, batch)
        blocks[name] = steps_of(states[name], found)
    seconds: dict[str, list[float]] = {name: [] for name in RECIPES}
    for step in range(steps):
        for name, block in blocks.items():
            state = states[name]
            inputs = state.batches.batch(step)
            with saved_bytes(list(state.supernet.parameters()), kept[name]):
                loss = F.cross_entropy(state.supernet(inputs.images), inputs.labels)
            del loss
            begin = time.process_time()
            block(1)
            seconds[name].append(time.process_time() - begin)
    saved = {name: statistics.mean(found) for name, found in kept.items()}
    times = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "batch": batch,
        "steps": steps,
        "saved_bytes": saved,
        "step_seconds": times,
        "saved_ratio": saved["pc-darts"] / saved["darts-v1"],
        "step_ratio": times["pc-darts"] / times["darts-v1"],
    }


def compare(case: str, steps: int, repeats: int) -> dict[str, Any]:
    """Differences, seconds of a step and the ratio theirs / ours for both recipes of a case."""
    space, side, channels, depth = CASES[case]
    found: dict[str, Any] = {}
    for name in RECIPES:
        state, of = search(name, space, side, channels, depth, BATCH)
        theirs = published(state, of, space, channels, depth)
        apart = difference(state, theirs.network, space)
        if max(apart.values()) > TOLERANCE:
            raise SystemExit(f"{case} {name}: not the same function: {apart}")
        seconds = in_turn({"ours": steps_of(state, of), "published": theirs}, steps, repeats)
        found[name] = {"difference": apart, "seconds": seconds, "ratio": seconds["published"] / seconds["ours"]}
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cases", default="small,full,darts")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--blocks-of", type=int, default=2)
    parser.add_argument("--saved-batch", type=int, default=8, help="0: leave the memory out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = {case: compare(case, options.blocks_of, options.repeats) for case in options.cases.split(",") if case}
    kept = memory(options.saved_batch) if options.saved_batch else None
    if options.json:
        print(json.dumps({"command": "speed_supernet", "cases": cases, "memory": kept}))
        return
    print(f"seconds of a step at batch {BATCH}, medians of {options.repeats} blocks of {options.blocks_of} in turn")
    for case, rows in cases.items():
        for name, row in rows.items():
            seconds = row["seconds"]
            line = f"{case:6s} {name:9s} ours {seconds['ours']:8.4f}  published {seconds['published']:8.4f}"
            verdict = "aim reached" if row["ratio"] >= WISH else "not slower" if row["ratio"] >= BAR else "slower"
            print(f"{line}  ratio {row['ratio']:5.2f} (bar {BAR}, aim {WISH}: {verdict})")
    if kept is not None:
        print(f"pc-darts / darts-v1, space darts, batch {kept['batch']}, {kept['steps']} steps:")
        print(f"  bytes kept for backward {kept['saved_ratio']:.3f} (bar {SAVED_BAR})")
        print(f"  seconds of a step       {kept['step_ratio']:.3f} (aim {STEP_AIM})")


if __name__ == "__main__":
    main()
