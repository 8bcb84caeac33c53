"""Expressions of written Python, and how they break over lines: as ruff format does at 120 characters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH = 120


class Code(str):
    """Python text, where a plain string would be a value."""


@dataclass(frozen=True)
class Call:
    """`head(first, name=second)`; arguments are (name or "", value) pairs, values calls, sums, code or plain values."""

    head: str
    arguments: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return f"{self.head}({', '.join(_argument(name, value) for name, value in self.arguments)})"


@dataclass(frozen=True)
class Items:
    """`[first, second]`."""

    values: tuple[object, ...]

    def __str__(self) -> str:
        return f"[{', '.join(text(value) for value in self.values)}]"


@dataclass(frozen=True)
class Sum:
    """`first + second`."""

    terms: tuple[str, ...]

    def __str__(self) -> str:
        return " + ".join(self.terms)


def call(head: str, *values: object, **named: object) -> Call:
    """A call in Python's own manner."""
    return Call(head, (*(("", value) for value in values), *named.items()))


def add(terms: Sequence[str]) -> Sum | Code:
    """The sum of one or more terms."""
    return Sum(tuple(terms)) if len(terms) > 1 else Code(terms[0])


def text(value: object) -> str:
    """`value` on one line, strings in double quotes."""
    if isinstance(value, Code | Call | Items | Sum):
        return str(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _argument(name: str, value: object) -> str:
    return f"{name}={text(value)}" if name else text(value)


def layout(prefix: str, value: object, indent: int = 8, suffix: str = "") -> list[str]:
    """The lines of `prefix` and `value`, broken where they do not fit."""
    space = " " * indent
    line = f"{space}{prefix}{text(value)}{suffix}"
    if len(line) <= WIDTH or not isinstance(value, Call | Items | Sum):
        return [line]
    if isinstance(value, Sum):
        lines = [f"{space}    {'+ ' if i else ''}{term}" for i, term in enumerate(value.terms)]
        return [f"{space}{prefix}(", *lines, f"{space}){suffix}"]
    if isinstance(value, Items):
        body = [line for item in value.values for line in layout("", item, indent + 4, ",")]
        return [f"{space}{prefix}[", *body, f"{space}]{suffix}"]
    inner = f"{space}    {', '.join(_argument(name, item) for name, item in value.arguments)}"
    if len(inner) <= WIDTH:
        body = [inner]
    elif len(value.arguments) == 1 and isinstance(value.arguments[0][1], Sum):  # the brackets are there already
        body = layout("", value.arguments[0][1], indent)[1:-1]
    else:
        comma = "," * (len(value.arguments) > 1)
        body = [
            line
            for name, item in value.arguments
            for line in layout(f"{name}=" if name else "", item, indent + 4, comma)
        ]
    return [f"{space}{prefix}{value.head}(", *body, f"{space}){suffix}"]


def function(header: str, arguments: Iterable[str], result: str = "") -> list[str]:
    """`    def header(self, ...):` with its arguments broken over lines where they are too many."""
    listed = ["self", *arguments]
    arrow = f" -> {result}" if result else ""
    line = f"    def {header}({', '.join(listed)}){arrow}:"
    if len(line) <= WIDTH:
        return [line]
    inner = f"        {', '.join(listed)}"
    body = [inner] if len(inner) <= WIDTH else [f"        {argument}," for argument in listed]
    return [f"    def {header}(", *body, f"    ){arrow}:"]
