"""nas predict: predictors of performance, evaluated, trained, and at work."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

import nas
from nas.cli import options
from nas.cli.context import command_line, default_folder, environment
from nas.cli.lists import _first_sentence
from nas.cli.output import Output
from search_spaces.common.errors import UserError

if TYPE_CHECKING:
    from benchmarks.table import Table
    from nas.prediction.evaluation import Evaluation, Result

app = typer.Typer(
    help="Predictors of performance: evaluate them, train one, rank what was not measured.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
SHOWN = ("kendall_tau", "held_out_kendall_tau", "spearman", "precision_at_1", "precision_at_5", "best_rank_at_10")


def _names(incomplete: str) -> list[str]:
    from predictors.registry import PREDICTORS

    return [name for name in PREDICTORS if name.startswith(incomplete)]


Benchmark = Annotated[
    str,
    typer.Option("--benchmark", help="<space>/<data set>, see `nas bench list`.", autocompletion=options._benchmarks),
]
Labels = Annotated[
    str | None, typer.Option("--labels", help="val-run, val-mean or test-mean (default: val-run where there is one).")
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="val-mean, test-mean, or a column such as raspi4_latency_ms, the label then too"
        " (default: test-mean where there is one).",
    ),
]
PretrainSteps = Annotated[
    int | None,
    typer.Option("--pretrain-steps", help="Most steps on unlabelled graphs, of predictors that take them (2000)."),
]


@app.command("list")
def list_(
    name: Annotated[str | None, typer.Argument(help="One predictor, with its settings.", autocompletion=_names)] = None,
    json: options.Json = False,
) -> None:
    """List the predictors, or the settings of one with their defaults (--setting NAME=VALUE)."""
    from predictors.registry import PREDICTORS, predictor_class

    output = Output("predict list", json)
    if name is not None:
        kind = predictor_class(name)
        listed = [_described(name)]
        output.say(inspect.cleandoc(kind.__doc__ or ""))
        output.say("")
        output.say(inspect.cleandoc(kind.Settings.__doc__ or ""))
        output.say("")
        output.table(["setting", "default"], [[k, str(v)] for k, v in listed[0]["settings"].items()])
    else:
        listed = [_described(each) for each in PREDICTORS]
        output.table(["predictor", "what it is"], [[p["name"], p["about"]] for p in listed])
        output.say("the settings of one: nas predict list NAME")
    output.finish({"predictors": listed})


def _described(name: str) -> dict[str, Any]:
    from predictors.registry import predictor_class

    try:
        kind = predictor_class(name)
    except (ImportError, UserError) as error:  # a missing extra
        return {"name": name, "settings": {}, "about": f"not here: {error}"}
    return {"name": name, "settings": asdict(kind.Settings()), "about": _first_sentence(kind.__doc__)}


@app.command()
def evaluate(
    benchmark: Benchmark,
    predictors: Annotated[
        str,
        typer.Option("--predictors", help="Names with commas between, see `nas predict list`.", autocompletion=_names),
    ] = "gp-graf",
    train_sizes: Annotated[
        str, typer.Option(help="Labelled architectures, commas between; percentages too, such as 1%.")
    ] = "78,156,469",
    seeds: Annotated[int, typer.Option(help="Splits, from --seed on (pinat: one).")] = 10,
    protocol: Annotated[str, typer.Option(help="nasforge, pinat or gates.")] = "nasforge",
    labels: Labels = None,
    target: Target = None,
    scores: Annotated[
        Path | None, typer.Option(help="A Parquet file of proxies (columns arch and names) as extra columns.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--setting", help="PREDICTOR.NAME=VALUE, see `nas predict list`; repeatable.")
    ] = None,
    pretrain_steps: PretrainSteps = None,
    out: Annotated[Path | None, typer.Option(help="Where results are kept (default: a folder below runs/).")] = None,
    seed: options.Seed = 0,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page with plots.")] = None,
    json: options.Json = False,
) -> None:
    """How well predictors rank a benchmark after training on a few labels.

    Every result is kept as it comes: the same command, or one with more predictors, sizes or seeds and the same --out,
    goes on where it was interrupted.
    """
    from benchmarks.registry import open_table
    from nas.prediction.evaluation import evaluate_predictors

    output = Output("predict evaluate", json, seed)
    table = open_table(benchmark)
    names = [name.strip() for name in predictors.split(",") if name.strip()]
    folder = out or default_folder(f"predict-{table.id}")
    with output.progress("trainings") as progress:
        found = evaluate_predictors(
            table,
            names,
            [size.strip() for size in train_sizes.split(",") if size.strip()],
            folder,
            seeds=seeds,
            seed=seed,
            protocol=protocol,
            labels=labels,
            target=target,
            settings=_settings(setting, names, pretrain_steps),
            extra=None if scores is None else _extra(scores, table),
            describe={"command": command_line(), "version": nas.__version__, "environment": environment()},
            progress=progress,
        )
    _print(found, output)
    result = {"run": str(folder), **found.as_json(), "files": []}
    if report is not None:
        from nas.prediction.report import write_evaluation_report

        write_evaluation_report(found, report, command_line(), environment())
        output.say(f"report: {report}", style="dim")
        result["files"] = [str(report)]
    output.finish(result)


def _print(found: Evaluation, output: Output) -> None:
    from nas.prediction.report import COLUMNS

    for note in found.notes:
        output.warn(note)
    for (name, size), text in found.failures.items():
        output.warn(f"{name} on {size:,} labels failed: {text}")
    columns = [key for key in SHOWN if any(key in r.statistics for r in found.results)]
    headings = ["predictor", "labels", *(COLUMNS[key] for key in columns), "95 % of tau", "fit, s", "predict, s"]
    output.table(headings, [_row(r, columns) for r in found.results], title=found.statement())


def _row(result: Result, columns: list[str]) -> list[Any]:
    from nas.prediction.report import shown

    s = result.statistics
    low, high = s["kendall_tau"].interval
    interval = "-" if s["kendall_tau"].n < 2 else f"{low:.3f} to {high:.3f}"
    cells = [shown(s.get(key), 1 if key == "best_rank_at_10" else 3) for key in columns]
    seconds = [f"{s[name].mean:.2f}" if name in s else "" for name in ("fit_seconds", "predict_seconds")]
    return [result.predictor, result.train_size, *cells, interval, *seconds]


def _settings(given: list[str] | None, names: list[str], pretrain_steps: int | None) -> dict[str, dict[str, Any]]:
    """`["gp-graf.kernel=rbf"]` -> {"gp-graf": {"kernel": "rbf"}}. Errors: UserError."""
    settings = _budget(names, pretrain_steps)
    for item in given or ():
        name, dot, rest = item.partition(".")
        if not dot or "=" in name:
            raise UserError(item, "a setting as PREDICTOR.NAME=VALUE", f"{names[0]}.{item}")
        settings.setdefault(name, {}).update(options.read_settings([rest]))
    return settings


def _budget(names: list[str], steps: int | None) -> dict[str, dict[str, Any]]:
    """`pretrain_steps` for those of `names` that train on unlabelled graphs first. Errors: UserError if none does."""
    from predictors.registry import predictor_class

    if steps is None:
        return {}
    taking = [name for name in names if getattr(predictor_class(name).Settings(), "mode", "scratch") != "scratch"]
    if not taking:
        raise UserError("--pretrain-steps", f"a predictor that is pre-trained; {', '.join(names)} has no budget", "cap")
    return {name: {"pretrain_steps": steps} for name in taking}


def _extra(path: Path, table: Table) -> dict[str, np.ndarray]:
    """The columns of a file of proxies by row of the table. Errors: UserError where a row has no scores."""
    from nas.scoring.published import read_scores

    found = read_scores(path, table.space)
    rows = table.rows_of([table.space.decode(text) for text in found.archs])
    columns = {}
    for name in found.proxies:
        values = np.full(len(table), np.nan)
        values[rows] = found.column(name)[:, 0]
        columns[name] = values
    missing = len(table) - len(set(rows.tolist()))
    if missing:
        raise UserError(str(path), f"scores of every architecture of {table.id}; {missing:,} have none")
    return columns


@app.command()
def train(
    benchmark: Benchmark,
    predictor: Annotated[str, typer.Option("--predictor", help="See `nas predict list`.", autocompletion=_names)],
    out: Annotated[Path, typer.Option("--out", help="The folder of the predictor.")],
    train_size: Annotated[
        str | None, typer.Option(help="Random rows to learn from: a count or a percentage (default: all).")
    ] = None,
    labels: Labels = None,
    target: Target = None,
    setting: Annotated[
        list[str] | None, typer.Option("--setting", help="NAME=VALUE of the predictor, see `nas predict list`.")
    ] = None,
    pretrain_steps: PretrainSteps = None,
    warm_from: Annotated[
        str | None,
        typer.Option("--warm-from", help="Start from a search's folder or from a predictor's (of other data, say)."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a predictor that is there.")] = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Train a predictor on a benchmark (your own measurements: `nas bench add`) and save it."""
    from benchmarks.registry import open_table
    from nas.prediction.ranking import train_on

    output = Output("predict train", json, seed)
    if (out / "predictor.json").exists() and not force:
        raise UserError(str(out), "a folder without a predictor (or --force, which replaces it)")
    table = open_table(benchmark)
    given = _budget([predictor], pretrain_steps).get(predictor, {}) | options.read_settings(setting)
    with output.progress("graphs") as progress:
        found = train_on(
            table,
            predictor,
            train_size,
            seed=seed,
            labels=labels,
            target=target,
            settings=given,
            warm_from=warm_from,
            progress=progress,
        )
    found.predictor.save(out)
    known, quality = found.known, dict(found.quality)
    for note in known.notes:
        output.warn(note)
    learned = f"{found.size:,} of {len(known.rows):,} rows of {table.id}, labels {known.label_kind}"
    lines: dict[str, Any] = {"predictor": found.predictor.kind, "learned from": learned}
    for what, name in (("over all rows", "kendall_tau"), ("over the others", "held_out_kendall_tau")):
        if name in quality:
            lines[f"tau {what}"] = f"{quality[name]:.3f} (target {known.target_kind})"
    lines["saved"] = str(out)
    output.pairs(lines)
    output.say(f"\nrank the space: nas predict rank {out}", style="dim")
    output.finish(
        {
            "predictor": found.predictor.kind,
            "benchmark": table.id,
            "train_size": found.size,
            "warm_from": warm_from,
            "labels": known.label_kind,
            "target": known.target_kind,
            "saved": str(out),
            **quality,
        }
    )


