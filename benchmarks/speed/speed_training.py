"""Images per second of the training loop against a bare PyTorch loop with the same model and augmentation.

    python -m benchmarks.speed.speed_training [--json] [--data ../shared/data/cifar10] [--steps 30] [--device cpu]

The bare loop is what a person writes first: a shuffled permutation, crop and flip of the batch, normalisation, forward,
cross-entropy, backward, SGD, the loss as a number for the log. Both train the same network on the same images in
turn, a block of steps each, on one thread; the ratio is that of the medians. Where the loop's time goes is printed
from torch's profiler with --profile. Random images stand in where there is no CIFAR-10.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nas.training.data import Dataset, Split, load_data
from nas.training.loop import advance, start
from nas.training.recipe import Recipe
from search_spaces.registry import load_space

ARCH = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"
BATCH, BLOCKS = 128, 7
RECIPE = Recipe(
    steps=10**6, batch_size=BATCH, padding=4, flip=True, nesterov=True, decay="all", schedule="constant", warmup_steps=0
)


def images(folder: Path) -> Dataset:
    """CIFAR-10, or noise of its shape."""
    if folder.is_dir():
        return load_data("cifar10", root=folder)
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(256, size=(10_000, 3, 32, 32), dtype=np.uint8))
    part = Split(pixels, torch.arange(10_000) % 10)
    moments = (0.5,) * 3
    return Dataset("noise", part, part, part, tuple("0123456789"), moments, moments)


def network() -> nn.Module:
    """A NAS-Bench-201 network at a scale for one core."""
    torch.manual_seed(0)
    return load_space("nas-bench-201").build(load_space("nas-bench-201").decode(ARCH), channels=8, cells_per_stage=1)


def ours(data: Dataset, steps: int, device: str) -> Callable[[], object]:
    """A block of steps of the toolkit's loop."""
    state = start(network().to(device), data, RECIPE, seed=0)
    return lambda: advance(state, RECIPE, steps=state.step + steps)


def bare(data: Dataset, steps: int, device: str) -> Callable[[], object]:
    """The same block written out."""
    model = network().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    mean = torch.tensor(data.mean, device=device).view(-1, 1, 1) * 255
    std = torch.tensor(data.std, device=device).view(-1, 1, 1) * 255
    order, position = torch.randperm(len(data.train)), 0

    def crop_flip(batch: Tensor) -> Tensor:
        count, height, width = len(batch), *batch.shape[2:]
        y, x = torch.randint(9, (2, count))
        windows = nn.functional.pad(batch, [4] * 4).unfold(2, height, 1).unfold(3, width, 1)
        batch = windows[torch.arange(count), :, y, x]
        return torch.where((torch.rand(count) < 0.5).view(-1, 1, 1, 1).to(batch.device), batch.flip(3), batch)

    def block() -> None:
        nonlocal order, position
        model.train()
        for _ in range(steps):
            if position + BATCH > len(order):
                order, position = torch.randperm(len(data.train)), 0
            rows = order[position : position + BATCH]
            position += BATCH
            batch = (crop_flip(data.train.images[rows]).float() - mean) / std
            loss = nn.functional.cross_entropy(model(batch), data.train.labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            loss.item()

    return block


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = images(options.data).to(options.device)
    blocks = {name: make(data, options.steps, options.device) for name, make in (("ours", ours), ("bare", bare))}
    times: dict[str, list[float]] = {name: [] for name in blocks}
    for repeat in range(BLOCKS + 1):
        for name, block in blocks.items():
            begin = time.perf_counter()
            block()
            if repeat:
                times[name].append(time.perf_counter() - begin)
    speed = {name: BATCH * options.steps / statistics.median(found) for name, found in times.items()}
    ratio = speed["ours"] / speed["bare"]
    if options.json:
        print(json.dumps({"command": "speed_training", "images_per_second": speed, "ratio": ratio}))
    else:
        for name, value in speed.items():
            print(f"{name:6s}{value:12,.0f} images/s")
        print(f"ratio {ratio:.3f} ({BLOCKS} blocks of {options.steps} steps each, in turn)")
    if options.profile:
        with torch.profiler.profile() as profiler:
            blocks["ours"]()
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=60))


if __name__ == "__main__":
    main()
