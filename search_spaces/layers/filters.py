"""Which layers are worth training at all: checks without data, from cheap to dear, each with a reason to refuse.

Order and definitions follow the rejection tests that a search over normalisation-activation layers needs before its
first training step: most random graphs ignore their input, are constant over space, or repeat one seen before.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.layers.duals import Probe, evaluate_dual, random_probe
from search_spaces.layers.evaluate import evaluate
from search_spaces.layers.graph import LayerGraph, X
from search_spaces.layers.simplify import simplify

if TYPE_CHECKING:
    from search_spaces.layers.space import LayerSpace

STAGES = ("static", "dedup", "numeric")
SCALES = (1e-3, 1.0, 1e3)
_SHAPES = ((4, 8, 5, 5), (4, 8, 1, 1), (1, 8, 5, 5), (1, 8, 1, 1))  # the last ones: nothing to take statistics of


def static(graph: LayerGraph, ops: Collection[str] | None = None) -> str | None:
    """The reason to refuse a graph at a glance, or None.

    `ignores_input`: x is no ancestor of the output. `family`: a live operation is not among `ops`. `non_finite` and
    `not_full_shape`: infinite, or constant over batch, channels or space, on a batch of 1.5 N(0, 1) + .3 of shape
    8 x 32 x 6 x 6 with 8 groups in fp32, v0 and v1 from N(0, 1).
    """
    if X not in graph.live:
        return "ignores_input"
    if ops is not None and any(node.name not in ops for _, node in graph.live_nodes):
        return "family"
    return _shape_reason(graph, _image_probe())


def numeric(graph: LayerGraph) -> str | None:
    """The reason to refuse a graph whose numbers will not do, or None.

    `non_finite`: value or gradient in fp32 on inputs of scale .001, 1 and 1000, on 1 x 1 images and on batches of one,
    or in half precision on unit inputs with statistics in single precision, as under autocast. `zero_gradient`: no
    gradient reaches x at the initial parameters. `trivial`: see `trivial`.
    """
    slopes = []
    for x, direction in _safety_inputs():
        finite, slope = _finite_and_slope(graph, x, direction)
        if not finite:
            return "non_finite"
        slopes.append(slope)
    with np.errstate(all="ignore"):
        value, change = evaluate_dual(graph, _half_probe())
        if not np.isfinite(value).all() or (change is not None and not np.isfinite(change).all()):
            return "non_finite"
    if slopes[0] == 0:  # the unit input: far out, a saturated layer may be flat
        return "zero_gradient"
    return "trivial" if trivial(graph) else None


def trivial(graph: LayerGraph) -> bool:
    """Whether the layer is an affine map of its input: f(a) + f(b) - f(0) = f(a + b) to four digits.

    So the identity, x + constant, x * v1, and x less any of its means are trivial.
    """
    first, second, zeros, both = _affine_probes()
    with np.errstate(all="ignore"):
        fa, fb, f0, fab = (evaluate_dual(graph, p)[0] for p in (first, second, zeros, both))
        error = np.sqrt(np.mean((fa + fb - f0 - fab) ** 2))
        return bool(error <= 1e-4 * np.sqrt(np.mean((fab - f0) ** 2)))


def normalizes(graph: LayerGraph) -> bool:
    """Whether the layer is an admissible one that normalises: it takes a statistic of x, and |f(1000 x)| < 20 |f(x)|.

    The statistic must survive simplification; the sizes are means over a batch with v0 and v1 from N(0, 1). An
    admissible layer is finite and varies over batch, channels and space.
    """
    if X not in graph.live or not any(node.aggregate for _, node in graph.live_nodes):
        return False
    graph = simplify(graph)
    if not any(node.aggregate and node.inputs[0] in graph.depends_on_x for _, node in graph.live_nodes):
        return False
    unit, large = _scale_probes()
    if _shape_reason(graph, unit) is not None:
        return False
    with np.errstate(all="ignore"):
        before, after = (float(np.abs(evaluate_dual(graph, p)[0]).mean()) for p in (unit, large))
    return after < 20 * before  # False for NaN and infinity


def sample_counts(
    space: LayerSpace,
    count: int,
    stages: Iterable[str] = ("static",),
    rng: np.random.Generator | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """What becomes of `count` random graphs: {"count", "passed", "rejected": {reason: how many}}.

    stages: of STAGES, in the order in which they are applied; `dedup` compares fingerprints. rng: default seed 0.
    Errors: UserError for an unknown stage or a count below one.
    """
    stages = list(stages)
    for stage in stages:
        if stage not in STAGES:
            raise UserError(stage, f"a stage of the funnel ({one_of(STAGES)})", nearest(stage, STAGES))
    if count < 1:
        raise UserError(count, "a positive number of graphs")
    rng = np.random.default_rng(0) if rng is None else rng
    seen: set[str] = set()
    rejected: Counter[str] = Counter()

    def duplicate(graph: LayerGraph) -> str | None:
        key = space.key(graph)
        if key in seen:
            return "duplicate"
        seen.add(key)
        return None

    operations = frozenset(space.ops)
    checks = {"static": lambda graph: static(graph, operations), "dedup": duplicate, "numeric": numeric}
    for done in range(count):
        graph = space.sample(rng)
        reason = next((r for stage in stages if (r := checks[stage](graph)) is not None), None)
        if reason is not None:
            rejected[reason] += 1
        if progress is not None and (done + 1) % 100 == 0:
            progress(done + 1, count)
    if progress is not None:
        progress(count, count)
    return {"count": count, "passed": count - rejected.total(), "rejected": dict(rejected.most_common())}


# -- how it is measured ------------------------------------------------------------------------------------------


def _shape_reason(graph: LayerGraph, probe: Probe) -> str | None:
    with np.errstate(all="ignore"):
        value, _ = evaluate_dual(graph, probe)
        if not np.isfinite(value).all():
            return "non_finite"
        tolerance = 1e-6 * np.abs(value).max()
        for dim in (2, 1, 0):
            if value.shape[dim] == 1 or np.ptp(value, axis=dim).max() <= tolerance:
                return "not_full_shape"
    return None


def _finite_and_slope(graph: LayerGraph, x: torch.Tensor, direction: torch.Tensor) -> tuple[bool, float]:
    """(whether the value and the gradients of x, v0 and v1 are finite, the largest gradient of x)."""
    x = x.detach().requires_grad_()
    v0, v1 = (torch.full((x.shape[1],), begin, requires_grad=True) for begin in (0.0, 1.0))
    value = evaluate(graph, x, {"v0": v0, "v1": v1})
    gradients: list[torch.Tensor] = []
    if value.requires_grad:
        found = torch.autograd.grad(value, (x, v0, v1), direction, allow_unused=True)
        gradients = [g for g in found if g is not None]
        slope = 0.0 if found[0] is None else float(found[0].abs().max())
    else:
        slope = 0.0
    return all(bool(torch.isfinite(t).all()) for t in (value, *gradients)), slope


@functools.cache
def _safety_inputs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(shape, 1.0) for shape in _SHAPES] + [(_SHAPES[0], scale) for scale in SCALES if scale != 1.0]
    return [
        (scale * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        for shape, scale in shapes
    ]


def _with_vectors(probe: Probe, rng: np.random.Generator) -> Probe:
    v0, v1 = rng.standard_normal((2, probe.x.shape[1])).astype(probe.x.dtype)
    return Probe(probe.x, v0, v1, probe.groups, probe.dx)


@functools.cache
def _image_probe() -> Probe:
    rng = np.random.default_rng(0)
    return _with_vectors(random_probe(rng, (8, 32, 36), groups=8, scale=1.5, offset=0.3, dtype=np.float32), rng)


@functools.cache
def _half_probe() -> Probe:
    return random_probe(np.random.default_rng(1), (4, 8, 25), groups=4, direction=True, dtype=np.float16)


@functools.cache
def _affine_probes() -> tuple[Probe, ...]:
    rng = np.random.default_rng(2)
    first = _with_vectors(random_probe(rng, (3, 6, 4), groups=2), rng)
    other = random_probe(rng, (3, 6, 4), groups=2, scale=2.0).x
    inputs = (first.x, other, np.zeros_like(other), first.x + other)
    return tuple(Probe(x, first.v0, first.v1, first.groups) for x in inputs)


@functools.cache
def _scale_probes() -> tuple[Probe, Probe]:
    rng = np.random.default_rng(3)
    unit = _with_vectors(random_probe(rng, (4, 8, 16), groups=2, scale=1.5, offset=0.3, dtype=np.float32), rng)
    return unit, Probe(1000 * unit.x, unit.v0, unit.v1, unit.groups)
