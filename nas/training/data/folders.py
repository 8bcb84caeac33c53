"""Image folders: one subfolder per class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nas.training.data.cache import Images
from nas.training.data.decoding import CHUNK, Chunk, Part, Reading, decode
from nas.training.data.parquet import PART_NAMES
from search_spaces.common.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}


def find(folder: Path) -> dict[str, Part]:
    """Parts as `train/<class>/<image>` with `val` and `test`, or one part `train` as `<class>/<image>`.

    Errors: UserError where the parts have different classes.
    """
    folders = {p.name.lower(): p for p in subfolders(folder)}
    named = {PART_NAMES[name]: path for name, path in folders.items() if name in PART_NAMES}
    if "train" in named:
        found = {part: _part(path) for part, path in named.items()}
        for part, other in found.items():
            if other.classes != found["train"].classes:
                odd = sorted(set(other.classes) ^ set(found["train"].classes))
                raise UserError(str(named[part]), f"the class folders of {named['train']}; {odd[0]!r} is in one only")
            if not other.files:
                raise UserError(str(named[part]), f"images in class folders ({', '.join(sorted(SUFFIXES))})")
        return found
    whole = _part(folder)
    return {"train": whole} if whole.files else {}


def subfolders(folder: Path) -> list[Path]:
    """The folders inside, sorted, without hidden ones."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _part(folder: Path) -> Part:
    files: list[Path] = []
    labels: list[int] = []
    names = [p.name for p in subfolders(folder)]
    for label, name in enumerate(names):
        for file in sorted((folder / name).rglob("*")):
            if file.suffix.lower() in SUFFIXES:
                files.append(file)
                labels.append(label)
    return Part("folder", tuple(files), tuple(names), tuple(labels))


def read(part: Part, folder: Path, reading: Reading) -> Images:
    """The images of the files, decoded. Errors: UserError for unreadable images and odd shapes."""
    return decode(_chunks(part), len(part.files), folder, reading)


def _chunks(part: Part) -> Iterator[Chunk]:
    for start in range(0, len(part.files), CHUNK):
        files = list(part.files[start : start + CHUNK])
        yield [str(f) for f in files], files, list(part.labels[start : start + CHUNK])
