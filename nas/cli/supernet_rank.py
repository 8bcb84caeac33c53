"""nas supernet rank: how well a trained supernet ranks the architectures of a table."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from nas.cli import options
from nas.cli.output import Output
from search_spaces.common.errors import UserError

if TYPE_CHECKING:
    from nas.scoring.correlation import ProxyCorrelation

SUFFIXES = (".csv", ".parquet")


def rank(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a search by `nas supernet search`.")],
    benchmark: Annotated[str, typer.Option("--benchmark", help="<space>/<data set>, see `nas bench list`.")],
    sample: Annotated[int | None, typer.Option(help="Architectures drawn, of different keys (default: all).")] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Of the benchmark: val_acc or test_acc (default: test where it has test values)."),
    ] = None,
    search_seed: Annotated[
        list[int] | None, typer.Option("--search-seed", help="A seed of the search; repeatable (default: all).")
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Measure accuracy on so many of the alphas' images (default: all).")
    ] = None,
    resamples: Annotated[int, typer.Option(help="Bootstrap samples for the intervals.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the sample and of the intervals.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    out: Annotated[Path | None, typer.Option("--out", help="Write all scores to this .csv or .parquet file.")] = None,
    json: options.Json = False,
) -> None:
    """Score sub-networks of a trained supernet with the weights they share, and compare with a benchmark.

    BatchNorm's statistics are taken anew for every sub-network. What was scored is kept in the run, so the same
    command goes on where it was interrupted.
    """
    from benchmarks.registry import open_table
    from nas.cli.train import _device
    from nas.run import Run
    from nas.supernet.ranking import rank as rank_

    output = Output("supernet rank", json, seed)
    if out is not None and (out.suffix not in SUFFIXES or not out.parent.is_dir()):
        raise UserError(str(out), f"a file in a folder that exists, ending in {' or '.join(SUFFIXES)}")
    if resamples < 1:
        raise UserError(resamples, "at least one bootstrap sample")
    found, table = Run.open(run), open_table(benchmark)
    with output.progress("sub-networks") as progress:
        ranking = rank_(
            found,
            table,
            np.random.default_rng(seed),
            sample=sample,
            metric=metric,
            seeds=search_seed,
            images=images,
            device=_device(device),
            resamples=resamples,
            progress=progress,
        )
    settings = found.settings["search"]
    last = settings["recipe"]["training"]["epochs"]
    for each, epochs in ranking.epochs.items():
        if epochs < last:
            output.warn(f"seed {each} is ranked after {epochs} of {last} epochs")
    rows = [_row(f"seed {each}", one) for each, one in ranking.each.items()]
    if len(rows) > 1:
        rows.append(_row("mean of the seeds", ranking.mean))
    rows += [_row(name, one) for name, one in ranking.counts.items()]
    columns = ["ranked by", "kendall", "95 %", "spearman", "tau top 10 %", "P@5 %", "arg-max", "regret"]
    title = f"{found.settings['strategy']} on {settings['data']}; {table.id}: {len(ranking.archs):,} architectures, "
    output.table(columns, rows, title=title + ranking.metric)
    files = [] if out is None else [str(out)]
    if out is not None:
        _write(out, ranking.columns())
        output.say(f"\nscores: {out}", style="dim")
    result = {
        "run": run,
        "recipe": found.settings["strategy"],
        "data": settings["data"],
        "benchmark": table.id,
        **ranking.as_json(),
        "files": files,
    }
    output.finish(result)


def _row(name: str, found: ProxyCorrelation) -> list[Any]:
    s, (low, high) = found.statistics, found.interval["kendall_tau"]
    shown = [s["spearman"], s["top_10_tau"], s["precision_at_5"], s["chosen"], s["regret"]]
    return [name, s["kendall_tau"], f"{low:.3f} to {high:.3f}", *shown]


def _write(path: Path, columns: Mapping[str, list[Any]]) -> None:
    import pyarrow
    from pyarrow import csv, parquet

    from search_spaces.common.files import atomic_write

    content = io.BytesIO()
    {".csv": csv.write_csv, ".parquet": parquet.write_table}[path.suffix](pyarrow.table(columns), content)
    with atomic_write(path, "wb") as file:
        file.write(content.getvalue())
