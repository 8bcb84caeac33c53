"""Data sets as tensors: `load_data(name)` for digits, CIFAR-10, image folders, and a user's own object."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nas.training.cache import Images, channel_moments
from nas.training.sources import locate, read_part
from search_spaces.common.errors import UserError
from search_spaces.common.files import home
from search_spaces.common.names import load_object, nearest

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NAMES = ("digits", "cifar10")
TEST_SHARE = 0.2  # of data that come without a test part


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

    name: `digits` (scikit-learn's, 8x8 grey), `cifar10`, the path of a folder, or `package.module:object`: a torch
    Dataset of (image, label), arrays (images, labels), a mapping of `train`, `test` and optionally `val` to either,
    or a function that returns one of these. root: where named data lie (default: $NASFORGE_DATA, or `data` in
    $NASFORGE_HOME); formats are those of `nas.training.sources.find_parts`. size: images averaged down to
    [size, size] (8-bit ones rounded to 8 bits). channels: 3 or 1, of files. val_share: of the training images, where
    the data have no validation part. Data without a test part lose a fifth to one that no seed changes. Decoded
    files are kept in $NASFORGE_HOME/cache; a user's own objects are not. skip_broken: leave unreadable images out.
    Errors: UserError for an unknown name, unreadable images, NaN, labels out of range, a class without images.
    """
    if size is not None and size < 1:
        raise UserError(size, "a positive size")
    if channels not in (1, 3):
        raise UserError(channels, "1 or 3 channels")
    if not 0 < val_share < 1:
        raise UserError(val_share, "a share of validation images between 0 and 1")
    text = str(name)
    if text == "digits":
        parts, classes = _digits(), tuple("0123456789")
    elif text in NAMES or Path(text).expanduser().is_dir():
        parts, classes = _from_files(text, root, channels, size, skip_broken)
    elif ":" in text:
        parts, classes = _from_object(text)
    else:
        raise UserError(text, "a data set: digits, cifar10, a folder or package.module:object", nearest(text, NAMES))
    parts = {part: _shrink(found, size) for part, found in parts.items()}
    classes = classes or tuple(str(k) for k in range(int(parts["train"].labels.max(initial=0)) + 1))
    for part, found in parts.items():
        _check(part, found, classes, parts["train"])
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


def _check(part: str, found: Images, classes: tuple[str, ...], train: Images) -> None:
    if len(found.labels) == 0:
        raise UserError(f"0 {part} images", "at least one image")
    if len(classes) < 2:
        raise UserError(f"{len(classes)} class", "data with two classes or more")
    if found.images.shape[1:] != train.images.shape[1:]:
        raise UserError(
            f"{part} images of shape {found.images.shape[1:]}",
            f"the shape of the training images {train.images.shape[1:]}",
        )
    wrong = np.flatnonzero((found.labels < 0) | (found.labels >= len(classes)))
    if len(wrong):
        expected = f"labels from 0 to {len(classes) - 1} ({len(wrong)} are not, the first at index {wrong[0]})"
        raise UserError(f"{part} label {found.labels[wrong[0]]}", expected)
    counts = np.bincount(found.labels, minlength=len(classes))
    empty = [classes[k] for k in np.flatnonzero(counts == 0)]
    if empty and part == "train":
        raise UserError(f"class {empty[0]!r}", f"images of every class; {len(empty)} of {len(classes)} have none")
    if found.images.dtype != np.uint8 and not np.isfinite(found.images).all():
        bad = np.flatnonzero(~np.isfinite(found.images).reshape(len(found.images), -1).all(1))
        raise UserError(f"{part} image {bad[0]}", f"finite pixels; {len(bad)} images have NaN or infinity")


# -- arrays ------------------------------------------------------------------------------------------------------


def _digits() -> dict[str, Images]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return {"train": Images((found.images[:, None] / 16).astype(np.float32), found.target.astype(np.int64))}


def _from_files(
    name: str, root: str | os.PathLike[str] | None, channels: int, size: int | None, skip_broken: bool
) -> tuple[dict[str, Images], tuple[str, ...]]:
    if name in NAMES:
        default = Path(os.environ.get("NASFORGE_DATA") or home() / "data")
        folder, found = locate(name, root, default)
    else:
        folder, found = locate("", Path(name).expanduser(), home())
    label = name if name in NAMES else folder.name
    parts = {
        part: read_part(source, name=f"{label}-{part}", channels=channels, size=size, skip_broken=skip_broken)
        for part, source in found.items()
    }
    classes = found["train"].classes
    if name == "cifar10":
        if classes not in ((), CIFAR10_CLASSES):
            raise UserError(str(folder), f"the classes of cifar10, found {', '.join(classes[:3])}, ...")
        classes = CIFAR10_CLASSES
    return parts, classes


def _from_object(path: str) -> tuple[dict[str, Images], tuple[str, ...]]:
    """A user's own data set. Its classes are named by its attribute `classes`, if it has one."""
    found: Any = load_object(path, "a data set")
    if isinstance(found, type) or (callable(found) and not hasattr(found, "__getitem__")):
        found = found()
    classes = tuple(str(c) for c in getattr(found, "classes", ()))
    if isinstance(found, Mapping):
        if "train" not in found:
            raise UserError(path, "a mapping with `train`, and optionally `val` and `test`")
        return {part: _arrays(path, part, found[part]) for part in ("train", "val", "test") if part in found}, classes
    return {"train": _arrays(path, "train", found)}, classes


def _arrays(path: str, part: str, found: Any) -> Images:
    if isinstance(found, Sequence) and len(found) == 2 and hasattr(found[0], "shape"):
        images, labels = found
    elif hasattr(found, "__getitem__") and hasattr(found, "__len__"):
        pairs = [found[k] for k in range(len(found))]
        if not all(isinstance(pair, tuple | list) and len(pair) >= 2 for pair in pairs):
            raise UserError(path, f"items (image, label) in {part}")
        pixels = [_pixels(pair[0]) for pair in pairs]
        odd = next((k for k, p in enumerate(pixels) if p.shape != pixels[0].shape), None)
        if odd is not None:
            raise UserError(f"{part} image {odd}", f"images of one shape {pixels[0].shape}, found {pixels[odd].shape}")
        images, labels = np.stack(pixels) if pixels else np.zeros((0, 1, 1, 1)), [pair[1] for pair in pairs]
    else:
        raise UserError(path, f"a torch Dataset of (image, label), or arrays (images, labels), in {part}")
    images = np.asarray(images.cpu() if isinstance(images, Tensor) else images)
    labels = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4:
        raise UserError(f"{part} images of shape {images.shape}", "images [N, C, H, W], [N, H, W, C] or [N, H, W]")
    if labels.shape != (len(images),):
        raise UserError(f"{part} labels of shape {labels.shape}", f"one label for each of {len(images)} images")
    if labels.dtype.kind not in "iu" and not (labels.dtype.kind == "f" and (labels == np.round(labels)).all()):
        raise UserError(f"{part} labels of type {labels.dtype}", "whole numbers from 0")
    if images.dtype != np.uint8:
        images = images.astype(np.float32)
    return Images(images, labels.astype(np.int64))


def _pixels(image: Any) -> np.ndarray:
    """One image as [C, H, W]; arrays and Pillow images may have their channels last."""
    pixels = image.cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim == 3 and pixels.shape[-1] in (1, 3) and pixels.shape[0] not in (1, 3):
        return pixels.transpose(2, 0, 1)
    return pixels


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
