"""A trained supernet of a run, opened to measure or to inherit from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nas.run import Run, TrialRecord
from nas.supernet.building import network_scale
from nas.supernet.evolution import RECALIBRATION, path_accuracy
from nas.supernet.network import Supernet
from nas.supernet.search import KIND, SearchTask, open_supernet
from nas.training.data import Dataset
from nas.training.loop import training_errors
from search_spaces.common.errors import UserError, one_of
from search_spaces.registry import load_space
from search_spaces.space import SearchSpace


@dataclass(frozen=True, eq=False)
class TrainedSupernet:
    """The supernet of one seed of a search, with the images it was trained on; both on one device.

    data: `train` are the images of the weights, `val` those of the alphas. epochs: how many are done.
    """

    run: Run
    seed: int
    task: SearchTask
    space: SearchSpace
    supernet: Supernet
    data: Dataset
    step: int
    epochs: int

    @property
    def network(self) -> dict[str, Any]:
        """The keywords of `space.build` that give an architecture the size it has in the supernet."""
        shape = {"in_channels": self.data.shape[0], "num_classes": self.data.num_classes}
        return {**shape, **network_scale(self.space, self.task.recipe)}

    def accuracy(
        self,
        arch: Any,
        *,
        recalibration: tuple[int, int] = RECALIBRATION,
        evaluation: tuple[int, int] | None = None,
    ) -> dict[str, float]:
        """`path_accuracy` of an architecture."""
        limits: dict[str, Any] = {"recalibration": recalibration, "evaluation": evaluation}
        with training_errors(max(recalibration[1], 500), "images in a batch"):
            return path_accuracy(self.supernet, self.space.select(arch), self.data, **limits)


def open_trained(run: Run, seed: int | None = None, device: str = "cpu") -> TrainedSupernet:
    """The supernet of a seed (default: the first) as its last sound checkpoint has it.

    Errors: UserError for another kind of run, a seed that was not searched with, no checkpoint, and for data that have
    changed since the search.
    """
    seed = seeds_of(run)[0] if seed is None else seed
    if seed not in seeds_of(run):
        raise UserError(seed, f"a seed of the search in {run.path} ({one_of(map(str, seeds_of(run)))})")
    task, state, data = open_supernet(run, seed)
    about = data.describe()
    if about != run.settings["data"]:
        changed = [k for k, v in run.settings["data"].items() if about.get(k) != v]
        raise UserError(task.data, f"the images of the search in {run.path}; other than then: {', '.join(changed)}")
    there = torch.device(device)
    with training_errors(task.recipe.training.batch_size):
        supernet, data_there = state.supernet.to(there), data.to(there)
    space = load_space(task.space)
    return TrainedSupernet(run, seed, task, space, supernet, data_there, state.step, state.epoch)


def seeds_of(run: Run) -> list[int]:
    """The seeds of a search in a supernet. Errors: UserError for another kind of run."""
    if run.settings.get("kind") != KIND:
        raise UserError(str(run.path), f"a search in a supernet; this run is a {run.settings.get('kind')}")
    return list(run.settings["seeds"])


def named_trial(reference: str) -> tuple[Run, TrialRecord | None]:
    """(run, trial) of `RUN:best` and `RUN:<id>`; (run, None) of `RUN` alone. Errors: UserError as `find_architecture`,
    and for a run that is no search in a supernet."""
    from nas.references import find_architecture

    folder, colon, _ = reference.rpartition(":")
    alone = not colon or Run.exists(reference)
    run = Run.open(reference if alone else folder)
    seeds_of(run)
    return run, None if alone else find_architecture(reference).record


def checkpoint_folder(run: Run, seed: int) -> Path:
    """Where the checkpoints of a seed lie."""
    return run.path / "checkpoints" / f"seed-{seed}"
