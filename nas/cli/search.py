"""nas search, nas resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import nas
from nas.cli import options
from nas.cli.context import command_line, environment
from nas.cli.output import Output
from search_spaces.common.errors import UserError


def search(
    benchmark: options.Benchmark = None,
    evaluator: Annotated[str | None, typer.Option(help="table:ID or package.module:object.")] = None,
    space: Annotated[
        str | None, typer.Option(help="A space's name or package.module:object (tables know theirs).")
    ] = None,
    strategy: options.Strategy = "regularized-evolution",
    queries: Annotated[int | None, typer.Option(help="Stop after so many evaluations.")] = None,
    simulated_seconds: Annotated[float | None, typer.Option(help="Stop by the simulated clock (cost_seconds).")] = None,
    wall_seconds: Annotated[float | None, typer.Option(help="Stop by the clock on the wall.")] = None,
    objectives: options.Objectives = None,
    label: options.Label = "val",
    seed_policy: Annotated[str, typer.Option(help="Of a table: mean, random, or a seed's number.")] = "mean",
    setting: options.Settings = None,
    seed: options.Seed = 0,
    workers: Annotated[int, typer.Option(help="Processes that evaluate.")] = 1,
    timeout: Annotated[float | None, typer.Option(help="Seconds for one evaluation.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder (default: a new one below runs/).")] = None,
    json: options.Json = False,
) -> None:
    """Search for an architecture; the run can be continued, reported and shown afterwards."""
    if (benchmark is None) == (evaluator is None):
        raise UserError("--benchmark", "one of --benchmark and --evaluator")
    if queries is None and simulated_seconds is None and wall_seconds is None:
        queries = 300
    settings = {
        "evaluator": evaluator or f"table:{benchmark}",
        "space": space,
        "strategy": strategy,
        "strategy_settings": options.read_settings(setting),
        "objectives": objectives,
        "label": label,
        "seed_policy": options.read_seed_policy(seed_policy),
        "budget": {"queries": queries, "simulated_seconds": simulated_seconds, "wall_seconds": wall_seconds},
        "seed": seed,
        "workers": workers,
        "timeout_seconds": timeout,
    }
    output = Output("search", json, seed)
    _search(settings, out, output)


def resume(
    run: options.RunFolder,
    workers: Annotated[int | None, typer.Option(help="Processes that evaluate (default: as before).")] = None,
    json: options.Json = False,
) -> None:
    """Continue a run where it stopped."""
    from nas.run import Run

    settings = dict(Run.open(run).settings)
    if settings.get("kind") == "layers":
        from nas.cli.layers import resume as resume_layers

        settings["workers"] = workers or settings["workers"]
        resume_layers(settings, Path(run), Output("resume", json, settings["seed"]))
        return
    if settings.get("kind") != "search":
        raise UserError(run, f"a search; this run is a {settings.get('kind')}")
    settings["workers"] = workers or settings["workers"]
    output = Output("resume", json, settings["seed"])
    _search(settings, Path(run), output)


def _search(settings: Mapping[str, Any], out: Path | None, output: Output) -> None:
    from nas.budget import Budget
    from nas.comparison import fill_settings
    from nas.evaluators import TableEvaluator, make_evaluator, space_of
    from nas.loop import search as run_search
    from nas.objectives import parse_objectives
    from nas.strategies import strategy_class
    from search_spaces.registry import load_space, space_text

    name = strategy_class(settings["strategy"]).name
    objectives = parse_objectives(settings["objectives"]) if settings["objectives"] else None
    budget = Budget(**settings["budget"])
    evaluator = make_evaluator(settings["evaluator"], objectives, settings["label"], settings["seed_policy"] or "mean")
    space = load_space(settings["space"]) if settings["space"] else space_of(evaluator)
    if isinstance(evaluator, TableEvaluator) and space.name != evaluator.table.space.name:
        raise UserError(space.name, f"the space of {evaluator.benchmark}", evaluator.table.space_name)
    evaluator_text = _evaluator_text(evaluator, settings["evaluator"])
    describe = {
        "space": settings["space"] or space_text(space),
        "evaluator": evaluator_text,
        "command": settings.get("command") or command_line(),
        "version": nas.__version__,
        "environment": settings.get("environment") or environment(),
    }
    arguments: dict[str, Any] = {
        "strategy": name,
        "strategy_settings": fill_settings(name, settings["strategy_settings"], evaluator),
        "budget": budget,
        "objectives": objectives,
        "seed": settings["seed"],
        "workers": settings["workers"],
        "timeout_seconds": settings["timeout_seconds"],
        "describe": describe,
    }
    if out is None:
        out = _default_folder(f"{evaluator_text.partition(':')[2]}-{name}-seed{settings['seed']}", settings)
    with output.progress("evaluations") as progress:
        result = run_search(space, evaluator, out=out, progress=progress, **arguments)
    _print(result, out, output)


def _evaluator_text(evaluator: Any, given: str) -> str:
    from nas.evaluators import TableEvaluator

    return f"table:{evaluator.benchmark}" if isinstance(evaluator, TableEvaluator) else given


def _default_folder(name: str, settings: Mapping[str, Any]) -> Path:
    """runs/<name>, or runs/<name>-2, ... : the first that is free or was begun by the same command."""
    from nas.run import Run

    stem = "".join(c if c.isalnum() or c in ".-" else "-" for c in name)
    number = 1
    while True:
        path = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        if not path.exists() or (Run.exists(path) and Run.open(path).settings.get("command") == command_line()):
            return path
        number += 1


def _print(result: Any, out: Path, output: Output) -> None:
    failed = [r for r in result.records if r.status == "failed"]
    if failed:
        output.warn(f"{len(failed)} of {len(result.records)} trials failed, the last with: {failed[-1].error}")
    if result.settings["label"] == "test":
        output.warn("searched on test labels (--label test): the values below are no estimate of generalisation")
    summary = result.summary().as_json()
    best = summary["best"]
    if best is None:
        raise UserError(str(out), "a trial that succeeded and keeps the bounds; none did")
    primary = result.settings["objectives"].partition(",")[0].partition(":")[0]
    lines: dict[str, Any] = {"best": best["arch"], primary: best["metrics"][primary]}
    for name, value in best["metrics"].items():
        if name not in (primary, "cost_seconds"):
            lines[name] = value
    if summary["optimum"] is not None:
        bounded = any(sign in result.settings["objectives"] for sign in "<>")
        lines["optimum of the table" + (" under the bounds" if bounded else "")] = summary["optimum"]
        lines["regret"] = summary["regret"]
    if result.settings["label"] != "test" and summary["optimum"] is not None:
        lines["test"] = summary["best_test"] if summary["best_test"] is not None else "no test values in this table"
    if len(summary["front"] or ()) > 1:
        lines["front"] = f"{len(summary['front'])} architectures"
        lines["hypervolume regret"] = summary["hypervolume_regret"]
    lines["queries"] = summary["queries"]
    lines["run"] = str(out)
    output.pairs(lines)
    output.say(f"\nreport: nas report {out}    drawing: nas show {out}:best", style="dim")
    output.finish({"run": str(out), **summary})
