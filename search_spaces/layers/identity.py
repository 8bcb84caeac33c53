"""Which layers are one candidate: a fingerprint of what a graph computes, whatever it looks like.

Three levels: `simplify(graph).stable_hash()` is exact and misses what no rewrite knows; `fingerprint` compares values
and derivatives on random inputs; `fingerprint(graph, refit=True)` also forgives what weight and bias can absorb.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from search_spaces.layers.duals import Probe, evaluate_dual
from search_spaces.layers.graph import LayerGraph
from search_spaces.layers.ops import PARAMETERS
from search_spaces.layers.patterns import patterns
from search_spaces.layers.simplify import simplify

CHANNELS, GROUPS = 6, 2  # on the probes groups hold three channels, so they differ from channels and from the layer
# For each draw of v0 and v1, batches of (batch, space, scale, offset).
_BATCHES = (((3, 4, 1.5, 0.3), (2, 7, 0.2, -0.1)), ((5, 2, 0.7, -0.4), (2, 5, 6.0, 1.0)))
_STEP = 1e-5  # five significant digits
_FLOOR = 1e-4  # below this size, digits count from here: rounding errors near zero are absolute


def fingerprint(graph: LayerGraph, *, refit: bool = False) -> str:
    """32 hexadecimal digits, equal for graphs that compute the same function of x, v0, v1 and further parameters.

    Evaluated in fp64 on four batches of different size, scale and offset and two draws of v0 and v1, each of both
    signs, together with the derivative along a random direction of x, v0 and v1, to five significant digits. Groups
    stand for themselves: a group is neither a channel nor the whole layer, unless the graph's rule makes it so.
    refit: equal up to a weight and a bias per channel. Batch aggregates are those of training; their momentum counts.
    """
    graph = simplify(graph)
    digits = []
    with np.errstate(all="ignore"):
        for probes in _probes(_groups(graph)):
            found = [evaluate_dual(graph, probe) for probe in probes]
            value = _by_channel([value for value, _ in found], probes)
            change = _by_channel([0.0 if change is None else change for _, change in found], probes)
            if refit:
                value, change = _refit(value, change)
            digits += [_quantised(value), _quantised(change)]
    text = b"".join(array.tobytes() for array in digits) + _settings(graph).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _settings(graph: LayerGraph) -> str:
    """What tells layers apart but shows in no value: how groups are counted, how running statistics are kept."""
    known = patterns(graph)
    grouped = _groups(graph) == GROUPS and any(
        node.axes in ("group", "channel-group") and known[node.inputs[0]].reduced(node.axes) != known[node.inputs[0]]
        for _, node in graph.live_nodes
    )
    groups = (None if graph.group_size else graph.groups, graph.group_size) if grouped else None
    running = (graph.momentum, graph.unbiased) if graph.batch_aggregates() else None
    return repr((graph.affine, groups, running))


def _groups(graph: LayerGraph) -> int:
    """The probes' number of groups: one channel each or one for all only where that holds at every width."""
    if graph.group_size == 1:
        return CHANNELS
    return 1 if graph.group_size is None and graph.groups == 1 else GROUPS


@functools.cache
def _probes(groups: int) -> tuple[tuple[Probe, ...], ...]:
    """Batches that share v0, v1 and their change, so that one weight and one bias must fit them; two such sets.

    Among each of v0 and v1 some are above 1 and some below -1, and their means have either sign, so that
    `max(v1, sigmoid(v0))` and the like show both sides.
    """
    rng = np.random.default_rng(2004_02967)
    more = np.random.default_rng(2006_03179)  # of its own, so that the other numbers are what they were
    sets = []
    for sign, batches in zip((1.0, -1.0), _BATCHES, strict=True):
        v0, v1 = sign * _both_sides(rng), -sign * _both_sides(rng)
        dv0, dv1 = rng.standard_normal((2, CHANNELS))
        vectors = {name: (sign * _both_sides(more), more.standard_normal(CHANNELS)) for name in PARAMETERS}
        probes = []
        for batch, space, scale, offset in batches:
            x, dx = rng.standard_normal((2, batch, CHANNELS, space))
            probes.append(Probe(x * scale + offset, v0, v1, groups, dx * scale, dv0, dv1, vectors))
        sets.append(tuple(probes))
    return tuple(sets)


def _both_sides(rng: np.random.Generator) -> np.ndarray:
    """A normal vector with numbers beyond 1 on both sides and a mean above .2."""
    while True:
        vector = rng.standard_normal(CHANNELS)
        if vector.max() > 1 and vector.min() < -1 and vector.mean() > 0.2:
            return vector


def _by_channel(values: list, probes: tuple[Probe, ...]) -> np.ndarray:
    """Values of several batches as [C, all positions]."""
    full = (np.broadcast_to(v, p.x.shape) for v, p in zip(values, probes, strict=True))
    return np.concatenate([np.moveaxis(v, 1, 0).reshape(CHANNELS, -1) for v in full], 1)


def _refit(value: np.ndarray, change: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every channel with mean 0 and size 1 over all batches, its largest deviation positive.

    The change of v0 and v1 also moves what the weight and the bias absorb, hence the same treatment for `change`:
    what remains is the part that neither the value itself nor a constant explains.
    """
    value, size = _centred(value, value)
    value = value * np.sign(_pivot(value))
    rest = change - change.mean(1, keepdims=True)
    rest = rest - value * (value * rest).mean(1, keepdims=True)
    change, _ = _centred(rest, np.abs(change) + size)
    return value, change * np.sign(_pivot(change))


def _centred(value: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(channels with mean 0 and size 1, their size); zeros where only rounding errors of `reference` are left."""
    value = value - value.mean(1, keepdims=True)
    size, before = (np.sqrt((v * v).mean(1, keepdims=True)) for v in (value, reference))
    return np.where(size > 1e-9 * before, value / size, 0.0), size


def _pivot(value: np.ndarray) -> np.ndarray:
    """The sum of cubes of each channel with fixed uneven weights: its sign is the channel's orientation."""
    weights = 1 + np.arange(value.shape[1]) % 7 / 3
    return (weights * value**3).sum(1, keepdims=True)


def _quantised(value: np.ndarray) -> np.ndarray:
    """int64, finite values in logarithmic steps of `_STEP`; special values far outside.

    Steps of a logarithm with an odd phase put their boundaries at numbers that no formula yields, unlike decimal
    digits, where 0.00390625 is a tie. Two evaluations that differ by rounding (1e-15) then fall into different steps
    about once in 1e10 numbers, and a fingerprint holds a few hundred.
    """
    steps = np.arcsinh(value / _FLOOR) / _STEP + 0.2718281828
    special = np.where(np.isnan(value), 2.0**60, np.sign(value) * 2.0**61)
    return np.floor(np.where(np.isfinite(value), steps, special)).astype(np.int64)
