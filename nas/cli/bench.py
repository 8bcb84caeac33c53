"""nas bench: tables of measured architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from nas.cli import options
from nas.cli.output import Output
from search_spaces.common.errors import UserError

app = typer.Typer(help="List, describe, add, query and remove tables.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_(json: options.Json = False) -> None:
    """List the benchmarks: those on this machine, and how to get the others."""
    from benchmarks.registry import BENCHMARKS, compiled_ids, is_available, known_ids
    from benchmarks.registry import open_table as open_

    output = Output("bench list", json)
    here: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = []
    for id in known_ids():
        if id in compiled_ids():
            table = open_(id)
            here.append({"id": id, "space": table.space_name, "rows": len(table), "columns": table.metrics})
        elif is_available(id):
            here.append({"id": id, "space": BENCHMARKS[id].space, "rows": None, "columns": []})
        else:
            missing.append({"id": id, "space": BENCHMARKS[id].space, "get": BENCHMARKS[id].how_to_get()})
    rows = [[b["id"], b["rows"], ", ".join(b["columns"]) or "compiled at first use"] for b in here]
    if rows:
        output.table(["benchmark", "rows", "metrics"], rows)
    if missing:
        output.say()
        output.table(["not here", "how to get it"], [[b["id"], b["get"]] for b in missing])
    output.finish({"benchmarks": here, "missing": missing})


@app.command()
def info(benchmark: options.BenchmarkId, json: options.Json = False) -> None:
    """Describe a table: columns with units and ranges, origin, licence. Test columns show no values."""
    from benchmarks.registry import open_table

    output = Output("bench info", json)
    table = open_table(benchmark)
    about = {k: table.about[k] for k in ("id", "space", "rows", "origin", "licence", "notes")}
    about |= {"file": str(table.path), "bytes": table.path.stat().st_size}
    output.pairs({k: v if v else "-" for k, v in about.items()})
    columns: list[dict[str, Any]] = []
    for metric in table.metrics:
        lengths: list[int | None] = [*table.epochs(metric)]
        for epochs in lengths or [None]:
            of = [c for c in table.columns if c.metric == metric and c.epochs == epochs]
            entry: dict[str, Any] = {"metric": metric, "epochs": epochs, "unit": of[0].unit}
            entry["seeds"] = sorted(c.seed for c in of if c.seed is not None)
            if of[0].split != "test":
                values = table.column(metric, epochs=epochs)
                finite = values[np.isfinite(values)]
                entry |= {
                    "least": float(finite.min()),
                    "most": float(finite.max()),
                    "missing": len(values) - len(finite),
                }
            columns.append(entry)
    output.say()
    rows = [
        [c["metric"], c["epochs"], c["unit"], len(c["seeds"]) or None, c.get("least"), c.get("most"), c.get("missing")]
        for c in columns
    ]
    output.table(["metric", "epochs", "unit", "seeds", "least", "most", "missing"], rows)
    output.finish({**about, "columns": columns})


@app.command()
def add(
    benchmark: options.BenchmarkId,
    file: Annotated[Path | None, typer.Option(help="An official file or folder of the benchmark.")] = None,
    table: Annotated[Path | None, typer.Option(help="A Parquet, CSV or JSON-lines file with a column `arch`.")] = None,
    space: Annotated[str | None, typer.Option(help="The space of --table (known for published benchmarks).")] = None,
    rename: Annotated[list[str] | None, typer.Option(help="OLD=NEW for a column; repeatable.")] = None,
    columns: Annotated[str | None, typer.Option(help="Take only these columns (commas between).")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Add the columns to the table that is there.")] = False,
    drop_bad_rows: Annotated[
        bool, typer.Option("--drop-bad-rows", help="Leave out bad rows instead of refusing.")
    ] = False,
    fill_missing: Annotated[
        bool, typer.Option("--fill-missing", help="With --merge: NaN where a row is missing.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Compile a table from an official file, or from a table of your own."""
    from benchmarks.adding import add_file, add_table
    from benchmarks.registry import BENCHMARKS

    if (file is None) == (table is None):
        raise UserError("--file", "one of --file (official) and --table (your own)")
    output = Output("bench add", json)
    with output.progress("reading") as progress:
        if file is not None:
            added = add_file(benchmark, file, progress=progress)
        else:
            assert table is not None
            known = BENCHMARKS[benchmark].space if benchmark in BENCHMARKS else None
            if space is None and known is None:
                raise UserError("--space", f"the space of {benchmark} (see `nas spaces`)")
            added = add_table(
                benchmark,
                space or known,
                table,
                rename=_renames(rename),
                columns=[c.strip() for c in columns.split(",")] if columns else None,
                merge=merge,
                drop_bad_rows=drop_bad_rows,
                fill_missing=fill_missing,
                progress=progress,
            )
    if added.dropped:
        output.warn(f"rows left out: {added.dropped}")
    for note in added.notes:
        output.say(note)
    rows, whole = added.covers
    output.pairs(
        {
            "table": added.id,
            "rows": added.rows,
            "of the space": f"{rows:,} of {whole:,} architectures" if whole else "-",
            "columns": ", ".join(added.columns),
            "file": str(added.path),
        }
    )
    output.finish({"id": added.id, "rows": added.rows, "columns": list(added.columns), "file": str(added.path)})


def _renames(given: list[str] | None) -> dict[str, str]:
    pairs = {}
    for item in given or ():
        old, equals, new = item.partition("=")
        if not (old and equals and new):
            raise UserError(item, "a renaming as OLD=NEW")
        pairs[old] = new
    return pairs


@app.command()
def query(
    benchmark: options.BenchmarkId,
    arch: Annotated[str, typer.Argument(metavar="ARCH", help="An architecture in the space's notation.")],
    epochs: Annotated[int | None, typer.Option(help="Training length (default: the longest).")] = None,
    seed_policy: Annotated[str, typer.Option(help="mean, random, or a seed's number.")] = "mean",
    test: Annotated[bool, typer.Option("--test", help="Show test values too.")] = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Look up one architecture."""
    from benchmarks.registry import open_table

    output = Output("bench query", json, seed)
    table = open_table(benchmark)
    decoded = table.space.decode(arch)
    row = table.rows_of([decoded])
    policy: dict[str, Any] = {"seed": options.read_seed_policy(seed_policy), "rng": np.random.default_rng(seed)}
    metrics: dict[str, float] = {}
    for metric in table.metrics:
        at = epochs if table.epochs(metric) else None
        if at is not None and at not in table.epochs(metric):
            continue
        if not metric.startswith("test_"):
            metrics[metric] = float(table.column(metric, epochs=at, **policy)[row][0])
        elif test:
            purpose = "asked for on the command line"
            metrics[metric] = float(table.test_values([decoded], metric, purpose=purpose, epochs=at, **policy)[0])
    if not metrics:
        raise UserError(epochs, f"epochs of {table.id}, see `nas bench info {table.id}`")
    key = table.space.key(decoded)
    output.pairs({"architecture": arch, "key": key, **metrics})
    if not test and any(m.startswith("test_") for m in table.metrics):
        output.say("\ntest values: add --test", style="dim")
    output.finish({"arch": arch, "key": key, "metrics": metrics})


@app.command()
def remove(benchmark: options.BenchmarkId, json: options.Json = False) -> None:
    """Delete a compiled table."""
    from benchmarks.registry import remove_table

    output = Output("bench remove", json)
    path = remove_table(benchmark)
    output.say(f"removed {path}")
    output.finish({"removed": str(path)})
