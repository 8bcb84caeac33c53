"""Files that survive a crash: home folder, atomic writes, locks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from search_spaces.common.errors import RunError, UserError


def home() -> Path:
    """The folder of tables and caches: `$NASFORGE_HOME`, by default the platform's cache folder."""
    named = os.environ.get("NASFORGE_HOME")
    if named:
        return Path(named).expanduser()
    try:
        import platformdirs
    except ImportError:  # GPU machines that have torch and little else
        return Path.home() / ".cache" / "nasforge"
    return Path(platformdirs.user_cache_dir("nasforge", appauthor=False))


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside `path`; it takes the name only when the block ends without an error.

    Errors: UserError where the folder cannot be written, RunError when the disk fills. The old file survives both.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise UserError(str(target), f"a file that can be written ({error.strerror or error})") from None
    try:
        encoding = None if "b" in mode else "utf-8"
        with os.fdopen(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise RunError(f"{target} could not be written: {error.strerror or error}; nothing was changed") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], *, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on `path` (flock: it ends with the process, however that ends).

    With `wait=False` a lock held elsewhere raises BlockingIOError at once.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
