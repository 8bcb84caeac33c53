"""Which parts a recipe has."""

from __future__ import annotations

from nas.supernet.auxiliary import AuxiliarySkip
from nas.supernet.importance import ImportanceSampling
from nas.supernet.latency import LatencyLoss
from nas.supernet.network import Supernet
from nas.supernet.oles import OperationFreezing
from nas.supernet.part import Part
from nas.supernet.recipe import Recipe
from nas.supernet.relaxed import Twin
from nas.supernet.shapley import ShapleyAlphas
from nas.supernet.skip_dropout import SkipDropout


def parts_of(recipe: Recipe, supernet: Supernet) -> dict[str, Part]:
    """The parts that `recipe` asks for, by name, in the order in which they are called."""
    found: dict[str, Part] = {}
    if recipe.auxiliary_skip:
        found["auxiliary-skip"] = AuxiliarySkip(supernet, recipe)
    if recipe.freezing is not None:
        found["freezing"] = OperationFreezing(supernet, recipe.freezing)
    if recipe.shapley is not None:
        found["shapley"] = ShapleyAlphas(supernet, recipe.shapley)
    if recipe.latency is not None:
        found["latency"] = LatencyLoss(supernet, recipe.latency)
    if recipe.importance is not None:
        found["importance"] = ImportanceSampling(supernet, recipe.importance)
    if recipe.solver == "relaxed":
        found["twin"] = Twin(supernet, recipe)
    if recipe.skip_dropout:
        found["skip-dropout"] = SkipDropout(supernet)
    return found
