"""nas spaces, nas strategies: what there is, with its settings."""

from __future__ import annotations

import re
from typing import Any

from nas.cli import options
from nas.cli.output import Output
from search_spaces.common.errors import UserError


def spaces(json: options.Json = False) -> None:
    """List the search spaces."""
    from search_spaces.registry import load_space, space_names

    output = Output("spaces", json)
    listed = []
    for name in space_names():
        space = load_space(name)
        try:
            size: int | None = len(space)
        except (UserError, OverflowError):
            size = None
        about = _first_sentence(type(space).__doc__)
        listed.append({"name": name, "architectures": size, "about": about})
    output.table(["space", "architectures", "what it is"], [[*row.values()] for row in listed])
    output.finish({"spaces": listed})


def strategies(json: options.Json = False) -> None:
    """List the search strategies with their settings and defaults."""
    from nas.strategies import STRATEGIES, strategy_class, strategy_settings

    output = Output("strategies", json)
    listed: list[dict[str, Any]] = []
    for name in STRATEGIES:
        settings = strategy_settings(name)
        about = _first_sentence(strategy_class(name).__doc__)
        listed.append({"name": name, "settings": settings, "about": about})
    rows = [[s["name"], ", ".join(f"{k}={v}" for k, v in s["settings"].items()), s["about"]] for s in listed]
    output.table(["strategy", "settings (--setting NAME=VALUE)", "what it does"], rows)
    output.finish({"strategies": listed})


def _first_sentence(text: str | None) -> str:
    paragraph = " ".join((text or "").strip().split("\n\n")[0].split())
    return re.split(r"(?<=[a-z0-9)])\. ", paragraph)[0].rstrip(".")
