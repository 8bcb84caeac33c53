"""A differentiable search as a run: a trial for each seed, checkpoints, a log; resumed by the same call."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nas.run import Run, TrialRecord
from nas.supernet.building import make_supernet, network_scale, search_data
from nas.supernet.discretization import discretize
from nas.supernet.evolution import evolve, path_accuracy
from nas.supernet.hessian import early_stop
from nas.supernet.measures import curvature, mixture_accuracy, skip_share
from nas.supernet.network import Supernet
from nas.supernet.recipe import Recipe
from nas.supernet.state import SearchState, load_state_dict, start, state_dict
from nas.supernet.steps import run_epoch
from nas.training.checkpoints import (
    FORMAT,
    DamagedCheckpoint,
    checkpoint_path,
    checkpoints,
    keep_newest,
    read,
    write,
)
from nas.training.data import Dataset, load_data
from nas.training.loop import check_model, training_errors
from search_spaces.common.errors import UserError
from search_spaces.common.files import atomic_write
from search_spaces.registry import load_space
from search_spaces.space import SearchSpace

KIND = "supernet"
Row = dict[str, Any]
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class SearchTask:
    """What is searched, on what and how, as plain values.

    space: as in `load_space`. data, root, size, skip_broken: as in `load_data`. images: at most so many for weights
    and alphas together, None for the recipe's share of all. split_seed: of the halves. curvature: log the largest
    eigenvalue of the Hessian every epoch (recipes with early stop do anyway).
    """

    recipe: Recipe
    space: str = "nas-bench-201"
    data: str = "digits"
    root: str | None = None
    size: int | None = None
    images: int | None = None
    split_seed: int = 0
    skip_broken: bool = False
    curvature: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain values; `SearchTask.from_json` inverts it."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> SearchTask:
        """The task that `as_json` wrote."""
        return SearchTask(**{**found, "recipe": Recipe.from_json(found["recipe"])})

    def differences(self, other: SearchTask) -> list[str]:
        """`name: ours instead of theirs` for everything that differs."""
        ours, theirs = self._flat(), other._flat()
        names = dict.fromkeys((*ours, *theirs))
        return [f"{n}: {ours.get(n)!r} instead of {theirs.get(n)!r}" for n in names if ours.get(n) != theirs.get(n)]

    def _flat(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k != "recipe"}
        return {**own, "recipe": self.recipe.name, **{k: v for k, v in self.recipe.flat().items() if k != "name"}}

    def open_data(self) -> Dataset:
        """Images for the weights (`train`) and the alphas (`val`); validation images of the data set are not used.

        Errors: UserError.
        """
        found = load_data(self.data, root=self.root, size=self.size, val_share=0.0, skip_broken=self.skip_broken)
        return search_data(found, self.recipe, images=self.images, seed=self.split_seed)


def search_run(
    task: SearchTask,
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
    describe: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    on_epoch: Callable[[Row], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Run:
    """Search once with each seed in the folder `out`; goes on where a search there stopped.

    A seed is a trial; its `val_acc` is that of the architecture found with the weights it shares (BatchNorm
    recalibrated), `mixture_val_acc` that of the whole supernet. seeds: of weights, alphas, draws, order and
    augmentation. describe: more settings of the run. progress: (steps, all steps). on_epoch: gets the row of the log.
    A seed whose loss, gradients or parameters are not finite is a failed trial; its last good checkpoint stays.
    Errors: UserError for data or a space that do not fit, a folder with another search (differences are listed);
    RunError when memory or disk runs out.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(list(seeds), "seeds that differ, at least one")
    space, data, out = load_space(task.space), task.open_data(), Path(out)
    _create(out, task, data, seeds, describe or {})
    run = Run.open(out)
    with run.writing():
        session = _Session(run, task, space, data, seeds, torch.device(device), on_warning or (lambda text: None))
        for index, seed in enumerate(seeds):
            session.search(index, seed, progress, on_epoch)
        run.update_settings(finished=True)
    return run


