"""Decoded images on disk: written once under `$NASFORGE_HOME/cache/data`, memory-mapped ever after."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from search_spaces.common.errors import RunError, UserError
from search_spaces.common.files import home, locked

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Images:
    """Decoded images of one part: images [N, C, H, W] (uint8, or float as the user gave them), labels int64 [N].

    broken: what could not be read and was left out, by name. mean, std: per channel, of images scaled to [0, 1].
    """

    images: np.ndarray
    labels: np.ndarray
    broken: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def file_stamps(files: list[Path]) -> list[tuple[str, int, int]]:
    """(absolute path, size, time of change) of files: a cache entry is good as long as they are the same."""
    stamps = []
    for file in files:
        about = file.stat()
        stamps.append((str(file.absolute()), about.st_size, about.st_mtime_ns))
    return stamps


def cached(name: str, key: Mapping[str, Any], make: Callable[[Path], Images]) -> Images:
    """The images that `key` identifies, decoded by `make(folder)` if they are not in the cache yet.

    `make` may leave a memory-mapped array in the folder, which is where it would be saved. A damaged entry is made
    again; processes that ask at once wait for the first. Errors: UserError or RunError if it cannot be written.
    """
    digest = hashlib.sha256(json.dumps({"format": FORMAT, **key}, sort_keys=True).encode()).hexdigest()[:20]
    entry = home() / "cache" / "data" / f"{name}-{digest}"
    found = _read(entry)
    if found is not None:
        return found
    try:
        with locked(entry.with_name(entry.name + ".lock")):
            found = _read(entry)  # another process may have made it meanwhile
            if found is None:
                _write(entry, make)
                found = _read(entry)
    except OSError as error:
        raise RunError(f"the cache {entry.parent} could not be written: {error.strerror or error}") from error
    if found is None:
        raise RunError(f"the cache {entry} cannot be read back")
    return found


def _write(entry: Path, make: Callable[[Path], Images]) -> None:
    temporary = entry.with_name(f".{entry.name}.making")  # under the entry's lock: what is there is a dead process's
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        made = make(temporary)
        if not (temporary / "images.npy").exists():
            np.save(temporary / "images.npy", made.images)
        np.save(temporary / "labels.npy", made.labels)
        mean, std = channel_moments(made.images)
        about = {"broken": made.broken, "mean": mean, "std": std, "shape": made.images.shape}
        (temporary / "about.json").write_text(json.dumps(about))
        shutil.rmtree(entry, ignore_errors=True)
        os.replace(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read(entry: Path) -> Images | None:
    try:
        about = json.loads((entry / "about.json").read_text())
        images = np.load(entry / "images.npy", mmap_mode="r")
        labels = np.load(entry / "labels.npy")
        if list(images.shape) != about["shape"] or len(labels) != len(images):
            return None
        return Images(images, labels, tuple(about["broken"]), tuple(about["mean"]), tuple(about["std"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def channel_moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel; uint8 images are scaled to [0, 1] first.

    Errors: UserError for a channel that is the same number everywhere.
    """
    means, deviations = [], []
    for channel in range(images.shape[1]):
        if images.dtype == np.uint8:
            counts = np.zeros(256)  # exact, and small next to a copy of everything in floating point
            for start in range(0, len(images), 4096):
                counts += np.bincount(images[start : start + 4096, channel].reshape(-1), minlength=256)
            levels, weights = np.arange(256) / 255, counts / counts.sum()
            mean = float(levels @ weights)
            std = float(np.sqrt((levels - mean) ** 2 @ weights))
        else:
            values = images[:, channel].astype(np.float64)
            mean, std = float(values.mean()), float(values.std())
        if std == 0:
            raise UserError(f"channel {channel}", f"images that differ; this channel is {mean:g} everywhere")
        means.append(mean)
        deviations.append(std)
    return tuple(means), tuple(deviations)
