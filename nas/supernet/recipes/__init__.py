"""The recipes of papers, each with the place it was taken from.

Where a setting's place ends with `recollection` it was not checked against the paper or its code.
"""

from __future__ import annotations

from collections.abc import Mapping

from nas.supernet.recipe import Recipe, diff
from nas.supernet.recipes import darts, sampled, stabilised, staged
from nas.supernet.recipes.scales import SCALES, Scale, scaled
from search_spaces.common.names import match

__all__ = ["OWN", "RECIPES", "SCALES", "SOURCES", "Scale", "diff", "recipe", "scaled", "sources"]

_FILES = (darts, stabilised, staged, sampled)
RECIPES: dict[str, Recipe] = {found.name: found for file in _FILES for found in file.LISTED}
# Where the settings stand in which a recipe differs from darts-v1; those of darts-v1 itself in its own entry.
# OWN: recipes whose entry has all of them.
SOURCES: dict[str, Mapping[str, str]] = {name: found for file in _FILES for name, found in file.SOURCES.items()}
OWN = tuple(found.name for found in sampled.LISTED)


def sources(name: str) -> dict[str, str]:
    """{setting: where it stands} for all settings of a recipe that have a place; none for an unknown recipe."""
    if name not in RECIPES:
        return {}
    inherited = {} if name in OWN else SOURCES["darts-v1"]  # what trains single paths is no descendant of DARTS
    return {
        key: place for found in (inherited, SOURCES[name]) for keys, place in found.items() for key in keys.split(", ")
    }


def recipe(name: str) -> Recipe:
    """The recipe called `name`. Errors: UserError with the nearest."""
    return RECIPES[match(name, RECIPES, "a recipe")]
