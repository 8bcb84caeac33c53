"""nas compare."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import nas
from nas.cli import options
from nas.cli.context import command_line, environment
from nas.cli.output import Output
from nas.cli.search import (
    Device,
    OwnSchedule,
    SplitSeed,
    Threads,
    TrainSeed,
    clock,
    read_training,
)
from search_spaces.common.errors import UserError
from search_spaces.common.names import nearest

if TYPE_CHECKING:
    from nas.comparison import StrategyCurves


def compare(
    benchmark: options.Benchmark = None,
    evaluator: Annotated[str | None, typer.Option(help="table:ID, or train: real training, see --space.")] = None,
    strategies: Annotated[str, typer.Option(help="Names with commas between.")] = (
        "random-search,local-search,regularized-evolution"
    ),
    setting: Annotated[
        list[str] | None, typer.Option(help="STRATEGY.NAME=VALUE, see `nas strategies`; repeatable.")
    ] = None,
    queries: Annotated[int | None, typer.Option(help="Evaluations per seed (default: 150, 20 of train).")] = None,
    simulated_seconds: Annotated[
        float | None, typer.Option(help="Of train: stop each search after so many seconds of training.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="How many, from --seed on (default: 200, 3 of train).")] = None,
    objectives: options.Objectives = None,
    label: options.Label = "val",
    seed: options.Seed = 0,
    workers: Annotated[int | None, typer.Option(help="Processes (default: one per core, 1 of train).")] = None,
    space: Annotated[str | None, typer.Option(help="Of train: the space.")] = None,
    data: options.Data = "digits",
    data_root: options.DataRoot = None,
    size: options.Size = None,
    preset: options.Preset = "digits-tiny",
    change: options.Changes = None,
    scale: options.Scale = None,
    norm: options.Norm = None,
    act: options.Act = None,
    layer: options.Layer = None,
    val_share: options.ValShare = None,
    split_seed: SplitSeed = 0,
    train_seed: TrainSeed = 0,
    own_schedule: OwnSchedule = False,
    device: Device = "cpu",
    threads: Threads = 1,
    out: Annotated[Path | None, typer.Option(help="Of train: the folder of the runs (default: below runs/).")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML file with the curves (of tables).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the curves as .svg or .png (of tables).")] = None,
    json: options.Json = False,
) -> None:
    """Compare strategies over many seeds on one table, or over a few by real training (--evaluator train).

    The options from --data to --threads are those of --evaluator train.
    """
    if (benchmark is None) == (evaluator is None):
        raise UserError("--benchmark", "one of --benchmark and --evaluator")
    root = None if data_root is None else str(data_root)
    given: dict[str, Any] = {"data": data, "root": root, "size": size, "norm": norm, "act": act, "layer": layer}
    given |= {"val_share": val_share, "split_seed": split_seed, "train_seed": train_seed, "threads": threads}
    given |= {"own_schedule": own_schedule, "device": device}
    training = read_training(evaluator, space, preset, change, scale, **given)
    names = [name.strip() for name in strategies.split(",") if name.strip()]
    settings = options.read_strategy_settings(setting, names)
    if training is not None:
        for option, unused in (("--report", report), ("--plot", plot)):
            if unused is not None:
                raise UserError(option, "a table with it; of runs by training each has its own: nas report RUN")
        budget = {"queries": queries, "simulated_seconds": simulated_seconds}
        arguments = {"seeds": seeds or 3, "seed": seed, "workers": workers or 1, "strategy_settings": settings}
        _compare_by_training(training, names, out, budget, objectives or "val_acc", label, arguments, json)
        return
    for option, value in (("--simulated-seconds", simulated_seconds), ("--space", space), ("--out", out)):
        if value is not None:
            raise UserError(option, "--evaluator train with it")
    id = benchmark or str(evaluator).removeprefix("table:")
    if evaluator is not None and not evaluator.startswith("table:"):
        raise UserError(evaluator, "an evaluator to compare on: table:<benchmark id> or train", nearest(id, ["train"]))
    files = {"report": report, "plot": plot}
    _compare_on_table(
        id, names, settings, queries or 150, seeds or 200, objectives, label, seed, workers, json=json, **files
    )


def _compare_on_table(
    benchmark: str,
    strategies: list[str],
    settings: dict[str, dict[str, Any]],
    queries: int,
    seeds: int,
    objectives: str | None,
    label: str,
    seed: int,
    workers: int | None,
    report: Path | None,
    plot: Path | None,
    json: bool,
) -> None:
    from nas.comparison import compare as run_compare
    from nas.strategies import strategy_settings

    output = Output("compare", json, seed)
    with output.progress("comparing") as progress:
        result = run_compare(
            benchmark,
            strategies,
            queries=queries,
            seeds=seeds,
            seed=seed,
            objectives=objectives,
            label=label,
            strategy_settings=settings,
            workers=workers,
            progress=progress,
        )
    if label == "test":
        output.warn("compared on test labels (--label test)")
    partial = [s.name for s in result.strategies if "fidelities" in strategy_settings(s.name)]
    if partial:
        output.warn(f"a query of {' or '.join(partial)} may be a short training: equal queries are not equal costs")
    at = result.milestones()
    what = f"{result.objectives} on {result.benchmark}: mean of the best found after so many queries, {seeds} seeds"
    rows = [
        [
            s.name,
            *(_mean_and_error(s, q) for q in at),
            f"{100 * s.optimum_share():.1f} %",
            s.median_queries_to_optimum(),
        ]
        for s in result.strategies
    ]
    rows.append(["random draws, exact", *(f"{result.expectation[q - 1]:.3f}" for q in at), "", ""])
    rows.append(["optimum of the table", *(f"{result.optimum:.3f}" for _ in at), "", ""])
    headings = ["strategy", *(f"{q:,}" for q in at), "at optimum", "median queries to it"]
    output.table(headings, rows, title=what)
    if report is not None or plot is not None:
        from nas.comparison_report import write_comparison_plot, write_comparison_report

        if report is not None:
            write_comparison_report(result, report, command=command_line(), environment=environment())
            output.say(f"report: {report}")
        if plot is not None:
            write_comparison_plot(result, plot)
            output.say(f"plot: {plot}")
    output.finish(result.as_json())


def _mean_and_error(curves: StrategyCurves, queries: int) -> str:
    mean, error = curves.mean_best([queries])[str(queries)], curves.standard_error([queries])[str(queries)]
    return _shown(mean, error)


def _compare_by_training(
    training: dict[str, Any],
    strategies: list[str],
    out: Path | None,
    budget: dict[str, Any],
    objectives: str,
    label: str,
    arguments: dict[str, Any],
    json: bool,
) -> None:
    from nas.budget import Budget
    from nas.evaluators import make_evaluator
    from nas.objectives import parse_objectives
    from nas.training.comparison import compare_by_training, mean_and_error

    output = Output("compare", json, arguments["seed"])
    if all(value is None for value in budget.values()):
        budget = {"queries": 20}
    evaluator: Any = make_evaluator("train", parse_objectives(objectives), label, training=training)
    if out is None:
        out = _folder(f"compare-train-{evaluator.space}-{Path(evaluator.data).name}".replace(":", "-"))
    describe = {"command": command_line(), "version": nas.__version__, "environment": environment()}
    with output.progress("searches") as progress:
        result = compare_by_training(
            evaluator,
            strategies,
            out,
            budget=Budget(**budget),
            objectives=objectives,
            describe=describe,
            progress=progress,
            **arguments,
        )
    at, seconds = result.queries(), result.common_seconds()
    rows = []
    for name in result.results:
        costs = [float(spent[-1]) for _, spent in result.curves(name)]
        after = [_shown(*mean_and_error(result.after_queries(name, q))) for q in at]
        within = _shown(*mean_and_error(result.within_seconds(name, seconds)))
        rows.append([name, *after, within, clock(sum(costs) / len(costs))])
    headings = ["strategy", *(f"{q:,}" for q in at), f"within {clock(seconds)}", "training"]
    count = f"{arguments['seeds']} seeds" if arguments["seeds"] > 1 else "1 seed"
    title = f"{objectives} of {evaluator.space} on {evaluator.data}: mean of the best after so many trials, {count}"
    output.table(headings, rows, title=title)
    output.say(
        f"\nruns: {out}    reports: nas report {out}/{next(iter(result.results))}-seed{arguments['seed']}", "dim"
    )
    output.finish({"run": str(out), "seeds": arguments["seeds"], **result.as_json()})


def _folder(name: str) -> Path:
    """runs/<name>, or runs/<name>-2, ... : the first that is free or whose runs were begun by the same command."""
    from nas.run import find_runs

    number = 1
    while True:
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not path.exists() or any(run.settings.get("command") == command_line() for run in find_runs(path)):
            return path
        number += 1


def _shown(mean: float, error: float) -> str:
    if math.isnan(mean):
        return "-"  # some seeds have not trained anything to the end by then
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"
