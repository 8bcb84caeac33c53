"""Trainings that pause: what one training gave after some steps, and a checkpoint from which it goes on.

Each training has a folder: `results.json` with its milestones, `step-*.pt` while it is paused, `lock`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nas.training.checkpoints import checkpoint_path, checkpoints, keep_newest, restore, save_state
from nas.training.data import Dataset
from nas.training.loop import LoopState, advance, check_model, evaluate_split, start
from nas.training.task import Task
from search_spaces.common.errors import UserError
from search_spaces.common.files import atomic_write, locked

FORMAT = 1
SAVE_SECONDS = 30.0  # a killed training loses at most about so much
LOOK_STEPS = 20  # steps between two looks at the clock
PAUSED_BYTES = 10 * 2**30  # of all checkpoints together: 1,200 networks of NAS-Bench-201's size
log = logging.getLogger("nasforge.training")


@dataclass(frozen=True)
class Milestone:
    """A training after `steps` steps. seconds: of training and evaluation since the first step. metrics: `val_acc`
    (percent), `val_loss`, `train_loss` of the last epoch, `params`; None where the loss was not finite (`stopped`)."""

    steps: int
    seconds: float
    metrics: Mapping[str, float] | None
    stopped: str | None = None


@dataclass(frozen=True)
class PausedTraining:
    """A training that is carried on from where it was, whoever did it last.

    data: of the task, on `device`. seed: of weights, order, augmentation and dropout. folder: where results and
    checkpoints stand; processes that ask at once wait for each other. None keeps nothing and trains each time.
    """

    task: Task
    data: Dataset
    seed: int
    device: str = "cpu"
    folder: Path | None = None

    def reach(self, steps: int, account: str = "") -> tuple[Milestone, float]:
        """The training after `steps` steps, and the seconds that this adds to what `account` has reached before.

        An account is whoever pays, such as a run: results that others left cost it what they took to make, so that a
        clock of these seconds does not depend on what was kept. Asked again, it is told the same.
        Errors: UserError if model and data do not fit; RunError when memory or disk runs out.
        """
        if self.folder is None:
            found = self._train(steps)
            return found, found.seconds
        with locked(self.folder / "lock"):
            results = _Results.read(self.folder / "results.json")
            if steps not in results.milestones:
                results.milestones[steps] = self._train(steps)
            added = results.charge(account, steps)
            results.write(self.folder / "results.json")
            return results.milestones[steps], added

    def _train(self, steps: int) -> Milestone:
        recipe = self.task.recipe
        state = self._resumed(steps)
        saved = time.monotonic()
        while state.step < steps and state.stopped is None:
            advance(state, recipe, steps=min(steps, state.step + LOOK_STEPS))
            if not state.failed and time.monotonic() - saved > SAVE_SECONDS:
                self._save(state)
                saved = time.monotonic()
        if state.failed:
            return Milestone(state.step, state.seconds, None, state.stopped)
        begin = time.perf_counter()
        found = evaluate_split(state.evaluated, self.data, self.data.val, recipe)
        state.seconds += time.perf_counter() - begin
        per_epoch = state.batches.steps_per_epoch
        losses = state.losses[(steps - 1) // per_epoch * per_epoch :]
        own = (p for name, p in state.model.named_parameters() if not name.startswith("auxiliary_head."))
        metrics = {
            "val_acc": found["acc"],
            "val_loss": found["loss"],
            "train_loss": sum(losses) / len(losses),
            "params": float(sum(p.numel() for p in own)),
        }
        if steps < recipe.resolved(per_epoch).steps:
            self._save(state)
        elif self.folder is not None:  # nothing comes after the end
            keep_newest(self.folder, 0)
        return Milestone(steps, state.seconds, metrics)

    def _resumed(self, steps: int) -> LoopState:
        """The state of the newest sound checkpoint not beyond `steps`, or the one before the first step."""
        for path in checkpoints(self.folder) if self.folder is not None else ():
            if int(path.stem.removeprefix("step-")) > steps:
                continue
            state = self._fresh()
            try:
                restore(state, path, self.task.recipe)
                return state
            except UserError as error:
                log.warning("%s cannot be used, the training begins anew: %s", path, error)
        return self._fresh()

    def _fresh(self) -> LoopState:
        model = self.task.make_network(self.data, seed=self.seed).to(self.device)
        check_model(model, self.data)
        return start(model, self.data, self.task.recipe, seed=self.seed)

    def _save(self, state: LoopState) -> None:
        if self.folder is not None:
            save_state(checkpoint_path(self.folder, state.step), state, self.task.recipe)
            keep_newest(self.folder, 1)
            make_room(self.folder.parent)


@dataclass
class _Results:
    """What `results.json` holds. asked: by account, the steps it asked for, in that order."""

    milestones: dict[int, Milestone] = field(default_factory=dict)
    asked: dict[str, list[int]] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> _Results:
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                return _Results()
            return _Results({int(k): Milestone(**m) for k, m in content["milestones"].items()}, content["asked"])
        except (OSError, ValueError, KeyError, TypeError):  # written whole or not at all: this is not ours
            return _Results()

    def write(self, path: Path) -> None:
        milestones = {str(k): asdict(m) for k, m in self.milestones.items()}
        with atomic_write(path) as file:
            json.dump({"format": FORMAT, "milestones": milestones, "asked": self.asked}, file)

    def charge(self, account: str, steps: int) -> float:
        """The seconds between `steps` and the farthest milestone below that the account had asked for before."""
        asked = self.asked.setdefault(account, [])
        if steps not in asked:
            asked.append(steps)
        before = [self.milestones[s] for s in asked[: asked.index(steps)] if s < steps and s in self.milestones]
        begun = max((m.seconds for m in before), default=0.0)
        return max(self.milestones[steps].seconds - begun, 0.0)


def make_room(folder: Path, most_bytes: int = PAUSED_BYTES) -> None:
    """Delete the checkpoints below `folder` that were paused longest ago until the others fit into `most_bytes`.

    The latest are those that a search is about to go on from. What is deleted costs time, never a result: the
    training begins anew and gives the same.
    """
    found = sorted(_stamps(folder.glob("*/step-*.pt")), reverse=True)
    total = 0
    for place, (_, size, path) in enumerate(found):
        total += size
        if total > most_bytes and place:
            path.unlink(missing_ok=True)


def _stamps(paths: Iterable[Path]) -> Iterable[tuple[int, int, Path]]:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # another process goes on from it just now
            about: Any = os.stat(path)
            yield about.st_mtime_ns, about.st_size, path
