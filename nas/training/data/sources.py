"""Where images come from: `find_parts(folder)` says what a folder holds, `read_part` decodes it, once, into the cache.

One module per kind: `parquet`, `cifar` (the authors' own files), `folders` (class subfolders); a user's own objects
are in `objects`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from nas.training.data import cifar, folders, parquet
from nas.training.data.cache import Images, cached, file_stamps
from nas.training.data.decoding import Part, Reading
from search_spaces.common.errors import UserError
from search_spaces.common.names import nearest

READERS: dict[str, Callable[[Part, Path, Reading], Images]] = {
    "parquet": parquet.read,
    "folder": folders.read,
    **dict.fromkeys(cifar.LAYOUTS, cifar.read),
}


def find_parts(folder: Path, name: str = "") -> dict[str, Part]:
    """What a folder holds by part (train, val, test), empty if nothing is recognised.

    Parquet files come first, then CIFAR in one of its four layouts, then image folders. name: `cifar10` or `cifar100`
    where a folder may hold both.
    """
    return parquet.find(folder) or cifar.find(folder, name) or folders.find(folder)


def read_part(part: Part, name: str, reading: Reading) -> Images:
    """The images of a part, from the cache if they were decoded before.

    Unreadable images that `reading` leaves out are named in the result. Errors: UserError for unreadable images, odd
    shapes, images smaller than the size, damaged files.
    """
    labels = [int(label) for label in part.labels]
    key = {"kind": part.kind, "files": file_stamps(list(part.files)), "labels": labels, **asdict(reading)}
    return cached(name, key, lambda folder: READERS[part.kind](part, folder, reading))


def locate(name: str, root: str | os.PathLike[str] | None, default: Path) -> tuple[Path, dict[str, Part]]:
    """The folder and the parts of a named data set below `root` (or `default`), looking in `<root>/<name>` first."""
    base = Path(root) if root is not None else default
    for folder in (base / name, base):
        if folder.is_dir():
            parts = find_parts(folder, name)
            if "train" in parts:
                return folder, parts
    official = [kind for kind, layout in cifar.LAYOUTS.items() if name in ("", layout.data)]
    expected = f"a folder with {name or 'images'}: train.parquet, {', '.join(official)}, or train/<class>/<image>"
    close = nearest(name, [p.name for p in folders.subfolders(base)]) if name and base.is_dir() else None
    hint = " (--data-root or NASFORGE_DATA)" if name else ""
    raise UserError(str(base), expected + hint, str(base / close) if close else None)
