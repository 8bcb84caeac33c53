"""nas search, nas resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import nas
from nas.cli import options
from nas.cli.context import command_line, default_folder, environment
from nas.cli.output import Output
from search_spaces.common.errors import UserError

if TYPE_CHECKING:
    from nas.training.evaluator import TrainEvaluator

SplitSeed = Annotated[int, typer.Option("--split-seed", help="Of the split into training and validation images.")]
TrainSeed = Annotated[int, typer.Option("--train-seed", help="Of weights, order and augmentation of all trainings.")]
OwnSchedule = Annotated[
    bool,
    typer.Option(
        "--own-schedule", help="A learning rate that falls to the end of each fidelity; such trainings cannot go on."
    ),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:1.")]
Threads = Annotated[int, typer.Option("--threads", help="CPU threads of each training, whatever --workers is.")]
Cache = Annotated[bool, typer.Option("--cache/--no-cache", help="Keep and use trainings in $NASFORGE_HOME.")]


def search(
    benchmark: options.Benchmark = None,
    evaluator: Annotated[
        str | None,
        typer.Option(help="table:ID, train, proxy:NAMES, predictor:DIR, supernet:RUN or package.module:object."),
    ] = None,
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
    predictor: Annotated[
        str | None, typer.Option(help="Of predictor searches: a name of `nas predict list` (default gp-graf).")
    ] = None,
    warm_from: Annotated[
        Path | None,
        typer.Option("--warm-from", help="Of predictor searches: start from a search's or a predictor's folder."),
    ] = None,
    seed: options.Seed = 0,
    workers: Annotated[int, typer.Option(help="Processes that evaluate.")] = 1,
    timeout: Annotated[float | None, typer.Option(help="Seconds for one evaluation.")] = None,
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
    cache: Cache = True,
    out: Annotated[Path | None, typer.Option(help="The run's folder (default: a new one below runs/).")] = None,
    json: options.Json = False,
) -> None:
    """Search for an architecture; the run can be continued, reported and shown afterwards.

    The options from --data to --cache are those of --evaluator train; proxy:NAMES (`nas proxies list`) takes --data,
    --data-root, --size, --scale, --device, --threads and --cache.
    """
    if (benchmark is None) == (evaluator is None):
        raise UserError("--benchmark", "one of --benchmark and --evaluator")
    if queries is None and simulated_seconds is None and wall_seconds is None:
        queries = 300
    scoring = read_scoring(
        evaluator, space, scale, data=data, root=data_root, size=size, device=device, threads=threads, cache=cache
    )
    if scoring is not None:  # taken
        data, data_root, size, scale, device, threads, cache = "digits", None, None, None, "cpu", 1, True
    training = read_training(
        evaluator,
        space,
        preset,
        change,
        scale,
        data=data,
        root=None if data_root is None else str(data_root),
        size=size,
        norm=norm,
        act=act,
        layer=layer,
        val_share=val_share,
        split_seed=split_seed,
        train_seed=train_seed,
        own_schedule=own_schedule,
        device=device,
        threads=threads,
        cache=cache,
    )
    settings = {
        "evaluator": evaluator or f"table:{benchmark}",
        "training": training,
        **({} if scoring is None else {"scoring": scoring}),
        "space": space,
        "strategy": strategy,
        "strategy_settings": {
            **options.read_settings(setting),
            **({} if predictor is None else {"predictor": predictor}),
            **({} if warm_from is None else {"warm_from": str(warm_from.absolute())}),
        },
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


def read_training(
    evaluator: str | None, space: str | None, preset: str, change: Any, scale: Any, **given: Any
) -> dict[str, Any] | None:
    """The settings of a TrainEvaluator from the options of a command; None for other evaluators.

    Errors: UserError, also for an option that the evaluator has no use for.
    """
    if evaluator != "train":
        unused = {"preset": preset, "set": change, "scale": scale, **given}
        plain = {"preset": "digits-tiny", "data": "digits", "device": "cpu", "threads": 1, "cache": True}
        for name, value in unused.items():
            if value != plain.get(name) and value not in (None, 0, False):
                option = f"--{ {'root': 'data-root'}.get(name, name).replace('_', '-') }"
                raise UserError(option, "--evaluator train with it: other evaluators train nothing")
        return None
    from nas.training.evaluator import train_evaluator

    if space is None:
        raise UserError("--space", "the space that --evaluator train is to train networks of", "nas-bench-201")
    changes, network = options.read_settings(change), options.read_settings(scale)
    return train_evaluator(space, preset, changes=changes, scale=network, **given).as_json()


def read_scoring(evaluator: str | None, space: str | None, scale: Any, **given: Any) -> dict[str, Any] | None:
    """The settings of a ProxyEvaluator from the options of a command; None for other evaluators. Errors: UserError."""
    if evaluator is None or not evaluator.startswith("proxy:"):
        return None
    if space is None:
        raise UserError("--space", "the space whose architectures are to be scored", "nas-bench-201")
    root = given.pop("root")
    return {"space": space, "network": options.read_settings(scale), "root": root and str(root), **given}


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
    if settings.get("kind") == "training":
        from nas.cli.train import resume as resume_training

        resume_training(settings, Path(run), Output("resume", json, settings["seeds"][0]))
        return
    if settings.get("kind") == "supernet":
        from nas.cli.supernet import resume as resume_supernet

        resume_supernet(settings, Path(run), Output("resume", json, settings["seed"]))
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
    from nas.objectives import Objective, parse_objectives
    from nas.strategies import strategy_class
    from search_spaces.registry import load_space, space_text

    name = strategy_class(settings["strategy"]).name
    objectives = parse_objectives(settings["objectives"]) if settings["objectives"] else None
    budget = Budget(**settings["budget"])
    policy, training = settings["seed_policy"] or "mean", settings.get("training")
    if training is not None and objectives is None:
        objectives = parse_objectives("val_acc")
    scoring = settings.get("scoring")
    evaluator = make_evaluator(settings["evaluator"], objectives, settings["label"], policy, training, scoring)
    if objectives is None and (scoring is not None or settings["evaluator"].startswith(("predictor:", "supernet:"))):
        objectives = (Objective(evaluator.metrics()[0], maximize=True),)  # type: ignore[attr-defined]
    space = load_space(settings["space"]) if settings["space"] else space_of(evaluator)
    if isinstance(evaluator, TableEvaluator) and space.name != evaluator.table.space.name:
        raise UserError(space.name, f"the space of {evaluator.benchmark}", evaluator.table.space_name)
    if settings["evaluator"].startswith("supernet:") and space.name != space_of(evaluator).name:
        raise UserError(space.name, "the space of the supernet", space_of(evaluator).name)
    evaluator_text = _evaluator_text(evaluator, settings["evaluator"])
    describe = {
        "space": settings["space"] or space_text(space),
        "evaluator": evaluator_text,
        "command": settings.get("command") or command_line(),
        "version": nas.__version__,
        "environment": settings.get("environment") or environment(),
        **({} if scoring is None else {"scoring": scoring}),
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
        subject = evaluator_text.partition(":")[2]
        if training is not None:
            subject = f"train-{settings['space']}-{Path(training['data']).name}"
        out = default_folder(f"{subject}-{name}-seed{settings['seed']}")
    if training is not None:
        evaluator = prepared(evaluator, out, arguments["strategy_settings"])
        describe["training"] = evaluator.as_json()
    with output.progress("evaluations") as progress:
        result = run_search(space, evaluator, out=out, progress=progress, **arguments)
    _print(result, out, output)


def _evaluator_text(evaluator: Any, given: str) -> str:
    from nas.evaluators import TableEvaluator

    return f"table:{evaluator.benchmark}" if isinstance(evaluator, TableEvaluator) else given


def prepared(evaluator: Any, out: Path, strategy_settings: Mapping[str, Any]) -> TrainEvaluator:
    """An evaluator that trains, checked, under the account of the run in the folder `out` or of a new one.

    Errors: UserError for a network or data that do not fit, and for fidelities beyond the training's end.
    """
    from nas.training.comparison import account_of

    evaluator.check()
    for fidelity in strategy_settings.get("fidelities", ()):
        evaluator.steps(fidelity)
    return replace(evaluator, account=account_of(out))


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
        if summary["hypervolume_regret"] is not None:
            lines["hypervolume regret"] = summary["hypervolume_regret"]
    if best["fidelity"] is not None and "training" in result.settings:
        lines["epochs"] = best["fidelity"]
    lines["queries"] = summary["queries"]
    if "training" in result.settings:
        lines["trained"] = trained(result)
    lines["run"] = str(out)
    output.pairs(lines)
    output.say(f"\nreport: nas report {out}    drawing: nas show {out}:best", style="dim")
    output.finish({"run": str(out), **summary})


def trained(result: Any) -> str:
    """What a search by training has trained: how many architectures, for how long."""
    told = [r for r in result.records if r.status != "asked"]
    seconds = sum((r.metrics or {}).get("cost_seconds", 0.0) for r in told)
    return f"{len({r.arch for r in told}):,} architectures, {clock(seconds)} in all"


def clock(seconds: float) -> str:
    """A length of time as a person says it."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
