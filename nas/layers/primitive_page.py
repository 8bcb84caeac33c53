"""docs/primitives.md: every primitive with its formula and source, and drawings of those that act point by point."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from nas.layers.primitive_cost import CHANNELS, trained_numbers
from nas.layers.primitive_plots import draw_all
from nas.plots import svg
from search_spaces.common.files import atomic_write
from search_spaces.primitives.primitive import Primitive
from search_spaces.primitives.registry import ACT, NORM, misfit, primitives

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND_TITLES = {
    "activation": "Activations",
    "gate": "Gates",
    "normalisation": "Normalisations",
    "layer": "Layers",
    "placement": "Placements of normalisations",
    "mixing": "Mixing of tokens or positions",
}
ABOUT = {
    "activation": "Channels in, channels out. Names for `act=`, `with_layers(acts=...)` and `nas train --act`.",
    "gate": "They take twice the channels, `[a, b]`, and give half; not for `act=`, where the channels must stay.",
    "normalisation": "Names for `norm=`, `with_layers(norms=...)` and `nas train --norm`. Means and variances carry "
    "the dimensions they are taken over: B samples, C channels, H and W positions.",
    "layer": "Normalisation and activation in one module: `norm=` with `act=identity`, or `nas train --layer`. With "
    "`-tokens` the statistics of a layer or group are those of each position. `nas layers show NAME` draws the graph.",
    "placement": "Where the normalisation N stands around the branch f of a residual block; the module wraps f.",
    "mixing": "Blocks that exchange between tokens or positions; mostly for tokens `[B, N, C]`.",
}
DRAWN = {"activation": ("activations", -2, 4), "normalisation": ("normalisations", -1, 2)}  # file and axis


def page() -> str:
    """The text of the page."""
    lines = [
        "# Primitives",
        "",
        "Activations, gates, normalisations and what surrounds them, each with its formula and where that stands. This",
        "page is written by `nas primitives page --out docs` from the registry (`search_spaces.primitives.registry`);",
        "`nas primitives show NAME` says more about one, and `--cost` measures it.",
        "",
        f"Trained: parameters with shapes and initial values, and how many numbers they are for {CHANNELS} channels",
        "(of a placement: beside its branch). *Recollection* marks what was not compared with the source. Drawings:",
        "from -4 to 4, with initial parameters.",
    ]
    for kind, title in KIND_TITLES.items():
        lines += ["", f"## {title}", "", ABOUT[kind], ""]
        if kind in DRAWN:
            lines += [f"![{title} and their derivatives](primitives/{DRAWN[kind][0]}.svg)", ""]
        lines += ["| name | formula | trained | needs | source |", "|---|---|---|---|---|"]
        lines += [_row(each) for each in primitives(kind)]
    return "\n".join(lines) + "\n"


def drawings() -> dict[str, Figure]:
    """The page's figures by file name."""
    return {f"{name}.svg": draw_all(primitives(kind), low, high) for kind, (name, low, high) in DRAWN.items()}


def write_page(folder: str | os.PathLike[str]) -> list[Path]:
    """Write primitives.md and primitives/*.svg into `folder`; returns the files."""
    folder = Path(folder)
    (folder / "primitives").mkdir(parents=True, exist_ok=True)
    texts = {folder / "primitives.md": page()}
    for name, figure in drawings().items():
        text = re.sub(r"(\d\d\.\d\d)\d+", r"\1", svg(figure, name.removesuffix(".svg")))  # hundredths of a point
        text = re.sub(r"\n\s+", "\n", text)
        texts[folder / "primitives" / name] = '<?xml version="1.0" encoding="utf-8"?>\n' + text
    for path, text in texts.items():
        with atomic_write(path) as file:
            file.write(text)
    return list(texts)


def needs_of(found: Primitive) -> str:
    """What a primitive asks of its surroundings, in words."""
    tokens = ["tokens"] if found.layouts == ("tokens",) else []
    return ", ".join([*tokens, *(need.replace("-", " ") for need in found.needs)])


def places_of(found: Primitive) -> str:
    """Where in an image network it can stand, or why it cannot."""
    reasons = {"norm=": misfit(found, NORM), "act=": misfit(found, ACT)}
    fits = [place for place, reason in reasons.items() if reason is None]
    if fits:
        return " or ".join(fits) + (" (with act=identity)" if found.kind == "layer" else "")
    reason = str(reasons["act="])
    return f"neither norm= nor act=: {reason[reason.index('(') + 1 : -1]}"


def _row(found: Primitive) -> str:
    count = trained_numbers(found)
    trained = f"{found.parameters} ({count:,})" if count else found.parameters
    cells = (f"`{found.name}`", f"`{found.formula}`", trained, needs_of(found), found.source)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
