"""nas compare."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli import options
from nas.cli.context import command_line, environment
from nas.cli.output import Output

if TYPE_CHECKING:
    from nas.comparison import StrategyCurves


def compare(
    benchmark: Annotated[
        str, typer.Option(help="The table, see `nas bench list`.", autocompletion=options._benchmarks)
    ],
    strategies: Annotated[str, typer.Option(help="Names with commas between.")] = (
        "random-search,local-search,regularized-evolution"
    ),
    queries: Annotated[int, typer.Option(help="Evaluations per seed.")] = 150,
    seeds: Annotated[int, typer.Option(help="How many seeds, from --seed on.")] = 200,
    objectives: options.Objectives = None,
    label: options.Label = "val",
    seed: options.Seed = 0,
    workers: Annotated[int | None, typer.Option(help="Processes (default: one per core).")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML file with the curves.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the curves as .svg or .png.")] = None,
    json: options.Json = False,
) -> None:
    """Compare strategies over many seeds on one table."""
    from nas.comparison import compare as run_compare
    from nas.strategies import strategy_settings

    output = Output("compare", json, seed)
    with output.progress("comparing") as progress:
        result = run_compare(
            benchmark,
            [name.strip() for name in strategies.split(",") if name.strip()],
            queries=queries,
            seeds=seeds,
            seed=seed,
            objectives=objectives,
            label=label,
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
    if math.isnan(mean):
        return "-"  # some seeds have not trained anything to the end by then
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"
