"""nas evaluate: measure a trained network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli import options
from nas.cli.output import Output

if TYPE_CHECKING:
    from nas.training.evaluation import Evaluation

WORST_CLASSES = 5


def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN[:best|:ID]", help="A finished training.")],
    on: Annotated[str, typer.Option("--on", help="val or test.")] = "val",
    attack: Annotated[
        str | None, typer.Option("--attack", help="pgd, fgsm, or with options: pgd:epsilon=4/255,steps=20,count=500.")
    ] = None,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Time forward passes.")] = True,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Time with torch.compile too (takes a minute).")
    ] = True,
    batch_size: Annotated[int, typer.Option(help="Images at a time; not that of the timing.")] = 500,
    seed: options.Seed = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    json: options.Json = False,
) -> None:
    """Measure a trained network: accuracy, calibration, confusions, robustness, latency, memory.

    The training is finished, so its test images may be used.
    """
    import torch

    from nas.training.evaluation import evaluate_model
    from nas.training.evaluation.attack import parse_attack
    from nas.training.trained import load_trained

    output = Output("evaluate", json, seed)
    chosen = None if attack is None else parse_attack(attack)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = load_trained(run)
    with output.progress("images") as progress:
        found = evaluate_model(
            trained.model,
            trained.data,
            on=on,
            attack=chosen,
            latency=latency,
            compiled=compiled,
            batch_size=batch_size,
            device=device,
            seed=seed,
            progress=progress,
        )
    _print(output, found)
    for timing in found.timings:
        if timing.reason:
            output.warn(f"not compiled for batches of {timing.batch_size}: {timing.reason}")
    if trained.task.recipe.batch_statistics:
        output.warn("the training measured with the statistics of each batch; here running statistics are used")
    output.finish({"run": str(trained.run.path), "trial": trained.record.id, **found.as_json()})


def _print(output: Output, found: Evaluation) -> None:
    lines: dict[str, Any] = {"images": f"{found.count:,} of the {found.on} part of {found.data}"}
    lines["accuracy"] = _percent(found.accuracy, found.accuracy_interval)
    if found.top5_accuracy is not None:
        lines["top-5 accuracy"] = _percent(found.top5_accuracy, found.top5_interval)
    if found.robustness is not None:
        robust = found.robustness
        clean = f"unchanged {robust.clean_accuracy:.2f} %" + f", {robust.count:,} images"
        lines[f"under {robust.attack.name}"] = _percent(robust.accuracy, robust.interval, clean)
        lines["attack"] = robust.attack.describe()
    lines |= {
        "cross-entropy": f"{found.loss:.4f} nats",
        "calibration error": f"{found.calibration_error:.2f} % ({len(found.bins)} bins)",
        "Brier score": f"{found.brier:.4f}",
        "parameters": found.params,
        "multiply-adds": f"{found.macs:,} for an image of {' x '.join(map(str, found.input_shape))}",
        "peak of activations": f"{_bytes(found.peak_activation_bytes)} (one image)",
        "kept for training": f"{_bytes(found.training_activation_bytes)} per image",
    }
    output.pairs(lines)
    if found.timings:
        threads = "" if found.device != "cpu" else f", {found.threads} thread{'s' if found.threads != 1 else ''}"
        output.say(f"\nlatency ({found.device}{threads}; median)", style="bold")
        rows = [[t.mode, t.batch_size, t.latency_ms, _rate(t.images_per_second)] for t in found.timings]
        output.table(["mode", "batch size", "ms", "images per second"], rows)
    output.say("\nclasses", style="bold")
    output.table(["class", "images", "accuracy (%)"], _class_rows(found))
    if found.confused_pairs:
        output.say("\nmost confused", style="bold")
        pairs = [[p.true, p.predicted, p.count, p.share] for p in found.confused_pairs]
        output.table(["class", "taken for", "images", "% of the class"], pairs)


def _class_rows(found: Evaluation) -> Sequence[Sequence[Any]]:
    """Every class of a few; of many the ones with the lowest and the highest accuracy."""
    rows: list[list[Any]] = [
        [name, sum(row), accuracy]
        for name, row, accuracy in zip(found.classes, found.confusion, found.class_accuracy, strict=True)
    ]
    if len(rows) <= 4 * WORST_CLASSES:
        return rows
    order = sorted((accuracy, k) for k, accuracy in enumerate(found.class_accuracy) if accuracy is not None)
    measured = [rows[k] for _, k in order]
    if len(measured) <= 2 * WORST_CLASSES:
        return measured
    return [*measured[:WORST_CLASSES], ["...", None, None], *measured[-WORST_CLASSES:]]


def _percent(value: float, interval: tuple[float, float] | None, more: str = "") -> str:
    low, high = interval or (value, value)
    return f"{value:.2f} % (95 % interval {low:.2f} to {high:.2f}{'; ' + more if more else ''})"


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def _rate(value: float | None) -> float | None:
    return value if value is None or value < 100 else round(value)