@app.command()
def rank(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A predictor's folder.")],
    space: Annotated[str | None, typer.Option(help="A space's name (default: that of the predictor).")] = None,
    top: Annotated[int, typer.Option(help="How many are shown.")] = 20,
    sample: Annotated[
        int | None,
        typer.Option(help="Random architectures ranked (default: the whole space up to 50,000, else 10,000)."),
    ] = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """The best architectures of a space by a saved predictor."""
    from nas.prediction.ranking import rank_space
    from search_spaces.registry import load_space

    output = Output("predict rank", json, seed)
    given = None if space is None else load_space(space)
    with output.progress("architectures") as progress:
        found = rank_space(
            folder, given, top=top, sample=sample, rng=np.random.default_rng(seed), progress=progress
        )  # fmt: skip
    rows = [[place, r.arch, r.score, r.std] for place, r in enumerate(found.best, 1)]
    title = f"{found.predictor} on {found.candidates}: {found.count:,} of different keys; the scale is its own"
    output.table(["rank", "architecture", "prediction", "standard deviation"], rows, title=title)
    ranking = [{"rank": k, "arch": r.arch, "score": r.score, "std": r.std} for k, r in enumerate(found.best, 1)]
    output.finish(
        {
            "predictor": found.predictor,
            "space": found.space,
            "candidates": found.count,
            "sampled": found.candidates,
            "ranking": ranking,
        }
    )


@app.command()
def explain(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A predictor's folder.")],
    arch: Annotated[str, typer.Option("--arch", help="An architecture in the space's notation.")],
    out: Annotated[Path, typer.Option("--out", help="Write the drawing to this .svg file.")],
    space: Annotated[str | None, typer.Option(help="A space's name (default: that of the predictor).")] = None,
    method: Annotated[str, typer.Option(help="ablation (any predictor) or critical (what CARL learned).")] = "ablation",
    json: options.Json = False,
) -> None:
    """Draw what a predictor's value of an architecture rests on: importance of operations and edges as colour."""
    from nas.prediction.ranking import load_for
    from predictors.base import read_header
    from predictors.explain import draw_explanation, removable
    from predictors.explain import explain as explain_graph
    from search_spaces.common.files import atomic_write
    from search_spaces.registry import load_space

    output = Output("predict explain", json)
    if out.suffix.lower() != ".svg":
        raise UserError(str(out), "a file that ends in .svg", str(out.with_suffix(".svg")))
    found_space = load_space(read_header(folder)["space"] if space is None else space)
    predictor = load_for(folder, found_space)
    decoded = found_space.decode(arch)
    graph, text = found_space.graph(decoded), found_space.encode(decoded)
    found = explain_graph(predictor, graph, method)
    with atomic_write(out) as file:
        file.write(draw_explanation(graph, found, title=text, note=f"by {predictor.kind}"))
    nodes = {i: float(found.nodes[i]) for i in removable(graph)}
    rows = [[f"{i}: {graph.ops[i]}", v] for i, v in sorted(nodes.items(), key=lambda item: -abs(item[1]))]
    output.table(["operation", "importance"], rows, title=f"{text}: {found.prediction:.3f} by {predictor.kind}")
    output.pairs({"method": found.method, "drawing": str(out)})
    output.finish(
        {
            "predictor": predictor.kind,
            "arch": text,
            "method": found.method,
            "prediction": found.prediction,
            "nodes": [
                {"node": i, "operation": op, "importance": float(found.nodes[i])} for i, op in enumerate(graph.ops)
            ],
            "edges": [{"from": i, "to": j, "importance": v} for (i, j), v in found.edges.items()],
            "drawing": str(out),
        }
    )


@app.command()
def curves(
    benchmark: Benchmark,
    window: Annotated[int, typer.Option(help="Epochs whose training losses are summed.")] = 1,
    target: Target = None,
    json: options.Json = False,
) -> None:
    """How well partial trainings rank a benchmark that has learning curves: early stopping, sum of training losses."""
    from benchmarks.registry import open_table
    from nas.prediction.curves import evaluate_curves
    from nas.prediction.report import COLUMNS

    output = Output("predict curves", json)
    table = open_table(benchmark)
    found, kind, notes = evaluate_curves(table, window=window, target=target)
    for note in notes:
        output.warn(note)
    columns = [key for key in SHOWN if key in found[0].statistics]
    rows = [[r.method, r.epochs, *(r.statistics[key] for key in columns), r.rows] for r in found]
    headings = ["method", "epochs", *(COLUMNS[key] for key in columns), "rows"]
    output.table(headings, rows, title=f"{table.id}: partial trainings against {kind}")
    output.finish({"benchmark": table.id, "target": kind, "results": [r.as_json() for r in found]})
