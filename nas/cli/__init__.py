"""The command line `nas`: thin commands over the packages, one file per group."""

from __future__ import annotations

import os
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed while running, 2 wrong usage or bad input."""
    from nas.cli.app import run

    if os.getcwd() not in sys.path:  # for `package.module:object`, as with `python -m nas`
        sys.path.append(os.getcwd())
    given = sys.argv[1:] if arguments is None else arguments
    status = run(given)
    if arguments is None:
        sys.exit(status)
    return status
