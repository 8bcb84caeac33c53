"""SupernetEvaluator: what an architecture is worth with the weights it shares in a trained supernet."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

from nas.run import Run
from nas.supernet.evolution import RECALIBRATION
from nas.supernet.trained import TrainedSupernet, checkpoint_folder, named_trial, open_trained, seeds_of
from nas.training.checkpoints import checkpoints
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

METRICS = ("val_acc", "val_loss", "params", "macs", "live_macs", "cost_seconds")


@dataclass(frozen=True)
class SupernetEvaluator:
    """Measures an architecture on the alphas' images, nothing is trained; evolution over it is SPOS's search.

    reference: the run of a search in a supernet; `RUN:<id>` and `RUN:best` are the supernet of that trial's seed,
    `RUN` that of the first. space: the run's, if given. device: cpu, cuda or cuda:1. BatchNorm's statistics and
    the number of images are those of the recipe's own evolution where it has one (SPOS), else 2,000 of the weights'
    images and all of the alphas'.

    Metrics: `val_acc` (percent), `val_loss`, where the space states costs `params`, `macs` and `live_macs` of the
    network at the supernet's size, and `cost_seconds`, measured. The trial's seed is not used: the same architecture
    has the same value. Errors: UserError for a run of another kind or space, no checkpoint, an architecture of another
    space, a fidelity.
    """

    reference: str
    space: str = ""
    device: str = "cpu"

    def __post_init__(self) -> None:
        run, seed = self._named()
        own = run.settings["space"]
        if self.space and load_space(self.space).name != load_space(own).name:
            raise UserError(self.space, f"the space of the supernet in {run.path}", own)
        object.__setattr__(self, "space", self.space or own)
        folder = checkpoint_folder(run, seed)
        if not checkpoints(folder):
            raise UserError(str(folder), "a search with a checkpoint")

    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics, the accuracy first."""
        return METRICS

    def evaluate(self, arch: Any, fidelity: int | None = None, *, seed: int) -> dict[str, float]:
        """The metrics of one architecture."""
        if fidelity is not None:
            raise UserError(fidelity, "no fidelity: nothing is trained")
        trained = self._opened()
        if not _belongs(trained, arch):
            raise UserError(str(arch), f"an architecture of {trained.space.name}")
        own = trained.task.recipe.evolution
        limits = (RECALIBRATION, None) if own is None else (own.recalibration, own.evaluation)
        begin = time.perf_counter()
        found = trained.accuracy(arch, recalibration=limits[0], evaluation=limits[1])
        seconds = time.perf_counter() - begin
        return {"val_acc": found["acc"], "val_loss": found["loss"], **_costs(trained, arch), "cost_seconds": seconds}

    def _named(self) -> tuple[Run, int]:
        run, record = named_trial(self.reference)
        if record is None:
            return run, seeds_of(run)[0]
        assert record.seed is not None
        return run, record.seed

    def _opened(self) -> TrainedSupernet:
        run, seed = self._named()
        newest = checkpoints(checkpoint_folder(run, seed))[0]
        return _open(str(run.path), seed, self.device, str(newest), newest.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _open(folder: str, seed: int, device: str, checkpoint: str, stamp: int) -> TrainedSupernet:
    """Once in each process; a supernet that was trained further is opened anew."""
    return open_trained(Run.open(folder), seed, device)


def _belongs(trained: TrainedSupernet, arch: Any) -> bool:
    try:
        return trained.space.decode(trained.space.encode(arch)) == arch
    except (UserError, IndexError, KeyError, TypeError, ValueError, AttributeError):
        return False


def _costs(trained: TrainedSupernet, arch: Any) -> dict[str, float]:
    _, height, width = trained.data.shape
    if height != width:
        return {}
    try:
        found = trained.space.cost(arch, input_size=height, **trained.network)
    except UserError:  # a space that states no costs
        return {}
    return {name: float(found[name]) for name in ("params", "macs", "live_macs")}
