"""The two ways in which scoring says no."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: names the value, what was expected and, where there is one, the nearest valid choice.

    The same fields and text as the error of `search_spaces`, which stands on the same floor and is not imported.
    """

    def __init__(self, value: object, expected: str, suggestion: str | None = None):
        self.value, self.expected, self.suggestion = value, expected, suggestion
        super().__init__(f"{value!r}: expected {expected}" + (f"; did you mean {suggestion!r}?" if suggestion else ""))

    def __reduce__(self):
        return type(self), (self.value, self.expected, self.suggestion)


class NoValue(Exception):
    """Raised by a proxy or a pass that has no value for this model and batch; the text is the reason."""


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that looks most like `name`, if any does."""
    return next(iter(difflib.get_close_matches(name, list(choices), 1, 0.5)), None)
