"""A training as a run: one trial for each seed, checkpoints, curves, weights; resumed by the same call."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save as as_safetensors
from torch import Tensor, nn

from nas.run import Run, TrialRecord
from nas.training.checkpoints import (
    DamagedCheckpoint,
    checkpoint_path,
    checkpoints,
    keep_newest,
    read,
    restore,
    save_state,
)
from nas.training.continued import check_continues
from nas.training.curves import read_curves, write_curves
from nas.training.data import Dataset
from nas.training.distributed import ALONE, Processes
from nas.training.loop import LoopState, advance, check_model, evaluate_split, start, training_errors
from nas.training.preflight import Forecast, forecast
from nas.training.recalibrate import statistics_layers
from nas.training.task import Task
from nas.training.trained import weights_path
from search_spaces.common.errors import UserError
from search_spaces.common.files import atomic_write

CHECKPOINT_STEPS = 1000
Row = dict[str, float]
Progress = Callable[[int, int | None], None]


def train_run(
    task: Task,
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
    checkpoint_steps: int = CHECKPOINT_STEPS,
    describe: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    on_forecast: Callable[[Forecast], None] | None = None,
    on_epoch: Callable[[int, Row], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
    processes: Processes = ALONE,
) -> Run:
    """Train the task once with each seed in the folder `out`; goes on where a training there stopped.

    seeds: of weights, order, augmentation and dropout. checkpoint_steps: a checkpoint is written so often besides
    after every epoch. on_forecast: gets time and memory as predicted from two steps before the first one. on_epoch:
    gets (seed, row of the curves). on_warning: gets what the leading process found amiss, such as a damaged checkpoint.
    A seed whose loss, gradient or weights are not finite is a failed trial; its last good checkpoint stays.
    Errors: UserError for bad data, a model that does not fit them, a folder with another training (differences are
    listed); RunError when memory or disk runs out.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(list(seeds), "seeds that differ, at least one")
    if checkpoint_steps < 1:
        raise UserError(checkpoint_steps, "a positive number of steps between checkpoints")
    data = task.open_data()
    if task.recipe.patience is not None and not len(data.val):
        raise UserError(task.recipe.patience, "validation images, by which early stopping goes (--val-share)")
    out = Path(out)
    if processes.leads:
        _create(out, task, data, seeds, describe or {})
    processes.wait()
    run = Run.open(out)
    with contextlib.ExitStack() as stack:
        if processes.leads:
            stack.enter_context(run.writing())
        session = _Session(run, task, data, seeds, device, checkpoint_steps, processes)
        if on_warning is not None and processes.leads:
            session.tell = on_warning
        for index, seed in enumerate(seeds):
            session.train(index, seed, progress, on_forecast, on_epoch)
        if processes.leads:
            run.update_settings(finished=True)
    return run


def _create(out: Path, task: Task, data: Dataset, seeds: Sequence[int], describe: Mapping[str, Any]) -> None:
    about = data.describe()
    if not Run.exists(out):
        settings = {"kind": "training", "task": task.as_json(), "seeds": list(seeds), "data": about, **describe}
        Run.create(out, settings)
        return

    def differences(settings: Mapping[str, Any]) -> list[str]:
        return task.differences(Task.from_json(settings["task"]))

    check_continues(Run.open(out), "training", "training", differences, task.data, about, seeds)


