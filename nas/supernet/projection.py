"""DARTS-PT: an architecture from a supernet, one decision after another, by what the supernet loses.

Wang et al., Rethinking Architecture Selection in Differentiable NAS, ICLR 2021 (arXiv 2108.04392), algorithm 1; code
ruocwang/darts-pt 4ec3149. A label, in random order, keeps the one candidate without which the supernet gets the fewest
images of the alphas right; the others leave. Between two decisions the weights are trained. In the space darts all
operations are decided first, among those other than `none`; then every node keeps the two edges without which the
accuracy is lowest. Where accuracies are equal, the higher loss decides (the code takes the first).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nas.supernet.edges import edges_into_nodes
from nas.supernet.measures import empty_candidates, mixture_accuracy
from nas.supernet.network import Supernet
from nas.supernet.recipe import Recipe
from nas.supernet.state import SearchState
from nas.training.data import Dataset
from search_spaces.cells.darts import Darts
from search_spaces.layered import LayeredSpace
from search_spaces.space import SearchSpace

INPUTS = 2  # of a node, in the space darts


@dataclass(frozen=True)
class Decision:
    """What is decided: the candidate of the label `name`, or, where it has edges, the inputs of the node `name`."""

    name: str
    edges: tuple[str, ...] = ()


def decisions_of(space: SearchSpace, labels: Iterable[str], seed: int) -> list[Decision]:
    """All decisions of a search in the order they are taken, which follows from the seed."""
    rng, labels = np.random.default_rng((seed, 2)), list(labels)
    found = [Decision(labels[k]) for k in rng.permutation(len(labels))]
    if _chooses_inputs(space):
        nodes = {node: edges for node, edges in edges_into_nodes(labels).items() if len(edges) > INPUTS}
        names = list(nodes)
        found += [Decision(names[k], nodes[names[k]]) for k in rng.permutation(len(names))]
    return found


def decide(state: SearchState, data: Dataset, recipe: Recipe, space: SearchSpace, decision: Decision) -> dict[str, Any]:
    """Take a decision: the supernet is restricted to it. What is measured goes into the log's row.

    data: with the images of the alphas as `val`, on the device.
    """
    supernet = state.supernet
    if decision.edges:
        drops = {edge: _without(state, data, recipe, edge, None) for edge in decision.edges}
        kept = sorted(decision.edges, key=lambda edge: _remains(drops[edge]))[:INPUTS]
        empty = empty_candidates(supernet)
        for edge in decision.edges:
            if edge not in kept:
                supernet.restrict(edge, empty[edge][:1])
        chosen: Any = [edge for edge in decision.edges if edge in kept]
        return {"decided": decision.name, "kept": chosen, "without": {e: found["acc"] for e, found in drops.items()}}
    candidates = _choosable(supernet, decision.name, space)
    found = {k: _without(state, data, recipe, decision.name, (k,)) for k in candidates}
    best = min(candidates, key=lambda k: _remains(found[k]))
    supernet.restrict(decision.name, (best,))
    return {"decided": decision.name, "kept": best, "without": {str(k): found[k]["acc"] for k in candidates}}


def _without(
    state: SearchState, data: Dataset, recipe: Recipe, label: str, candidates: tuple[int, ...] | None
) -> dict[str, float]:
    with state.supernet.without(label, candidates):
        return mixture_accuracy(state, data, recipe)


def _remains(measured: dict[str, float]) -> tuple[float, float]:
    return measured["acc"], -measured["loss"]


def _choosable(supernet: Supernet, label: str, space: SearchSpace) -> tuple[int, ...]:
    candidates = supernet.candidates_of(label)
    if not _chooses_inputs(space):
        return candidates
    empty = empty_candidates(supernet)[label]
    return tuple(k for k in candidates if k not in empty) or candidates


def _chooses_inputs(space: SearchSpace) -> bool:
    return isinstance(space.space if isinstance(space, LayeredSpace) else space, Darts)
