"""Budget: when a search ends."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from search_spaces.common.errors import UserError


@dataclass(frozen=True)
class Budget:
    """When a search ends: after `queries` evaluations, `simulated_seconds` of the trials' `cost_seconds`, or
    `wall_seconds`; the first that is reached. Errors: UserError for a number that is not above zero, or none at all.
    """

    queries: int | None = None
    simulated_seconds: float | None = None
    wall_seconds: float | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in given.items():
            if value is not None and not value > 0:
                raise UserError(value, f"a number above 0 for {name.replace('_', ' ')}")
        if self.queries is not None and self.queries != int(self.queries):
            raise UserError(self.queries, "a whole number of queries")
        if all(value is None for value in given.values()):
            raise UserError("budget", "queries, simulated seconds or wall seconds")
