"""All primitives by name, and those that can stand as `norm=` or `act=` of an image network: channels -> module.

The files of the primitives are imported when one is first asked for.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import canonical, match, nearest
from search_spaces.primitives.primitive import KINDS, Primitive

FILES = (  # in the order of lists and pages
    "activations",
    "activation_families",
    "hermite",
    "kan_single",
    "gates",
    "norms",
    "batch_norms",
    "power_norms",
    "unified_norm",
    "pointwise_norms",
    "transformer_norms",
    "region_norm",
    "evaluation_norms",
    "adab2n",
    "graph_layers",
    "placements",
    "residual_scaling",
    "attention",
    "linear_attention",
    "gated_linear_attention",
    "pooling_blocks",
    "kan",
)
NORM, ACT = "a normalisation", "an activation"
CLOSE = {  # what stands at the same place and fits an image network
    "glu": "sigmoid",
    "bilinear": "identity",
    "reglu": "relu",
    "geglu": "gelu",
    "swiglu": "silu",
    "swiglu-clip": "quick-gelu",
    "powlu-glu": "powlu",
    "region-norm-b": "region-norm-l",
    "layer-norm-scaling": "ln-scaling",
    "transnormer-norm": "rms-norm",
    "skan": "skan-shifted-softplus",
    "kan-spline": "skan-swish",
    "af-kan": "skan-swish",
    "s-kan": "skan-swish",
}


def primitive(name: str) -> Primitive:
    """The primitive called `name`. Errors: UserError with the nearest name."""
    found = _by_name()
    return found[match(name, found, "a primitive (`nas primitives list`)")]


def primitives(kind: str | None = None) -> tuple[Primitive, ...]:
    """All primitives, or those of a kind, in the order of their files. Errors: UserError for an unknown kind."""
    found = tuple(_by_name().values())
    if kind is None:
        return found
    kind = match(kind, KINDS, "a kind of primitive")
    return tuple(each for each in found if each.kind == kind)


@dataclass(frozen=True)
class PrimitiveFactory:
    """channels -> the primitive `name` for inputs [B, C, H, W]. Equal by name; travels to other processes."""

    name: str

    def __call__(self, channels: int) -> nn.Module:
        return primitive(self.name).make(channels, layout="channels-first")


def norm_factory(name: str) -> PrimitiveFactory:
    """The normalisation, or layer of normalisation and activation (its `act=` is then `identity`), called `name`.

    Errors: UserError with the nearest name, or with the reason why this primitive cannot be one and what can.
    """
    return _factory(name, NORM)


def act_factory(name: str) -> PrimitiveFactory:
    """The activation called `name`.

    Errors: UserError with the nearest name, or with the reason why this primitive cannot be one and what can.
    """
    return _factory(name, ACT)


class Factories(Mapping[str, PrimitiveFactory]):
    """All that `norm_factory`, or `act_factory`, has a factory for, by name; nothing is imported before it is used."""

    def __init__(self, role: str):
        self.role = role

    def __getitem__(self, name: str) -> PrimitiveFactory:
        if name not in _fitting(self.role):
            raise KeyError(name)
        return PrimitiveFactory(name)

    def __iter__(self) -> Iterator[str]:
        return iter(_fitting(self.role))

    def __len__(self) -> int:
        return len(_fitting(self.role))


NORMS, ACTIVATIONS = Factories(NORM), Factories(ACT)


def misfit(found: Primitive, role: str) -> str | None:
    """Why a primitive cannot be the `norm=` or `act=` of an image network, None if it can. role: NORM or ACT.

    The words that follow the role, with what this one is in brackets at the end.
    """
    if found.kind == "gate":
        return "that keeps the channels (a gate takes twice the channels and gives half)"
    if found.kind == "placement":
        return "that is complete (a placement wraps the branch of a residual block)"
    if "channels-first" not in found.layouts:
        return "of images [B, C, H, W] (this takes tokens [B, N, C] only)"
    if "mask" in found.needs:
        return "of one input (this takes a mask as well)"
    if found.kind == "mixing":
        return "without convolutions (this is a whole block)"
    if role == NORM and found.kind == "activation" and found.name != "identity":
        return "(this is an activation, `act=`)"
    if role == ACT and found.kind == "normalisation":
        return "(this is a normalisation, `norm=`)"
    if role == ACT and found.kind == "layer":
        return "(this is a layer for both: `norm=`, with `identity` as `act=`)"
    return None


def _factory(name: str, role: str) -> PrimitiveFactory:
    known = {canonical(each): each for each in _by_name()}
    if canonical(name) not in known:
        names = _fitting(role)
        raise UserError(name, f"{role} ({one_of(names)}; `nas primitives list`)", nearest(name, names))
    found = primitive(name)
    reason = misfit(found, role)
    if reason is not None:
        raise UserError(name, f"{role} {reason}", _alternative(found, role))
    return PrimitiveFactory(found.name)


def _alternative(found: Primitive, role: str) -> str:
    close = CLOSE.get(found.name)
    if close in _fitting(role):
        return str(close)
    if found.kind == "layer":
        return "identity"
    return "batch-norm" if role == NORM else "relu"


@functools.cache
def _by_name() -> dict[str, Primitive]:
    files = (importlib.import_module(f"search_spaces.primitives.{file}") for file in FILES)
    return {each.name: each for file in files for each in file.PRIMITIVES}


@functools.cache
def _fitting(role: str) -> tuple[str, ...]:
    return tuple(each.name for each in _by_name().values() if misfit(each, role) is None)
