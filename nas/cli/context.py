"""What runs and reports note of where they were made."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nas


def command_line() -> str:
    """The command as it was typed, without the options that only change what is printed."""
    return shlex.join(["nas", *(a for a in sys.argv[1:] if a not in ("--json", "--debug"))])


def environment() -> dict[str, str]:
    """What a run notes of the machine: Python, platform, versions."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "nasforge": nas.__version__}
    for package in ("torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def default_folder(name: str) -> Path:
    """runs/<name>, or runs/<name>-2, ... : the first that is free or was begun by the same command."""
    from nas.run import Run

    stem = "".join(c if c.isalnum() or c in ".-" else "-" for c in name)
    number = 1
    while True:
        path = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        if not path.exists() or (Run.exists(path) and Run.open(path).settings.get("command") == command_line()):
            return path
        number += 1
