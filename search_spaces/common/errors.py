"""The one error that a user is meant to read."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: names the value, what was expected and, where there is one, the nearest valid choice.

    The command line prints it as one line and exits with status 2.
    """

    def __init__(self, value: object, expected: str, suggestion: str | None = None):
        self.value, self.expected, self.suggestion = value, expected, suggestion
        text = value if isinstance(value, str) and value.startswith("--") else repr(value)
        message = f"{text}: expected {expected}"
        if suggestion:
            message += f"; did you mean {suggestion!r}?"
        super().__init__(message)

    def __reduce__(self):
        return type(self), (self.value, self.expected, self.suggestion)


class RunError(RuntimeError):
    """Something failed while running, through no fault in the input; exit status 1."""


def one_of(names: Iterable[str], limit: int = 12) -> str:
    """`one of a, b, c` for the `expected` of a UserError; long lists are cut and counted."""
    listed = list(names)
    text = ", ".join(listed[:limit])
    return f"one of {text}" + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
