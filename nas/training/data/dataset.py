"""Data sets as tensors: `load_data(name)` for digits, CIFAR-10 and CIFAR-100, image folders, a user's own object."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nas.training.data.cache import Images, channel_moments
from nas.training.data.cifar import CIFAR10_CLASSES, CLASSES
from nas.training.data.decoding import Reading
from nas.training.data.objects import read_object
from nas.training.data.sources import locate, read_part
from search_spaces.common.errors import UserError
from search_spaces.common.files import home
from search_spaces.common.names import nearest

NAMES = ("digits", *CLASSES)
TEST_SHARE = 0.2  # of data that come without a test part
SAMPLE = 64  # images of a part that `describe` looks at


@dataclass(frozen=True, eq=False)
class Split:
    """Images [N, C, H, W] (uint8, or float32 as given) and labels int64 [N] of one part."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """The same on a device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """An image data set in memory.

    mean, std: per channel, over training and validation images (uint8 scaled to [0, 1]). flip: whether a mirrored
    image keeps its class. broken: images that could not be read and were left out.
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True
    broken: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return tuple(self.train.images.shape[1:])  # type: ignore[return-value]

    def normalize(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] as float32 with mean 0 and standard deviation 1 per channel over the training data."""
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images.float() - mean * scale) / (std * scale)

    def describe(self) -> dict[str, Any]:
        """The data in plain values, for a record; equal as long as neither the data nor their split change.

        `content` is a hash of all labels, the shapes and types, and the pixels of SAMPLE images spread over each part.
        """
        parts = {"train": self.train, "val": self.val, "test": self.test}
        content = hashlib.blake2b(digest_size=8)
        for name, part in parts.items():
            rows = torch.linspace(0, len(part) - 1, min(SAMPLE, len(part)), dtype=torch.float64).round().long()
            content.update(f"{name} {tuple(part.images.shape)} {part.images.dtype}".encode())
            content.update(part.labels.cpu().numpy().astype("<i8").tobytes())
            content.update(part.images[rows.to(part.images.device)].cpu().numpy().tobytes())
        return {
            "name": self.name,
            "images": {name: len(part) for name, part in parts.items()},
            "shape": list(self.shape),
            "num_classes": self.num_classes,
            "mean": list(self.mean),
            "std": list(self.std),
            "content": content.hexdigest(),
        }

    def to(self, device: torch.device | str) -> Dataset:
        """The same on a device: small data sets live on the accelerator as a whole."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))


def load_data(
    name: str = "digits",
    *,
    root: str | os.PathLike[str] | None = None,
    size: int | None = None,
    channels: int = 3,
    val_share: float = 0.1,
    seed: int = 0,
    skip_broken: bool = False,
) -> Dataset:
    """The data set `name`, its training part split into training and validation by `seed`, stratified by class.

    name: `digits` (scikit-learn's, 8x8 grey), `cifar10`, `cifar100`, the path of a folder, or
    `package.module:object` as in `nas.training.data.objects.read_object`. root: where named data lie (default:
    $NASFORGE_DATA, or `data` in $NASFORGE_HOME); formats are those of `nas.training.data.sources.find_parts`. size:
    images averaged down to [size, size] (8-bit ones rounded to 8 bits). channels: 3 or 1, of files. val_share: of
    the training images, where the data have no validation part; 0 for none. Data without a test part lose a fifth
    to one that no seed changes. Decoded files are kept in $NASFORGE_HOME/cache; a user's own objects are not.
    skip_broken: leave unreadable images out. Errors: UserError for an unknown name, no images, unreadable images,
    NaN, shapes that differ, labels out of range, a class without images or with too few to split.
    """
    if size is not None and size < 1:
        raise UserError(size, "a positive size")
    if channels not in (1, 3):
        raise UserError(channels, "1 or 3 channels")
    if not 0 <= val_share < 1:
        raise UserError(val_share, "a share of validation images from 0 to below 1")
    text = str(name)
    if text == "digits":
        parts, classes = _digits(), tuple("0123456789")
    elif text in NAMES or Path(text).expanduser().is_dir():
        parts, classes = _from_files(text, root, Reading(channels, size, skip_broken))
    elif ":" in text:
        parts, classes = read_object(text)
    else:
        expected = f"a data set: {', '.join(NAMES)}, a folder that exists, or package.module:object"
        raise UserError(text, expected, nearest(text, NAMES))
    parts = {part: _shrink(found, size) for part, found in parts.items()}
    classes = classes or _numbered(parts["train"].labels)
    for part, found in parts.items():
        _check(part, found, classes, parts["train"])
    _check_classes(parts, classes)
    return _dataset(text, parts, classes, val_share, seed, flip=text != "digits")


def _dataset(
    name: str, parts: Mapping[str, Images], classes: tuple[str, ...], val_share: float, seed: int, flip: bool
) -> Dataset:
    train = parts["train"]
    rows = np.arange(len(train.labels))
    if "test" in parts:
        test = _take(parts["test"], np.random.default_rng(0).permutation(len(parts["test"].labels)))
    else:
        # The seed of the search must not move test images into training.
        rows, held_out = stratified_split(train.labels, TEST_SHARE, seed=0)
        test = _take(train, held_out)
    if "val" in parts:
        val = _take(parts["val"], np.random.default_rng(0).permutation(len(parts["val"].labels)))
        kept = np.random.default_rng(seed).permutation(rows)
    elif val_share == 0:
        kept, val = np.random.default_rng(seed).permutation(rows), _take(train, rows[:0])
    else:
        inner, outer = stratified_split(train.labels[rows], val_share, seed=seed)
        kept, val = rows[inner], _take(train, rows[outer])
    mean, std = (train.mean, train.std) if train.mean and "test" in parts else channel_moments(train.images[rows])
    broken = tuple(name for part in parts.values() for name in part.broken)
    return Dataset(name, _take(train, kept), val, test, classes, mean, std, flip, broken)


def stratified_split(labels: np.ndarray, share: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, held out): `share` of every class (at least one image, at most all but one) is held out.

    Both lists are shuffled, so that batches mix classes. Errors: UserError for a class with a single image.
    """
    rng = np.random.default_rng(seed)
    kept, held = [], []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        if len(rows) < 2:
            raise UserError(f"class {label}", f"two images or more to split, found {len(rows)}")
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        held.append(rows[:count])
        kept.append(rows[count:])
    return rng.permutation(np.concatenate(kept)), rng.permutation(np.concatenate(held))


def _take(part: Images, rows: np.ndarray) -> Split:
    images = np.ascontiguousarray(part.images[rows])
    return Split(torch.from_numpy(images), torch.from_numpy(part.labels[rows].astype(np.int64)))


# -- checks ------------------------------------------------------------------------------------------------------


def _numbered(labels: np.ndarray) -> tuple[str, ...]:
    """The classes 0, 1, ... up to the highest label. Errors: UserError for labels that count something else."""
    highest = int(labels.max(initial=0))
    if highest > 2 * len(labels) + 1:
        raise UserError(f"train label {highest}", f"labels that count from 0, every class in {len(labels)} images")
    return tuple(str(k) for k in range(highest + 1))


def _check(part: str, found: Images, classes: tuple[str, ...], train: Images) -> None:
    if len(found.labels) == 0:
        raise UserError(f"0 {part} images", "at least one image")
    if 0 in found.images.shape:
        raise UserError(f"{part} images of shape {found.images.shape}", "images with pixels")
    if found.images.shape[1:] != train.images.shape[1:]:
        raise UserError(
            f"{part} images of shape {found.images.shape[1:]}",
            f"the shape of the training images {train.images.shape[1:]}",
        )
    wrong = np.flatnonzero((found.labels < 0) | (found.labels >= len(classes)))
    if len(wrong):
        expected = f"labels from 0 to {len(classes) - 1} ({len(wrong)} are not, the first at index {wrong[0]})"
        raise UserError(f"{part} label {found.labels[wrong[0]]}", expected)
    if len(classes) < 2:
        raise UserError(f"{len(classes)} class", "data with two classes or more")
    if found.images.dtype != np.uint8 and not np.isfinite(found.images).all():
        bad = np.flatnonzero(~np.isfinite(found.images).reshape(len(found.images), -1).all(1))
        raise UserError(f"{part} image {bad[0]}", f"finite pixels; {len(bad)} images have NaN or infinity")


def _check_classes(parts: Mapping[str, Images], classes: tuple[str, ...]) -> None:
    """Every class needs an image in each part that is split off, and one that stays."""
    counts = np.bincount(parts["train"].labels, minlength=len(classes))
    empty = [classes[k] for k in np.flatnonzero(counts == 0)]
    if empty:
        hint = "; labels count from 0" if counts[0] == 0 else ""
        expected = f"images of every class; {len(empty)} of {len(classes)} have none{hint}"
        raise UserError(f"class {empty[0]!r}", expected)
    made = [part for part in ("val", "test") if part not in parts]
    few = np.flatnonzero(counts < 1 + len(made))
    if len(few):
        expected = f"{1 + len(made)} images or more of every class, as {' and '.join(made)} are split off"
        raise UserError(f"class {classes[few[0]]!r} with {counts[few[0]]} images", expected)


# -- arrays ------------------------------------------------------------------------------------------------------


def _digits() -> dict[str, Images]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return {"train": Images((found.images[:, None] / 16).astype(np.float32), found.target.astype(np.int64))}


def _from_files(
    name: str, root: str | os.PathLike[str] | None, reading: Reading
) -> tuple[dict[str, Images], tuple[str, ...]]:
    if name in CLASSES:
        default = Path(os.environ.get("NASFORGE_DATA") or home() / "data")
        folder, found = locate(name, root, default)
    else:
        folder, found = locate("", Path(name).expanduser(), home())
    classes = found["train"].classes
    if name in CLASSES:
        other = name == "cifar10" and classes not in ((), CIFAR10_CLASSES)
        if other or len(classes) not in (0, CLASSES[name]):
            listed = ", ".join(classes[:3])
            raise UserError(str(folder), f"the {CLASSES[name]} classes of {name}, found {len(classes)}: {listed}, ...")
        classes = classes or (CIFAR10_CLASSES if name == "cifar10" else tuple(str(k) for k in range(CLASSES[name])))
    label = name if name in CLASSES else folder.name
    return {part: read_part(source, f"{label}-{part}", reading) for part, source in found.items()}, classes


def _shrink(part: Images, size: int | None) -> Images:
    """Images averaged down to [size, size], unless they have that size already."""
    height, width = part.images.shape[-2:]
    if size is None or (height, width) == (size, size):
        return part
    if min(height, width) < size:
        raise UserError(size, f"a size not above the images' own, {width}x{height}")
    images = torch.from_numpy(np.ascontiguousarray(part.images))
    small = torch.nn.functional.adaptive_avg_pool2d(images.float(), size)
    if images.dtype == torch.uint8:
        small = small.round().to(torch.uint8)
    return Images(small.numpy(), part.labels, part.broken)
