"""The log of a search: a line of JSON for each epoch and each decision, by seed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from nas.run import Run
from search_spaces.common.errors import UserError
from search_spaces.common.files import atomic_write

Row = dict[str, Any]


def read_log(run: Run) -> list[Row]:
    """The rows of all epochs, by seed. Errors: UserError where the file is damaged."""
    path = run.path / "epochs.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError:
        raise UserError(str(path), "a log with a JSON object in every line") from None


def write_lines(run: Run, name: str, rows: Iterable[Row]) -> None:
    """Write a file of the run's folder, a line of JSON for each row."""
    with atomic_write(run.path / name) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
