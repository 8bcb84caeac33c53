"""nas spaces, nas strategies, nas presets: what there is, with its settings."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Annotated, Any

import typer

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


def presets(
    name: Annotated[str | None, typer.Argument(help="Show all settings of one, with their sources.")] = None,
    json: options.Json = False,
) -> None:
    """List the presets of trainings, or all settings of one with where they are from."""
    from nas.training.presets import PRESETS, preset
    from nas.training.recipe import Recipe

    output = Output("presets", json)
    if name is None:
        rows = []
        for key, found in PRESETS.items():
            recipe = found.recipe
            length = f"{recipe.steps} steps" if recipe.epochs is None else f"{recipe.epochs} epochs"
            rows.append([key, length, recipe.batch_size, recipe.optimizer, recipe.learning_rate, recipe.source])
        output.table(["preset", "length", "batch", "optimiser", "rate", "source"], rows)
        output.finish({"presets": {key: asdict(found.recipe) for key, found in PRESETS.items()}})
        return
    found = preset(name)
    settings = {**asdict(found.recipe), **found.network, "val_share": found.val_share}
    default = asdict(Recipe())
    rows = []
    for key, value in settings.items():
        source = next((text for keys, text in found.sources.items() if key in keys.split(", ")), "")
        if key != "source" and (source or value != default.get(key)):
            rows.append([key, str(value), source])
    output.say(found.recipe.source)
    output.table(["setting (--set NAME=VALUE)", "value", "source"], rows)
    output.say("\nall other settings are off, or as `nas.training.Recipe` has them", style="dim")
    output.finish({"preset": settings, "sources": dict(found.sources)})


def _first_sentence(text: str | None) -> str:
    paragraph = " ".join((text or "").strip().split("\n\n")[0].split())
    return re.split(r"(?<=[a-z0-9)])\. ", paragraph)[0].rstrip(".")
