"""Task: what is trained, on what and how, as plain values that stand in a run's settings."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from nas.training.data import Dataset, load_data
from nas.training.recipe import Recipe
from search_spaces.common.errors import UserError
from search_spaces.common.names import canonical, load_object
from search_spaces.registry import load_space
from search_spaces.space import LayerFactory


@dataclass(frozen=True)
class Task:
    """A training. Either `space` and `arch` (its notation) or `factory` (`package.module:function`) gives the network.

    network: keywords of `space.build` or of the factory. norm, act: names for every normalisation and activation of
    the network; layer: a layer for both (a name, formula, file or RUN:best); in a factory's model it replaces its
    normalisations with the activations behind them. data, root, size, val_share, split_seed: as in `load_data`.
    """

    recipe: Recipe
    space: str | None = None
    arch: str | None = None
    factory: str | None = None
    network: Mapping[str, Any] = field(default_factory=dict)
    norm: str | None = None
    act: str | None = None
    layer: str | None = None
    data: str = "digits"
    root: str | None = None
    size: int | None = None
    val_share: float = 0.1
    split_seed: int = 0
    skip_broken: bool = False

    def __post_init__(self) -> None:
        if (self.factory is None) == (self.space is None):
            raise UserError("--space", "a space with an architecture, or a factory of one's own")
        if self.space is not None and self.arch is None:
            raise UserError(self.space, "an architecture with the space (--arch)")
        if self.layer is not None and (self.norm or self.act):
            raise UserError(self.layer, "a layer, or norm and act, but not both")
        if self.factory is not None and (self.norm or self.act):
            raise UserError(self.norm or self.act, "a layer, which can replace those of a factory's model (--layer)")

    def as_json(self) -> dict[str, Any]:
        """Plain values; `Task.from_json` inverts it."""
        return json.loads(json.dumps(asdict(self)))  # tuples become lists, as they come back from a file

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Task:
        """The task that `as_json` wrote."""
        return Task(**{**found, "recipe": Recipe(**found["recipe"])})

    def differences(self, other: Task) -> list[str]:
        """`name: ours instead of theirs` for everything that differs."""
        own, theirs = self.as_json(), other.as_json()
        found = [f"{k}: {v!r} instead of {theirs[k]!r}" for k, v in own.items() if k != "recipe" and v != theirs[k]]
        return found + self.recipe.differences(theirs["recipe"])

    def open_data(self) -> Dataset:
        """The images. Errors: UserError."""
        return load_data(
            self.data,
            root=self.root,
            size=self.size,
            val_share=self.val_share,
            seed=self.split_seed,
            skip_broken=self.skip_broken,
        )

    def make_network(self, data: Dataset, *, seed: int, auxiliary: bool = True) -> nn.Module:
        """The network for these data, its weights drawn from `seed`. Errors: UserError.

        auxiliary: False leaves an auxiliary head out, which only the training uses.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.factory is not None:
                return self._from_factory(data)
            space = load_space(str(self.space))
            arch = space.decode(str(self.arch))
            network = dict(self.network)
            if not auxiliary:
                network.pop("auxiliary", None)
            layers = layer_factories(self.norm, self.act, self.layer)
            return space.build(arch, in_channels=data.shape[0], num_classes=data.num_classes, **layers, **network)

    def _from_factory(self, data: Dataset) -> nn.Module:
        factory: Any = load_object(str(self.factory), "a function that makes a torch model")
        if isinstance(factory, nn.Module):
            raise UserError(self.factory, "a function that makes a new model each time, not one model")
        known = {"in_channels": data.shape[0], "num_classes": data.num_classes}
        arguments = {**{k: v for k, v in known.items() if k in _parameters(factory)}, **self.network}
        try:
            model = factory(**arguments)
        except TypeError as error:
            expected = f"a function that takes {', '.join(arguments) or 'no argument'} ({error})"
            raise UserError(self.factory, expected) from None
        if not isinstance(model, nn.Module):
            raise UserError(self.factory, f"a function that makes a torch model, it gave a {type(model).__name__}")
        if self.layer is not None:
            from nas.layers.references import find_layer
            from search_spaces.layers.replace import replace_norm_act

            model, _ = replace_norm_act(model, find_layer(self.layer))
        return model


def layer_factories(norm: str | None, act: str | None, layer: str | None) -> dict[str, LayerFactory]:
    """The arguments `norm` and `act` of `space.build` for names; `layer` stands for both.

    A name means a primitive as `norm`, and as `layer` first one of the catalogue (`nas layers list`): of some there are
    both, over other axes. Errors: UserError.
    """
    if layer is not None:
        from search_spaces.layers.catalog import names

        known = canonical(layer) in names()
        return {"norm": _graph_layer(layer) if known else norm_layer(layer), "act": act_layer("identity")}
    layers = {} if norm is None else {"norm": norm_layer(norm)}
    return layers if act is None else {**layers, "act": act_layer(act)}


def norm_layer(name: str) -> LayerFactory:
    """The normalisation `name`: a primitive, else a layer that `find_layer` knows. Errors: UserError."""
    from search_spaces.layers.catalog import names
    from search_spaces.primitives.registry import norm_factory, primitives

    plain = canonical(name)
    primitive = plain in {each.name for each in primitives()}
    if primitive or (plain not in names() and plain.replace("-", "").isalnum()):  # which is then refused
        return norm_factory(name)
    return _graph_layer(name)


def _graph_layer(name: str) -> LayerFactory:
    from nas.layers.references import find_layer
    from search_spaces.layers.module import GraphLayer

    graph = find_layer(name)
    return lambda channels: GraphLayer(graph, channels)


def act_layer(name: str) -> LayerFactory:
    """The activation `name`, a primitive. Errors: UserError with the nearest."""
    from search_spaces.primitives.registry import act_factory

    return act_factory(name)


def _parameters(factory: Callable[..., Any]) -> list[str]:
    try:
        found = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return []
    if any(p.kind is p.VAR_KEYWORD for p in found.values()):
        return ["in_channels", "num_classes"]
    return list(found)
