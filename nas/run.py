"""Run: the folder of a search. Every ask and tell stands in it before anything follows from it.

`settings.json` (written first), `trials.sqlite` (tables `trials` and `events`, WAL), `lock` (flock), `log.txt`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from search_spaces.common.errors import RunError, UserError
from search_spaces.common.files import atomic_write, locked

FORMAT = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS trials (
    id INTEGER PRIMARY KEY, arch TEXT NOT NULL, key TEXT NOT NULL, status TEXT NOT NULL, fidelity INTEGER,
    metrics TEXT, error TEXT, seconds REAL, worker INTEGER, parent INTEGER, seed INTEGER,
    asked_at REAL, told_at REAL, attempts INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS events (
    position INTEGER PRIMARY KEY, kind TEXT NOT NULL CHECK (kind IN ('ask', 'tell')),
    trial INTEGER NOT NULL, time REAL NOT NULL
);
"""


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One row of `trials`. status: `asked`, `done` or `failed`; times in seconds since the epoch."""

    id: int
    arch: str
    key: str
    status: str
    fidelity: int | None = None
    metrics: Mapping[str, float] | None = None
    error: str | None = None
    seconds: float | None = None
    worker: int | None = None
    parent: int | None = None
    seed: int | None = None
    asked_at: float | None = None
    told_at: float | None = None
    attempts: int = 0


_COLUMNS = ", ".join(f.name for f in fields(TrialRecord))


def _record(row: Sequence[Any]) -> TrialRecord:
    values = dict(zip((f.name for f in fields(TrialRecord)), row, strict=True))
    if values["metrics"] is not None:
        values["metrics"] = json.loads(values["metrics"])
    return TrialRecord(**values)


class Run:
    """A run folder. `Run.open` reads; `with Run.create(...)` or `with run.resume()` hold its lock for writing."""

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path = path
        self.settings = dict(settings)
        self._database: sqlite3.Connection | None = None

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """The run in a folder. Errors: UserError if it is none, of a newer format, or damaged."""
        path = Path(path)
        try:
            settings = json.loads((path / "settings.json").read_text())
            version = settings["format"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(str(path), "the folder of a run (it has a readable settings.json)", _like(path)) from None
        if version > FORMAT:
            raise UserError(str(path), f"a run of format {FORMAT} or older, found {version}; update nasforge")
        return cls(path, settings)

    @classmethod
    def exists(cls, path: str | os.PathLike[str]) -> bool:
        """Whether the folder holds a run."""
        return (Path(path) / "settings.json").exists()

    @classmethod
    def create(cls, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> Run:
        """A new run in an empty or new folder. Errors: UserError if the folder holds something or cannot be written."""
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(p.name != "lock" for p in path.iterdir())):
            raise UserError(str(path), "a new or empty folder for the run")
        with atomic_write(path / "settings.json") as file:
            json.dump({"format": FORMAT, **settings}, file, indent=1)
        return cls.open(path)

    def update_settings(self, **changed: Any) -> None:
        """Replace settings, in the file too (a larger budget, say)."""
        self.settings |= changed
        with atomic_write(self.path / "settings.json") as file:
            json.dump(self.settings, file, indent=1)

    # -- writing -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[Run]:
        """Hold the lock and the database. Errors: UserError if another search runs here or it cannot be written."""
        if not os.access(self.path, os.W_OK):
            raise UserError(str(self.path), "a run folder that can be written")
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path / "lock", wait=False))
            except BlockingIOError:
                raise UserError(str(self.path), "a run that no other process is writing; a search runs there") from None
            except OSError as error:
                raise UserError(str(self.path), f"a run folder that can be written ({error.strerror})") from None
            with self._errors():
                self._database = sqlite3.connect(self.path / "trials.sqlite", isolation_level=None)
                self._database.execute("PRAGMA journal_mode=WAL")
                # A killed process loses nothing; only a power cut could cost the last moments.
                self._database.execute("PRAGMA synchronous=NORMAL")
                self._database.executescript(_SCHEMA)
                if self._database.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                    raise sqlite3.DatabaseError("quick_check failed")
            try:
                yield self
            finally:
                with contextlib.suppress(sqlite3.Error):
                    self._database.close()
                self._database = None

    def add_ask(self, record: TrialRecord) -> None:
        """Write a new trial and its ask event in one transaction."""
        values = (record.id, record.arch, record.key, "asked", record.fidelity, record.parent, record.seed)
        with self._transaction() as database:
            database.execute(
                "INSERT INTO trials (id, arch, key, status, fidelity, parent, seed, asked_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*values, record.asked_at),
            )
            database.execute(
                "INSERT INTO events (kind, trial, time) VALUES ('ask', ?, ?)", (record.id, record.asked_at)
            )

    def add_tell(self, record: TrialRecord) -> None:
        """Write what a trial gave and its tell event in one transaction."""
        metrics = None if record.metrics is None else json.dumps(record.metrics)
        with self._transaction() as database:
            database.execute(
                "UPDATE trials SET status = ?, metrics = ?, error = ?, seconds = ?, worker = ?, told_at = ?,"
                " attempts = ? WHERE id = ?",
                (
                    record.status,
                    metrics,
                    record.error,
                    record.seconds,
                    record.worker,
                    record.told_at,
                    record.attempts,
                    record.id,
                ),
            )
            database.execute(
                "INSERT INTO events (kind, trial, time) VALUES ('tell', ?, ?)", (record.id, record.told_at)
            )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        if self._database is None:
            raise RuntimeError("the run is not open for writing")
        with self._errors():
            self._database.execute("BEGIN")
            try:
                yield self._database
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "malformed" in str(error) or "not a database" in str(error):
                raise self._damaged(error) from None
            raise RunError(
                f"{self.path}: the run could not be written ({error}); what was told before is kept,"
                f" go on with: nas resume {self.path}"
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> UserError:
        return UserError(str(self.path / "trials.sqlite"), f"a sound database of trials ({error})")

    def log(self, line: str) -> None:
        """Append a line with the time to `log.txt`."""
        with contextlib.suppress(OSError), open(self.path / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    # -- reading -----------------------------------------------------------------------------------------------

    def trials(self) -> list[TrialRecord]:
        """All trials by id. Errors: UserError if the database is damaged."""
        return [_record(row) for row in self._select(f"SELECT {_COLUMNS} FROM trials ORDER BY id")]

    def trial(self, id: int) -> TrialRecord:
        """One trial. Errors: UserError for an id that the run does not have."""
        rows = self._select(f"SELECT {_COLUMNS} FROM trials WHERE id = {int(id)}")
        if not rows:
            count = self._select("SELECT COUNT(*) FROM trials")[0][0]
            raise UserError(id, f"a trial of {self.path} (0 to {count - 1})" if count else "a run with trials")
        return _record(rows[0])

    def events(self) -> list[tuple[str, int]]:
        """(kind, trial id) of every ask and tell in the order they happened."""
        return [(kind, id) for kind, id in self._select("SELECT kind, trial FROM events ORDER BY position")]

    def _select(self, query: str) -> list[tuple]:
        if self._database is not None:
            with self._errors():
                return self._database.execute(query).fetchall()
        file = self.path / "trials.sqlite"
        if not file.exists():
            return []
        try:
            with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
                return database.execute(query).fetchall()
        except sqlite3.Error as error:
            if "no such table" in str(error):
                return []
            raise self._damaged(error) from None

    def running(self) -> bool:
        """Whether a process holds the run's lock now."""
        try:
            with locked(self.path / "lock", wait=False):
                return False
        except BlockingIOError:
            return True
        except OSError:
            return False


def find_runs(folder: str | os.PathLike[str]) -> list[Run]:
    """The runs directly below a folder, oldest first; folders that are no runs are passed over."""
    found = [p.parent for p in Path(folder).glob("*/settings.json")]
    runs = []
    for path in sorted(found, key=lambda p: (p / "settings.json").stat().st_mtime):
        with contextlib.suppress(UserError):
            runs.append(Run.open(path))
    return runs


def _like(path: Path) -> str | None:
    from search_spaces.common.names import nearest

    close = nearest(path.name, [p.parent.name for p in path.parent.glob("*/settings.json")])
    return str(path.parent / close) if close else None
