"""nas supernet: differentiable search, and its recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import nas
from nas.cli import options
from nas.cli.context import command_line, default_folder, environment
from nas.cli.output import Output
from nas.cli.supernet_compare import compare
from nas.cli.supernet_rank import rank
from search_spaces.common.errors import RunError, UserError

app = typer.Typer(no_args_is_help=True, help="Differentiable search in supernets: DARTS, PC-DARTS and relatives.")
app.command("rank")(rank)
app.command("compare")(compare)
EPOCH_LINES = 20


def _recipes(incomplete: str) -> list[str]:
    from nas.supernet.recipes import RECIPES

    return [name for name in RECIPES if name.startswith(incomplete)]


@app.command("search")
def search(
    recipe: Annotated[
        str, typer.Option("--recipe", help="See `nas supernet recipes`.", autocompletion=_recipes)
    ] = "pc-darts",
    space: Annotated[str, typer.Option(help="A space's name or package.module:object.")] = "nas-bench-201",
    data: options.Data = "digits",
    data_root: options.DataRoot = None,
    size: options.Size = None,
    images: Annotated[int | None, typer.Option(help="At most so many, for weights and alphas together.")] = None,
    scale: Annotated[str, typer.Option("--scale", help="full (the authors' settings), small, or tiny.")] = "full",
    epochs: Annotated[int | None, typer.Option(help="Passes over the weights' images (default: the recipe's).")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of the recipe, see `nas supernet recipes NAME`.")
    ] = None,
    curvature: Annotated[bool, typer.Option("--curvature", help="Log the Hessian's largest eigenvalue.")] = False,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave unreadable images out.")] = False,
    split_seed: Annotated[int, typer.Option(help="Of the split into images for weights and for alphas.")] = 0,
    seeds: Annotated[int, typer.Option(help="Search so often, with the seeds --seed, --seed + 1, ...")] = 1,
    seed: options.Seed = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="The run's folder (default: a new one below runs/).")] = None,
    json: options.Json = False,
) -> None:
    """Search an architecture by gradients; the run resumes, is shown, trained and exported from."""
    from nas.supernet.recipes import SCALES, scaled
    from nas.supernet.recipes import recipe as find_recipe
    from nas.supernet.search import SearchTask
    from search_spaces.common.names import match

    output = Output("supernet search", json, seed)
    if seeds < 1:
        raise UserError(seeds, "at least one seed")
    wanted = SCALES[match(scale, SCALES, "a scale")]
    flips = data != "digits"
    found = scaled(find_recipe(recipe), wanted.name, flip=flips)
    changes = options.read_settings(change)
    if epochs is not None:
        changes["epochs"] = epochs
        if "alpha_warmup_epochs" not in changes:
            changes["alpha_warmup_epochs"] = round(found.alpha_warmup_epochs * epochs / found.epochs)
    task = SearchTask(
        recipe=found.replaced(changes),
        space=space,
        data=data,
        root=None if data_root is None else str(data_root),
        size=size if size is not None or not flips else wanted.size,
        images=images if images is not None else wanted.images,
        split_seed=split_seed,
        skip_broken=skip_broken,
        curvature=curvature,
    )
    if out is None:
        name = f"supernet-{found.name}-{space}-{Path(data).name}-{wanted.name}-seed{seed}"
        out = default_folder(name.replace(":", "-"))
    describe = {
        "scale": wanted.name,
        "command": command_line(),
        "version": nas.__version__,
        "environment": environment(),
        "device": device,
    }
    _search(task, list(range(seed, seed + seeds)), out, describe, output)


def resume(settings: Mapping[str, Any], out: Path, output: Output) -> None:
    """Continue a search; `nas resume` calls it."""
    from nas.supernet.search import SearchTask

    names = ("scale", "command", "version", "environment", "device")
    describe = {name: settings[name] for name in names if name in settings}
    _search(SearchTask.from_json(settings["search"]), settings["seeds"], out, describe, output)


def _search(task: Any, seeds: list[int], out: Path, describe: Mapping[str, Any], output: Output) -> None:
    from nas.cli.train import _device, say_forecast
    from nas.references import find_architecture
    from nas.supernet.search import search_run
    from nas.training.distributed import joined

    every = max(1, task.recipe.epochs // EPOCH_LINES)

    def on_epoch(row: Mapping[str, Any]) -> None:
        if row["epoch"] % every and row["epoch"] != task.recipe.epochs:
            return
        skips = f"  skips {100 * row['skip_share']:3.0f} %" if "skip_share" in row else ""
        line = f"seed {row['seed']}  epoch {row['epoch']:>3}  train_loss {row['train_loss']:.4f}"
        output.say(f"{line}  val_acc {row['val_acc']:6.2f}{skips}", style="dim")

    device = _device(describe.get("device", "cpu"))
    with joined(device) as processes:
        if processes.world > 1 and device == "cuda":
            device = f"cuda:{processes.local_rank}"
        quiet = not processes.leads
        with output.progress("steps") as progress:
            run = search_run(
                task,
                out,
                seeds=seeds,
                device=device,
                describe=describe,
                progress=None if quiet else progress,
                on_epoch=None if quiet else on_epoch,
                on_forecast=None if quiet else lambda found: say_forecast(output, found, "of search"),
                on_warning=None if quiet else output.warn,
                processes=processes,
            )
    if quiet:
        return
    trials = run.trials()
    done = [trial for trial in trials if trial.status == "done"]
    if not done:
        raise RunError(f"no search finished: {trials[-1].error}")
    if len(done) < len(seeds):
        output.warn(f"{len(seeds) - len(done)} of {len(seeds)} seeds broke down")
    best = find_architecture(f"{out}:best")
    metrics = dict(best.record.metrics or {})
    shared, mixture = metrics["val_acc"], metrics["mixture_val_acc"]
    lines: dict[str, Any] = {
        "recipe": f"{task.recipe.name} ({describe.get('scale', 'full')})",
        "arch": best.record.arch,
        "val_acc": f"{shared:.2f} with shared weights, {mixture:.2f} of the whole supernet",
        "skip_share": metrics["skip_share"],
        "epochs": int(metrics["epochs"]),
        "seconds": metrics["search_seconds"],
    }
    if len(seeds) > 1:
        lines["seeds"] = f"{len(done)} done; found {len({trial.key for trial in done})} different architectures"
    lines["run"] = str(out)
    output.pairs(lines)
    output.say(f"\ntrain it: nas train {out}:best --data {task.data}    drawing: nas show {out}:best", style="dim")
    result = {
        "run": str(out),
        "recipe": task.recipe.name,
        "scale": describe.get("scale"),
        "arch": best.record.arch,
        "val_acc": metrics["val_acc"],
        "epochs": int(metrics["epochs"]),
        "metrics": metrics,
        "seeds": [
            {"seed": t.seed, "status": t.status, "arch": t.arch or None, "metrics": t.metrics, "error": t.error}
            for t in trials
        ],
    }
    output.finish(result)


@app.command("recipes")
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show all settings of one, with their sources.")] = None,
    other: Annotated[str | None, typer.Argument(help="Show where the two differ.")] = None,
    scale: Annotated[str, typer.Option("--scale", help="full (the authors' settings), small, or tiny.")] = "full",
    json: options.Json = False,
) -> None:
    """List the recipes, all settings of one with where they are from, or the difference of two."""
    from nas.supernet.recipes import RECIPES, diff, scaled, sources
    from nas.supernet.recipes import recipe as find_recipe

    output = Output("supernet recipes", json)
    if name is None:
        rows = []
        for found in RECIPES.values():
            found = scaled(found, scale)
            rate = found.training.learning_rate
            rows.append([found.name, found.relaxation, found.solver, found.epochs, found.training.batch_size, rate])
            rows[-1].append(found.source)
        output.table(["recipe", "relaxation", "solver", "epochs", "batch", "rate", "source"], rows)
        output.finish({"recipes": {key: scaled(found, scale).flat() for key, found in RECIPES.items()}})
        return
    first = scaled(find_recipe(name), scale)
    if other is not None:
        second = scaled(find_recipe(other), scale)
        differences = diff(first, second)
        rows = [[key, str(a), str(b)] for key, (a, b) in differences.items()]
        output.table(["setting", first.name, second.name], rows)
        output.finish({"diff": differences, "recipes": [first.name, second.name]})
        return
    known = sources(first.name)
    settings = {key: value for key, value in first.flat().items() if key not in ("name", "source")}
    rows = [[key, str(value), known.get(key, "")] for key, value in settings.items() if key in known]
    output.say(first.source)
    output.table(["setting (--set NAME=VALUE)", "value", "source"], rows)
    output.say("\nall other settings are off, or as `nas.supernet.recipe.Recipe` has them", style="dim")
    output.finish({"recipe": settings, "source": first.source, "sources": known})
