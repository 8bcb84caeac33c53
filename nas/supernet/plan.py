"""What a search with one seed will do, part after part."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nas.supernet.building import network_scale
from nas.supernet.phases import Phase, phases_of, total_epochs
from nas.supernet.projection import Decision, decisions_of
from nas.supernet.state import SearchState
from nas.supernet.task import SearchTask
from nas.training.data import Dataset
from search_spaces.choice import find_choices
from search_spaces.space import SearchSpace


@dataclass(frozen=True)
class Plan:
    """The parts of a search with one seed, and the decisions of its projection in their order."""

    phases: list[Phase]
    decisions: list[Decision]

    @property
    def epochs(self) -> int:
        """The epochs of all parts."""
        return total_epochs(self.phases)

    def due(self, state: SearchState) -> Decision | None:
        """The decision that comes before the next epoch, if there is one."""
        phase, made = self.phases[state.phase], sum("decided" in row for row in state.rows)
        if not phase.projecting or made == len(self.decisions):
            return None
        projection = phase.recipe.projection
        assert projection is not None
        return self.decisions[made] if state.epoch >= made * projection.epochs else None


def plan_of(task: SearchTask, space: SearchSpace, data: Dataset, seed: int) -> Plan:
    """What a search with `seed` will do."""
    if task.recipe.projection is None:
        return Plan(phases_of(task.recipe, 0), [])
    shape = {"in_channels": data.shape[0], "num_classes": data.num_classes}
    with torch.random.fork_rng(devices=[]):
        labels = find_choices(space.choices(**network_scale(space, task.recipe), **shape))
    decisions = decisions_of(space, labels, seed)
    return Plan(phases_of(task.recipe, len(decisions)), decisions)
