"""nas proxies: training-free scores of networks, and how well they rank a benchmark."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from nas.cli import options
from nas.cli.context import command_line
from nas.cli.output import Output
from search_spaces.common.errors import UserError

if TYPE_CHECKING:
    from nas.scoring import ScoringTask

app = typer.Typer(
    help="Training-free scores: list them, compute them, see how well they rank.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
DEFAULT_PROXIES = "nwot,synflow,jacov,live-macs"
FAILURES_SHOWN = 3


def _names(incomplete: str) -> list[str]:
    from zero_cost import PROXIES

    return [name for name in PROXIES if name.startswith(incomplete)]


_PROXIES_HELP = "Names with commas between, all, or package.module:object of your own."
Proxies = Annotated[str, typer.Option("--proxies", help=_PROXIES_HELP, autocompletion=_names)]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Images of a batch.")]
Batches = Annotated[int, typer.Option("--batches", help="Batches that zico compares.")]
Seeds = Annotated[int, typer.Option("--seeds", help="Seeds of weights and images, from --seed on.")]
Workers = Annotated[int, typer.Option("--workers", help="Processes that score.")]
Cache = Annotated[bool, typer.Option("--cache/--no-cache", help="Keep and use scores in $NASFORGE_HOME.")]
_WEIGHTS_HELP = "own, or shared: one network of all choices, many architectures in one forward pass."
Weights = Annotated[str, typer.Option("--weights", help=_WEIGHTS_HELP)]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:1.")]


@app.command("list")
def list_(json: options.Json = False) -> None:
    """List the proxies: formula, what they need, source."""
    from nas.scoring.aggregates import AGGREGATES
    from nas.scoring.trained import BN_ONLY, FORMULA, SOURCE
    from zero_cost import PROXIES

    output = Output("proxies list", json)
    rows, listed = [], []
    for p in PROXIES.values():
        needs = [w for w, needed in (("data", p.data), ("labels", p.labels), ("backward", p.backward)) if needed]
        rows.append([p.name, p.formula, ", ".join(needs) or "-", p.source])
        listed.append({"name": p.name, "formula": p.formula, "needs": needs, "sign": p.sign, "source": p.source})
    for a in AGGREGATES.values():
        rows.append([a.name, f"{a.formula} ({', '.join(a.parts)})", "a population", a.source])
        listed.append({"name": a.name, "formula": a.formula, "parts": list(a.parts), "source": a.source})
    rows.append([BN_ONLY, FORMULA, "data, labels, a short training", SOURCE])
    listed.append({"name": BN_ONLY, "formula": FORMULA, "needs": ["data", "labels", "training"], "source": SOURCE})
    output.table(["proxy", "formula (higher is better)", "needs", "source"], rows)
    output.say("\nwith + between names: log-rank sum over a population, such as nwot+logsynflow+live-macs", style="dim")
    output.finish({"proxies": listed})


@app.command()
def score(
    space: Annotated[str | None, typer.Option(help="A space's name or package.module:object.")] = None,
    arch: Annotated[list[str] | None, typer.Option(help="In the space's notation; repeatable.")] = None,
    model: Annotated[
        str | None, typer.Option(help="package.module:object, a module or a class or function that makes one.")
    ] = None,
    proxies: Proxies = "all",
    data: options.Data = "digits",
    data_root: options.DataRoot = None,
    size: options.Size = None,
    batch_size: BatchSize = 64,
    batches: Batches = 2,
    scale: options.Scale = None,
    seed: options.Seed = 0,
    seeds: Seeds = 1,
    workers: Workers = 1,
    weights: Weights = "own",
    device: Device = "cpu",
    cache: Cache = True,
    json: options.Json = False,
) -> None:
    """Score architectures of a space, or a network of your own.

    With --model, --data is a data set, or package.module:object of batches (a list, a DataLoader, or a function that
    returns one).
    """
    output = Output("proxies score", json, seed)
    if (space is None) == (model is None):
        raise UserError("--space", "one of --space (with --arch) and --model")
    if model is not None:
        for option, value in (("--arch", arch), ("--scale", scale), ("--weights", weights != "own")):
            if value:
                raise UserError(option, "--space with it")
        _score_model(
            model, proxies, output, data=data, root=data_root, size=size, batch_size=batch_size, batches=batches,
            seeds=range(seed, seed + seeds), device=device,
        )  # fmt: skip
        return
    assert space is not None
    if not arch:
        raise UserError("--arch", "an architecture in the notation of the space")
    from nas.scoring.aggregates import find_aggregate
    from nas.scoring.task import proxy_names
    from search_spaces.registry import load_space

    names = proxy_names(proxies)
    for name in names:
        if find_aggregate(name) is not None:
            raise UserError(name, "a proxy of one network; this one ranks a population (`nas proxies correlate`)")
    task = _task(space, data, data_root, size, batch_size, batches, scale, device)
    archs = [load_space(space).decode(text) for text in arch]
    range_of_seeds = range(seed, seed + _positive("--seeds", seeds))
    # Not one of the same function: the network that was asked for.
    table = _score_all(task, archs, names, range_of_seeds, workers, weights, cache, output, by_class=False)
    found = []
    for k, text in enumerate(table.archs):
        reasons = {name: why for (of, name), why in table.reasons.items() if of == text}
        found.append({"arch": text, **_scores(names, table.values[k], reasons)})
    _print_scores(output, found, names, seeds)
    output.finish(found[0] if len(found) == 1 else {"architectures": found})


def _score_model(model: str, proxies: str, output: Output, **given: Any) -> None:
    from nas.scoring.own import score_own

    names, values, reasons = score_own(model, proxies, **given)
    found = {"model": model, **_scores(names, values, reasons)}
    _print_scores(output, [found], names, len(given["seeds"]))
    output.finish(found)


def _scores(names: Any, values: np.ndarray, reasons: dict[str, str]) -> dict[str, Any]:
    """Means over the seeds of values [proxies, seeds], and of several seeds how much they spread; a proxy that has no
    value at some seed has no mean. non_finite: at how many seeds, where there are any."""
    found: dict[str, Any] = {"scores": dict(zip(names, values.mean(1).tolist(), strict=True))}
    if values.shape[1] > 1:
        found["spread"] = dict(zip(names, values.std(1, ddof=1).tolist(), strict=True))
    missing = (~np.isfinite(values)).sum(1).tolist()
    return {**found, "non_finite": {n: k for n, k in zip(names, missing, strict=True) if k}, "reasons": reasons}


def _print_scores(output: Output, found: list[dict[str, Any]], names: Any, seeds: int) -> None:
    for one in found:
        output.say(one.get("arch") or one["model"], style="bold")
        rows = []
        for name in names:
            spread = [one["spread"][name]] if seeds > 1 else []
            missing = one["non_finite"].get(name, 0)
            some = f"{missing} of {seeds} seeds: " if 0 < missing < seeds else ""
            rows.append([name, one["scores"][name], *spread, some + one["reasons"].get(name, "")])
        output.table(["proxy", "score", *(["standard deviation"] if seeds > 1 else []), ""], rows)


@app.command()
def correlate(
    benchmark: Annotated[str, typer.Option("--benchmark", help="<space>/<data set>, see `nas bench list`.")],
    proxies: Proxies = DEFAULT_PROXIES,
    scores: Annotated[
        Path | None, typer.Option(help="A Parquet file of scores (columns arch and proxies) instead of computing them.")
    ] = None,
    sample: Annotated[int | None, typer.Option(help="Architectures drawn (default: all).")] = None,
    label: Annotated[
        str | None, typer.Option("--label", help="val or test (default: test where the table has test values).")
    ] = None,
    data: options.Data = "digits",
    data_root: options.DataRoot = None,
    size: options.Size = None,
    batch_size: BatchSize = 64,
    batches: Batches = 2,
    scale: options.Scale = None,
    seed: options.Seed = 0,
    seeds: Seeds = 1,
    resamples: Annotated[int, typer.Option(help="Bootstrap samples for the intervals.")] = 200,
    workers: Workers = 1,
    weights: Weights = "own",
    device: Device = "cpu",
    cache: Cache = True,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page with scatter plots.")] = None,
    json: options.Json = False,
) -> None:
    """How well proxies rank the architectures of a benchmark, beside params, macs, live-macs and random.

    What was scored is kept, so the same command goes on where it was interrupted.
    """
    from benchmarks.registry import open_table
    from nas.scoring.aggregates import needed, with_aggregates
    from nas.scoring.correlation import BASELINES, accuracies, sample_rows, with_counts, with_random
    from nas.scoring.correlation import correlate as correlate_
    from nas.scoring.task import proxy_names
    from search_spaces.registry import space_text

    output = Output("proxies correlate", json, seed)
    table = open_table(benchmark)
    draw, resample = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    if scores is not None:
        found, rows = _published(scores, table, sample, draw, _positive("--seeds", seeds))
        names = list(found.proxies) if proxies == "all" else proxy_names(proxies)
        names = list(dict.fromkeys([*names, *BASELINES[:3]]))
        found = with_counts(found, table.space)
    else:
        names = list(dict.fromkeys([*proxy_names(proxies), *BASELINES[:3]]))
        rows = sample_rows(table, sample, draw)
        task = _task(space_text(table.space), data, data_root, size, batch_size, batches, scale, device)
        found = _compute(task, table, rows, needed(names), range(seed, seed + seeds), workers, weights, cache, output)
    truth, metric = accuracies(table, rows, label)
    whole = with_random(with_aggregates(found, names, table.space), draw)
    with output.progress("intervals") as progress:
        ranked = correlate_(whole, truth, resample, resamples=_positive("--resamples", resamples), progress=progress)
    reasons = _count_reasons(found.reasons)
    for text in reasons[:FAILURES_SHOWN]:
        output.warn(text)
    columns = ["proxy", "spearman", "95 %", "kendall", "tau top 10 %", "P@5 %", "arg-max", "regret", "no value"]
    output.table(
        columns, [_row(r) for r in ranked.values()], title=f"{table.id}: {len(rows):,} architectures, {metric}"
    )
    result = {
        "benchmark": table.id,
        "metric": metric,
        "n": len(rows),
        "seeds": list(found.seeds),
        "scores": None if scores is None else str(scores),
        "proxies": {name: r.as_json() for name, r in ranked.items()},
        "reasons": reasons,
        "files": [],
    }
    if report is not None:
        from nas.scoring.report import write_report

        write_report(report, table.id, metric, whole, truth, ranked, command_line(), reasons)
        output.say(f"\nreport: {report}", style="dim")
        result["files"] = [str(report)]
    output.finish(result)


def _compute(
    task: ScoringTask,
    table: Any,
    rows: np.ndarray,
    names: list[str],
    seeds: range,
    workers: int,
    weights: str,
    cache: bool,
    output: Output,
) -> Any:
    archs = [table.arch(int(row)) for row in rows]
    _positive("--seeds", len(seeds))
    return _score_all(task, archs, names, seeds, workers, weights, cache, output)


def _score_all(
    task: ScoringTask,
    archs: list[Any],
    names: list[str],
    seeds: range,
    workers: int,
    weights: str,
    cache: bool,
    output: Output,
    by_class: bool = True,
) -> Any:
    """Scores by passes, and then that by a short training if it is among them."""
    from nas.scoring import score_architectures
    from nas.scoring.trained import BN_ONLY, with_bn_only, without_bn_only

    with output.progress("networks") as progress:
        found = score_architectures(
            task,
            archs,
            without_bn_only(names),
            seeds=seeds,
            by_class=by_class,
            weights=weights,
            workers=workers,
            cache=_cache(cache),
            progress=progress,
        )
    if BN_ONLY not in names:
        return found
    with output.progress("trainings") as progress:
        found = with_bn_only(found, task, cache=_cache(cache), progress=progress)
    return dataclasses.replace(found, proxies=tuple(names), values=np.stack([found.column(n) for n in names], 1))


def _published(path: Path, table: Any, sample: int | None, rng: np.random.Generator, seeds: int) -> tuple[Any, Any]:
    """(the scores of a file, drawn, and the table's rows of the same architectures)."""
    from nas.scoring.published import read_scores

    if seeds != 1:
        raise UserError(seeds, "one seed with --scores: the file has one score of each proxy")
    found = read_scores(path, table.space)
    count = len(found.archs)
    if sample is not None and not 2 <= sample <= count:
        raise UserError(sample, f"a number of architectures from 2 to {count:,}, the rows of {path}")
    chosen = np.sort(rng.permutation(count)[:sample]) if sample is not None else np.arange(count)
    archs = tuple(found.archs[k] for k in chosen)
    rows = table.rows_of([table.space.decode(text) for text in archs])
    return dataclasses.replace(found, archs=archs, values=found.values[chosen]), rows


def _count_reasons(reasons: Any) -> list[str]:
    """`3 without nwot: ...`, most frequent first."""
    counts: dict[tuple[str, str], int] = {}
    for (_, name), why in reasons.items():
        counts[name, why] = counts.get((name, why), 0) + 1
    return [f"{n} without {name}: {why}" for (name, why), n in sorted(counts.items(), key=lambda item: -item[1])]


def _row(found: Any) -> list[Any]:
    s, (low, high) = found.statistics, found.interval["spearman"]
    shown = [s["kendall_tau"], s["top_10_tau"], s["precision_at_5"], s["chosen"], s["regret"]]
    return [found.name, s["spearman"], f"{low:.3f} to {high:.3f}", *shown, round(found.non_finite, 1)]


def _task(
    space: str, data: str, root: Path | None, size: int | None, batch_size: int, batches: int, scale: Any, device: str
) -> ScoringTask:
    from nas.scoring import ScoringTask

    return ScoringTask(
        space,
        data=data,
        root=None if root is None else str(root),
        size=size,
        batch_size=batch_size,
        batches=batches,
        network=options.read_settings(scale),
        device=device,
    )


def _cache(wanted: bool) -> Path | None:
    from nas.scoring.cache import default_cache

    return default_cache() if wanted else None


def _positive(option: str, value: int) -> int:
    if value < 1:
        raise UserError(option, f"a number from 1, not {value}")
    return value
