"""Searching activation functions through the funnel of layers: filtered spaces, and anchors that keep their norm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from nas.layers.anchors import anchor
from nas.layers.evaluator import LayerEvaluator
from nas.layers.signal import signal
from nas.training.recipe import Recipe
from search_spaces.common.errors import RunError, UserError
from search_spaces.common.names import match
from search_spaces.graph import OpGraph
from search_spaces.layers.activation_space import ActivationSpace, activation
from search_spaces.layers.filters import numeric, static
from search_spaces.layers.graph import LayerGraph
from search_spaces.layers.module import GraphLayer
from search_spaces.layers.pangaea_space import PangaeaSpace
from search_spaces.layers.swish_space import SwishSpace
from search_spaces.space import SearchSpace

SETS: dict[str, Callable[..., ActivationSpace]] = {"swish": SwishSpace, "pangaea": PangaeaSpace}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(max(1, channels // 4), channels),
    "layer": nn.LayerNorm,
    "none": lambda channels: nn.Identity(),
}
DRAWS = 100_000


class FilteredActivations(SearchSpace[LayerGraph]):
    """A space of SETS whose samples, mutants, children and neighbours passed the checks without data.

    ops: `swish` or `pangaea`; settings: of its class. first: names or formulas that the first samples are, so that a
    search can begin from known functions. A function is refused because it ignores x, is not finite, has no gradient,
    is affine, or equals one that was proposed (`duplicate`); `counts` says how many. Errors: UserError.
    """

    name = "activations"

    def __init__(self, ops: str = "pangaea", *, first: Sequence[str] = (), **settings: Any):
        name = match(ops, SETS, "a set of activation functions")
        self.inner = SETS[name](**settings)
        self.settings: dict[str, Any] = {"ops": name, **settings}
        self.first = tuple(first)
        self.vocabulary, self.ops = self.inner.vocabulary, self.inner.ops
        self.counts: Counter[str] = Counter()
        self._waiting = [self.inner.embed(activation(text)) for text in reversed(self.first)]
        self._proposed: dict[str, None] = {}

    def sample(self, rng: np.random.Generator) -> LayerGraph:
        """A known function of `first` while there are any, then random admissible ones."""
        if self._waiting:
            known = self._waiting.pop()
            self._proposed[self.key(known)] = None
            return known
        return self._admissible(lambda: self.inner.sample(rng))

    def mutate(self, arch: LayerGraph, rng: np.random.Generator) -> LayerGraph:
        """An admissible mutant that was not proposed before."""
        return self._admissible(lambda: self.inner.mutate(arch, rng))

    def crossover(self, first: LayerGraph, second: LayerGraph, rng: np.random.Generator) -> LayerGraph:
        """An admissible child that was not proposed before."""
        return self._admissible(lambda: self.inner.crossover(first, second, rng))

    def neighbors(self, arch: LayerGraph) -> Iterator[LayerGraph]:
        """The admissible neighbours; those proposed before are among them."""
        return (other for other in self.inner.neighbors(arch) if static(other) is None and numeric(other) is None)

    def _admissible(self, draw: Callable[[], LayerGraph]) -> LayerGraph:
        for _ in range(DRAWS):
            graph = draw()
            self.counts["drawn"] += 1
            reason = static(graph)
            if reason is None and self.key(graph) in self._proposed:
                reason = "duplicate"
            reason = reason or numeric(graph)
            if reason is None:
                self._proposed[self.key(graph)] = None
                return graph
            self.counts[reason] += 1
        raise RunError(f"no admissible function among {DRAWS:,} draws: {dict(self.counts)}")

    def encode(self, arch: LayerGraph) -> str:
        return self.inner.encode(arch)

    def decode(self, text: str) -> LayerGraph:
        return self.inner.decode(text)

    def readable(self, arch: LayerGraph) -> str:
        return self.inner.readable(arch)

    def key(self, arch: LayerGraph) -> str:
        return self.inner.key(arch)

    def function_key(self, arch: LayerGraph) -> str:
        return self.inner.function_key(arch)

    def graph(self, arch: LayerGraph) -> OpGraph:
        return self.inner.graph(arch)

    def __reduce__(self):
        return _remake, (self.settings, self.first)


def _remake(settings: dict[str, Any], first: tuple[str, ...]) -> FilteredActivations:
    return FilteredActivations(**settings, first=first)


@dataclass(frozen=True)
class ActivationEvaluator(LayerEvaluator):
    """LayerEvaluator for activation functions: every place of an anchor gets a normalisation, then the candidate.

    norm: of NORMS. The normalisation has its own weight and bias, the candidate none. The other settings, metrics and
    reasons are LayerEvaluator's. Errors: UserError.
    """

    norm: str = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        match(self.norm, NORMS, "a normalisation")
        if self.layout == "tokens" and self.norm in ("batch", "group"):
            raise UserError(self.norm, "layer or none for tokens", "layer")
        if self.layout != "tokens" and self.norm == "layer":
            raise UserError(self.norm, "batch, group or none for images", "batch")

    def place(self, graph: LayerGraph, channels: int) -> nn.Module:
        """What stands at one place of an anchor."""
        return nn.Sequential(NORMS[self.norm](channels), GraphLayer(graph, channels, layout=self.layout))

    def network(self, graph: LayerGraph, name: str, *, seed: int | None = None) -> nn.Module:
        """The anchor `name` with the normalisation and the function, freshly initialised."""
        data = self.dataset()
        return anchor(
            name,
            lambda channels: self.place(graph, channels),
            last=NORMS[self.norm],
            width=self.width,
            num_classes=data.num_classes,
            in_channels=data.shape[0],
            generator=torch.Generator().manual_seed(self.train_seed if seed is None else seed),
        )

    def _settings(self, *names: str) -> dict[str, Any]:
        return {**super()._settings(*names), "norm": self.norm}

    def _signal(self, graph: LayerGraph) -> str | None:
        generator = torch.Generator().manual_seed(self.train_seed)
        return signal(lambda c: self.place(graph, c), generator=generator, layout=self.layout).reason

    def _reference_loss(self, recipe: Recipe) -> float:
        raise UserError(self.screen_steps, "no screening of activation functions against a reference layer", "0")
