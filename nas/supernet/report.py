"""The report of a differentiable search: what each seed found, how it got there, the recipe with its sources."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas import page, plots
from nas.metrics import format_seconds
from nas.report import environment_section
from nas.run import Run, TrialRecord
from nas.supernet.log import Row, read_log
from nas.supernet.recipes import RECIPES, sources
from nas.supernet.task import SearchTask
from nas.training.report import repeat_section, seed_lines
from search_spaces.common.drawing import draw_graph
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space
from search_spaces.space import SearchSpace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    "val_acc": "accuracy of the whole supernet (%)",
    "skip_share": "share of skip connections",
    "entropy": "entropy of the mixing weights (nats)",
    "eigenvalue": "largest eigenvalue of the Hessian",
}


def write_search_report(run: Run, out: str | os.PathLike[str]) -> Path:
    """Write the report. Errors: UserError if no epoch is finished, RunError if it cannot be written."""
    return page.write(out, search_report(run))


def write_search_plot(run: Run, out: str | os.PathLike[str]) -> None:
    """Write the curves over the epochs to an .svg or .png file. Errors: UserError."""
    plots.save(epochs_figure(_rows(run)), out)


def search_report(run: Run) -> str:
    """The report as HTML."""
    rows, task = _rows(run), SearchTask.from_json(run.settings["search"])
    space, trials = load_space(task.space), run.trials()
    done = [trial for trial in trials if trial.status == "done"]
    kind = f"nasforge differentiable search · {task.space} on {task.data} · {run.settings.get('scale', 'own scale')}"
    found = len({trial.key for trial in done})
    many = "" if found == 1 else "s"
    title = f"{task.recipe.name} found {found} architecture{many} with {len(done)} of {len(trials)} seeds"
    caption = "Thin lines are seeds, thick ones their mean." if len(trials) > 1 else ""
    figures = [page.figure(plots.svg(epochs_figure(rows, [name]), name), caption) for name in _logged(rows)]
    body = [
        page.tiles(_tiles(run, rows, done)),
        *(_found_section(space, trial) for trial in done),
        page.section("Over the epochs", page.plots(figures)),
        _seeds_section(trials),
        _recipe_section(run, task),
        environment_section(run.settings.get("environment") or {}),
    ]
    return page.page(title, kind, body, f"nasforge {run.settings.get('version', '')}")


def epochs_figure(rows: list[Row], names: Sequence[str] | None = None) -> Figure:
    """A panel for each of `names` in PANELS, by default for all that the log holds, by epochs."""
    from matplotlib.ticker import MaxNLocator

    names = _logged(rows) if names is None else names
    axes = plots.panels(len(names))
    for own, name in zip(axes, names, strict=True):
        seed_lines(own, rows, name, plots.COLORS[0])
        own.set_xlabel("epoch")
        own.set_title(PANELS[name], fontsize=9.5, loc="left")
        own.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        if name == "skip_share":
            own.set_ylim(-0.03, 1.03)
    return plots.figure_of(axes[0])


def _logged(rows: list[Row]) -> list[str]:
    return [name for name in PANELS if any(name in row for row in rows)]


def _rows(run: Run) -> list[Row]:
    rows = read_log(run)
    if not rows:
        raise UserError(str(run.path), "a search with a finished epoch")
    return rows


def _tiles(run: Run, rows: list[Row], done: list[TrialRecord]) -> dict[str, str]:
    last = {row["seed"]: row for row in rows}
    skips = [trial.metrics["skip_share"] for trial in done if trial.metrics]
    tiles = {"seeds finished": f"{len(done)} of {len(run.settings['seeds'])}"}
    tiles["epochs"] = str(max(row["epoch"] for row in rows))
    if skips:
        tiles["skip connections"] = " ".join(f"{100 * share:.0f} %" for share in skips)
    tiles["time in all"] = format_seconds(sum(row["seconds"] for row in last.values()))
    return tiles


def _found_section(space: SearchSpace, trial: TrialRecord) -> page.Markup:
    arch = space.decode(trial.arch)
    try:
        drawing = page.figure(draw_graph(space.graph(arch), title=trial.arch))
    except UserError:  # a space without graphs
        drawing = page.paragraph("")
    return page.section(f"Found with seed {trial.seed}", drawing, page.code(space.readable(arch)))


def _seeds_section(trials: list[TrialRecord]) -> page.Markup:
    names = ("val_acc", "mixture_val_acc", "skip_share", "eigenvalue", "train_loss", "epochs", "search_seconds")
    rows = []
    for trial in trials:
        metrics = trial.metrics or {}
        cells = [f"{metrics[name]:.4g}" if name in metrics else "-" for name in names]
        rows.append([trial.seed, *cells, trial.error or ""])
    note = (
        "val_acc is the accuracy of the architecture with the weights it shares in the supernet, on the images of the"
        " alphas: it says little about what it reaches when it is trained."
    )
    headings = [
        "seed",
        *(name.replace("_", " ") for name in names),
        "broke down" if any(t.error for t in trials) else "",
    ]
    return page.section("The seeds", page.table(headings, rows, numbers=range(1, 1 + len(names))), page.small(note))


def _recipe_section(run: Run, task: SearchTask) -> page.Markup:
    """Its settings with their places, what was changed, and what to do next."""
    known, plain = sources(task.recipe.name), RECIPES[task.recipe.name].flat() if task.recipe.name in RECIPES else {}
    rows: list[list[Any]] = []
    for name, value in task.recipe.flat().items():
        if name in ("name", "source") or (name not in known and value == plain.get(name)):
            continue
        place = known.get(name, "")
        if value != plain.get(name):
            place = f"given or by the scale; the recipe has {plain.get(name)}"
        rows.append([name.replace("_", " "), str(value), place])
    goes_on = f"nas resume {run.path}\nnas train {run.path}:best --data {task.data}"
    onward = page.paragraph("To go on with it, to train what it found:"), page.block(goes_on)
    return repeat_section(run, "search", onward, task.recipe.source, rows)
