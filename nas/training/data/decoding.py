"""From image bytes and files to one array: what the kinds of sources have in common."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nas.training.data.cache import Images
from search_spaces.common.errors import UserError

CHUNK = 2048  # images decoded at a time; what is in flight stays small
Chunk = tuple[list[str], list[Any], list[int]]  # names, image bytes or paths (None: missing), labels


@dataclass(frozen=True)
class Part:
    """One part (train, val or test) of a data set on disk. kind: a key of `nas.training.data.sources.READERS`."""

    kind: str
    files: tuple[Path, ...]
    classes: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()  # of image folders, by file


@dataclass(frozen=True)
class Reading:
    """How to read a part. channels: 3 (RGB) or 1 (grey). size: the middle square of every image averaged down to
    [size, size], None keeps images as they are. skip_broken: leave unreadable images out."""

    channels: int = 3
    size: int | None = None
    skip_broken: bool = False


def decode(chunks: Iterator[Chunk], count: int, folder: Path, reading: Reading) -> Images:
    """Decode at most `count` images into `folder/images.npy`, chunk by chunk: memory does not grow with the data.

    Errors: UserError for unreadable images (named and counted), images of several shapes, none at all.
    """
    images: np.ndarray | None = None
    labels: list[int] = []
    broken: list[str] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # Pillow decodes without holding the lock
        for names, contents, chunk_labels in chunks:
            decoded = threads.map(lambda content: _open(content, reading), contents, chunksize=64)
            for name, pixels, label in zip(names, decoded, chunk_labels, strict=True):
                if isinstance(pixels, str):
                    broken.append(f"{name} ({pixels})")
                    continue
                if images is None:
                    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (count, *pixels.shape))
                if pixels.shape != images.shape[1:]:
                    expected = f"images of one shape ({_shape(images[0])}), found {_shape(pixels)}; give a size"
                    raise UserError(name, expected)
                images[len(labels)] = pixels
                labels.append(int(label))
    if broken and not reading.skip_broken:
        named = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        raise UserError(f"{len(broken)} of {count} images", f"images that can be read (or skip_broken): {named}")
    if images is None:
        raise UserError("0 images", "at least one that can be read" + (f"; {len(broken)} cannot" if broken else ""))
    if len(labels) < count:
        kept = np.array(images[: len(labels)])
        (folder / "images.npy").unlink()
        return Images(kept, np.array(labels, np.int64), tuple(broken))
    return Images(images, np.array(labels, np.int64))


def _shape(pixels: np.ndarray) -> str:
    return f"{pixels.shape[-1]}x{pixels.shape[-2]}"


def _open(content: bytes | Path | None, reading: Reading) -> np.ndarray | str:
    """Pixels [C, H, W], or what is wrong with the image."""
    from PIL import Image

    if content is None:
        return "no bytes"
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            plain = image.convert("L" if reading.channels == 1 else "RGB")
    except Exception as error:  # Pillow's decoders raise many kinds
        return str(error).split(": ")[-1][:60] if not isinstance(error, OSError) else "not a complete image"
    return _fit(plain, reading.size)


def convert(images: np.ndarray, reading: Reading) -> np.ndarray:
    """Decoded uint8 images [N, 3, H, W] in the channels and size of `reading`."""
    from PIL import Image

    if reading.size is None and reading.channels == 3:
        return images
    rows = (Image.fromarray(np.ascontiguousarray(row.transpose(1, 2, 0))) for row in images)
    return np.stack([_fit(row.convert("L") if reading.channels == 1 else row, reading.size) for row in rows])


def _fit(image: Any, size: int | None) -> np.ndarray:
    from PIL import Image

    if size is not None:
        width, height = image.size
        side = min(width, height)
        if side < size:
            raise UserError(size, f"a size not above the images' own; one is {width}x{height}")
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
        if side % size == 0:
            image = image.reduce(side // size, box)  # average pooling, rounded once
        else:
            image = image.resize((size, size), Image.Resampling.BOX, box=box)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
