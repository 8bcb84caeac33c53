"""The parts of a search: one for most recipes, the stages of those that shrink or grow, the time of a projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from nas.supernet.building import make_supernet
from nas.supernet.network import Supernet
from nas.supernet.recipe import Recipe
from nas.supernet.state import SearchState, start
from nas.training.data import Dataset
from nas.training.distributed import ALONE, Processes
from search_spaces.space import SearchSpace


@dataclass(frozen=True)
class Phase:
    """A part of a search. recipe: of its steps. end: the epoch of the state with which it is over.

    length: how many epochs that are. own: it has a supernet of its own, new or with weights of the one before;
    candidates: (how many, of how many) that one keeps. goes_on: its epochs count from those before.
    projecting: decisions are taken in it.
    """

    recipe: Recipe
    end: int
    length: int
    own: bool = True
    candidates: tuple[int, int] | None = None
    goes_on: bool = False
    projecting: bool = False


def phases_of(recipe: Recipe, decisions: int) -> list[Phase]:
    """The parts of a search, in order. decisions: how many a projection in the space takes."""
    first = _frozen(recipe) if recipe.projection is not None and recipe.projection.fixed_alphas else recipe
    found = _stages(first) if first.stages is not None else [Phase(first, first.epochs, first.epochs)]
    if recipe.projection is not None:
        epochs = recipe.projection.epochs * (decisions - 1)
        tuning = _tuning(replace(found[-1].recipe, stages=None), recipe.projection.rate, max(epochs, 1))
        found.append(Phase(tuning, epochs, epochs, own=False, projecting=True))
    return found


def total_epochs(phases: Sequence[Phase]) -> int:
    """The epochs of all parts."""
    return sum(phase.length for phase in phases)


def begin(
    phases: Sequence[Phase],
    index: int,
    space: SearchSpace,
    data: Dataset,
    *,
    seed: int,
    device: torch.device,
    before: SearchState | None = None,
    processes: Processes = ALONE,
) -> SearchState:
    """The state at the start of a part. before: the one at the end of the part before, which is used up; None for a
    state that another is loaded into, or the first. data: on the device.
    """
    phase = phases[index]
    own = seed if index == 0 else int(np.random.SeedSequence(seed, spawn_key=(index,)).generate_state(1)[0])
    if phase.own or before is None:
        supernet = make_supernet(space, phase.recipe, data, seed=own).to(device)
    else:
        supernet = before.supernet
    projection = phase.recipe.projection
    if projection is not None and projection.fixed_alphas and phase.own:
        with torch.no_grad():
            for alpha in supernet.alphas.values():
                alpha.zero_()
    if before is not None and phase.own:
        if phase.goes_on:
            inherit(supernet, before.supernet)
        if phase.candidates is not None:
            for label, kept in survivors(before.supernet, *phase.candidates).items():
                supernet.restrict(label, kept)
    state = start(supernet, data, phase.recipe, seed=seed if phase.goes_on else own, processes=processes)
    state.phase = index
    if before is not None:
        state.rows, state.seconds = before.rows, before.seconds
        state.step, state.steps_before = (before.step, before.steps_before) if phase.goes_on else (0, before.all_steps)
    return state


def survivors(supernet: Supernet, count: int, of: int) -> dict[str, tuple[int, ...]]:
    """{label: the candidates with the largest alphas that stay}: `count` where there were `of`, the same share, rounded
    up, of other numbers; among equals the earlier. Candidates that a label had lost before stay lost.
    """
    found = {}
    for label, alpha in supernet.alphas.items():
        wanted = -(-len(alpha) * count // of)
        ranked = sorted(supernet.candidates_of(label), key=lambda k: -float(alpha.detach()[k]))
        found[label] = tuple(sorted(ranked[:wanted]))
    return found


@torch.no_grad()
def inherit(supernet: Supernet, before: Supernet) -> None:
    """Weights, statistics, alphas and draws of `before` go on in a supernet whose partial channels may be wider.

    A wider candidate has the old one in its leading channels: their weights on channels that the old one did not see
    are zero, so that they compute what they did; the other channels keep the weights they were made with. (DrNAS's
    code widens as Net2Net does, with copies of channels instead of new ones; recollection.)
    """
    old = before.state_dict()
    for name, tensor in supernet.state_dict().items():
        source = old[name]
        if source.shape == tensor.shape:
            tensor.copy_(source)
            continue
        part = tuple(slice(0, size) for size in source.shape)
        if source.ndim > 1:
            tensor[part[0]] = 0
        tensor[part] = source
    supernet.generator.set_state(before.generator.get_state())


def _stages(recipe: Recipe) -> list[Phase]:
    stages, epochs = recipe.stages, recipe.epochs
    assert stages is not None
    training = recipe.training
    if stages.inherit:  # one schedule over all
        training = replace(training, epochs=epochs * len(stages.candidates))
    found = []
    for index, count in enumerate(stages.candidates):
        changes: dict[str, Any] = {
            name: getattr(stages, name)[index]
            for name in ("layers", "cells_per_stage", "partial", "skip_dropout")
            if getattr(stages, name) is not None
        }
        own = replace(recipe, training=training, stages=None, **changes)
        goes_on = stages.inherit and index > 0
        end = epochs * (index + 1) if stages.inherit else epochs
        candidates = (count, stages.candidates[0]) if index else None
        found.append(Phase(own, end, epochs, candidates=candidates, goes_on=goes_on))
    return found


def _frozen(recipe: Recipe) -> Recipe:
    return replace(recipe, alpha_warmup_epochs=recipe.epochs * len(recipe.stages.candidates if recipe.stages else "x"))


def _tuning(recipe: Recipe, rate: float, epochs: int) -> Recipe:
    """The recipe of the weights between decisions: the schedule anew from a lower rate; alphas stay."""
    training = recipe.training
    lower = training.learning_rate * rate
    changes: dict[str, Any] = {
        "learning_rate": lower,
        "final_rate": min(training.final_rate, lower),
        "warmup_epochs": 0.0,
    }
    tuned = replace(training, epochs=epochs, **changes)
    return replace(recipe, training=tuned, alpha_warmup_epochs=epochs)
