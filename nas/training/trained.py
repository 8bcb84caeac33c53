"""What a training left behind: its final weights in a network, its best seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from nas.run import Run, TrialRecord
from nas.training.data import Dataset
from nas.training.task import Task
from search_spaces.common.errors import RunError, UserError


@dataclass(frozen=True)
class Trained:
    """A trained network of a run, in evaluation mode, with its data."""

    model: nn.Module
    data: Dataset
    task: Task
    run: Run
    record: TrialRecord

    @property
    def metrics(self) -> Mapping[str, float]:
        """What was measured at the end: `val_acc`, `test_acc` in percent, losses, `epochs`, `seconds`."""
        return self.record.metrics or {}


def weights_path(run: Run, seed: int) -> Path:
    """The file of a seed's final weights."""
    return run.path / "weights" / f"seed-{seed}.safetensors"


def best_record(run: Run) -> TrialRecord:
    """The finished training with the highest validation accuracy (training loss where nothing was validated)."""
    done = [r for r in run.trials() if r.status == "done" and r.metrics]
    if not done:
        raise UserError(str(run.path), f"a training with a finished seed (nas resume {run.path})")
    return max(done, key=lambda r: _merit(r.metrics or {}))


def _merit(metrics: Mapping[str, float]) -> float:
    return metrics.get("val_acc", -metrics.get("train_loss", math.inf))


def load_trained(reference: str) -> Trained:
    """The network that RUN, RUN:best or RUN:<number> names, with its final weights. Errors: UserError."""
    folder, colon, which = reference.rpartition(":")
    if not colon or Run.exists(reference):
        folder, which = reference, "best"
    run = Run.open(folder)
    if run.settings.get("kind") != "training":
        raise UserError(reference, f"a training; this run is a {run.settings.get('kind')} (nas train {reference})")
    if which != "best" and not which.isdigit():
        raise UserError(which, "best or the number of a seed's trial after the run's folder", "best")
    record = best_record(run) if which == "best" else run.trial(int(which))
    if record.status != "done":
        raise UserError(reference, f"a finished training; this one is {record.status}")
    task = Task.from_json(run.settings["task"])
    data = task.open_data()
    assert record.seed is not None
    model = task.make_network(data, seed=record.seed, auxiliary=False)
    path = weights_path(run, record.seed)
    try:
        model.load_state_dict(load_file(path))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise RunError(f"the weights {path} cannot be loaded: {' '.join(str(error).split())[:160]}") from error
    return Trained(model.eval(), data, task, run, record)
