"""The report of a training: learning curves, accuracy over the seeds, the recipe with its sources."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nas import page, plots
from nas.metrics import format_count, format_seconds
from nas.report import environment_section
from nas.run import Run
from nas.training.curves import read_curves
from nas.training.presets import PRESETS
from nas.training.recipe import Recipe
from nas.training.summary import TrainingSummary, summarise
from nas.training.task import Task
from search_spaces.common.drawing import draw_graph
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, float]]
PARTS = {"train": plots.COLORS[0], "val": plots.COLORS[1]}
WORDS = {"train": "training", "val": "validation"}


def write_training_report(run: Run, out: str | os.PathLike[str]) -> Path:
    """Write the report of a training. Errors: UserError if no epoch is finished, RunError if it cannot be written."""
    return page.write(out, training_report(run))


def write_curve_plot(run: Run, out: str | os.PathLike[str]) -> None:
    """Write the learning curves to an .svg or .png file. Errors: UserError."""
    plots.save(curve_figure(_curves(run)), out)


def _curves(run: Run) -> Rows:
    path = run.path / "curves.parquet"
    if not path.exists():
        raise UserError(str(run.path), "a training with a finished epoch")
    return read_curves(path)


def training_report(run: Run) -> str:
    """The report as HTML."""
    rows, summary = _curves(run), summarise(run)
    task = Task.from_json(run.settings["task"])
    subject = task.space or str(task.factory)
    kind = f"nasforge training · {subject} on {task.data} · {run.settings.get('preset', 'own recipe')}"
    body = [
        page.tiles(_tiles(run, summary, rows)),
        page.section("Learning curves", page.figure(plots.svg(curve_figure(rows), "curves"), _caption(rows))),
        _network_section(task),
        _seeds_section(summary),
        _recipe_section(run, task),
        environment_section(run.settings.get("environment") or {}),
    ]
    title = "A training" if summary.val_acc is None else f"{summary.val_acc.text()} % validation accuracy"
    return page.page(title, kind, body, f"nasforge {run.settings.get('version', '')}")


def _tiles(run: Run, summary: TrainingSummary, rows: Rows) -> dict[str, str]:
    tiles: dict[str, str] = {}
    for name, spread in (("validation accuracy (%)", summary.val_acc), ("test accuracy (%)", summary.test_acc)):
        if spread is not None:
            tiles[name] = spread.text()
    tiles["seeds finished"] = f"{len(summary.finished)} of {len(run.settings['seeds'])}"
    tiles["epochs"] = str(max(int(row["epoch"]) for row in rows))
    last = {row["seed"]: row["seconds"] for row in rows}
    tiles["time in all"] = format_seconds(sum(last.values()))
    return tiles


def _caption(rows: Rows) -> str:
    seeds = len({row["seed"] for row in rows})
    return "" if seeds == 1 else f"Mean of {seeds} seeds; thin lines are the single trainings."


def curve_figure(rows: Rows) -> Figure:
    """Loss on the left, accuracy on the right, by epochs."""
    from matplotlib.ticker import MaxNLocator

    axes = plots.panels(2)
    for place, (quantity, label) in enumerate((("loss", "cross-entropy"), ("acc", "accuracy (%)"))):
        for part, color in PARTS.items():
            seed_lines(axes[place], rows, f"{part}_{quantity}", color, WORDS[part])
        axes[place].set_xlabel("epoch")
        axes[place].set_ylabel(label)
        axes[place].xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes[0].legend(loc="upper right", frameon=False)
    return plots.figure_of(axes[0])


def seed_lines(
    axes: Axes, rows: Sequence[Mapping[str, Any]], column: str, color: str, label: str | None = None
) -> None:
    """The mean of a column over seeds by epochs, and a thin line for each of several seeds.

    rows: with `seed` and `epoch`; those without the column are left out.
    """
    seeds = sorted({row["seed"] for row in rows})
    by_epoch: dict[int, list[float]] = {}
    for seed in seeds:
        points = [(int(r["epoch"]), r[column]) for r in rows if r["seed"] == seed and r.get(column) is not None]
        for epoch, value in points:
            by_epoch.setdefault(epoch, []).append(value)
        if points and len(seeds) > 1:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=0.7, alpha=0.4)
    if by_epoch:
        epochs = sorted(by_epoch)
        marker = "o" if len(epochs) == 1 else None
        means = [float(np.mean(by_epoch[e])) for e in epochs]
        axes.plot(epochs, means, color=color, linewidth=1.9, label=label, marker=marker)


def _network_section(task: Task) -> page.Markup:
    if task.space is None:
        return page.section("The network", page.pairs({"factory": page.code(task.factory), **dict(task.network)}))
    space = load_space(task.space)
    arch = space.decode(str(task.arch))
    values: dict[str, object] = {"space": task.space, "architecture": page.code(space.readable(arch))}
    values |= task.network
    values |= {k: v for k, v in {"norm": task.norm, "act": task.act, "layer": task.layer}.items() if v}
    try:
        cost = space.cost(arch, **dict(task.network))
        values |= {"parameters": format_count(cost["params"])}
    except (UserError, TypeError):
        pass
    drawing = page.figure(draw_graph(space.graph(arch), title=str(task.arch)))
    return page.section("The network", drawing, page.pairs(values))


def _seeds_section(summary: TrainingSummary) -> page.Markup:
    names = ("val_acc", "test_acc", "val_loss", "test_loss", "train_loss", "epochs", "train_seconds")
    rows: list[list[object]] = []
    for record in (*summary.finished, *summary.failed):
        metrics: Mapping[str, float] = record.metrics or {}
        cells: list[object] = [record.seed, *(f"{metrics[n]:.4g}" if n in metrics else "-" for n in names)]
        rows.append([*cells, record.error or ""])
    headings = ["seed", *(n.replace("_", " ") for n in names), "" if not summary.failed else "broke down"]
    return page.section("The seeds", page.table(headings, rows, numbers=range(1, 1 + len(names))))


def _recipe_section(run: Run, task: Task) -> page.Markup:
    """What differs from a plain recipe, and where it is from."""
    preset = PRESETS.get(run.settings.get("preset", ""))
    sources = preset.sources if preset is not None else {}
    own: dict[str, Any] = asdict(preset.recipe) if preset is not None else asdict(Recipe())
    plain = asdict(Recipe())
    rows: list[list[object]] = []
    for name, value in asdict(task.recipe).items():
        source = next((text for names, text in sources.items() if name in names.split(", ")), "")
        if value != own[name]:
            source = f"given; the preset has {own[name]}"
        if name != "source" and (source or value != plain[name]):
            rows.append([name.replace("_", " "), str(value), source])
    goes_on = f"nas resume {run.path}\nnas evaluate {run.path}\nnas export {run.path}:best --to model.py"
    onward = page.paragraph("To go on with it, to measure it, to take it home:"), page.block(goes_on)
    return repeat_section(run, "training", onward, task.recipe.source, rows)


def repeat_section(
    run: Run, what: str, onward: Sequence[page.Markup], source: str, rows: Sequence[Sequence[Any]]
) -> page.Markup:
    """The command of a run, what to do with it next, and its settings (name, value, source) and data.

    what: `training`, `search`. source: of the recipe.
    """
    data = {k: v for k, v in run.settings["data"].items() if not isinstance(v, list | dict)}
    content: list[object] = []
    if run.settings.get("command"):
        content += [page.paragraph(f"The same {what} again:"), page.block(run.settings["command"])]
    content += [*onward, page.paragraph(source), page.table(["setting", "value", "source"], rows)]
    content += [page.pairs({f"data {k}".replace("_", " "): str(v) for k, v in data.items()})]
    return page.section("How to repeat it", *content)
