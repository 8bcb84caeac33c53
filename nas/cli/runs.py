"""nas runs, show, report, plot: what stands in run folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from nas.cli import options
from nas.cli.output import Output
from search_spaces.common.errors import UserError

OutFile = Annotated[Path | None, typer.Option("--out", help="The file to write.")]


def runs(
    folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path("runs"),
    json: options.Json = False,
) -> None:
    """List the runs in a folder."""
    from nas.run import find_runs

    output = Output("runs", json)
    rows, listed = [], []
    for run in find_runs(folder):
        trials = run.trials()
        told = sum(t.status != "asked" for t in trials)
        running = run.running()
        state = "running" if running else "done" if run.settings.get("finished") else "stopped"
        evaluator, strategy, seed = _subject(run.settings)
        rows.append([str(run.path), evaluator, strategy, seed, told, state])
        names = ("run", "evaluator", "strategy", "seed", "trials", "state")
        listed.append(dict(zip(names, rows[-1], strict=True)))
    if rows:
        output.table(["run", "evaluator", "strategy", "seed", "trials", "state"], rows)
    else:
        output.say(f"no runs in {folder}; begin one with `nas search`")
    output.finish({"runs": listed})


def _subject(settings: Mapping[str, Any]) -> tuple[str, str, Any]:
    """What a run measures, how, and its seed or seeds."""
    if settings.get("kind") == "training":
        task = settings["task"]
        seeds = ", ".join(map(str, settings["seeds"]))
        return f"train:{task['space'] or task['factory']}/{task['data']}", settings.get("preset", "training"), seeds
    return settings["evaluator"], settings["strategy"], settings["seed"]


def show(
    architecture: Annotated[str, typer.Argument(metavar="RUN[:best|:ID]", help="A run, or one of its trials.")],
    build: Annotated[bool, typer.Option("--build", help="Build the network and count.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the drawing to this .svg file.")] = None,
    json: options.Json = False,
) -> None:
    """Show an architecture of a run: notation, metrics, costs, drawing."""
    from nas.references import find_architecture
    from search_spaces.common.drawing import draw_graph
    from search_spaces.common.files import atomic_write

    found = find_architecture(architecture)
    output = Output("show", json, found.run.settings.get("seed"))
    space, record = found.space, found.record
    arch = space.decode(record.arch)
    lines: dict = {"architecture": space.readable(arch), "trial": record.id, "key": record.key}
    lines |= record.metrics or {}
    result: dict[str, Any] = {"arch": record.arch, "key": record.key, "trial": record.id, "metrics": record.metrics}
    scale = found.network
    try:
        costs = space.cost(arch, **scale)
        if "params" not in (record.metrics or {}):  # a training counted them at the size of its own images
            lines |= {f"network {k}": v for k, v in costs.items()}
        result["cost"] = costs
    except UserError:
        pass
    if build:
        network = space.build(arch, **scale)
        result["built_params"] = sum(p.numel() for p in network.parameters())
        lines["parameters of the built network"] = result["built_params"]
    drawing = out or found.run.path / f"trial-{record.id}.svg"
    with atomic_write(drawing) as file:
        file.write(draw_graph(space.graph(arch), title=record.arch))
    lines["drawing"] = str(drawing)
    output.pairs(lines)
    output.finish({"run": str(found.run.path), "drawing": str(drawing), **result})


def report(run: options.RunFolder, out: OutFile = None, json: options.Json = False) -> None:
    """Write a run's report: one HTML file that opens from disk."""
    from nas.references import load_result
    from nas.report import write_report
    from nas.run import Run

    kind = Run.open(run).settings.get("kind")
    if kind in ("training", "supernet"):
        from nas.supernet.report import write_search_report
        from nas.training.report import write_training_report

        output = Output("report", json)
        write = write_training_report if kind == "training" else write_search_report
        path = write(Run.open(run), out or Path(run) / "report.html")
        output.say(f"report: {path}")
        output.finish({"run": str(run), "report": str(path)})
        return
    result = load_result(run)
    output = Output("report", json, result.settings["seed"])
    path = out or Path(run) / "report.html"
    write_report(result, path)
    output.say(f"report: {path}")
    output.finish({"run": str(run), "report": str(path)})


def plot(run: options.RunFolder, out: OutFile = None, json: options.Json = False) -> None:
    """Write a run's curve (and its front, with several objectives) as .svg or .png."""
    from nas.references import load_result
    from nas.report import write_run_plot
    from nas.run import Run

    kind = Run.open(run).settings.get("kind")
    if kind in ("training", "supernet"):
        from nas.supernet.report import write_search_plot
        from nas.training.report import write_curve_plot

        output = Output("plot", json)
        path = out or Path(run) / "curves.svg"
        draw = write_curve_plot if kind == "training" else write_search_plot
        draw(Run.open(run), path)
        output.say(f"plot: {path}")
        output.finish({"run": str(run), "plot": str(path)})
        return
    result = load_result(run)
    output = Output("plot", json, result.settings["seed"])
    path = out or Path(run) / "curve.svg"
    write_run_plot(result, path)
    output.say(f"plot: {path}")
    output.finish({"run": str(run), "plot": str(path)})
