"""nas train: train an architecture, a layer in it, or a model of one's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import nas
from nas.cli import options
from nas.cli.context import command_line, default_folder, environment
from nas.cli.output import Output
from search_spaces.common.errors import RunError, UserError

EPOCH_LINES = 20


def train(
    reference: Annotated[
        str | None, typer.Argument(metavar="[RUN[:best|:ID]]", help="An architecture that a search has found.")
    ] = None,
    space: Annotated[str | None, typer.Option(help="A space's name or package.module:object, with --arch.")] = None,
    arch: Annotated[str | None, typer.Option(help="An architecture in the space's notation.")] = None,
    factory: Annotated[str | None, typer.Option(help="package.module:function that makes a model of your own.")] = None,
    data: Annotated[str | None, options.DataOption] = None,
    data_root: options.DataRoot = None,
    size: options.Size = None,
    preset: Annotated[str | None, options.PresetOption] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images (default: the preset's).")] = None,
    change: options.Changes = None,
    scale: options.Scale = None,
    norm: options.Norm = None,
    act: options.Act = None,
    layer: options.Layer = None,
    kernels: Annotated[str | None, typer.Option(help="auto, triton, eager or compile.")] = None,
    val_share: options.ValShare = None,
    split_seed: Annotated[int, typer.Option(help="Of the split into training and validation images.")] = 0,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave unreadable images out.")] = False,
    seeds: Annotated[int, typer.Option(help="Train so often, with the seeds --seed, --seed + 1, ...")] = 1,
    seed: options.Seed = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    checkpoint_steps: Annotated[int, typer.Option(help="A checkpoint so often, besides every epoch.")] = 1000,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write curves for TensorBoard too.")] = False,
    out: Annotated[Path | None, typer.Option(help="The run's folder (default: a new one below runs/).")] = None,
    json: options.Json = False,
) -> None:
    """Train a network on your images; the run resumes, is reported, evaluated and exported from.

    After a search by training, RUN:best is trained as there unless options say otherwise; else on digits (digits-tiny).
    """
    from nas.training.presets import preset as find_preset
    from nas.training.recipe import Recipe
    from nas.training.task import Task

    output = Output("train", json, seed)
    if seeds < 1:
        raise UserError(seeds, "at least one seed")
    if sum(given is not None for given in (reference, space, factory)) != 1:
        raise UserError("--space", "one of: a search's RUN:best, --space with --arch, or --factory")
    known: Mapping[str, Any] = {}
    if reference is not None:
        space, arch, known = _found(reference)
    changes = options.read_settings(change)
    changes |= {k: v for k, v in (("epochs", epochs), ("kernels", kernels)) if v is not None}
    if preset is None and known:
        base = Recipe(**known["recipe"])
        defaults: Mapping[str, Any] = known
        network = dict(known["network"])
    else:
        preset = preset or "digits-tiny"
        settings = find_preset(preset)
        base, defaults = settings.recipe, {**known, "val_share": settings.val_share}
        network = dict(known.get("network", {}))
        if settings.space is not None and settings.space == space:
            network = dict(settings.network)
    same_data = data is None or data == known.get("data")
    given = {
        "norm": norm,
        "act": act,
        "layer": layer,
        "data": data,
        "root": None if data_root is None else str(data_root),
        "size": size,
        "val_share": val_share,
    }
    kept = {k: defaults[k] for k in given if k in defaults and (same_data or k not in ("root", "size"))}
    if norm or act or layer:
        kept = {k: v for k, v in kept.items() if k not in ("norm", "act", "layer")}
    task = Task(
        recipe=base.replaced(changes),
        space=space,
        arch=arch,
        factory=factory,
        network=network | options.read_settings(scale),
        split_seed=split_seed,
        skip_broken=skip_broken,
        **{**kept, **{k: v for k, v in given.items() if v is not None}},
    )
    if out is None:
        subject = (space or str(factory)).replace(":", "-")
        out = default_folder(f"train-{subject}-{Path(task.data).name.replace(':', '-')}-seed{seed}")
    describe = {
        "preset": preset,
        "command": command_line(),
        "version": nas.__version__,
        "environment": environment(),
        "device": device,
        "checkpoint_steps": checkpoint_steps,
        "tensorboard": tensorboard,
    }
    _train(task, list(range(seed, seed + seeds)), out, describe, output)


def resume(settings: Mapping[str, Any], out: Path, output: Output) -> None:
    """Continue a training; `nas resume` calls it."""
    from nas.training.task import Task

    names = ("preset", "command", "version", "environment", "device", "checkpoint_steps", "tensorboard")
    describe = {name: settings[name] for name in names if name in settings}
    _train(Task.from_json(settings["task"]), settings["seeds"], out, describe, output)


def _found(reference: str) -> tuple[str, str, Mapping[str, Any]]:
    """(space, architecture, the settings of the training that measured it if one did)."""
    from nas.references import find_architecture

    found = find_architecture(reference)
    settings = found.run.settings
    if settings.get("kind") == "layers":
        raise UserError(reference, f"a run over architectures; this found a layer (--layer {reference} trains with it)")
    return settings["task"]["space"] if "task" in settings else settings["space"], found.record.arch, found.training


def _train(task: Any, seeds: list[int], out: Path, describe: Mapping[str, Any], output: Output) -> None:
    from nas.training.distributed import joined
    from nas.training.runs import train_run
    from nas.training.summary import summarise

    device = _device(describe["device"])
    epochs = task.recipe.epochs
    every = max(1, (epochs or 1) // EPOCH_LINES)

    def on_epoch(seed: int, row: Mapping[str, float]) -> None:
        if row["epoch"] % every and row["epoch"] != epochs:
            return
        val = f"  val_acc {row['val_acc']:6.2f}" if "val_acc" in row else ""
        output.say(f"seed {seed}  epoch {row['epoch']:>3}  train_loss {row['train_loss']:.4f}{val}", style="dim")

    with joined(device) as processes:
        if processes.world > 1 and device == "cuda":
            device = f"cuda:{processes.local_rank}"
        quiet = not processes.leads
        with output.progress("steps") as progress:
            run = train_run(
                task,
                out,
                seeds=seeds,
                device=device,
                checkpoint_steps=describe["checkpoint_steps"],
                describe=describe,
                progress=None if quiet else progress,
                on_forecast=None if quiet else lambda found: say_forecast(output, found, "of training"),
                on_epoch=None if quiet else on_epoch,
                on_warning=None if quiet else output.warn,
                processes=processes,
            )
    if quiet:
        return
    if describe.get("tensorboard"):
        from nas.training.curves import write_tensorboard

        write_tensorboard(run.path)
    summary = summarise(run)
    if summary.best is None:
        raise RunError(f"no training finished: {summary.failed[-1].error}")
    if summary.failed:
        output.warn(f"{len(summary.failed)} of {len(seeds)} seeds broke down: {summary.failed[-1].error}")
    lines: dict[str, Any] = {"network": task.arch or task.factory}
    for label, spread in (("val_acc", summary.val_acc), ("test_acc", summary.test_acc)):
        if spread is not None:
            about = f" (mean of {spread.count} seeds, 95 % interval)" if spread.half_width is not None else ""
            lines[label] = spread.text() + about
    metrics = summary.best.metrics or {}
    lines |= {"epochs": int(metrics["epochs"]), "seconds": metrics["train_seconds"], "weights": summary.checkpoint}
    lines["run"] = str(out)
    output.pairs(lines)
    output.say(f"\nreport: nas report {out}    measure: nas evaluate {out}", style="dim")
    output.say(f"take it home: nas export {out}:best --to model.py", style="dim")
    output.finish({"run": str(out), **summary.as_json()})


def say_forecast(output: Output, found: Any, of_what: str) -> None:
    """Time and memory before the first step, and a warning where the memory will not do."""
    room = "" if found.available_bytes is None else f" of {found.available_bytes / 1e9:.1f} GB free"
    output.say(
        f"forecast: {_clock(found.seconds)} {of_what} ({1e3 * found.step_seconds:.0f} ms a step), "
        f"{_size(found.memory_bytes)}{room}",
        style="dim",
    )
    if not found.fits:
        output.warn("that is more memory than is free: lower batch_size (--set batch_size=...) or the scale")


def _device(wanted: str) -> str:
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(wanted).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise UserError(wanted, "a device: cpu, cuda, cuda:1 or auto", "auto")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(wanted, "a device that this machine has", "cpu")
    if kind == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # torchrun starts each process with one thread; the user's own setting is kept.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return wanted


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: int) -> str:
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
