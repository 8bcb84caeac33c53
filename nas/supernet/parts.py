"""Which parts a recipe has."""

from __future__ import annotations

from nas.supernet.network import Supernet
from nas.supernet.part import Part
from nas.supernet.recipe import Recipe


def parts_of(recipe: Recipe, supernet: Supernet) -> dict[str, Part]:
    """The parts that `recipe` asks for, by name, in the order in which they are called."""
    found: dict[str, Part] = {}
    return found
