"""Measurements of layers, kept once and shared by all searches: (layer, anchor, settings) -> result."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from search_spaces.common.errors import RunError

BUSY_SECONDS = 60.0


def cached_result(
    path: Path | None, kind: str, layer: str, settings: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What `compute` gives, or gave before for the same arguments; plain values that JSON keeps exactly.

    path: a SQLite file that any number of processes may use; None computes always. layer: its fingerprint.
    """
    if path is None:
        return compute()
    text = json.dumps([kind, layer, settings], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    try:
        found = _query(path, "SELECT value FROM results WHERE key = ?", (key,))
        if found:
            return json.loads(found[0][0])
        value = compute()
        _query(path, "INSERT OR REPLACE INTO results VALUES (?, ?, ?)", (key, text, json.dumps(value)))
    except sqlite3.Error as error:
        raise RunError(f"{path}: the cache of measurements cannot be used ({error}); it may be deleted") from error
    return value


def _query(path: Path, statement: str, values: tuple) -> list[tuple]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as database, database:
        database.execute("CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, arguments TEXT, value TEXT)")
        return database.execute(statement, values).fetchall()
