"""nas export: take a network home."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from nas.cli import options
from nas.cli.context import command_line, environment
from nas.cli.output import Output
from search_spaces.common.errors import UserError


def export(
    reference: Annotated[
        str | None, typer.Argument(metavar="[RUN[:best|:ID]]", help="A training, or an architecture of a search.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="FILE.py (source), FILE.pt2 (torch.export) or FILE.onnx; a card beside it.")
    ] = None,
    space: Annotated[str | None, typer.Option(help="A space's name or package.module:object, with --arch.")] = None,
    arch: Annotated[str | None, typer.Option(help="An architecture in the space's notation.")] = None,
    norm: options.Norm = None,
    act: options.Act = None,
    layer: options.Layer = None,
    scale: options.Scale = None,
    num_classes: Annotated[int | None, typer.Option(help="Outputs of the network (default: the space's).")] = None,
    in_channels: Annotated[
        int | None, typer.Option(help="Channels of an image, features of a graph's node (default: the space's).")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Height and width of the example input (default: 32).")] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Of a search in a supernet: random (default), or inherited: those the network shares there."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files.")] = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Write a network as something that needs nasforge no more, checked in a process that cannot import it."""
    from nas.export.exporting import check_target, export_model
    from nas.export.subject import Build, from_run, named_architecture

    output = Output("export", json, seed)
    if to is None:
        raise UserError("--to", "the file to write: FILE.py, FILE.pt2 or FILE.onnx")
    if (reference is None) == (space is None):
        raise UserError("--space", "one of: RUN:best, or --space with --arch")
    if (space is None) != (arch is None):
        raise UserError("--arch" if arch is None else arch, "--space and --arch together")
    if weights is not None and reference is None:
        raise UserError("--weights", "RUN:best with it: a search in a supernet")
    check_target(to, force=force)
    build = Build(norm, act, layer, options.read_settings(scale), num_classes, in_channels, size, seed)
    if reference is not None:
        subject = from_run(reference, build, weights)
    else:
        subject = named_architecture(str(space), str(arch), build)
    card = replace(subject.card, command=command_line(), versions=_versions())
    exported = export_model(
        subject.model, to, example=subject.example, card=card, weights=card.trained and to.suffix == ".py", force=force
    )
    files = [str(path) for path in exported.files]
    lines: dict[str, Any] = {"files": files, "parameters": exported.params, "verified": exported.verified.sentence()}
    output.pairs(lines)
    if not card.trained:
        output.say("\nthe weights are random" + (f"; train it with: {card.training}" if card.training else ""), "dim")
    result = {
        "files": files,
        "params": exported.params,
        "verified": True,
        "verification": exported.verified.as_json(),
        "space": card.space,
        "arch": card.arch,
        "trained": card.trained,
        "train_command": None if card.trained else card.training,
    }
    output.finish(({"run": reference.rpartition(":")[0] or reference} if reference else {}) | result)


def _versions() -> dict[str, str]:
    known = environment()
    return {name: known[name] for name in ("nasforge", "torch", "python") if name in known}
