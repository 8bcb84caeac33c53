"""Among the paths of a trained supernet: how good each is with the weights they share, and evolution over them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from nas.supernet.network import Supernet
from nas.supernet.settings import Evolution
from nas.training.batches import evaluation_batches
from nas.training.data import Dataset, Split
from nas.training.loop import evaluate
from nas.training.recalibrate import recalibrate
from search_spaces.common.errors import UserError
from search_spaces.space import SearchSpace, TupleSpace

RECALIBRATION = (10, 200)  # batches, images in each: as the accuracy of what a search has found is measured
ATTEMPTS = 100  # draws for one architecture that is new and within the bounds

Score = Callable[[Any], float]


@contextlib.contextmanager
def selected(supernet: Supernet, selection: Mapping[str, int]) -> Iterator[None]:
    """The supernet with `selection` fixed for the length of a block; fixed labels and all buffers are put back."""
    before = {name: value.clone() for name, value in supernet.network.named_buffers()}
    fixed = {label: supernet._mixed[label][0].selected for label in supernet.fixed}
    free = [label for label in supernet.labels if label not in supernet.fixed]
    try:
        supernet.select(selection)
        yield
    finally:
        supernet.release(free)
        supernet.select(fixed)
        for name, buffer in supernet.network.named_buffers():
            buffer.copy_(before[name])


def path_accuracy(
    supernet: Supernet,
    selection: Mapping[str, int],
    data: Dataset,
    *,
    recalibration: tuple[int, int] = RECALIBRATION,
    evaluation: tuple[int, int] | None = None,
) -> dict[str, float]:
    """`acc` (percent), `loss` and `count` on `data.val` of the network that `selection` takes out of the supernet.

    BatchNorm's statistics are first those of the first `recalibration` = (batches, images in each) of `data.train`, on
    which the weights were trained; evaluation: (batches, images in each) of `data.val`, None for all. The supernet is
    as before afterwards, selected labels and statistics too. Images are normalised anew each time, which is 2 % of the
    time on a CPU (8 channels, 4,500 images of 16 x 16).
    """
    with selected(supernet, selection):
        recalibrate(supernet, first_images(data, data.train, *recalibration))
        return evaluate(supernet, first_images(data, data.val, *(evaluation or (None, 500))))


def evolve(
    space: SearchSpace,
    score: Score,
    settings: Evolution,
    rng: np.random.Generator,
    *,
    macs: Callable[[Any], int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[Any, float]]:
    """All (architecture, score) that were scored, the best first; among equals the earlier.

    macs: the multiply-adds that `max_macs` bounds. A space with fewer architectures than asked for gives what is
    there. Source: Guo et al., Single Path One-Shot, ECCV 2020, algorithm 1. Errors: UserError where no architecture
    keeps the bound.
    """
    known: dict[Any, float] = {}

    def allowed(arch: Any) -> bool:
        bound = settings.max_macs
        return arch not in known and (bound is None or macs is None or macs(arch) <= bound)

    def ranked() -> list[tuple[Any, float]]:
        return sorted(known.items(), key=lambda item: -item[1])

    for _ in range(settings.generations):
        parents = [arch for arch, _ in ranked()[: settings.parents]]
        plan = [_random] * settings.population
        if parents:
            plan[: settings.crossover + settings.mutation] = [_child] * settings.crossover + [
                _mutant
            ] * settings.mutation
        found = 0
        for make in plan:
            for attempt in range(2 * ATTEMPTS):
                # Children of parents that are much alike may all be known: then random ones fill up.
                arch = (make if attempt < ATTEMPTS else _random)(space, parents, settings, rng)
                if allowed(arch):
                    known[arch] = score(arch)
                    found += 1
                    break
            if progress is not None:
                progress(len(known), settings.generations * settings.population)
        if not found:
            break
    if not known:
        raise UserError(settings.max_macs, f"a max_macs that some architecture of {space.name} keeps")
    return ranked()


def _random(space: SearchSpace, parents: list[Any], settings: Evolution, rng: np.random.Generator) -> Any:
    return space.sample(rng)


def _child(space: SearchSpace, parents: list[Any], settings: Evolution, rng: np.random.Generator) -> Any:
    first, second = (parents[int(rng.integers(len(parents)))] for _ in range(2))
    return space.crossover(first, second, rng)


def _mutant(space: SearchSpace, parents: list[Any], settings: Evolution, rng: np.random.Generator) -> Any:
    parent = parents[int(rng.integers(len(parents)))]
    if not isinstance(space, TupleSpace):
        return space.mutate(parent, rng)
    redrawn = rng.random(len(parent)) < settings.mutation_probability
    return tuple(int(rng.integers(size)) if new else old for new, old, size in zip(redrawn, parent, space.sizes))


def first_images(data: Dataset, split: Split, count: int | None, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised (images, labels) of the first `count` batches of `size`; None for all of them."""
    stop = len(split) if count is None else min(count * size, len(split))
    return evaluation_batches(split.images[:stop], split.labels[:stop], size, normalize=data.normalize)
