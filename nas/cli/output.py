"""What commands print: tables for people, one JSON object for programs, progress on a terminal."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

import nas


class Output:
    """One command's output. With `json` exactly one object goes to standard output, all else to standard error."""

    def __init__(self, command: str, json: bool, seed: int | None = None):
        self.command, self.json, self.seed = command, json, seed
        self.warnings: list[str] = []
        self.begun = time.perf_counter()
        self.console = Console(stderr=json, highlight=False, soft_wrap=True)
        if not self.console.is_terminal:  # a file or a pipe has no width
            self.console.width = 240

    def say(self, text: str = "", style: str | None = None) -> None:
        """A line for a person."""
        self.console.print(Text(text, style=style or ""))

    def warn(self, text: str) -> None:
        """A warning: on standard error and in the JSON object."""
        self.warnings.append(text)
        Console(stderr=True, highlight=False, soft_wrap=True).print(Text(f"warning: {text}", style="yellow"))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
        """Rows under headings; numbers to the right, the first column and the headings whole."""
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for i, column in enumerate(columns):
            numeric = bool(rows) and all(row[i] is None or isinstance(row[i], int | float) for row in rows)
            justify: Any = "right" if numeric else "left"
            table.add_column(column, justify=justify, overflow="fold", no_wrap=i == 0)
        for row in rows:
            table.add_row(*(Text(show(value)) for value in row))
        self.console.print(table)

    def pairs(self, pairs: Mapping[str, Any], indent: str = "") -> None:
        """Name and value, a line each; values are never broken, so that they can be copied."""
        width = max(map(len, pairs), default=0)
        for name, value in pairs.items():
            line = Text(indent + name.ljust(width + 2), style="bold")
            self.console.print(line.append(Text(show(value), style="not bold")))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Print the JSON object if it was asked for."""
        if self.json:
            whole = {
                "command": self.command,
                "version": nas.__version__,
                "seed": self.seed,
                "seconds": round(time.perf_counter() - self.begun, 3),
                "warnings": self.warnings,
                **result,
            }
            sys.stdout.write(json.dumps(plain(whole), allow_nan=False) + "\n")

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator[Callable[[int, int | None], None]]:
        """A progress bar on standard error while the block runs, if that is a terminal."""
        console = Console(stderr=True)
        if not console.is_terminal:
            yield lambda done, total: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def show(value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return _show_float(float(value))
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {show(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(show, value))
    return str(value)


def _show_float(value: float) -> str:
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    if abs(value) < 1:
        return f"{value:.4g}"
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1000 else f"{value:,.3f}"


def plain(value: Any) -> Any:
    """`value` as JSON knows it: numpy numbers as Python's, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value)
