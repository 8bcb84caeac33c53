"""The network a recipe searches in, and the data it searches on."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nas.supernet.auxiliary import add_auxiliary_skips
from nas.supernet.candidates import check_candidates
from nas.supernet.edges import edges_into_nodes
from nas.supernet.network import EDGE_LABELS, PartialChannels, Supernet
from nas.supernet.recipe import Recipe
from nas.training.data import Dataset, Split, stratified_split
from search_spaces.cells.darts import Darts
from search_spaces.choice import Choice, find_choices
from search_spaces.common.errors import UserError
from search_spaces.layered import LayeredSpace
from search_spaces.module_space import ModuleSpace
from search_spaces.space import SearchSpace

SCALE = ("channels", "layers", "cells_per_stage", "stem")


def network_scale(space: SearchSpace, recipe: Recipe) -> dict[str, Any]:
    """The keywords of `space.choices` that the recipe sets. Errors: UserError for a space without choices."""
    inner = _inner(space)
    if type(inner).choices is SearchSpace.choices:
        raise UserError(space.name, "a space with a network of choices", "nas-bench-201")
    if isinstance(inner, ModuleSpace):
        # The other names may mean something else in a module of one's own, and Choices must not depend on them.
        return {"channels": recipe.channels} if "channels" in inner.keywords() else {}
    known = inspect.signature(inner.choices).parameters
    return {name: getattr(recipe, name) for name in SCALE if name in known}


def make_supernet(space: SearchSpace, recipe: Recipe, data: Dataset, *, seed: int) -> Supernet:
    """The supernet for these data; its weights, alphas and draws follow from `seed`.

    In cells with choices normalisations have no weights of their own unless the recipe is affine, and pooling in the
    space darts gets one behind it: `space.build` has neither, so weights of such a supernet are not a built network's.
    A normalisation that is itself a candidate keeps its weights: the whole layer is what is to be compared.
    Errors: UserError where k of partial channels does not divide the channels, for partial channels or edge
    normalisation where labels name no edges, and in a module of one's own for candidates that do not fit each other
    (`check_candidates`).
    """
    scale = {**network_scale(space, recipe), "in_channels": data.shape[0], "num_classes": data.num_classes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, partial = space.choices(**scale), None
        _prepare(network, space, recipe)
        if isinstance(_inner(space), ModuleSpace):
            check_candidates(network, data.shape)
        if (recipe.partial > 1 or recipe.edge_normalisation) and not edges_into_nodes(find_choices(network)):
            raise UserError(
                recipe.name, f"a recipe without partial channels in {space.name}: it needs {EDGE_LABELS}", "gdas"
            )
        if recipe.partial > 1:
            if scale.get("channels", 0) % recipe.partial:
                raise UserError(recipe.partial, f"k of partial channels, one that divides {recipe.channels} channels")
            narrow = space.choices(**{**scale, "channels": recipe.channels // recipe.partial})
            _prepare(narrow, space, recipe)
            partial = PartialChannels(recipe.partial, narrow)
        supernet = Supernet(
            network,
            recipe.make_relaxation(),
            generator=torch.Generator().manual_seed(seed),
            partial=partial,
            edge_normalisation=recipe.edge_normalisation,
            checkpointed=recipe.checkpointed,
            joined=recipe.joined_channels,
        )
        if recipe.auxiliary_skip:
            add_auxiliary_skips(supernet, recipe.auxiliary_skip)
        return supernet


def search_data(data: Dataset, recipe: Recipe, *, images: int | None, seed: int) -> Dataset:
    """The data of a search: `train` for the weights, `val` for the alphas, both from `data.train`; `test` untouched.

    images: at most so many of both together. Classes keep their shares; the split follows from `seed`. Errors:
    UserError for classes with too few images.
    """
    labels = data.train.labels.numpy()
    wanted = min(recipe.shares, 1.0 if images is None else images / len(labels) * recipe.shares)
    alphas = recipe.alpha_images / recipe.shares * wanted
    kept, held = stratified_split(labels, alphas, seed=seed)
    if wanted < 1 - 1e-9:
        share = (wanted - alphas) / (1 - alphas)
        _, inner = stratified_split(labels[kept], share, seed=seed)
        kept = kept[inner]
    parts = [Split(data.train.images[torch.from_numpy(rows)], data.train.labels[rows]) for rows in (kept, held)]
    return replace(data, train=parts[0], val=parts[1])


def _inner(space: SearchSpace) -> SearchSpace:
    return space.space if isinstance(space, LayeredSpace) else space


def _prepare(network: nn.Module, space: SearchSpace, recipe: Recipe) -> None:
    inner = _inner(space)
    if not recipe.affine:
        names: list[str] = [] if isinstance(inner, ModuleSpace) else getattr(network, "stages", list)()
        stages = [network.get_submodule(name) for name in names]
        searched = [stage for stage in stages if any(isinstance(part, Choice) for part in stage.modules())]
        places: list[nn.Module] = [choice for choices in find_choices(network).values() for choice in choices]
        whole = {id(candidate) for place in places for candidate in place.candidates}  # type: ignore[union-attr]
        for place in (*searched, *places):
            for part in place.modules():
                if isinstance(part, nn.BatchNorm2d) and id(part) not in whole:
                    part.weight = part.bias = None  # type: ignore[assignment]
                    part.affine = False
    if recipe.norm_after_pools and isinstance(inner, Darts):
        for cell in network.cells:  # type: ignore[union-attr]
            width = cell.preprocess_1.conv.out_channels
            for part in list(cell.modules()):
                if isinstance(part, Choice):
                    for index, candidate in enumerate(part.candidates):
                        if isinstance(candidate, nn.MaxPool2d | nn.AvgPool2d):
                            norm = nn.BatchNorm2d(width, affine=recipe.affine)
                            part.candidates[index] = nn.Sequential(candidate, norm)
