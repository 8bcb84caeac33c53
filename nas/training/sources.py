"""Where images come from: Parquet with image bytes, CIFAR-10's python folder, class subfolders.

`find_parts(folder)` says what a folder holds, `read_part` decodes it (threads; once, into the cache).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nas.training.cache import Images, cached, file_stamps
from search_spaces.common.errors import UserError
from search_spaces.common.names import nearest
from search_spaces.common.pickles import RestrictedUnpickler

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}
PART_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
PARQUET_PLACES = ("", "data", "plain_text")  # the Hugging Face hub's folders
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
CHUNK = 2048  # images decoded at a time; what is in flight stays small
Chunk = tuple[list[str], list[Any], list[int]]  # names, image bytes or paths (None: missing), labels


@dataclass(frozen=True)
class Part:
    """One part (train, val or test) of a data set on disk. kind: `parquet`, `python` or `folder`."""

    kind: str
    files: tuple[Path, ...]
    classes: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()  # of folders, by file


def find_parts(folder: Path) -> dict[str, Part]:
    """What a folder holds by part, empty if nothing is recognised.

    Parquet files are named by their part (`train.parquet`, `test-00000-of-00001.parquet`), here or in `data`;
    the python folder of CIFAR-10 has `data_batch_1` to `_5` and `test_batch`; image folders are
    `train/<class>/<image>` and `test/<class>/<image>`, or `<class>/<image>`.
    """
    return _parquet_parts(folder) or _python_parts(folder) or _folder_parts(folder)


def _parquet_parts(folder: Path) -> dict[str, Part]:
    files: dict[str, list[Path]] = {}
    for file in sorted(file for place in PARQUET_PLACES for file in (folder / place).glob("*.parquet")):
        part = PART_NAMES.get(file.stem.lower().split("-")[0])
        if part:
            files.setdefault(part, []).append(file)
    return {part: Part("parquet", tuple(found), _parquet_classes(found[0])) for part, found in files.items()}


def _parquet_classes(file: Path) -> tuple[str, ...]:
    """The class names that the Hugging Face writer keeps in the schema's metadata, or none."""
    import pyarrow.parquet

    with _parquet_errors(file):
        about = (pyarrow.parquet.read_schema(file).metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(about)["info"]["features"]
        return next((tuple(features[c]["names"]) for c in LABEL_COLUMNS if "names" in features.get(c, {})), ())
    except (KeyError, TypeError, ValueError):
        return ()


@contextlib.contextmanager
def _parquet_errors(file: Path) -> Iterator[None]:
    """Whatever pyarrow finds wrong with a file, as a UserError."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(str(file), f"a complete Parquet file ({' '.join(str(error).split())[:120]})") from None


def _python_parts(folder: Path) -> dict[str, Part]:
    for place in (folder, folder / "cifar-10-batches-py"):
        if (place / "data_batch_1").exists():
            train = tuple(place / f"data_batch_{k}" for k in range(1, 6))
            missing = [file.name for file in (*train, place / "test_batch") if not file.exists()]
            if missing:
                raise UserError(str(place), f"the whole CIFAR-10 python folder; {', '.join(missing)} is missing")
            return {"train": Part("python", train), "test": Part("python", (place / "test_batch",))}
    return {}


def _folder_parts(folder: Path) -> dict[str, Part]:
    folders = {p.name.lower(): p for p in _subfolders(folder)}
    named = {PART_NAMES[name]: path for name, path in folders.items() if name in PART_NAMES}
    if "train" in named:
        found = {part: _image_folder(path) for part, path in named.items()}
        for part, other in found.items():
            if other.classes != found["train"].classes:
                odd = sorted(set(other.classes) ^ set(found["train"].classes))
                raise UserError(str(named[part]), f"the class folders of {named['train']}; {odd[0]!r} is in one only")
        return found
    whole = _image_folder(folder)
    return {"train": whole} if whole.files else {}


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_folder(folder: Path) -> Part:
    files: list[Path] = []
    labels: list[int] = []
    names = [p.name for p in _subfolders(folder)]
    for label, name in enumerate(names):
        for file in sorted((folder / name).rglob("*")):
            if file.suffix.lower() in SUFFIXES:
                files.append(file)
                labels.append(label)
    return Part("folder", tuple(files), tuple(names), tuple(labels))


# -- reading -----------------------------------------------------------------------------------------------------


def read_part(part: Part, *, name: str, channels: int, size: int | None, skip_broken: bool) -> Images:
    """The images of a part, from the cache if they were decoded before.

    channels: 3 (RGB) or 1 (grey). size: every image is cut to its middle square and averaged down to [size, size];
    None keeps images, which must then have one shape. skip_broken: leave unreadable images out (they are named in
    the result). Errors: UserError for unreadable images, odd shapes, images smaller than `size`.
    """
    key = {
        "kind": part.kind,
        "files": file_stamps(list(part.files)),
        "labels": [int(label) for label in part.labels],
        "channels": channels,
        "size": size,
        "skip_broken": skip_broken,
    }

    def make(folder: Path) -> Images:
        if part.kind == "python":
            return _read_python(part.files, channels, size)
        if part.kind == "parquet":
            return _decode(_parquet_chunks(part.files), _parquet_rows(part.files), folder, channels, size, skip_broken)
        return _decode(_folder_chunks(part), len(part.files), folder, channels, size, skip_broken)

    return cached(name, key, make)


def _parquet_rows(files: Sequence[Path]) -> int:
    import pyarrow.parquet

    rows = 0
    for file in files:
        with _parquet_errors(file):
            rows += pyarrow.parquet.read_metadata(file).num_rows
    return rows


def _parquet_chunks(files: Sequence[Path]) -> Iterator[Chunk]:
    import pyarrow.parquet

    for file in files:
        with _parquet_errors(file):
            table = pyarrow.parquet.ParquetFile(file)
            columns = table.schema_arrow.names
        image = next((c for c in IMAGE_COLUMNS if c in columns), None)
        label = next((c for c in LABEL_COLUMNS if c in columns), None)
        if image is None or label is None:
            raise UserError(str(file), f"columns `image` and `label`; it has {', '.join(columns)}")
        row = 0
        batches = table.iter_batches(CHUNK, columns=[image, label])
        while True:
            with _parquet_errors(file):
                batch = next(batches, None)
            if batch is None:
                break
            entries, labels = batch.column(0).to_pylist(), batch.column(1).to_pylist()
            if None in labels:
                raise UserError(f"{file.name}, row {row + labels.index(None)}", "a label")
            if not all(isinstance(entry, dict | None) for entry in entries):
                raise UserError(str(file), f"images as {{bytes, path}} in the column `{image}`")
            names = [(e or {}).get("path") or f"{file.name}, row {row + k}" for k, e in enumerate(entries)]
            yield names, [(e or {}).get("bytes") for e in entries], labels
            row += len(labels)


def _folder_chunks(part: Part) -> Iterator[Chunk]:
    for start in range(0, len(part.files), CHUNK):
        files = list(part.files[start : start + CHUNK])
        yield [str(f) for f in files], files, list(part.labels[start : start + CHUNK])


def _decode(
    chunks: Iterator[Chunk], count: int, folder: Path, channels: int, size: int | None, skip_broken: bool
) -> Images:
    """Decode into `folder/images.npy` chunk by chunk: memory does not grow with the data."""
    images: np.ndarray | None = None
    labels: list[int] = []
    broken: list[str] = []
    filled = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # Pillow decodes without holding the lock
        for names, contents, chunk_labels in chunks:
            decoded = threads.map(lambda content: _open(content, channels, size), contents, chunksize=64)
            for name, pixels, label in zip(names, decoded, chunk_labels, strict=True):
                if isinstance(pixels, str):
                    broken.append(f"{name} ({pixels})")
                    continue
                if images is None:
                    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (count, *pixels.shape))
                if pixels.shape != images.shape[1:]:
                    expected = f"images of one shape ({_shape(images[0])}), found {_shape(pixels)}; give a size"
                    raise UserError(name, expected)
                images[filled] = pixels
                labels.append(int(label))
                filled += 1
    if broken and not skip_broken:
        named = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        raise UserError(f"{len(broken)} of {count} images", f"images that can be read (or skip_broken): {named}")
    if images is None:
        raise UserError("0 images", "a folder or file with images that can be read")
    if filled < count:
        kept = np.array(images[:filled])
        (folder / "images.npy").unlink()
        return Images(kept, np.array(labels, np.int64), tuple(broken))
    return Images(images, np.array(labels, np.int64), tuple(broken))


def _shape(pixels: np.ndarray) -> str:
    return f"{pixels.shape[-1]}x{pixels.shape[-2]}"


def _open(content: bytes | Path | None, channels: int, size: int | None) -> np.ndarray | str:
    """Pixels [C, H, W], or what is wrong with the image."""
    from PIL import Image

    if content is None:
        return "no bytes"
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            plain = image.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow's decoders raise many kinds
        return str(error).split(": ")[-1][:60] if not isinstance(error, OSError) else "not a complete image"
    return _shrink(plain, size)


def _shrink(image: Any, size: int | None) -> np.ndarray:
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


class _Python2Unpickler(RestrictedUnpickler):
    """The restricted reader for files of Python 2, whose strings are bytes."""

    def __init__(self, file: Any):
        super().__init__(file)
        pickle.Unpickler.__init__(self, file, encoding="bytes")


def _read_python(files: Sequence[Path], channels: int, size: int | None) -> Images:
    """CIFAR-10's python batches: `data` uint8 [N, 3072] (red, green, blue planes), `labels`."""
    from PIL import Image

    images, labels = [], []
    for file in files:
        try:
            with open(file, "rb") as stream:
                batch = {
                    str(k, "ascii") if isinstance(k, bytes) else k: v
                    for k, v in _Python2Unpickler(stream).load().items()
                }
            planes = np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32)
            labels += [int(label) for label in batch["labels"]]
        except MemoryError:
            raise
        except Exception as error:  # a broken pickle can raise nearly anything
            raise UserError(str(file), f"a complete batch of CIFAR-10 ({error or type(error).__name__})") from None
        images.append(planes)
    whole = np.concatenate(images)
    if size is not None or channels == 1:
        rows = (Image.fromarray(row.transpose(1, 2, 0)) for row in whole)
        whole = np.stack([_shrink(row.convert("L") if channels == 1 else row, size) for row in rows])
    return Images(whole, np.array(labels, np.int64))


def locate(name: str, root: str | os.PathLike[str] | None, default: Path) -> tuple[Path, dict[str, Part]]:
    """The folder and the parts of a named data set below `root` (or `default`), looking in `<root>/<name>` first."""
    base = Path(root) if root is not None else default
    for folder in (base / name, base):
        if folder.is_dir():
            parts = find_parts(folder)
            if "train" in parts:
                return folder, parts
    expected = f"a folder with {name}: train.parquet and test.parquet, cifar-10-batches-py, or train/<class>/<image>"
    close = nearest(name, [p.name for p in _subfolders(base)]) if base.is_dir() else None
    raise UserError(str(base), f"{expected} (--data-root or NASFORGE_DATA)", str(base / close) if close else None)
