"""nas supernet compare: differentiable searches side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from nas.cli import options
from nas.cli.output import Output


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of searches in supernets.", show_default=False)],
    benchmark: Annotated[
        str,
        typer.Option(
            "--benchmark", help="<space>/<data set> that knows the truth.", autocompletion=options._benchmarks
        ),
    ] = "nas-bench-201/cifar10",
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the epochs, .svg or .png.")] = None,
    records: Annotated[Path | None, typer.Option("--records", help="Write all epochs, a line of JSON each.")] = None,
    json: options.Json = False,
) -> None:
    """Compare what searches found by a table: accuracy, rank, skip connections, curvature."""
    from benchmarks.registry import open_table
    from nas.supernet import comparison as compared

    output = Output("supernet compare", json)
    table = open_table(benchmark)
    found = compared.compare(runs, table)
    lines = compared.rows(found)
    names = ["recipe", "seeds", found.metric, "±", f"ranks of {found.size:,}", "skips", "eigenvalue", "seconds"]
    output.table(
        names,
        [
            [
                line["recipe"],
                line["seeds"],
                f"{line['acc']:.2f}",
                "" if line["acc_deviation"] is None else f"{line['acc_deviation']:.2f}",
                ", ".join(f"{rank:,}" for rank in line["ranks"]),
                f"{100 * line['skip_share']:.0f} %",
                "" if line["eigenvalue"] is None else f"{line['eigenvalue']:.2f}",
                f"{line['seconds']:.0f}",
            ]
            for line in lines
        ],
    )
    output.say(
        f"\na random architecture {found.mean:.2f} ± {found.deviation:.2f}, the best {found.best:.2f}"
        "; ±: standard deviation, between seeds or architectures",
        style="dim",
    )
    if records is not None:
        compared.write_records(found, records)
    if plot is not None:
        from nas.plots import save

        save(compared.figure(found), plot)
    chance = {"mean": found.mean, "deviation": found.deviation, "best": found.best, "size": found.size}
    outcomes = [{k: v for k, v in asdict(outcome).items() if k != "epochs"} for outcome in found.outcomes]
    output.finish(
        {"benchmark": found.benchmark, "metric": found.metric, "recipes": lines, "table": chance, "outcomes": outcomes}
    )
