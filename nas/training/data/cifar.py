"""CIFAR-10 and CIFAR-100 as their authors publish them, for Python and as binary files.

Layouts after the description at cs.toronto.edu/~kriz/cifar.html (Krizhevsky 2009): an image is 3072 bytes, the planes
red, green and blue of 32x32 pixels. CIFAR-100 is read with its 100 fine labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nas.training.data.cache import Images
from nas.training.data.decoding import Part, Reading, convert
from search_spaces.common.errors import UserError
from search_spaces.common.pickles import load_pickle

CLASSES = {"cifar10": 10, "cifar100": 100}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """One of the four publications of the data set `data`.

    Python: `labels` and `names` are keys of the pickled dictionaries in the batches and in `meta`. Binary: a row
    begins with `label_bytes`, of which the last is the label, and `meta` is a list of names.
    """

    data: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str = ""
    names: str = ""
    label_bytes: int = 0


BATCHES = tuple(f"data_batch_{k}" for k in range(1, 6))
LAYOUTS = {
    "cifar-10-batches-py": Layout("cifar10", BATCHES, "test_batch", "batches.meta", "labels", "label_names"),
    "cifar-10-batches-bin": Layout(
        "cifar10", tuple(f"{name}.bin" for name in BATCHES), "test_batch.bin", "batches.meta.txt", label_bytes=1
    ),
    "cifar-100-python": Layout("cifar100", ("train",), "test", "meta", "fine_labels", "fine_label_names"),
    "cifar-100-binary": Layout("cifar100", ("train.bin",), "test.bin", "fine_label_names.txt", label_bytes=2),
}


def find(folder: Path, name: str = "") -> dict[str, Part]:
    """The parts of one of LAYOUTS in `folder` or in its subfolder of that name; only of the data `name` if given.

    Errors: UserError for an incomplete folder, or where both data sets are there and no name says which.
    """
    present: dict[str, Path] = {}
    for kind, layout in LAYOUTS.items():
        for place in (folder, folder / kind):
            if name in ("", layout.data) and (place / layout.train[0]).is_file():
                present.setdefault(kind, place)
    if len({LAYOUTS[kind].data for kind in present}) > 1:
        raise UserError(str(folder), f"one data set in a folder, found {' and '.join(present)}")
    for kind, place in present.items():
        layout = LAYOUTS[kind]
        train, test = tuple(place / file for file in layout.train), place / layout.test
        missing = [file.name for file in (*train, test) if not file.is_file()]
        if missing:
            raise UserError(str(place), f"the whole folder {kind}; {', '.join(missing)} is missing")
        classes = _classes(place / layout.meta, layout)
        return {"train": Part(kind, train, classes), "test": Part(kind, (test,), classes)}
    return {}


def _classes(meta: Path, layout: Layout) -> tuple[str, ...]:
    """The names in the file; without one those of CIFAR-10, or numbers."""
    count = CLASSES[layout.data]
    if not meta.is_file():
        return CIFAR10_CLASSES if layout.data == "cifar10" else tuple(str(k) for k in range(count))
    if layout.names:
        listed = _load(meta).get(layout.names, [])
        names = tuple(str(n, "utf-8") if isinstance(n, bytes) else str(n) for n in listed)
    else:
        names = tuple(meta.read_text(encoding="utf-8", errors="replace").split())
    if len(names) != count:
        raise UserError(str(meta), f"{count} class names, found {len(names)}")
    return names


def read(part: Part, folder: Path, reading: Reading) -> Images:
    """The images of the files. Errors: UserError for a truncated or damaged file, by name."""
    layout = LAYOUTS[part.kind]
    if layout.labels:
        found = [_read_python(file, layout) for file in part.files]
    else:
        found = [_read_binary(file, layout) for file in part.files]
        counts = [len(labels) for _, labels in found]
        if len(set(counts)) > 1:  # the published batches are equal; a file may be cut between two rows
            short = int(np.argmin(counts))
            raise UserError(str(part.files[short]), f"{max(counts)} rows as in the other batches, found {min(counts)}")
    images = convert(np.concatenate([images for images, _ in found]), reading)
    return Images(images, np.concatenate([labels for _, labels in found]))


def _read_binary(file: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    content = np.fromfile(file, np.uint8)
    row = layout.label_bytes + PIXELS
    whole, rest = divmod(len(content), row)
    if rest or not whole:
        raise UserError(str(file), f"a complete file of {row} bytes a row, found {whole} rows and {rest} bytes")
    rows = content.reshape(whole, row)
    images = rows[:, layout.label_bytes :].reshape(whole, 3, 32, 32)
    return images, rows[:, layout.label_bytes - 1].astype(np.int64)


def _read_python(file: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    batch = _load(file)
    try:
        images = np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32)
        labels = np.asarray(batch[layout.labels], np.int64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        wanted = f"a batch of `data` and `{layout.labels}`"
        raise UserError(str(file), f"{wanted} ({type(error).__name__}: {error})") from None
    if labels.shape != (len(images),):
        raise UserError(str(file), f"one label for each of {len(images)} images, found {labels.size}")
    return images, labels


def _load(file: Path) -> dict[str, Any]:
    """A pickled dictionary of Python 2, whose keys are byte strings, or of Python 3."""
    with open(file, "rb") as stream:
        found = load_pickle(stream, str(file), encoding="bytes")
    if not isinstance(found, dict):
        raise UserError(str(file), f"a dictionary, found {type(found).__name__}")
    return {str(k, "utf-8", "replace") if isinstance(k, bytes) else str(k): v for k, v in found.items()}
