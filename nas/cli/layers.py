"""nas layers: search, compare and take home normalisation-activation layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

import nas
from nas.cli import options
from nas.cli.context import command_line, environment
from nas.cli.output import Output
from search_spaces.common.errors import UserError

if TYPE_CHECKING:
    from nas.layers.evaluator import LayerEvaluator

app = typer.Typer(
    help="Search, compare and take home normalisation-activation layers.", no_args_is_help=True, rich_markup_mode=None
)
Anchors = Annotated[
    str, typer.Option("--anchors", help="resnet, mobilenetv2, efficientnet, vgg or vit; commas between.")
]
Steps = Annotated[int, typer.Option("--steps", help="Training steps in each anchor.")]
Rate = Annotated[float, typer.Option("--learning-rate", help="Its highest value.")]
GroupSize = Annotated[
    int | None, typer.Option("--group-size", help="Channels in a group (default: at most 32 groups).")
]
Ops = Annotated[str, typer.Option("--ops", help="A set of primitives: evonorm24, evonorm21, extended, tokens.")]
SearchOps = Annotated[
    str,
    typer.Option("--ops", help="evonorm24, evonorm21, extended, tokens; of activation functions: swish, pangaea."),
]
LayerName = Annotated[str, typer.Argument(metavar="LAYER", help="A name, RUN:best, FILE.json or a formula.")]


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _evaluator(
    data: str, root: Path | None, size: int | None, anchors: str, width: int, steps: int, rate: float, **more: Any
) -> LayerEvaluator:
    from nas.layers.evaluator import LayerEvaluator
    from nas.training.recipe import Recipe

    recipe = Recipe(steps=steps, learning_rate=rate)
    return LayerEvaluator(data, str(root) if root else None, size, _split(anchors), width, recipe, **more)


@app.command()
def search(
    data: options.Data = "digits",
    data_root: options.DataRoot = None,
    size: options.Size = None,
    anchors: Anchors = "resnet",
    budget: Annotated[int, typer.Option(help="How many layers reach training.")] = 50,
    steps: Steps = 100,
    learning_rate: Rate = 0.1,
    width: Annotated[int, typer.Option(help="Channels of an anchor's first stage.")] = 8,
    strategy: options.Strategy = "regularized-evolution",
    setting: options.Settings = None,
    objectives: options.Objectives = None,
    ops: SearchOps = "evonorm24",
    nodes: Annotated[int, typer.Option(help="Operations in a graph.")] = 10,
    sampling: Annotated[str, typer.Option(help="normalizing, flat or nested.")] = "normalizing",
    immigrants: Annotated[float, typer.Option(help="Share of random layers among the mutants.")] = 0.1,
    first: Annotated[str, typer.Option(help="Known layers to begin from, see `nas layers list`.")] = "",
    group_size: GroupSize = 4,
    norm: Annotated[
        str, typer.Option(help="What stands before an activation function: batch, group, layer, none.")
    ] = "batch",
    units: Annotated[int, typer.Option(help="Core units of the swish set: 1 or 2.")] = 1,
    workers: Annotated[int, typer.Option(help="Processes that train.")] = 1,
    seed: options.Seed = 0,
    out: Annotated[Path | None, typer.Option(help="The run's folder.")] = None,
    json: options.Json = False,
) -> None:
    """Search for a layer, or with `--ops swish|pangaea` for an activation function, on your own images; the run can be
    continued, reported and exported from."""
    from nas.layers.activation_search import SETS, ActivationEvaluator, FilteredActivations
    from nas.layers.aquasurf import BASELINES, AQuaSurF
    from nas.layers.funnel import FilteredLayers

    output = Output("layers search", json, seed)
    evaluator = _evaluator(data, data_root, size, anchors, width, steps, learning_rate)
    space: FilteredLayers | FilteredActivations
    if ops in SETS:
        evaluator = ActivationEvaluator(**{**vars(evaluator), "norm": norm})
        of_set: dict[str, Any] = {"units": units} if ops == "swish" else {}
        known = BASELINES if strategy == AQuaSurF.name and ops == "pangaea" else ()
        space = FilteredActivations(ops, first=_split_layers(first) if first else known, **of_set)
    else:
        space = FilteredLayers(
            ops,
            nodes,
            sampling,
            mutations=("replace", "rewire"),
            immigrants=immigrants,
            group_size=group_size,
            first=_split(first),
        )
    kind = "activations" if ops in SETS else "layers"
    out = out or Path("runs") / f"{kind}-{Path(data).name.replace(':', '-')}-{strategy}-seed{seed}"
    describe = {"command": command_line(), "version": nas.__version__, "environment": environment()}
    arguments: dict[str, Any] = {"strategy_settings": options.read_settings(setting), "describe": describe}
    _run(space, evaluator, strategy, budget, objectives or "val_acc", seed, workers, out, output, **arguments)


def resume(settings: dict[str, Any], out: Path, output: Output) -> None:
    """Continue a layer run; `nas resume` calls it."""
    from nas.budget import Budget
    from nas.layers.search import evaluator_from, space_from

    describe = {k: settings[k] for k in ("command", "version", "environment") if k in settings}
    arguments: dict[str, Any] = {"strategy_settings": settings["strategy_settings"], "describe": describe}
    _run(
        space_from(settings),
        evaluator_from(settings),
        settings["strategy"],
        Budget(**settings["budget"]),
        settings["objectives"],
        settings["seed"],
        settings["workers"],
        out,
        output,
        **arguments,
    )


def _run(space, evaluator, strategy, budget, objectives, seed, workers, out, output, **arguments) -> None:
    from nas.layers.search import funnel_counts, search_layers

    with output.progress("layers") as progress:
        result = search_layers(
            space,
            evaluator,
            strategy,
            budget=budget,
            objectives=objectives,
            seed=seed,
            workers=workers,
            out=out,
            progress=progress,
            **arguments,
        )
    summary, funnel = result.summary().as_json(), funnel_counts(result)
    refused = ", ".join(f"{reason} {n:,}" for reason, n in funnel["rejected"].items())
    lines: dict[str, Any] = {
        "drawn": f"{funnel['drawn']:,} graphs",
        "refused": refused,
        "trained": f"{funnel['trained']:,} layers",
    }
    formula = None
    if summary["best"] is not None:
        formula = space.readable(space.decode(summary["best"]["arch"]))
        lines = {"best": formula, **summary["best"]["metrics"], **lines}
        lines["training steps of the best"] = int(lines.pop("cost_seconds"))
    output.pairs({**lines, "run": str(out)})
    if formula is None:
        output.warn("no layer passed every test; a larger --budget, more --steps or another --learning-rate may help")
    output.say(f"\nreport: nas report {out}    source: nas layers export {out}:best --to layer.py", style="dim")
    output.finish({"run": str(out), **summary, "funnel": funnel, "formula": formula})


@app.command()
def compare(
    layers: Annotated[str, typer.Option(help="Names, RUN:best, files or formulas; commas between.")],
    data: options.Data = "digits",
    data_root: options.DataRoot = None,
    size: options.Size = None,
    anchors: Anchors = "resnet",
    steps: Steps = 100,
    learning_rate: Rate = 0.1,
    width: Annotated[int, typer.Option(help="Channels of an anchor's first stage.")] = 8,
    seeds: Annotated[int, typer.Option(help="Trainings of each layer in each anchor.")] = 5,
    group_size: GroupSize = 4,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Train layers side by side in the same anchors."""
    from nas.layers.comparison import compare_layers
    from nas.layers.references import find_layer

    output = Output("layers compare", json, seed)
    if seeds < 1:
        raise UserError(seeds, "at least one seed")
    found = {name: find_layer(name, group_size=group_size) for name in _split_layers(layers)}
    evaluator = _evaluator(data, data_root, size, anchors, width, steps, learning_rate, train_seed=seed)
    with output.progress("training") as progress:
        scores = compare_layers(found, evaluator, seeds=seeds, progress=progress)
    rows = [
        [
            s.name,
            s.anchor,
            f"{s.val_acc:.2f}" + (f" ± {s.standard_error:.2f}" if s.standard_error is not None else ""),
            f"{s.latency_ms:.1f}",
            f"{s.activation_bytes / 1e6:.2f}",
            s.broke_down or "",
        ]
        for s in scores
    ]
    title = f"validation accuracy on {data} after {steps} steps, {seeds} seeds (± standard error)"
    headings = ["layer", "anchor", "val_acc", "ms per step", "activations (MB)", "broke down"]
    output.table(headings, rows, title=title)
    output.finish({"layers": [s.as_json() for s in scores]})


