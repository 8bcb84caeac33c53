"""The funnel's cheap end: a layer space that proposes only what is worth training, and counts what it refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from search_spaces.common.errors import RunError
from search_spaces.layers.catalog import layer
from search_spaces.layers.filters import numeric, static
from search_spaces.layers.graph import LayerGraph
from search_spaces.layers.space import LayerSpace

DRAWS = 100_000  # without an admissible layer among so many the space has none to speak of


class FilteredLayers(LayerSpace):
    """A LayerSpace whose samples, mutants, children and neighbours passed the static and the numeric checks.

    counts: how many graphs were `drawn`, and how many were refused for which reason, `duplicate` among them (equal
    fingerprints). first: names of catalogue layers that the first samples are, so that a search can begin from known
    layers; the others are random. They only count and remember what was proposed, so equal calls with equal rngs
    propose equal layers. The other settings are LayerSpace's. Errors: UserError.
    """

    def __init__(self, *settings: Any, first: Sequence[str] = (), **named: Any):
        super().__init__(*settings, **named)
        self.counts: Counter[str] = Counter()
        self.first = tuple(first)
        self._waiting = [layer(name, **_rules(self)) for name in reversed(self.first)]
        self._proposed: set[str] = set()
        self._unfiltered = LayerSpace(**self.settings)

    def sample(self, rng: np.random.Generator) -> LayerGraph:
        """A known layer of `first` while there are any, then random admissible ones."""
        if self._waiting:
            known = self.embed(self._waiting.pop(), rng)
            self._proposed.add(self.key(known))
            return known
        return self._admissible(lambda: self._unfiltered.sample(rng))

    def mutate(self, arch: LayerGraph, rng: np.random.Generator) -> LayerGraph:
        """An admissible mutant that was not proposed before."""
        return self._admissible(lambda: self._unfiltered.mutate(arch, rng))

    def crossover(self, first: LayerGraph, second: LayerGraph, rng: np.random.Generator) -> LayerGraph:
        """An admissible child that was not proposed before."""
        return self._admissible(lambda: self._unfiltered.crossover(first, second, rng))

    def neighbors(self, arch: LayerGraph) -> Iterator[LayerGraph]:
        """The admissible neighbours; those proposed before are among them, as their scores are known."""
        for other in super().neighbors(arch):
            if static(other) is None and numeric(other) is None:
                yield other

    def _admissible(self, draw: Callable[[], LayerGraph]) -> LayerGraph:
        for _ in range(DRAWS):
            graph = draw()
            self.counts["drawn"] += 1
            reason = self._reason(graph)
            if reason is None:
                self._proposed.add(self.key(graph))
                return graph
            self.counts[reason] += 1
        raise RunError(f"no admissible layer among {DRAWS:,} draws: {dict(self.counts)}")

    def _reason(self, graph: LayerGraph) -> str | None:
        reason = static(graph)
        if reason is None and self.key(graph) in self._proposed:
            reason = "duplicate"
        return reason or numeric(graph)

    def __reduce__(self):
        return _remake, (self.settings, self.first)


def _rules(space: LayerSpace) -> dict[str, Any]:
    return {name: space.settings[name] for name in ("affine", "groups", "group_size")}


def _remake(settings: dict[str, Any], first: tuple[str, ...]) -> FilteredLayers:
    return FilteredLayers(**settings, first=first)
