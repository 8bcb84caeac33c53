"""Scores on disk, so that what was computed once is never computed again; any number of processes may share it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

from search_spaces.common.errors import RunError
from search_spaces.common.files import home

BUSY_SECONDS = 60.0
FEW = 500  # architectures that are asked for by name; of more, all that are kept are read
Entry = tuple[str, int, str]  # architecture, seed, proxy
_TABLE = """CREATE TABLE IF NOT EXISTS scores (task TEXT, arch TEXT, seed INTEGER, proxy TEXT, value REAL, reason TEXT,
PRIMARY KEY (task, arch, seed, proxy)) WITHOUT ROWID"""


def default_cache() -> Path:
    """`cache/scores.sqlite` in the home folder."""
    return home() / "cache" / "scores.sqlite"


class ScoreCache:
    """The scores of one task. path: a SQLite file, None for memory only. archs: those that are asked for.

    Errors: RunError for a damaged file.
    """

    def __init__(self, path: Path | None, task: str, archs: Sequence[str]):
        self.path, self.task = path, task
        self._known: dict[Entry, tuple[float, str]] = {}
        if path is not None:
            question = "SELECT arch, seed, proxy, value, reason FROM scores WHERE task = ?"
            values: tuple[str, ...] = (task,)
            if len(archs) <= FEW:
                question += f" AND arch IN ({', '.join('?' * len(archs))})"
                values = (task, *archs)
            for arch, seed, proxy, value, reason in self._run(question, [values]):
                self._known[arch, seed, proxy] = (float("nan") if value is None else value, reason)

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._known

    def __getitem__(self, entry: Entry) -> tuple[float, str]:
        """(value, reason); the reason is empty where there is a value."""
        return self._known[entry]

    def add(self, arch: str, seed: int, values: dict[str, float], reasons: dict[str, str]) -> None:
        """Keep the scores of one network."""
        rows = {(arch, seed, proxy): (value, reasons.get(proxy, "")) for proxy, value in values.items()}
        self._known |= rows
        if self.path is not None:
            statement = "INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?, ?)"
            self._run(statement, [(self.task, *entry, *found) for entry, found in rows.items()])

    def _run(self, statement: str, values: Iterable[tuple]) -> list[tuple]:
        assert self.path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS)) as database, database:
                database.execute(_TABLE)
                if statement.startswith("SELECT"):
                    (arguments,) = values
                    return database.execute(statement, arguments).fetchall()
                database.executemany(statement, values)
                return []
        except sqlite3.Error as error:
            raise RunError(f"{self.path}: the cache of scores cannot be used ({error}); it may be deleted") from error