def _split_layers(text: str) -> list[str]:
    """Commas between layers, but not those inside a formula's brackets."""
    parts, depth, begin = [], 0, 0
    for i, character in enumerate(text + ","):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth <= 0:
            parts.append(text[begin:i].strip())
            begin = i + 1
    found = [part for part in parts if part]
    if not found:
        raise UserError(text, "at least one layer")
    return found


@app.command()
def sample(
    count: Annotated[int, typer.Option(help="How many random graphs.")] = 20_000,
    ops: Ops = "evonorm24",
    nodes: Annotated[int, typer.Option(help="Operations in a graph.")] = 10,
    sampling: Annotated[str, typer.Option(help="flat, nested or normalizing.")] = "flat",
    funnel: Annotated[str, typer.Option(help="Tests in order: static, dedup, numeric.")] = "static",
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Count what becomes of random graphs, per reason."""
    from search_spaces.layers.filters import sample_counts
    from search_spaces.layers.space import LayerSpace

    output = Output("layers sample", json, seed)
    space = LayerSpace(ops, nodes, sampling)
    with output.progress("graphs") as progress:
        counts = sample_counts(space, count, _split(funnel), np.random.default_rng(seed), progress)
    rows = [[reason, n, f"{100 * n / count:.1f} %"] for reason, n in counts["rejected"].items()]
    rows.append(["passed", counts["passed"], f"{100 * counts['passed'] / count:.1f} %"])
    output.table(["reason", "graphs", "share"], rows, title=f"{count:,} random graphs over {ops}, {sampling} sampling")
    output.finish(counts)


@app.command("list")
def list_(json: options.Json = False) -> None:
    """List the layers of the catalogue."""
    from search_spaces.layers.catalog import named_layer, names

    output = Output("layers list", json)
    listed = [
        {"name": name, "formula": named_layer(name).formula, "source": named_layer(name).source} for name in names()
    ]
    output.table(["layer", "formula", "source"], [list(row.values()) for row in listed])
    output.finish({"layers": listed})


@app.command()
def show(
    layer: LayerName,
    latex: Annotated[bool, typer.Option("--latex", help="The formula as LaTeX.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write a drawing of the graph to this .svg file.")] = None,
    json: options.Json = False,
) -> None:
    """Show a layer: formula, parameters, statistics, graph."""
    from nas.layers.references import find_layer
    from search_spaces.common.drawing import draw_graph
    from search_spaces.common.files import atomic_write
    from search_spaces.layers.formula import format_formula
    from search_spaces.layers.latex import format_latex
    from search_spaces.layers.module import buffer_names, parameter_names
    from search_spaces.layers.simplify import simplify
    from search_spaces.layers.space import LayerSpace

    output = Output("layers show", json)
    graph = simplify(find_layer(layer))
    formula = format_latex(graph) if latex else format_formula(graph)
    lines = {
        "formula": formula,
        "operations": len(graph.live_nodes),
        "parameters": ", ".join(parameter_names(graph)) or "none",
        "running statistics": ", ".join(buffer_names(graph).values()) or "none",
        "groups": f"{graph.group_size} channels each" if graph.group_size else f"at most {graph.groups}",
    }
    gaussian = _gaussian(graph)
    if gaussian:
        lines["behind a normalisation"] = ", ".join(f"{name} {value:.4g}" for name, value in gaussian.items())
    if out is not None:
        space = LayerSpace("extended", max(1, len(graph.nodes)))
        with atomic_write(out) as file:
            file.write(draw_graph(space.graph(graph), title=layer))
        lines["drawing"] = str(out)
    output.pairs(lines)
    about = {"formula": formula, "graph": graph.to_json(), "hash": graph.stable_hash()}
    output.finish({**about, "gaussian": gaussian})


def _gaussian(graph: Any) -> dict[str, float] | None:
    """What an activation function makes of standard normal inputs; None for a layer with aggregates, and for one
    that is not finite."""
    from search_spaces.layers.gauss_hermite import gain, moments

    try:
        found = moments(graph)
        return {"mean": found.mean, "variance": found.variance, "chi": found.chi, "gain": gain(graph)[0]}
    except UserError:
        return None


@app.command()
def replace(
    layer: LayerName,
    model: Annotated[str, typer.Option(help="package.module:factory, a function that makes a torch model.")],
    lone: Annotated[
        str, typer.Option(help="Normalisations without activation: keep, layer, affine, norm-only.")
    ] = "keep",
    last: Annotated[str, typer.Option(help="The last one of a residual block.")] = "affine",
    final: Annotated[str, typer.Option(help="The one before the global pooling.")] = "layer",
    group_size: Annotated[int | None, typer.Option(help="Channels in a group, for names and formulas.")] = None,
    json: options.Json = False,
) -> None:
    """Show what `replace_norm_act` does to a model of your own: each normalisation, and what becomes of it."""
    from torch import nn

    from nas.layers.references import find_layer
    from search_spaces.common.names import load_object
    from search_spaces.layers.replace import ReplacePolicy, replace_norm_act

    output = Output("layers replace", json)
    graph = find_layer(layer, **({"group_size": group_size} if group_size else {}))
    policy = ReplacePolicy(lone=lone, last=last, final=final)
    factory = load_object(model, "a function that makes a torch model")
    made = factory if isinstance(factory, nn.Module) else factory() if callable(factory) else None
    if not isinstance(made, nn.Module):
        raise UserError(model, "a torch model, or a function that makes one")
    _, report = replace_norm_act(made, graph, policy=policy)
    rows = [[r.norm, r.act, r.place, r.channels, r.action, r.reason] for r in report]
    output.table(["normalisation", "activation", "place", "channels", "becomes", "because"], rows)
    replaced = sum(r.replaced for r in report)
    output.say(f"\n{replaced} of {len(report)} replaced")
    keys = ("norm", "act", "place", "channels", "action", "reason")
    output.finish({"replaced": replaced, "places": [dict(zip(keys, row, strict=True)) for row in rows]})


@app.command()
def export(
    layer: LayerName,
    to: Annotated[Path, typer.Option(help="The .py file to write, or .json for the graph.")],
    name: Annotated[str | None, typer.Option("--class", help="The class's name (default: from the file's).")] = None,
    layout: Annotated[str, typer.Option(help="channels-first or tokens.")] = "channels-first",
    group_size: Annotated[int | None, typer.Option(help="Channels in a group, for names and formulas.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    json: options.Json = False,
) -> None:
    """Write a layer as readable source that needs torch only, or as JSON."""
    import json as json_module

    from nas.layers.references import find_layer
    from search_spaces.common.files import atomic_write
    from search_spaces.layers.simplify import simplify
    from search_spaces.layers.source import to_source

    output = Output("layers export", json)
    if to.suffix not in (".py", ".json"):
        raise UserError(str(to), "a file that ends in .py or .json")
    if to.exists() and not force:
        raise UserError(str(to), "a file that does not exist (--force replaces it)")
    graph = simplify(find_layer(layer, **({"group_size": group_size} if group_size else {})))
    class_name = name or "".join(part.title() for part in to.stem.replace("-", "_").split("_"))
    text = (
        to_source(graph, class_name, layout=layout)
        if to.suffix == ".py"
        else json_module.dumps(graph.to_json(), indent=1)
    )
    with atomic_write(to) as file:
        file.write(text)
    output.say(f"{to}: {class_name}(channels)" if to.suffix == ".py" else str(to))
    output.finish({"files": [str(to)], "class": class_name if to.suffix == ".py" else None})
