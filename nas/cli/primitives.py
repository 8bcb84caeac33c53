"""nas primitives: activations, normalisations and their kin, with formulas, sources, drawings and costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nas.cli import options
from nas.cli.output import Output
from search_spaces.common.errors import UserError

app = typer.Typer(
    help="Activations and normalisations from the literature: formula, source, drawing, cost.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _kinds(incomplete: str) -> list[str]:
    from search_spaces.primitives.primitive import KINDS

    return [kind for kind in KINDS if kind.startswith(incomplete)]


def _names(incomplete: str) -> list[str]:
    from search_spaces.primitives.registry import primitives

    return [each.name for each in primitives() if each.name.startswith(incomplete)]


@app.command("list")
def list_(
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind", help="activation, gate, normalisation, layer, placement or mixing.", autocompletion=_kinds
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """List all primitives, or those of a kind, with their formulas."""
    from nas.layers.primitive_page import places_of
    from search_spaces.primitives.registry import primitives

    output = Output("primitives list", json)
    found = primitives(kind)
    fields = ("name", "kind", "formula", "parameters", "layouts", "needs", "source")
    output.table(["primitive", "kind", "formula", "source"], [[p.name, p.kind, p.formula, p.source] for p in found])
    output.finish({"primitives": [{**{f: getattr(p, f) for f in fields}, "fits": places_of(p)} for p in found]})


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="See `nas primitives list`.", autocompletion=_names)],
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the function and its derivative into this .svg or .png file.")
    ] = None,
    cost: Annotated[
        bool, typer.Option("--cost", help="Measure forward and backward on [64, 64, 16, 16]; takes seconds.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where --cost measures: cpu or cuda.")] = "cpu",
    json: options.Json = False,
) -> None:
    """Show a primitive: formula, parameters, source, what it needs and where it fits."""
    from nas.layers.primitive_cost import CHANNELS, measure_cost, trained_numbers
    from nas.layers.primitive_page import needs_of, places_of
    from nas.layers.primitive_plots import draw
    from nas.plots import save
    from search_spaces.primitives.primitive import KINDS
    from search_spaces.primitives.registry import primitive

    output = Output("primitives show", json)
    found = primitive(name)
    count = trained_numbers(found)
    facts: dict[str, Any] = {
        "name": found.name,
        "kind": f"{found.kind} ({KINDS[found.kind]})",
        "formula": found.formula,
        "parameters": f"{found.parameters}; for {CHANNELS} channels {count:,}",
        "layouts": ", ".join(found.layouts),
        "needs": needs_of(found) or "nothing",
        "fits": places_of(found),
        "source": found.source,
    }
    result: dict[str, Any] = {
        **{field: getattr(found, field) for field in ("name", "kind", "formula", "parameters", "layouts", "needs")},
        "fits": facts["fits"],
        "source": found.source,
        "params": count,
        "files": [],
    }
    if plot is not None:
        save(draw(found), plot)
        facts["drawing"] = str(plot)
        result["files"] = [str(plot)]
    if cost:
        _check_device(device)
        measured = measure_cost(found, device=device)
        facts["time"] = f"{measured.milliseconds:.3g} ms, {measured.relative_time:.2f} times {measured.reference}"
        facts["memory"] = (
            f"{measured.saved_bytes:,} bytes kept for the backward pass, "
            f"{measured.relative_memory:.2f} times {measured.reference}"
        )
        result["cost"] = {
            "reference": measured.reference,
            "step_ms": measured.milliseconds,
            "reference_step_ms": measured.reference_milliseconds,
            "activation_bytes": measured.saved_bytes,
            "reference_activation_bytes": measured.reference_saved_bytes,
        }
    output.pairs(facts)
    output.finish(result)


@app.command()
def page(
    out: Annotated[Path, typer.Option(help="The folder to write primitives.md and primitives/*.svg into.")],
    json: options.Json = False,
) -> None:
    """Write the page of all primitives, with drawings."""
    from nas.layers.primitive_page import write_page

    output = Output("primitives page", json)
    files = [str(path) for path in write_page(out)]
    for path in files:
        output.say(path)
    output.finish({"files": files})


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(device, "a device that this torch has", "cpu") from None
