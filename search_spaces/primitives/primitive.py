"""Primitive: one published activation, normalisation or operation, with its formula and where that stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

KINDS = {
    "activation": "point by point, or with few parameters; keeps the shape",
    "gate": "takes twice the channels and gives half",
    "normalisation": "keeps the shape",
    "layer": "normalisation and activation in one; keeps the shape",
    "placement": "wraps a branch of a residual block",
    "mixing": "exchanges between tokens or positions; keeps the shape",
}
LAYOUTS = ("channels-first", "tokens")  # [B, C, ...] and [B, N, C]
NEEDS = {
    "images": "two space dimensions",
    "running-statistics": "statistics of the training, kept for evaluation",
    "batch": "more than one sample in training",
    "mask": "a second input",
    "square-grid": "tokens that are a square image without class token",
}


@dataclass(frozen=True)
class Primitive:
    """name: on the command line. kind: of KINDS. formula: one line of text. source: paper, year, and the place in it
    or in the published code; what was not checked says `recollection`.

    make: (channels, *, layout=...) -> module; for activations that know no channels they are ignored. layouts: which
    of LAYOUTS it takes. function: the function of one tensor with initial parameters, where it is point by point.
    parameters: what is trained, with shapes and initial values. needs: of NEEDS.
    """

    name: str
    kind: str
    formula: str
    source: str
    make: Callable[..., nn.Module]
    layouts: tuple[str, ...] = LAYOUTS
    function: Callable[[Tensor], Tensor] | None = None
    parameters: str = "none"
    needs: tuple[str, ...] = ()
