"""Generated source as files below `$NASFORGE_HOME/kernels`, and the functions in them.

Triton and its users read kernels from files. A file is named by the hash of its key and written under another name
first, so that workers may share the folder; its content is compared with what it should be at every use, so that a
damaged file is written again. The folder keeps the newest LIMIT files. What Triton compiles lies in a folder of its
own, TRITON_CACHE_DIR.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import linecache
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from search_spaces.common.files import home

LIMIT = 4096  # files; about 10 kB each
_PLACE = "nasforge-place"  # in a folder of compiled kernels: where it lay when they were compiled
_ABANDONED = 3600.0  # seconds after which a temporary file belongs to a process that died


def folder() -> Path:
    """Where generated source is kept."""
    return home() / "kernels"


def entries() -> list[Path]:
    """The files of the cache, oldest first."""
    return [path for _, path in sorted(_found(".py"))]


def clear() -> int:
    """Remove all files of the cache; returns how many there were."""
    _remove_abandoned()
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
    """The module of a source file. It is not in `sys.modules`, so that it goes when nothing uses it any more.

    Triton's compiler reads functions as text, so Python compiles only their signatures; Triton's interpreter gets all.
    """
    module = ModuleType(f"nasforge_{path.stem}")
    module.__file__ = str(path)
    lines = text.splitlines(keepends=True)
    # Triton asks `inspect` for the text; it must find this one even if another process removes the file.
    _publish(path, lines)
    try:
        if os.environ.get("TRITON_INTERPRET") == "1":
            exec(compile(text, str(path), "exec", dont_inherit=True), module.__dict__)
        else:
            compiled_folder()
            module.__dict__["_with_text"] = functools.partial(_with_text, module, lines)
            exec(compile("".join(_signatures(lines)), str(path), "exec", dont_inherit=True), module.__dict__)
            del module.__dict__["_with_text"]
    finally:
        linecache.cache.pop(str(path), None)
    return module


def triton_folder() -> Path:
    """Where Triton is told to keep compiled kernels."""
    named = os.environ.get("TRITON_CACHE_DIR")
    return Path(named or Path(os.environ.get("TRITON_HOME") or "~") / ".triton" / "cache").expanduser()


@functools.cache
def compiled_folder() -> Path:
    """The same, looked at once in a process: where it cannot be written, a warning, and a temporary one instead."""
    path = triton_folder()
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        settle(path)
    except OSError as error:
        path = _temporary_folder(str(path), error.strerror or str(error)) / "compiled"
        os.environ["TRITON_CACHE_DIR"] = str(path)
    return path


def mark(path: Path) -> None:
    """Note in a folder of compiled kernels where it lies, so that `settle` sees when it was carried elsewhere."""
    _replace(path / _PLACE, str(path.absolute()))


def settle(path: Path) -> int:
    """Make a folder of compiled kernels that was carried here, and was marked, known to Triton; returns how many
    kernels it has that had to be told. Triton lists the files of each kernel by their full paths."""
    here = str(path.absolute())
    try:
        if (path / _PLACE).read_text(encoding="utf-8") == here:
            return 0
    except OSError:  # not marked: Triton's own
        return 0
    count = 0
    for group in path.glob("*/__grp__*.json"):
        with contextlib.suppress(ValueError, KeyError, AttributeError):  # damaged: compiled again by Triton
            names = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
            moved = {name: str(group.absolute().with_name(name)) for name in names}
            _replace(group, json.dumps({"child_paths": moved}))
            count += 1
    mark(path)
    return count


def _signatures(lines: list[str]) -> Iterator[str]:
    """The text without the bodies of its functions, which `_with_text` follows."""
    for number, line in enumerate(lines):
        if line.startswith("def "):
            yield f"@_with_text({number})\n{line.rstrip()} pass\n"
        elif not line.startswith(" "):
            yield line


def _with_text(module: ModuleType, lines: list[str], begin: int) -> Callable[[Callable], Callable]:
    """Makes `inspect` say of a function without a body what its text is: that of its `def` line and what is indented.

    `inspect` finds a function's end by Python's tokenizer, 2 milliseconds each; of a module it takes all lines. So
    the function says that it wraps the module, which has the function's lines for the moment, each at its place.
    """
    end = begin + 1
    while end < len(lines) and lines[end].startswith(" "):
        end += 1

    def change(function: Callable) -> Callable:
        function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        function.__wrapped__ = module  # type: ignore[attr-defined]
        _publish(Path(str(module.__file__)), ["\n"] * (begin + 1) + lines[begin:end])
        return function

    return change


def _publish(path: Path, lines: list[str]) -> None:
    linecache.cache[str(path)] = (sum(map(len, lines)), None, lines, str(path))


def _written(path: Path, text: str, limit: int) -> Path:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == text:
            return path
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, text)
    if len(os.listdir(path.parent)) > limit:
        _remove_abandoned()
        for old in _excess(entries(), limit):
            if old != path:
                _removed(old)
    return path


def _replace(path: Path, text: str) -> None:
    """Write a file so that readers see all of it or the one before."""
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        _removed(Path(temporary))
        raise


def _found(ending: str) -> list[tuple[float, Path]]:
    found = []
    with contextlib.suppress(OSError), os.scandir(folder()) as files:
        for file in files:
            if file.name.endswith(ending):
                with contextlib.suppress(FileNotFoundError):
                    found.append((file.stat().st_mtime, Path(file.path)))
    return found


def _remove_abandoned() -> None:
    for written, path in _found(".tmp"):
        if written < time.time() - _ABANDONED:
            _removed(path)


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
    variable = "NASFORGE_HOME" if wanted == str(folder()) else "TRITON_CACHE_DIR"
    warnings.warn(
        f"{wanted} cannot be written ({reason}): kernels go to {temporary.name} until this process ends "
        f"({variable} may name another folder)",
        RuntimeWarning,
        stacklevel=4,
    )
    return Path(temporary.name)


_KEPT: list[tempfile.TemporaryDirectory] = []  # removed when the process ends
