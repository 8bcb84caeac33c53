"""Layers for the tests of kernels: random graphs, shapes, inputs, and what torch's autograd says about them in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kernels.autodiff import differentiate
from kernels.lower import lower
from kernels.reference import execute, from_program, to_program
from search_spaces.layers.evaluate import channel_dim, evaluate
from search_spaces.layers.graph import LayerGraph
from search_spaces.layers.simplify import simplify
from search_spaces.layers.space import LayerSpace

IMAGES = ((2, 8, 3, 2), (1, 6, 2, 2), (3, 10, 1, 1), (2, 12, 5), (4, 7), (1, 5, 1), (2, 1, 4))
TOKENS = ((2, 5, 8), (1, 1, 12), (3, 4, 1), (3, 1, 6))
GROUPS = (1, 2, 3, 4, 32)


@dataclass(frozen=True)
class Case:
    """A graph on a batch: x and dy of the layer's shape, channel vectors, running moments by node id in evaluation."""

    graph: LayerGraph
    layout: str
    x: Tensor
    dy: Tensor
    params: dict[str, Tensor]
    stats: dict[int, Tensor] | None


def make_case(graph: LayerGraph, shape: tuple[int, ...], *, layout: str, training: bool, seed: int) -> Case:
    """Random tensors for a graph; every third seed has integers in x, so that ties, kinks and zeros are met."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    x = normal(*shape) * 1.5 + 0.3
    channels = shape[channel_dim(len(shape), layout)]
    lowered = lower(graph, layout=layout, training=training, mixed=True)
    params = {name: normal(channels) for name in lowered.parameters}
    stats = None if training else {s.id: normal(channels).abs() + 0.5 for s in lowered.statistics}
    return Case(graph, layout, x.round() if seed % 3 == 0 else x, normal(*shape), params, stats)


def random_cases(preset: str, count: int, seed: int, **settings) -> Iterator[Case]:
    """Random graphs of a preset, on shapes and numbers of groups that take turns."""
    rng = np.random.default_rng(seed)
    layout = "tokens" if preset == "tokens" else "channels-first"
    shapes = TOKENS if layout == "tokens" else IMAGES
    for made in range(count):
        graph = LayerSpace(preset, groups=GROUPS[made % len(GROUPS)], **settings).sample(rng)
        shape = shapes[made % len(shapes)]
        yield make_case(graph, shape, layout=layout, training=made % 4 > 0, seed=1000 * seed + made)


def expected(case: Case) -> dict[str, Tensor]:
    """y, and dx and d<parameter>, by `evaluate` and torch's autograd."""
    x = case.x.clone().requires_grad_()
    params = {name: value.clone().requires_grad_() for name, value in case.params.items()}
    y = evaluate(case.graph, x, params, case.stats, layout=case.layout)
    inputs = [x, *params.values()]
    if y.requires_grad:
        found = torch.autograd.grad(y, inputs, case.dy, allow_unused=True, materialize_grads=True)
    else:
        found = tuple(torch.zeros_like(i) for i in inputs)
    return {"y": y.detach(), "dx": found[0]} | {f"d{name}": g for name, g in zip(params, found[1:], strict=True)}


def by_programs(case: Case) -> dict[str, Tensor]:
    """The same by the lowered program, its derivative and the reference executor."""
    lowered = lower(case.graph, layout=case.layout, training=case.stats is None, mixed=True)
    derivative = differentiate(lowered.program, ("x", *lowered.parameters))
    inputs = {"x": to_program(case.x, case.layout, lowered.flat), **case.params}
    inputs |= {s.name: case.stats[s.id] for s in lowered.statistics if case.stats is not None}
    groups = case.graph.group_count(case.x.shape[channel_dim(case.x.ndim, case.layout)])
    forward = execute(derivative.forward, inputs, groups=groups)
    dy = to_program(case.dy, case.layout, lowered.flat)
    found = {"y": forward["y"]} | execute(derivative.backward, {**inputs, **forward, "dy": dy}, groups=groups)
    for name in ("y", "dx"):
        found[name] = from_program(found[name], case.x.shape, case.layout, lowered.flat)
    return found


def check(case: Case, rounding: float = 1e-12) -> None:
    """y agrees to `rounding` and gradients to 1e-9 of their norm, but for what is zero, 1e-11 of the largest one."""
    wanted, found = expected(case), by_programs(case)
    assert found.keys() == wanted.keys()
    if case.stats is None and found["y"].isfinite().all() and not wanted["y"].isfinite().all():
        # Of one infinite number alone, torch's deviation is NaN; programs and `simplify` know that there is no spread.
        wanted = expected(replace(case, graph=simplify(case.graph)))
    largest = max(1.0, *(float(w[w.isfinite()].norm()) for name, w in wanted.items() if name != "y"))
    for name, want in wanted.items():
        finite = want.isfinite()
        assert found[name].shape == want.shape
        assert torch.equal(found[name].isfinite(), finite), (name, case.graph)
        error, size = ((t[finite]).norm() for t in (found[name] - want, want))
        tolerance = rounding * size if name == "y" else 1e-9 * size + 1e-11 * largest
        assert error <= tolerance + 1e-300, (name, float(error), float(size), case.graph)