@dataclass
class _Session:
    run: Run
    task: Task
    data: Dataset
    seeds: Sequence[int]
    device: str
    checkpoint_steps: int
    processes: Processes
    tell: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self.curves: list[Row] = []
        self.predicted = False
        with training_errors(self.task.recipe.batch_size):
            self.data_there = self.data.to(self.device) if self.device != "cpu" else self.data
        if self.processes.leads:
            for left in self.run.path.glob(".curves.parquet.*"):  # half written by a killed process
                left.unlink(missing_ok=True)

    def train(
        self,
        index: int,
        seed: int,
        progress: Progress | None,
        on_forecast: Callable[[Forecast], None] | None,
        on_epoch: Callable[[int, Row], None] | None,
    ) -> None:
        """Train one seed to its end, unless that was done before."""
        # Only the leader writes the trials; the others would read them at another moment.
        status = self.processes.first({r.id: r.status for r in self.run.trials()}.get(index))
        folder = self.run.path / "checkpoints" / f"seed-{seed}"
        recipe = self.task.recipe
        if status in (None, "asked"):
            model = self.task.make_network(self.data, seed=seed).to(self.device)
            check_model(model, self.data_there)
            state = start(model, self.data_there, recipe, seed=seed, processes=self.processes)
            more = self._restore(state, folder)
        else:
            self.curves += self._known_curve(seed, folder)
            return
        curve, best = list(more.get("curve", ())), more.get("best")
        per_epoch = state.batches.steps_per_epoch
        last = recipe.resolved(per_epoch).steps
        if status is None and self.processes.leads:
            text = self.task.arch or str(self.task.factory)
            self.run.add_ask(TrialRecord(index, text, text, "asked", seed=seed, asked_at=time.time()))
        if state.step < last and state.stopped is None and not self.predicted:
            self._predict(state, last, len(self.seeds) - index, on_forecast)
        if state.step:
            self._log(f"seed {seed}: goes on at step {state.step} of {last}")
        callbacks = [] if progress is None else [_Counter(progress, index * last, len(self.seeds) * last)]
        while state.step < last and state.stopped is None:
            boundary = min((state.step // per_epoch + 1) * per_epoch, last)
            target = min(boundary, (state.step // self.checkpoint_steps + 1) * self.checkpoint_steps)
            advance(state, recipe, steps=target, callbacks=callbacks)
            if not state.failed and not self.processes.first(_finite(state.model)):
                state.stopped, state.failed = f"weights or running statistics became infinite by step {target}", True
            if state.failed:
                break
            if state.step == boundary:
                row, best = self._epoch(state, seed, best)
                curve.append(row)
                if self.processes.leads:
                    write_curves(self.run.path / "curves.parquet", self.curves + curve)
                if on_epoch is not None:
                    on_epoch(seed, row)
            self._save(state, folder, {"curve": curve, "best": best})
        self.curves += curve
        self._finish(index, seed, state, folder, curve, best)

    # -- pieces ------------------------------------------------------------------------------------------------

    def _predict(self, state: LoopState, last: int, seeds: int, on_forecast: Callable[[Forecast], None] | None) -> None:
        """Once in a session; all processes take part if one of them asks."""
        self.predicted = True
        if any(self.processes.gather(on_forecast is not None)):
            found = forecast(state, self.task.recipe, last, seeds)
            if on_forecast is not None:
                on_forecast(found)

    def _restore(self, state: LoopState, folder: Path) -> Mapping[str, Any]:
        """Load the newest sound checkpoint, if there is one."""
        found = self.processes.first(checkpoints(folder))
        for path, before in itertools.pairwise([*found, None]):
            try:
                return restore(state, path, self.task.recipe)
            except DamagedCheckpoint:
                self.processes.wait()  # all have tried to read it
                self.tell(f"{path} is damaged; going back to {before or 'the beginning'}")
                self._log(f"damaged checkpoint {path}")
                if self.processes.leads:
                    path.rename(path.with_suffix(".damaged"))
        return {}

    def _known_curve(self, seed: int, folder: Path) -> list[Row]:
        """The curve of a seed that is done, from its checkpoint or, without one, from the file of curves."""
        for path in checkpoints(folder):
            with contextlib.suppress(UserError):
                return list(read(path)["more"]["curve"])
        with contextlib.suppress(UserError):
            rows = read_curves(self.run.path / "curves.parquet")
            return [{k: v for k, v in row.items() if v is not None} for row in rows if row["seed"] == seed]
        return []

    def _log(self, line: str) -> None:
        if self.processes.leads:
            self.run.log(line)

    def _epoch(self, state: LoopState, seed: int, best: Any) -> tuple[Row, Any]:
        """The row of the epoch that has just ended, and the best weights so far (with `patience` only)."""
        recipe = self.task.recipe
        per_epoch = state.batches.steps_per_epoch
        first = (state.step - 1) // per_epoch * per_epoch
        losses = state.losses[first:]
        row: Row = {
            "seed": seed,
            "epoch": math.ceil(state.step / per_epoch),
            "step": state.step,
            "learning_rate": recipe.resolved(per_epoch).rate(state.step - 1, per_epoch),
            "train_loss": sum(losses) / len(losses),
            "train_acc": 100 * state.hits / max(state.seen, 1),
        }
        if len(self.data.val):
            begin = time.perf_counter()
            found = evaluate_split(state.evaluated, self.data_there, self.data_there.val, recipe, self.processes)
            row |= {"val_loss": found["loss"], "val_acc": found["acc"]}
            state.seconds += time.perf_counter() - begin
        row["seconds"] = state.seconds
        state.hits = state.seen = 0
        self._log(" ".join(f"{k} {v:.5g}" for k, v in row.items()))
        if recipe.patience is not None:
            if best is None or row["val_acc"] > best["val_acc"]:
                weights = {k: v.detach().cpu().clone() for k, v in state.evaluated.state_dict().items()}
                best = {"val_acc": row["val_acc"], "epoch": row["epoch"], "model": weights}
            elif row["epoch"] - best["epoch"] >= recipe.patience:
                state.stopped = f"no better validation accuracy for {recipe.patience} epochs, at step {state.step}"
        return row, best

    def _save(self, state: LoopState, folder: Path, more: Mapping[str, Any]) -> None:
        if self.processes.leads:
            save_state(checkpoint_path(folder, state.step), state, self.task.recipe, more)
            keep_newest(folder)
        else:
            state.processes.gather(state.random)  # the leader's state_dict collects them

    def _finish(self, index: int, seed: int, state: LoopState, folder: Path, curve: list[Row], best: Any) -> None:
        """Measure, write the weights, tell the trial."""
        recipe = self.task.recipe
        asked = TrialRecord(index, "", "", "asked", seed=seed)
        if state.failed:
            kept = checkpoints(folder)
            where = f"the last good state is {kept[0]}" if kept else "there is no checkpoint before it"
            error = f"{state.stopped}; {where}"
            if self.processes.leads:
                self.run.add_tell(replace(asked, status="failed", error=error, seconds=state.seconds, **_now()))
            self.tell(f"seed {seed}: {error}; a lower learning rate or clip_norm=5 may help")
            return
        model = state.evaluated
        if best is not None:
            model.load_state_dict(best["model"])
        metrics: dict[str, float] = {"train_loss": curve[-1]["train_loss"]} if curve else {}
        for part in ("val", "test"):
            split = getattr(self.data_there, part)
            if len(split):
                found = evaluate_split(model, self.data_there, split, recipe, self.processes)
                metrics |= {f"{part}_acc": found["acc"], f"{part}_loss": found["loss"]}
        metrics |= {
            "epochs": float(curve[-1]["epoch"] if best is None else best["epoch"]) if curve else 0.0,
            "steps": float(state.step),
            "train_seconds": state.seconds,
        }
        if not self.processes.leads:
            return
        plain = self.task.make_network(self.data, seed=seed, auxiliary=False).state_dict()
        weights: dict[str, Tensor] = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        with atomic_write(weights_path(self.run, seed), "wb") as file:
            file.write(as_safetensors({k: v.clone() for k, v in weights.items() if k in plain}))
        self.run.add_tell(replace(asked, status="done", metrics=metrics, seconds=state.seconds, worker=0, **_now()))
        if state.stopped:
            self.tell(f"seed {seed}: {state.stopped}; the weights are those of epoch {best['epoch']}")


def _now() -> dict[str, Any]:
    return {"told_at": time.time(), "attempts": 1}


class _Counter:
    """A callback of the loop that reports progress."""

    def __init__(self, progress: Progress, done: int, total: int):
        self.progress, self.done, self.total = progress, done, total

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        self.progress(self.done + step, self.total)


def _finite(model: nn.Module) -> bool:
    """Whether all weights and running statistics are; other buffers may hold infinities by intent."""
    statistics = [b for layer in statistics_layers(model) for b in layer.buffers()]
    return all(bool(tensor.isfinite().all()) for tensor in (*model.parameters(), *statistics))
