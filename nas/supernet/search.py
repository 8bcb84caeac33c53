"""A differentiable search as a run: a trial for each seed, checkpoints, a log; resumed by the same call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nas.run import Run
from nas.supernet.log import Row, read_log
from nas.supernet.measures import skip_share
from nas.supernet.phases import begin
from nas.supernet.plan import plan_of
from nas.supernet.session import Progress, Session, folder_of
from nas.supernet.state import SearchState, load_state_dict
from nas.supernet.task import SearchTask
from nas.training.checkpoints import DamagedCheckpoint, checkpoints, read
from nas.training.continued import check_continues
from nas.training.data import Dataset
from nas.training.distributed import ALONE, Processes
from nas.training.preflight import Forecast
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

__all__ = ["KIND", "Row", "SearchTask", "open_supernet", "read_log", "search_run", "skip_share"]

KIND = "supernet"


def search_run(
    task: SearchTask,
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
    describe: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    on_epoch: Callable[[Row], None] | None = None,
    on_forecast: Callable[[Forecast], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
    processes: Processes = ALONE,
) -> Run:
    """Search once with each seed in the folder `out`; goes on where a search there stopped.

    A seed is a trial; its `val_acc` is that of the architecture found with the weights it shares (BatchNorm
    recalibrated), `mixture_val_acc` that of the whole supernet. seeds: of weights, alphas, draws, order and
    augmentation. describe: more settings of the run. progress: (steps, all steps). on_epoch: gets the row of the log.
    on_forecast: gets time and memory as predicted before the first step. processes: the group that torchrun began; all
    call this, the leading one writes.
    A seed whose loss, gradients or parameters are not finite is a failed trial; its last good checkpoint stays.
    Errors: UserError for data or a space that do not fit, a folder with another search (differences are listed);
    RunError when memory or disk runs out.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(list(seeds), "seeds that differ, at least one")
    if processes.world > 1:
        _check_shareable(task)
    space, data, out = load_space(task.space), task.open_data(), Path(out)
    if processes.leads:
        _create(out, task, data, seeds, describe or {})
    processes.wait()
    run = Run.open(out)
    with contextlib.ExitStack() as stack:
        if processes.leads:
            stack.enter_context(run.writing())
        tell = on_warning or (lambda text: None)
        session = Session(run, task, space, data, seeds, torch.device(device), tell, processes)
        for index, seed in enumerate(seeds):
            session.search(index, seed, progress, on_epoch, on_forecast)
        if processes.leads:
            run.update_settings(finished=True)
    return run


def open_supernet(run: Run, seed: int | None = None) -> tuple[SearchTask, SearchState, Dataset]:
    """The task, the last good state and the data of a seed's search (default: the first).

    The task's recipe is that of the state's part of the search, so it describes the supernet there. Errors: UserError.
    """
    if run.settings.get("kind") != KIND:
        raise UserError(str(run.path), f"a search in a supernet; this run is a {run.settings.get('kind')}")
    seed = run.settings["seeds"][0] if seed is None else seed
    task = SearchTask.from_json(run.settings["search"])
    data = task.open_data()
    space, folder = load_space(task.space), folder_of(run, seed)
    phases = plan_of(task, space, data, seed).phases
    for path in checkpoints(folder):
        with contextlib.suppress(DamagedCheckpoint):
            content = read(path)
            index = content.get("phase", 0)
            state = begin(phases, index, space, data, seed=seed, device=torch.device("cpu"))
            load_state_dict(state, content)
            return replace(task, recipe=phases[index].recipe), state, data
    raise UserError(str(folder), "a search with a checkpoint that can be read")


def _check_shareable(task: SearchTask) -> None:
    """Errors: UserError for a recipe with parts that decide by what one process alone sees."""
    recipe = task.recipe
    alone = {
        "perturbation": recipe.perturbation == "adversarial",
        "stages": recipe.stages is not None,
        "projection": recipe.projection is not None,
    }
    found = [f"{name} ({recipe.name})" for name, needed in alone.items() if needed]
    if found:
        raise UserError(", ".join(found), "one process; begin this search without torchrun")


# -- a run -------------------------------------------------------------------------------------------------------


def _create(out: Path, task: SearchTask, data: Dataset, seeds: Sequence[int], describe: Mapping[str, Any]) -> None:
    about = data.describe()
    if not Run.exists(out):
        names = {"evaluator": f"{KIND}:{task.recipe.name}", "strategy": task.recipe.name, "space": task.space}
        common = {"objectives": "val_acc", "label": "val", "seed": seeds[0], "seeds": list(seeds)}
        Run.create(out, {"kind": KIND, **names, **common, "search": task.as_json(), "data": about, **describe})
        return

    def differences(settings: Mapping[str, Any]) -> list[str]:
        return task.differences(SearchTask.from_json(settings["search"]))

    check_continues(Run.open(out), KIND, "search", differences, task.data, about, seeds)
