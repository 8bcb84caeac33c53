"""Choices for a module of one's own: candidates by name, activations, normalisations and whole layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from search_spaces.choice import Choice
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import canonical, nearest
from search_spaces.layers.catalog import layer
from search_spaces.layers.catalog import names as catalogue
from search_spaces.layers.module import GraphLayer
from search_spaces.primitives.registry import ACT, act_factory, misfit, norm_factory, primitives
from search_spaces.space import LayerFactory

Layers = Iterable[str] | Mapping[str, LayerFactory]
READABLE = re.compile(r"[^\s,=#]+")  # a label or a name that can stand in `label=name,label=name`


class NamedChoice(Choice):
    """A Choice whose candidates have names: `NamedChoice({"conv3x3": module, "skip": nn.Identity()}, "stem")`.

    Architectures of a ModuleSpace are written with them. Errors: UserError as Choice, and for a name with a blank, a
    comma, an equals sign or # in it, or one that is a number.
    """

    def __init__(self, candidates: Mapping[str, nn.Module], label: str):
        super().__init__(candidates.values(), label)
        for name in candidates:
            if not READABLE.fullmatch(name) or name.isdigit():
                raise UserError(
                    name, f"a name without blank, comma, equals sign and #, not a number, for a candidate of {label!r}"
                )
        self.names = tuple(candidates)


def choice_of_acts(acts: Layers, channels: int, label: str) -> NamedChoice:
    """A choice of activations: names of `nas primitives list`, or own factories (channels -> module) by name.

    A layer for both, such as `evonorm-s0`, can be among them: it then also normalises. Errors: UserError for an
    unknown name with the nearest, for one that cannot stand there with the reason, and for no name.
    """
    return _choice(acts, _activation, channels, label)


def choice_of_norms(norms: Layers, channels: int, label: str) -> NamedChoice:
    """A choice of normalisations, or of layers for both: names of `nas primitives list`, or own factories by name.

    Errors: as `choice_of_acts`.
    """
    return _choice(norms, norm_factory, channels, label)


def choice_of_layers(layers: Layers, channels: int, label: str) -> NamedChoice:
    """A choice of what normalises and activates: `batch-norm+relu`, one after the other, or a layer for both.

    A single name means a layer of the catalogue (`nas layers list`), else one of `nas primitives list`.
    Errors: as `choice_of_acts`.
    """
    return _choice(layers, _layer, channels, label)


def _choice(wanted: Layers, find: Callable[[str], LayerFactory], channels: int, label: str) -> NamedChoice:
    if isinstance(wanted, str):
        wanted = (wanted,)
    if not isinstance(wanted, Mapping):
        wanted = {canonical(name): find(name) for name in wanted}
    return NamedChoice({name: make(channels) for name, make in wanted.items()}, label)


def _activation(name: str) -> LayerFactory:
    found = {each.name: each for each in primitives("layer")}.get(canonical(name))
    return norm_factory(name) if found is not None and misfit(found, ACT) is not None else act_factory(name)


def _layer(name: str) -> LayerFactory:
    norm, plus, act = (part.strip() for part in name.partition("+"))
    if plus:
        make_norm, make_act = norm_factory(norm), act_factory(act)
        return lambda channels: nn.Sequential(make_norm(channels), make_act(channels))
    if canonical(name) in catalogue():
        graph = layer(name)
        return lambda channels: GraphLayer(graph, channels)
    known = [*catalogue(), *(each.name for each in primitives())]
    if canonical(name) not in map(canonical, known):
        raise UserError(name, f"a layer ({one_of(catalogue())}; `nas layers list`)", nearest(name, known))
    return norm_factory(name)
