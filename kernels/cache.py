"""Generated source as files below `$NASFORGE_HOME/kernels`, and the functions in them.

Triton and its users read kernels from files. A file is named by the hash of its key and written under another name
first, so that workers may share the folder; its content is compared with what it should be at every use, so that a
damaged file is written again. The folder keeps the newest LIMIT files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import linecache
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from search_spaces.common.files import home

LIMIT = 4096  # files; about 10 kB each


def folder() -> Path:
    """Where generated source is kept."""
    return home() / "kernels"


def entries() -> list[Path]:
    """The files of the cache, oldest first."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder()) as files:
        for file in files:
            if file.name.endswith(".py"):
                with contextlib.suppress(FileNotFoundError):
                    found.append((file.stat().st_mtime, Path(file.path)))
    return [path for _, path in sorted(found)]


def clear() -> int:
    """Remove all files of the cache; returns how many there were."""
    return sum(_removed(path) for path in entries())


def write_source(key: str, text: str, limit: int = LIMIT) -> Path:
    """The file with `text`, written unless it is there. Where the folder cannot be written: a warning, and a
    temporary folder that ends with the process."""
    name = f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.py"
    try:
        return _written(folder() / name, text, limit)
    except OSError as error:
        return _written(_temporary_folder(str(folder()), error.strerror or str(error)) / name, text, limit)


def load(path: Path, text: str) -> ModuleType:
    """The module of a source file. It is not in `sys.modules`, so that it goes when nothing uses it any more."""
    module = ModuleType(f"nasforge_{path.stem}")
    module.__file__ = str(path)
    # Triton asks `inspect` for the text; it must find this one even if another process removes the file.
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    finally:
        linecache.cache.pop(str(path), None)
    return module


def _written(path: Path, text: str, limit: int) -> Path:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == text:
            return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        _removed(Path(temporary))
        raise
    for old in _excess(entries(), limit):
        if old != path:
            _removed(old)
    return path


def _excess(files: list[Path], limit: int) -> Iterator[Path]:
    """The oldest files beyond the limit and a tenth of it more, so that this happens rarely."""
    if len(files) > limit:
        yield from files[: len(files) - limit + limit // 10]


def _removed(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True


@functools.cache
def _temporary_folder(wanted: str, reason: str) -> Path:
    temporary = tempfile.TemporaryDirectory(prefix="nasforge-kernels-")
    _KEPT.append(temporary)
    warnings.warn(
        f"{wanted} cannot be written ({reason}): kernels go to {temporary.name}", RuntimeWarning, stacklevel=4
    )
    return Path(temporary.name)


_KEPT: list[tempfile.TemporaryDirectory] = []  # removed when the process ends
