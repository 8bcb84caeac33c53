"""The state of a differentiable search, which can be saved and put back."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nas.supernet.network import Supernet
from nas.supernet.part import Part
from nas.supernet.parts import parts_of
from nas.supernet.recipe import Recipe
from nas.training.batches import Batch, Batches, make_batches
from nas.training.data import Dataset
from nas.training.distributed import ALONE, Processes
from nas.training.optimizers import make_optimizer

ALPHA_SEED = 1_000_003  # added to the seed of the weights' batches


@dataclass
class SearchState:
    """A search at a step: everything that the next step depends on.

    alpha_optimizer: None where alphas are not used. random: torch's generator states. parts: what the recipe adds.
    phase: which of the search's parts it is in (`nas.supernet.phases`); steps and epochs count from its first step, or
    from that of the phase whose weights it goes on with, and steps_before those that were done then.
    rows: the log, a row for each epoch that is over and each decision of a projection. stopped: why the search ended
    before its last epoch, or None; failed: whether that was a number that is not finite.
    """

    supernet: Supernet
    optimizer: torch.optim.Optimizer
    alpha_optimizer: torch.optim.Optimizer | None
    batches: Batches
    alpha_batches: Batches
    device: torch.device
    random: dict[str, Tensor]
    parts: dict[str, Part]
    processes: Processes = ALONE
    step: int = 0
    phase: int = 0
    steps_before: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None
    failed: bool = False
    seconds: float = 0.0

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return self.step // self.batches.steps_per_epoch

    @property
    def all_steps(self) -> int:
        """How many steps are done since the search began."""
        return self.steps_before + self.step

    @property
    def all_epochs(self) -> int:
        """How many epochs are done since the search began."""
        return self.all_steps // self.batches.steps_per_epoch

    def fail(self, reason: str) -> None:
        """End the search before its next step: `reason` happened in this one."""
        place = f"step {self.all_steps + 1}, in epoch {self.all_epochs + 1}"
        self.stopped, self.failed = f"{reason} at {place}", True

    def share(self, batch: Batch, batches: Batches | None = None) -> float:
        """The factor with which a mean over this process's images, averaged over processes, is that over all of them.

        batches: those that the batch is of, by default the weights'.
        """
        if self.processes.world == 1:
            return 1.0
        batches = self.batches if batches is None else batches
        last = (self.step + 1) % batches.steps_per_epoch == 0
        return len(batch.images) * self.processes.world / (batches.last_size if last else batches.batch_size)

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over all processes."""
        return self.processes.total(value.detach().double().clone()).item() / self.processes.world

    def training_batch(self) -> Batch:
        """The weights' batch of this step, on the device."""
        return _to(self.batches.batch(self.step), self.device)

    def held_out_batch(self) -> Batch:
        """The alphas' batch of this step, on the device."""
        return _to(self.alpha_batches.batch(self.step), self.device)


def start(supernet: Supernet, data: Dataset, recipe: Recipe, *, seed: int, processes: Processes = ALONE) -> SearchState:
    """The state before the first step. data: `train` for the weights, `val` for the alphas.

    processes: each has its share of every batch; all draw the same mixing weights, so the search is that of one process
    up to rounding, but for normalisation by batches. Errors: UserError where the images do not fill a batch.
    """
    device = next(supernet.parameters()).device
    batches = make_batches(data, recipe.training, seed=seed, processes=processes)
    alpha_batches, optimizer = batches, None
    if recipe.solver != "weights-only":
        if recipe.solver != "single-level":
            held_out = replace(data, train=data.val)
            alpha_batches = make_batches(held_out, recipe.training, seed=seed + ALPHA_SEED, processes=processes)
        alphas = supernet.architecture_parameters()
        optimizer = torch.optim.Adam(
            alphas, lr=recipe.alpha_rate, betas=recipe.alpha_betas, weight_decay=recipe.alpha_decay
        )
    random = {"cpu": torch.Generator().manual_seed(seed + 1).get_state()}
    if device.type == "cuda":
        random["cuda"] = torch.Generator(device).manual_seed(seed + 1).get_state()
    weights = make_optimizer(supernet.network, recipe.training)
    parts = parts_of(recipe, supernet)
    return SearchState(supernet, weights, optimizer, batches, alpha_batches, device, random, parts, processes)


def state_dict(state: SearchState) -> dict[str, Any]:
    """Everything that the next step depends on, as tensors and plain values."""
    supernet = state.supernet
    return {
        "supernet": supernet.state_dict(),
        "selected": {label: supernet._mixed[label][0].selected for label in sorted(supernet.fixed)},
        "kept": dict(supernet.kept),
        "progress": supernet.progress,
        "generator": supernet.generator.get_state(),
        "optimizer": state.optimizer.state_dict(),
        "alpha_optimizer": None if state.alpha_optimizer is None else state.alpha_optimizer.state_dict(),
        "random": dict(state.random),
        "parts": {name: part.state_dict() for name, part in state.parts.items()},
        "images": [len(state.batches.images), len(state.alpha_batches.images)],
        "step": state.step,
        "phase": state.phase,
        "steps_before": state.steps_before,
        "rows": state.rows,
        "stopped": state.stopped,
        "failed": state.failed,
        "seconds": state.seconds,
    }


def load_state_dict(state: SearchState, content: Mapping[str, Any]) -> None:
    """Put a state back to where `state_dict` was taken. Errors: RuntimeError, ValueError, KeyError if it differs."""
    found = [len(state.batches.images), len(state.alpha_batches.images)]
    if list(content["images"]) != found:
        raise ValueError(f"{content['images']} images for weights and alphas instead of {found}")
    state.supernet.load_state_dict(content["supernet"])
    state.supernet.release()
    state.supernet.select(content["selected"])
    state.supernet.kept = {label: tuple(kept) for label, kept in content.get("kept", {}).items()}
    state.supernet.progress = content["progress"]
    state.supernet.generator.set_state(content["generator"])
    state.optimizer.load_state_dict(deepcopy(content["optimizer"]))
    if state.alpha_optimizer is not None:
        state.alpha_optimizer.load_state_dict(deepcopy(content["alpha_optimizer"]))
    state.random = dict(content["random"])
    for name, part in state.parts.items():
        part.load_state_dict(deepcopy(content["parts"][name]))
    state.step, state.rows = content["step"], [dict(row) for row in content["rows"]]
    state.phase, state.steps_before = content.get("phase", 0), content.get("steps_before", 0)
    state.stopped, state.failed, state.seconds = content["stopped"], content["failed"], content["seconds"]


def _to(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(tensor.to(device) for tensor in batch))
