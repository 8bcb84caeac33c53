"""The product of a space and a choice of normalisation and activation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from search_spaces.cells.operations import batch_norm, relu
from search_spaces.choice import Choice
from search_spaces.common.errors import UserError
from search_spaces.common.names import match
from search_spaces.graph import OpGraph
from search_spaces.primitives.registry import ACT, NORM, PrimitiveFactory, act_factory, norm_factory
from search_spaces.space import LayerFactory, SearchSpace

A = TypeVar("A")
PLAIN_NORMS = (batch_norm, PrimitiveFactory("batch-norm"))  # with these a space's own `cost` is exact
PLAIN_ACTS = (relu, PrimitiveFactory("relu"))
COST_ONLY = ("input_size", "nodes")  # what `cost` asks for beyond the arguments of `build`


@dataclass(frozen=True)
class LayeredArchitecture(Generic[A]):
    """An architecture of the inner space with the names of its normalisation and its activation."""

    arch: A
    norm: str
    act: str


def with_layers(
    space: SearchSpace[A],
    *,
    norms: Iterable[str] | Mapping[str, LayerFactory] = ("batch-norm",),
    acts: Iterable[str] | Mapping[str, LayerFactory] = ("relu",),
) -> LayeredSpace[A]:
    """`space` with a choice of one normalisation and one activation for all its operations.

    norms, acts: names of `search_spaces.primitives.registry`, or own factories (channels -> module) by name.
    Errors: UserError for an unknown name with the nearest one, for a primitive that cannot stand there with the reason,
    for no name, and for a name with a blank in it.
    """
    return LayeredSpace(space, _factories(norms, norm_factory, NORM), _factories(acts, act_factory, ACT))


class LayeredSpace(SearchSpace[LayeredArchitecture[A]]):
    """What `with_layers` returns. Text: `<architecture> # norm=group-norm act=silu`.

    The graph is the inner one with two nodes behind its input, `norm=group-norm` and `act=silu`, through which all
    data pass: every path sees the choice.
    """

    def __init__(self, space: SearchSpace[A], norms: Mapping[str, LayerFactory], acts: Mapping[str, LayerFactory]):
        self.space, self.norms, self.acts = space, dict(norms), dict(acts)
        self.name = f"{space.name}-with-layers"
        self.vocabulary = (*space.vocabulary, *(f"norm={n}" for n in self.norms), *(f"act={a}" for a in self.acts))

    def __reduce__(self):
        return type(self), (self.space, self.norms, self.acts)

    def __repr__(self) -> str:
        return f"with_layers({self.space!r}, norms={list(self.norms)}, acts={list(self.acts)})"

    def sample(self, rng: np.random.Generator) -> LayeredArchitecture[A]:
        """A sample of the inner space, a uniform normalisation and a uniform activation."""
        return LayeredArchitecture(self.space.sample(rng), _pick(self.norms, rng), _pick(self.acts, rng))

    def mutate(self, arch: LayeredArchitecture[A], rng: np.random.Generator) -> LayeredArchitecture[A]:
        """A mutation of the inner architecture, another normalisation or another activation, equally often."""
        norms = [name for name in self.norms if name != arch.norm]
        acts = [name for name in self.acts if name != arch.act]
        part = _pick(["arch"] + ["norm"] * bool(norms) + ["act"] * bool(acts), rng)
        if part == "norm":
            return replace(arch, norm=_pick(norms, rng))
        if part == "act":
            return replace(arch, act=_pick(acts, rng))
        return replace(arch, arch=self.space.mutate(arch.arch, rng))

    def crossover(
        self, first: LayeredArchitecture[A], second: LayeredArchitecture[A], rng: np.random.Generator
    ) -> LayeredArchitecture[A]:
        """The inner crossover, normalisation and activation each from either parent."""
        arch = self.space.crossover(first.arch, second.arch, rng)
        return LayeredArchitecture(arch, _pick([first.norm, second.norm], rng), _pick([first.act, second.act], rng))

    def neighbors(self, arch: LayeredArchitecture[A]) -> Iterator[LayeredArchitecture[A]]:
        """All inner neighbours, then all other normalisations, then all other activations."""
        for inner in self.space.neighbors(arch.arch):
            yield replace(arch, arch=inner)
        for norm in self.norms:
            if norm != arch.norm:
                yield replace(arch, norm=norm)
        for act in self.acts:
            if act != arch.act:
                yield replace(arch, act=act)

    def encode(self, arch: LayeredArchitecture[A]) -> str:
        """The inner notation, then ` # norm=<name> act=<name>`."""
        return self.space.encode(arch.arch) + _suffix(arch)

    def decode(self, text: str) -> LayeredArchitecture[A]:
        """Inverse of `encode`. Errors: UserError with the nearest name."""
        found = re.fullmatch(r"([^#]*) # norm=(\S+) act=(\S+)", text.strip())
        if found is None:
            raise UserError(text, f"an architecture of {self.space.name}, then ` # norm=<name> act=<name>`")
        norm, act = match(found[2], self.norms, NORM), match(found[3], self.acts, ACT)
        return LayeredArchitecture(self.space.decode(found[1]), norm, act)

    def key(self, arch: LayeredArchitecture[A]) -> str:
        """The inner key with both names."""
        return self.space.key(arch.arch) + _suffix(arch)

    def function_key(self, arch: LayeredArchitecture[A]) -> str:
        """The inner function key with both names."""
        return self.space.function_key(arch.arch) + _suffix(arch)

    def graph(self, arch: LayeredArchitecture[A]) -> OpGraph:
        """The inner graph with the normalisation and the activation in series behind its input."""
        inner = self.space.graph(arch.arch)
        n = len(inner)
        adjacency = np.zeros((n + 2, n + 2), bool)
        adjacency[3:, 3:] = inner.adjacency[1:, 1:]
        adjacency[2, 3:] = inner.adjacency[0, 1:]
        adjacency[0, 1] = adjacency[1, 2] = True
        ops = ("input", f"norm={arch.norm}", f"act={arch.act}", *inner.ops[1:])
        return OpGraph(ops, adjacency, (inner.parts[0], "layers", "layers", *inner.parts[1:]))

    def cost(self, arch: LayeredArchitecture[A], **net: Any) -> dict[str, int]:
        """The inner costs; `params` with those of the chosen layers, `macs` without what these might multiply.

        The network is built on the meta device to be counted where the layers are not BatchNorm and ReLU.
        """
        cost = self.space.cost(arch.arch, **net)
        if self.norms[arch.norm] in PLAIN_NORMS and self.acts[arch.act] in PLAIN_ACTS:
            return cost
        with torch.device("meta"):
            network = self.build(arch, **{name: value for name, value in net.items() if name not in COST_ONLY})
        return {**cost, "params": sum(p.numel() for p in network.parameters())}

    def build(self, arch: LayeredArchitecture[A], **net: Any) -> nn.Module:
        """The inner space's network with the chosen layers; takes what its `build` takes but `norm` and `act`."""
        self._refuse_layers(net)
        return self.space.build(arch.arch, norm=self.norms[arch.norm], act=self.acts[arch.act], **net)

    def choices(self, **net: Any) -> nn.Module:
        """The inner network of choices, with a Choice labelled `norm` or `act` in place of every such layer."""
        self._refuse_layers(net)
        return self.space.choices(
            norm=lambda channels: Choice([make(channels) for make in self.norms.values()], "norm"),
            act=lambda channels: Choice([make(channels) for make in self.acts.values()], "act"),
            **net,
        )

    def select(self, arch: LayeredArchitecture[A]) -> dict[str, int]:
        """The inner selection with those of `norm` and `act`."""
        layers = {"norm": list(self.norms).index(arch.norm), "act": list(self.acts).index(arch.act)}
        return {**self.space.select(arch.arch), **layers}

    def __len__(self) -> int:
        return len(self.space) * len(self.norms) * len(self.acts)

    def __iter__(self) -> Iterator[LayeredArchitecture[A]]:
        for arch in self.space:
            for norm in self.norms:
                for act in self.acts:
                    yield LayeredArchitecture(arch, norm, act)

    def _refuse_layers(self, net: dict[str, Any]) -> None:
        for name in ("norm", "act"):
            if name in net:
                raise UserError(name, f"no such argument: in {self.name} the architecture chooses it")


def _factories(
    wanted: Iterable[str] | Mapping[str, LayerFactory], find: Callable[[str], PrimitiveFactory], kind: str
) -> dict[str, LayerFactory]:
    if isinstance(wanted, str):
        wanted = (wanted,)
    factories: dict[str, LayerFactory]
    if isinstance(wanted, Mapping):
        factories = dict(wanted)
    else:
        factories = {found.name: found for found in map(find, wanted)}
    if not factories:
        raise UserError([], f"the name of {kind} at least")
    for name in factories:
        if not name or re.search(r"\s", name):
            raise UserError(name, f"a name without blanks for {kind}")
    return factories


def _pick(options: Sequence[str] | Mapping[str, Any], rng: np.random.Generator) -> str:
    names = list(options)
    return names[int(rng.integers(len(names)))]


def _suffix(arch: LayeredArchitecture) -> str:
    return f" # norm={arch.norm} act={arch.act}"