def open_supernet(run: Run, seed: int | None = None) -> tuple[SearchTask, SearchState, Dataset]:
    """The task, the last good state and the data of a seed's search (default: the first). Errors: UserError."""
    if run.settings.get("kind") != KIND:
        raise UserError(str(run.path), f"a search in a supernet; this run is a {run.settings.get('kind')}")
    seed = run.settings["seeds"][0] if seed is None else seed
    task = SearchTask.from_json(run.settings["search"])
    data = task.open_data()
    folder = _folder(run, seed)
    for path in checkpoints(folder):
        with contextlib.suppress(DamagedCheckpoint):
            state = start(
                make_supernet(load_space(task.space), task.recipe, data, seed=seed), data, task.recipe, seed=seed
            )
            load_state_dict(state, read(path))
            return task, state, data
    raise UserError(str(folder), "a search with a checkpoint that can be read")


def read_log(run: Run) -> list[Row]:
    """The rows of all epochs, by seed. Errors: UserError where the file is damaged."""
    path = run.path / "epochs.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError:
        raise UserError(str(path), "a log with a JSON object in every line") from None


# -- a run -------------------------------------------------------------------------------------------------------


def _create(out: Path, task: SearchTask, data: Dataset, seeds: Sequence[int], describe: Mapping[str, Any]) -> None:
    about = data.describe()
    if not Run.exists(out):
        names = {"evaluator": f"{KIND}:{task.recipe.name}", "strategy": task.recipe.name, "space": task.space}
        common = {"objectives": "val_acc", "label": "val", "seed": seeds[0], "seeds": list(seeds)}
        Run.create(out, {"kind": KIND, **names, **common, "search": task.as_json(), "data": about, **describe})
        return
    run = Run.open(out)
    if run.settings.get("kind") != KIND:
        raise UserError(str(out), f"a new folder or one of a supernet; this run is a {run.settings.get('kind')}")
    differences = task.differences(SearchTask.from_json(run.settings["search"]))
    if differences:
        raise UserError(str(out), f"the settings of the search there, or a new folder; {'; '.join(differences)}")
    if run.settings["data"] != about:
        changed = [f"{k}: {about.get(k)} instead of {v}" for k, v in run.settings["data"].items() if about.get(k) != v]
        raise UserError(task.data, f"the data the search in {out} began with; {'; '.join(changed)}")
    before = run.settings["seeds"]
    if before != list(seeds):
        if before != list(seeds)[: len(before)]:
            raise UserError(list(seeds), f"the seeds of the search there, {before}, or more after them")
        run.update_settings(seeds=list(seeds))


def _folder(run: Run, seed: int) -> Path:
    return run.path / "checkpoints" / f"seed-{seed}"


