"""A search with one seed: parts, epochs and decisions one after another, each written down before the next."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nas.run import Run, TrialRecord
from nas.supernet.building import network_scale
from nas.supernet.evolution import evolve, path_accuracy
from nas.supernet.hessian import early_stop
from nas.supernet.log import Row, read_log, write_lines
from nas.supernet.measures import curvature, mixture_accuracy, skip_share
from nas.supernet.network import Supernet
from nas.supernet.phases import Phase, begin
from nas.supernet.plan import Plan, plan_of
from nas.supernet.preflight import forecast
from nas.supernet.projection import Decision, decide
from nas.supernet.reading import alpha_row
from nas.supernet.recipe import Recipe
from nas.supernet.state import SearchState, load_state_dict, state_dict
from nas.supernet.steps import run_epoch
from nas.supernet.task import SearchTask
from nas.training.checkpoints import (
    FORMAT,
    DamagedCheckpoint,
    checkpoint_path,
    checkpoints,
    keep_newest,
    read,
    write,
)
from nas.training.data import Dataset
from nas.training.distributed import ALONE, Processes
from nas.training.loop import check_model, training_errors
from nas.training.preflight import Forecast
from search_spaces.common.errors import UserError
from search_spaces.space import SearchSpace

Progress = Callable[[int, int | None], None]


def folder_of(run: Run, seed: int) -> Path:
    """Where the checkpoints of a seed are."""
    return run.path / "checkpoints" / f"seed-{seed}"


@dataclass
class Session:
    """A run and what its seeds share. data: on the CPU. tell: for warnings. Of several processes the leading one writes
    and measures; all take its decisions.
    """

    run: Run
    task: SearchTask
    space: SearchSpace
    data: Dataset
    seeds: Sequence[int]
    device: torch.device
    tell: Callable[[str], None]
    processes: Processes = ALONE

    def __post_init__(self) -> None:
        self.rows = [row for row in read_log(self.run) if row["seed"] in self.seeds]
        self.predicted = False
        with training_errors(self.task.recipe.training.batch_size):
            self.data_there = self.data.to(self.device)

    def search(
        self,
        index: int,
        seed: int,
        progress: Progress | None = None,
        on_epoch: Callable[[Row], None] | None = None,
        on_forecast: Callable[[Forecast], None] | None = None,
    ) -> None:
        """Search with one seed to the end, unless that was done before."""
        # The others would read the trials at another moment.
        status = self.processes.first({r.id: r.status for r in self.run.trials()}.get(index))
        if status not in (None, "asked"):
            return
        plan, folder = plan_of(self.task, self.space, self.data, seed), folder_of(self.run, seed)
        state = self._restored(plan, seed, folder)
        last = plan.epochs * state.batches.steps_per_epoch
        if state.stopped is None and state.all_steps < last:
            self._forecast(state, plan, len(self.seeds) - index, on_forecast)
        if state.all_steps:
            self._log(f"seed {seed}: goes on at step {state.all_steps} of {last}")

        def count(step: int) -> None:
            if progress is not None:
                progress(index * last + state.steps_before + step, len(self.seeds) * last)

        while state.stopped is None:
            phase, due = plan.phases[state.phase], plan.due(state)
            if due is not None:
                changes = self._decision(state, phase, due)
            elif state.epoch < phase.end:
                changes = dict(run_epoch(state, phase.recipe, count))
                if not state.failed and not self.processes.first(_finite(state.supernet)):
                    state.stopped, state.failed = f"parameters became infinite in epoch {state.all_epochs}", True
                if state.failed:
                    break
            elif state.phase + 1 < len(plan.phases):
                state = self._begun(plan, state.phase + 1, seed, state)
                continue
            else:
                break
            row = self._row(state, phase.recipe, seed, changes)
            state.rows.append(row)
            self._early_stop(state)
            if self.processes.leads:
                write(checkpoint_path(folder, state.all_steps), {"format": FORMAT, **state_dict(state)})
                keep_newest(folder)
                self._log_rows(seed, state.rows)
            self.processes.wait()
            self._log(" ".join(f"{k} {v:.5g}" for k, v in row.items() if isinstance(v, int | float)))
            if on_epoch is not None and due is None:
                on_epoch(row)
        if self.processes.leads:
            self._finish(index, seed, state, folder)
        self.processes.wait()

    # -- pieces ------------------------------------------------------------------------------------------------

    def _begun(self, plan: Plan, index: int, seed: int, before: SearchState | None) -> SearchState:
        """The state at the start of a part; see `begin`."""
        recipe = plan.phases[index].recipe
        with training_errors(recipe.training.batch_size):
            where: dict[str, Any] = {"device": self.device, "processes": self.processes}
            state = begin(plan.phases, index, self.space, self.data_there, seed=seed, before=before, **where)
            draws = state.supernet.generator.get_state()
            check_model(state.supernet, self.data_there)
            state.supernet.generator.set_state(draws)
            for part in state.parts.values():
                part.prepare(state, recipe, self.run.path)
        return state

    def _restored(self, plan: Plan, seed: int, folder: Path) -> SearchState:
        """The newest sound state of a seed, or the first one."""
        state = self._begun(plan, 0, seed, None)
        for path, before in itertools.pairwise([*checkpoints(folder), None]):
            assert path is not None
            try:
                content = read(path)
                if content.get("phase", 0):
                    state = self._begun(plan, content["phase"], seed, None)
                load_state_dict(state, content)
                return state
            except DamagedCheckpoint:
                self.processes.wait()  # all have read it
                if self.processes.leads:
                    self.tell(f"{path} is damaged; going back to {before or 'the beginning'}")
                    self._log(f"damaged checkpoint {path}")
                    path.rename(path.with_suffix(".damaged"))
                self.processes.wait()
            except (RuntimeError, ValueError, KeyError, IndexError) as error:
                reason = " ".join(str(error).split())[:120]
                raise UserError(str(path), f"a checkpoint of this search ({reason})") from None
        return state

    def _forecast(
        self, state: SearchState, plan: Plan, seeds: int, on_forecast: Callable[[Forecast], None] | None
    ) -> None:
        """Once in a session, for the part of the search that comes next; all processes take part if one asks."""
        wanted, self.predicted = not self.predicted, True
        if wanted and any(self.processes.gather(on_forecast is not None)):
            found = forecast(state, plan.phases[state.phase].recipe)
            left = plan.epochs * state.batches.steps_per_epoch * seeds - state.all_steps
            if on_forecast is not None:
                on_forecast(replace(found, seconds=found.step_seconds * left))

    def _log(self, text: str) -> None:
        if self.processes.leads:
            self.run.log(text)

    def _decision(self, state: SearchState, phase: Phase, due: Decision) -> Row:
        begin_time = time.perf_counter()
        found = decide(state, self.data_there, phase.recipe, self.space, due)
        state.seconds += time.perf_counter() - begin_time
        return found

    def _row(self, state: SearchState, recipe: Recipe, seed: int, changes: Mapping[str, Any]) -> Row:
        """The row of the epoch or the decision that is just over."""
        return self.processes.first(self._measured(state, recipe, seed, changes) if self.processes.leads else None)

    def _measured(self, state: SearchState, recipe: Recipe, seed: int, changes: Mapping[str, Any]) -> Row:
        begin_time = time.perf_counter()
        found = mixture_accuracy(state, self.data_there, recipe)
        row: Row = {
            "seed": seed,
            "epoch": state.all_epochs,
            "step": state.all_steps,
            "learning_rate": state.optimizer.param_groups[0]["lr"],
            **changes,
            "val_loss": found["loss"],
            "val_acc": found["acc"],
        }
        if self.task.recipe.stages is not None:
            row["stage"] = min(state.phase + 1, len(self.task.recipe.stages.candidates))
        if state.alpha_optimizer is not None:
            row |= alpha_row(self.space, state.supernet, recipe)
            if recipe.early_stop or self.task.curvature:
                row["eigenvalue"] = curvature(state, recipe)
        for part in state.parts.values():
            row |= part.row()
        state.seconds += time.perf_counter() - begin_time
        return {**row, "seconds": state.seconds}

    def _early_stop(self, state: SearchState) -> None:
        if not self.task.recipe.early_stop:
            return
        values, epochs = [r["eigenvalue"] for r in state.rows], [r["epoch"] - 1 for r in state.rows]
        back = early_stop(values, epochs)
        if back is not None:
            state.stopped = f"the Hessian's eigenvalue grew: back to epoch {back + 1}, at epoch {state.epoch}"
            state.rows[-1]["stopped_for_epoch"] = back + 1

    def _log_rows(self, seed: int, rows: list[Row]) -> None:
        self.rows = [row for row in self.rows if row["seed"] != seed] + rows
        write_lines(self.run, "epochs.jsonl", self.rows)

    def _finish(self, index: int, seed: int, state: SearchState, folder: Path) -> None:
        """Read the architecture off, measure it, tell the trial."""
        if state.failed:
            kept = checkpoints(folder)
            where = f"the last good state is {kept[0]}" if kept else "there is no checkpoint before it"
            error = f"{state.stopped}; {where}"
            self._record(TrialRecord(index, "", "", "failed", seed=seed, error=error, seconds=state.seconds))
            self.tell(f"seed {seed}: {error}; a lower learning rate may help")
            return
        recipe, row = self.task.recipe, state.rows[-1]
        if recipe.evolution is not None:
            arch = self._evolved(state, seed)
        else:
            back = row.get("stopped_for_epoch")
            chosen = row if back is None else next(r for r in state.rows if r["epoch"] == back)
            arch = self.space.decode(chosen["arch"])
        selection = self.space.select(arch)
        begin_time = time.perf_counter()
        with training_errors(200, "eval_batch_size"):
            found = path_accuracy(state.supernet, selection, self.data_there)
        seconds = state.seconds + time.perf_counter() - begin_time
        metrics = {
            "val_acc": found["acc"],
            "mixture_val_acc": row["val_acc"],
            "train_loss": next(r["train_loss"] for r in reversed(state.rows) if "train_loss" in r),
            "skip_share": skip_share(state.supernet, selection),
            "epochs": float(state.all_epochs),
            "steps": float(state.all_steps),
            "search_seconds": seconds,
        }
        if "eigenvalue" in row:
            metrics["eigenvalue"] = row["eigenvalue"]
        text, key = self.space.encode(arch), self.space.key(arch)
        self._record(TrialRecord(index, text, key, "done", metrics=metrics, seed=seed, seconds=seconds, worker=0))
        if state.stopped:
            self.tell(f"seed {seed}: {state.stopped}")

    def _record(self, trial: TrialRecord) -> None:
        """Write the ask, unless it stands there already, and the tell."""
        now = time.time()
        values = {**_fields(trial), "asked_at": now, "told_at": now, "attempts": 1}
        if trial.id not in {r.id for r in self.run.trials()}:
            self.run.add_ask(TrialRecord(**{**values, "status": "asked"}))
        self.run.add_tell(TrialRecord(**values))

    def _evolved(self, state: SearchState, seed: int) -> Any:
        settings = self.task.recipe.evolution
        assert settings is not None
        limits = {"recalibration": settings.recalibration, "evaluation": settings.evaluation}

        def score(arch: Any) -> float:
            return path_accuracy(state.supernet, self.space.select(arch), self.data_there, **limits)["acc"]

        scale = network_scale(self.space, self.task.recipe)
        shape = {"in_channels": self.data.shape[0], "num_classes": self.data.num_classes}

        def macs(arch: Any) -> int:
            return self.space.cost(arch, input_size=self.data.shape[1], **shape, **scale)["macs"]

        with training_errors(settings.evaluation[1], "evolution_evaluation"):
            found = evolve(self.space, score, settings, np.random.default_rng((seed, 1)), macs=macs)
        lines = [{"seed": seed, "arch": self.space.encode(arch), "acc": acc} for arch, acc in found]
        write_lines(self.run, f"evolution-seed-{seed}.jsonl", lines)
        return found[0][0]


def _fields(trial: TrialRecord) -> dict[str, Any]:
    return {name: getattr(trial, name) for name in TrialRecord.__dataclass_fields__}


def _finite(supernet: Supernet) -> bool:
    return all(bool(p.isfinite().all()) for p in supernet.parameters())
