"""Recipes in stages: networks that grow while candidates are dropped, and edges decided one after another."""

from __future__ import annotations

from collections.abc import Mapping

from nas.supernet.recipe import Recipe

LISTED: tuple[Recipe, ...] = ()

# Where the settings stand in which a recipe differs from darts-v1.
SOURCES: dict[str, Mapping[str, str]] = {}
