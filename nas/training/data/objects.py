"""A user's own data, named as `package.module:object`: torch Datasets, iterables and arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from nas.training.data.cache import Images
from search_spaces.common.errors import UserError
from search_spaces.common.names import load_object

PARTS = ("train", "val", "test")


def read_object(path: str) -> tuple[dict[str, Images], tuple[str, ...]]:
    """The parts and the class names (empty if it has no attribute `classes`) of the object at `path`.

    It is a torch Dataset, map-style or iterable, or any iterable of (image, label); arrays (images, labels); a
    mapping of `train`, `test` and `val` to these; or a class or function that returns one of them, called without
    arguments. An image is a Pillow image, an array or a tensor. Errors: UserError for anything else.
    """
    found: Any = load_object(path, "a data set")
    if isinstance(found, type) or (callable(found) and not hasattr(found, "__getitem__")):
        found = found()
    if not isinstance(found, Mapping):
        return {"train": _read(path, "train", found)}, _classes(found)
    if "train" not in found:
        raise UserError(path, "a mapping with `train`, and optionally `val` and `test`")
    classes = _classes(found) or _classes(found["train"])
    return {part: _read(path, part, found[part]) for part in PARTS if part in found}, classes


def _classes(found: Any) -> tuple[str, ...]:
    """The attribute `classes`, of the data set itself or of the one that it is a subset of."""
    classes = getattr(found, "classes", None)
    if classes is None and hasattr(found, "dataset"):
        return _classes(found.dataset)
    return tuple(str(c) for c in classes or ())


def _read(path: str, part: str, found: Any) -> Images:
    if isinstance(found, Sequence) and len(found) == 2 and hasattr(found[0], "shape"):
        images, labels = (np.asarray(v.detach().cpu() if isinstance(v, Tensor) else v) for v in found)
    else:
        images, labels = _collect(path, part, _items(path, part, found))
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4:
        raise UserError(f"{part} images of shape {images.shape}", "images [N, C, H, W], [N, H, W, C] or [N, H, W]")
    if images.dtype.kind not in "uifb":
        raise UserError(f"{part} images of type {images.dtype}", "pixels that are real numbers")
    if labels.shape != (len(images),):
        raise UserError(f"{part} labels of shape {labels.shape}", f"one label for each of {len(images)} images")
    if labels.dtype.kind not in "iu" and not (labels.dtype.kind == "f" and (labels == np.round(labels)).all()):
        raise UserError(f"{part} labels of type {labels.dtype}", "whole numbers from 0")
    if images.dtype != np.uint8:
        images = images.astype(np.float32)
    return Images(images, labels.astype(np.int64))


def _items(path: str, part: str, found: Any) -> Iterable[Any]:
    """What the data set gives, item by item. torch's iterable Datasets have `__getitem__` too, but it only raises."""
    if hasattr(found, "__getitem__") and hasattr(found, "__len__") and not _is_iterable_dataset(found):
        return (found[k] for k in range(len(found)))
    if isinstance(found, Iterable) and not isinstance(found, str | bytes | Tensor | np.ndarray):
        return found
    raise UserError(path, f"a torch Dataset of (image, label), or arrays (images, labels), in {part}")


def _is_iterable_dataset(found: Any) -> bool:
    from torch.utils.data import IterableDataset

    return isinstance(found, IterableDataset)


def _collect(path: str, part: str, items: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
    pixels: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for k, item in enumerate(items):
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise UserError(path, f"items (image, label) in {part}; item {k} is of type {type(item).__name__}")
        image, label = _pixels(item[0]), np.asarray(item[1])
        if label.size != 1:
            raise UserError(f"{part} label {k} of shape {label.shape}", "one whole number")
        if pixels and image.shape != pixels[0].shape:
            raise UserError(f"{part} image {k}", f"images of one shape {pixels[0].shape}, found {image.shape}")
        pixels.append(image)
        labels.append(label.reshape(()))
    if not pixels:
        return np.zeros((0, 1, 1, 1), np.uint8), np.zeros(0, np.int64)
    return np.stack(pixels), np.stack(labels)


def _pixels(image: Any) -> np.ndarray:
    """One image as [C, H, W]; arrays and Pillow images may have their channels last."""
    if isinstance(image, Tensor):
        pixels = image.detach().cpu().numpy()
    else:
        mode = getattr(image, "mode", None)  # of Pillow; a palette's indices, say, are no pixels
        if mode in ("P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"):
            image = image.convert("RGB")
        elif mode in ("1", "LA", "La"):
            image = image.convert("L")
        pixels = np.asarray(image)
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim == 3 and pixels.shape[-1] in (1, 3) and pixels.shape[0] not in (1, 3):
        return pixels.transpose(2, 0, 1)
    return pixels