@dataclass
class _Session:
    run: Run
    task: SearchTask
    space: SearchSpace
    data: Dataset
    seeds: Sequence[int]
    device: torch.device
    tell: Callable[[str], None]

    def __post_init__(self) -> None:
        self.rows = [row for row in read_log(self.run) if row["seed"] in self.seeds]
        with training_errors(self.task.recipe.training.batch_size):
            self.data_there = self.data.to(self.device)

    def search(self, index: int, seed: int, progress: Progress | None, on_epoch: Callable[[Row], None] | None) -> None:
        """Search with one seed to the end, unless that was done before."""
        status = {r.id: r.status for r in self.run.trials()}.get(index)
        if status not in (None, "asked"):
            return
        recipe, folder = self.task.recipe, _folder(self.run, seed)
        state = self._restored(seed, folder)
        last = recipe.epochs * state.batches.steps_per_epoch
        if state.step:
            self.run.log(f"seed {seed}: goes on at step {state.step} of {last}")
        count = None
        if progress is not None:

            def count(step: int) -> None:
                progress(index * last + step, len(self.seeds) * last)

        while state.epoch < recipe.epochs and state.stopped is None:
            means = run_epoch(state, recipe, count)
            if not state.failed and not _finite(state.supernet):
                state.stopped, state.failed = f"parameters became infinite in epoch {state.epoch}", True
            if state.failed:
                break
            row = self._row(state, seed, means)
            state.rows.append(row)
            self._early_stop(state)
            write(checkpoint_path(folder, state.step), {"format": FORMAT, **state_dict(state)})
            keep_newest(folder)
            self._log_rows(seed, state.rows)
            self.run.log(" ".join(f"{k} {v:.5g}" for k, v in row.items() if isinstance(v, int | float)))
            if on_epoch is not None:
                on_epoch(row)
        self._finish(index, seed, state, folder)

    # -- pieces ------------------------------------------------------------------------------------------------

    def _fresh(self, seed: int) -> SearchState:
        recipe = self.task.recipe
        with training_errors(recipe.training.batch_size):
            supernet = make_supernet(self.space, recipe, self.data, seed=seed).to(self.device)
            before = supernet.generator.get_state()
            check_model(supernet, self.data_there)
            supernet.generator.set_state(before)
            return start(supernet, self.data_there, recipe, seed=seed)

    def _restored(self, seed: int, folder: Path) -> SearchState:
        """The newest sound state of a seed, or the first one."""
        state = self._fresh(seed)
        for path, before in itertools.pairwise([*checkpoints(folder), None]):
            assert path is not None
            try:
                load_state_dict(state, read(path))
                return state
            except DamagedCheckpoint:
                self.tell(f"{path} is damaged; going back to {before or 'the beginning'}")
                self.run.log(f"damaged checkpoint {path}")
                path.rename(path.with_suffix(".damaged"))
            except (RuntimeError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split())[:120]
                raise UserError(str(path), f"a checkpoint of this search ({reason})") from None
        return state

    def _row(self, state: SearchState, seed: int, means: Mapping[str, float]) -> Row:
        """The row of the epoch that has just ended."""
        recipe, supernet = self.task.recipe, state.supernet
        begin = time.perf_counter()
        found = mixture_accuracy(state, self.data_there, recipe)
        row: Row = {
            "seed": seed,
            "epoch": state.epoch,
            "step": state.step,
            "learning_rate": state.optimizer.param_groups[0]["lr"],
            **means,
            "val_loss": found["loss"],
            "val_acc": found["acc"],
        }
        if state.alpha_optimizer is not None:
            arch = self._read_off(supernet)
            alphas = {label: a.detach().cpu() for label, a in supernet.alphas.items()}
            gates = torch.sigmoid if recipe.discretization == "sigmoid" else lambda a: a.softmax(0)
            entropies = [-(a.softmax(0) * a.log_softmax(0)).sum() for a in alphas.values()]
            row |= {
                "arch": self.space.encode(arch),
                "skip_share": skip_share(supernet, self.space.select(arch)),
                "entropy": float(torch.stack(entropies).mean()),
                "alphas": {label: gates(a).tolist() for label, a in alphas.items()},
            }
            if supernet.betas:
                row["betas"] = {node: b.detach().cpu().softmax(0).tolist() for node, b in supernet.betas.items()}
            for part in state.parts.values():
                row |= part.row()
            if recipe.early_stop or self.task.curvature:
                row["eigenvalue"] = curvature(state, recipe)
        state.seconds += time.perf_counter() - begin
        return {**row, "seconds": state.seconds}

    def _read_off(self, supernet: Supernet) -> Any:
        strength = torch.sigmoid if self.task.recipe.discretization == "sigmoid" else None
        more = {} if strength is None else {"strength": strength}
        return discretize(self.space, supernet.alphas, supernet.betas or None, **more)

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
        with atomic_write(self.run.path / "epochs.jsonl") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)

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
        begin = time.perf_counter()
        with training_errors(200, "eval_batch_size"):
            found = path_accuracy(state.supernet, selection, self.data_there)
        seconds = state.seconds + time.perf_counter() - begin
        metrics = {
            "val_acc": found["acc"],
            "mixture_val_acc": row["val_acc"],
            "train_loss": row["train_loss"],
            "skip_share": skip_share(state.supernet, selection),
            "epochs": float(state.epoch),
            "steps": float(state.step),
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
        with atomic_write(self.run.path / f"evolution-seed-{seed}.jsonl") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        return found[0][0]


def _fields(trial: TrialRecord) -> dict[str, Any]:
    return {name: getattr(trial, name) for name in TrialRecord.__dataclass_fields__}


def _finite(supernet: Supernet) -> bool:
    return all(bool(p.isfinite().all()) for p in supernet.parameters())
