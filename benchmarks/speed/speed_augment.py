"""Crop and flip of ours against kornia's, the library's policies, and the cache against decoding in every epoch.

    python -m benchmarks.speed.speed_augment [--json] [--data ../shared/data/cifar10] [--images 10000]

On one core. Batches are [256, 3, 32, 32]; medians of several repeats, ours and kornia's in turn. kornia's crop and flip
run per batch with one draw for each image, as a training loop would call them. The data part reads CIFAR-10's Parquet
files: decoding takes the first `--images` of the training part.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nas.training.augment import CropFlip, CutMix, Cutout, Mixup
from nas.training.data import load_data
from nas.training.draws import Draws
from nas.training.policies import POLICIES, policy

BATCH = 256


def in_turn(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each action, all of them once per repeat."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 2):
        for name, action in actions.items():
            begin = time.perf_counter()
            action()
            if repeat >= 2:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in times.items()}


def augmentations() -> dict[str, float]:
    """Images per second."""
    from kornia.augmentation import AugmentationSequential, RandomCrop, RandomHorizontalFlip

    raw = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8)
    images, targets = raw / 255, torch.eye(10)[torch.arange(BATCH) % 10]
    draws = Draws(0, 0, np.arange(BATCH))
    crops = {
        mode: AugmentationSequential(
            RandomCrop((32, 32), padding=4, cropping_mode=mode), RandomHorizontalFlip(), data_keys=["input"]
        )
        for mode in ("slice", "resample")
    }
    quick = {
        "crop and flip, uint8": lambda: CropFlip()(raw, draws),
        "crop and flip, float32": lambda: CropFlip()(images, draws),
        "crop and flip, float32, kornia (slice)": lambda: crops["slice"](images),
        "crop and flip, float32, kornia (resample)": lambda: crops["resample"](images),
        "cutout": lambda: Cutout()(images, draws),
        "mixup": lambda: Mixup()(images, targets, draws),
        "cutmix": lambda: CutMix()(images, targets, draws),
    }
    policies = {f"{name}, per image": policy(name) for name in POLICIES}
    slow = {name: (lambda found=found: found(raw, draws)) for name, found in policies.items()}  # type: ignore[misc]
    seconds = {**in_turn(quick, 30), **in_turn(slow, 5)}
    return {name: BATCH / s for name, s in seconds.items()}


def data(folder: Path, count: int) -> dict[str, float]:
    """Seconds: of a first load (which fills the cache), of later ones, and of decoding `count` images as one would in
    every epoch without a cache, against reading as many from the loaded tensors."""
    import pyarrow.parquet
    from PIL import Image

    with tempfile.TemporaryDirectory() as home:
        os.environ["NASFORGE_HOME"] = home
        begin = time.perf_counter()
        load_data("cifar10", root=folder)
        first = time.perf_counter() - begin
        begin = time.perf_counter()
        found = load_data("cifar10", root=folder)
        later = time.perf_counter() - begin
    table = pyarrow.parquet.ParquetFile(folder / "train.parquet")
    entries = next(table.iter_batches(count)).column("image").to_pylist()
    rows = torch.randperm(len(found.train))[: len(entries)].split(BATCH)

    def decode() -> None:
        for entry in entries:
            np.asarray(Image.open(io.BytesIO(entry["bytes"])).convert("RGB"))

    def take() -> None:
        for some in rows:
            found.train.images[some]

    seconds = in_turn({"decoding": decode, "tensors": take}, 3)
    return {
        "first load of CIFAR-10 (s)": first,
        "later loads (s)": later,
        "an epoch by decoding, 50,000 images (s)": seconds["decoding"] * 50_000 / len(entries),
        "an epoch from tensors, 50,000 images (s)": seconds["tensors"] * 50_000 / len(entries),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("--images", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    speeds = augmentations()
    loads = data(options.data, options.images) if options.data.is_dir() else {}
    if options.json:
        print(json.dumps({"command": "speed_augment", "images_per_second": speeds, "seconds": loads}))
        return
    for name, value in speeds.items():
        print(f"{name:45s}{value:12,.0f} images/s")
    for name, value in loads.items():
        print(f"{name:45s}{value:12.2f}")


if __name__ == "__main__":
    main()
