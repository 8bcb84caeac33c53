"""Checkpoints: a LoopState in a file, two kept, each written whole or not at all."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.training.data import Dataset
from nas.training.distributed import ALONE, Processes
from nas.training.loop import LoopState, start
from nas.training.recipe import Recipe
from search_spaces.common.errors import RunError, UserError
from search_spaces.common.files import atomic_write

FORMAT = 2  # 1 was the layer search's before there were epochs
KEPT = 2
# What may change between a checkpoint and the training that goes on from it.
FREE = (
    *("steps", "epochs", "schedule", "decay_share", "warmup_steps", "warmup_epochs", "milestones", "gamma"),
    *("final_rate", "rate_per_epoch", "learning_rate", "source", "eval_batch_size", "patience", "kernels"),
)


class DamagedCheckpoint(UserError):
    """A file that is no complete checkpoint; the one before it may be."""


def state_dict(state: LoopState) -> dict[str, Any]:
    """Everything that the next step depends on, as tensors and plain values; all processes call it together."""
    return {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "average": None if state.average is None else state.average.state_dict(),
        "random": state.processes.gather(dict(state.random)),
        "images": len(state.batches.images),
        "seed": state.batches.seed,
        "step": state.step,
        "losses": torch.tensor(state.losses, dtype=torch.float64),
        "hits": state.hits,
        "seen": state.seen,
        "stopped": state.stopped,
        "failed": state.failed,
        "seconds": state.seconds,
    }


def load_state_dict(state: LoopState, content: Mapping[str, Any]) -> None:
    """Put a state back to where `state_dict` was taken. Errors: RuntimeError, ValueError, KeyError if it differs."""
    state.model.load_state_dict(content["model"])
    state.optimizer.load_state_dict(deepcopy(content["optimizer"]))
    state.scaler.load_state_dict(content["scaler"])
    if state.average is not None:
        state.average.load_state_dict(content["average"])
    state.batches.seed = content["seed"]
    state.random = dict(content["random"][state.processes.rank])
    state.step, state.losses = content["step"], content["losses"].tolist()
    state.hits, state.seen = content["hits"], content["seen"]
    state.stopped, state.failed, state.seconds = content["stopped"], content["failed"], content["seconds"]


def snapshot(state: LoopState) -> dict[str, Any]:
    """A `state_dict` that later steps do not change."""
    return deepcopy(state_dict(state))


def save_state(
    path: str | os.PathLike[str], state: LoopState, recipe: Recipe, more: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint with `more` beside the state; the old file survives a crash. Errors: RunError (full disk)."""
    write(path, {"format": FORMAT, "recipe": asdict(recipe), **state_dict(state), "more": dict(more or {})})


def write(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write tensors and plain values that `read` gives back; they have an integer `format`. Errors: RunError."""
    try:
        with atomic_write(path, "wb") as file:
            torch.save(dict(content), file)
    except RunError:
        raise
    except RuntimeError as error:  # how torch reports a disk that fills while it writes
        reason = str(error).splitlines()[0][:120]
        raise RunError(f"the checkpoint {path} could not be written ({reason}); the one before it is kept") from error


def load_state(
    path: str | os.PathLike[str], model: nn.Module, data: Dataset, recipe: Recipe, *, processes: Processes = ALONE
) -> LoopState:
    """The state of a checkpoint, in a model of the same architecture; going on is bit-identical on a CPU.

    The recipe may have other steps or another schedule; other settings of data and optimiser are refused with the
    differences. Errors: UserError for a damaged file, a newer format, another model or recipe.
    """
    state = start(model, data, recipe, seed=0, processes=processes)
    restore(state, path, recipe)
    return state


def restore(state: LoopState, path: str | os.PathLike[str], recipe: Recipe) -> dict[str, Any]:
    """Put `state` to where the checkpoint was written; returns what stood beside it. Errors: as `load_state`."""
    name, content = str(Path(path)), read(path)
    differences = [d for d in recipe.differences(content["recipe"]) if d.split(":")[0] not in FREE]
    if differences:
        raise UserError(name, f"a checkpoint of the same recipe; {'; '.join(differences)}")
    if len(content["random"]) != state.processes.world:
        expected = f"as many as wrote {name}, {len(content['random'])}: each has its own random numbers"
        raise UserError(f"{state.processes.world} processes", expected)
    if content["images"] != len(state.batches.images):
        raise UserError(len(state.batches.images), f"{content['images']} training images, as in {name}")
    try:
        load_state_dict(state, content)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(name, f"a checkpoint of this model ({' '.join(str(error).split())[:120]})") from None
    return content["more"]


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint's content. Errors: UserError for a file that is missing, damaged (by its checksums) or newer."""
    name = str(Path(path))
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not check the sums of its own archives
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content["format"]
    except FileNotFoundError:
        raise UserError(name, "a checkpoint that exists") from None
    except PermissionError:
        raise UserError(name, "a checkpoint that can be read") from None
    except Exception as error:  # a damaged archive can raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise DamagedCheckpoint(name, f"a complete checkpoint ({reason})") from None
    if version > FORMAT:
        raise UserError(name, f"a checkpoint of format {FORMAT} or older, found {version}; update nasforge")
    if version < FORMAT:
        raise UserError(name, f"a checkpoint of format {FORMAT}; found {version}, of an older nasforge")
    return content


# -- a folder of them --------------------------------------------------------------------------------------------


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return folder / f"step-{step:09d}.pt"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


def keep_newest(folder: Path, count: int = KEPT) -> None:
    """Delete all but the newest `count` checkpoints, and what killed processes left half written."""
    for old in (*checkpoints(folder)[count:], *folder.glob(".step-*")):
        old.unlink(missing_ok=True)
