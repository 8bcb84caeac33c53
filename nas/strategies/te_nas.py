"""TE-NAS: pruning the network of all choices by its neural tangent kernel and its linear regions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

import zero_cost
from nas.objectives import Objective
from nas.strategies.strategy import Strategy, positive
from search_spaces.choice import Choice
from search_spaces.common.errors import UserError
from search_spaces.registry import space_text
from search_spaces.space import SearchSpace, TupleSpace, places
from zero_cost.correlation import average_ranks
from zero_cost.watch import Watch, argument, is_relu

A = TypeVar("A")
Kept = tuple[tuple[int, ...], ...]  # per position of an architecture the values that are left
Scores = Callable[[Sequence[Kept]], Any]  # -> [N, M], of each mixed network, higher is better
MOST_SEED = 2**31


class TeNas(Strategy[A]):
    """Pruning without training (Chen et al., TE-NAS, ICLR 2021, algorithm 1): from the network that adds up all
    operations at every place, each round takes away one at each place, until one is left.

    An operation's removal ranks by the condition number of the neural tangent kernel of what remains (lower is better)
    and by its number of linear regions (higher is better); the operation goes whose removal has the best sum of ranks.

    scoring: settings of `ScoringTask` for the kernel (`data`, `batch_size`, `few` images that it reads, `network`).
    regions (5,000), region_size (3), thin ({"channels": 1}): linear regions are counted among so many inputs ~ N(0, 1)
    of one channel and so many pixels a side, on a thin network, since a wide one tells all inputs apart.
    repeats (3): initialisations over which both are averaged. scores: a function of one's own instead of all this,
    [what is kept at every position] -> [N, M].

    The first trial is the architecture found; the paper ends there. Further trials are mutations of the best so far.
    Spaces: those whose architectures are tuples of choices. It never waits. Errors: UserError.
    """

    name = "te-nas"

    def __init__(
        self,
        space: SearchSpace[A],
        objectives: Sequence[Objective],
        rng: np.random.Generator,
        *,
        scoring: Mapping[str, Any] | None = None,
        regions: int = 5000,
        region_size: int = 3,
        thin: Mapping[str, Any] | None = None,
        repeats: int = 3,
        scores: Scores | None = None,
    ):
        super().__init__(space, objectives, rng)
        if not isinstance(space, TupleSpace):
            raise UserError(space.name, "a space whose architectures are tuples of choices", "nas-bench-201")
        positive("regions", regions, 2)
        positive("region_size", region_size)
        seeds = [int(seed) for seed in rng.integers(MOST_SEED, size=positive("repeats", repeats))]
        self._scores = scores
        if scores is None:
            self._scores = _MixedNetworks(space, seeds, scoring or {}, int(regions), int(region_size), thin)
        self._pruned: A | None = None

    def _propose(self) -> tuple[A, int | None, int | None]:
        if self._pruned is None:
            assert isinstance(self.space, TupleSpace)
            assert self._scores is not None
            self._pruned = prune(self.space.sizes, self._scores)  # type: ignore[assignment]
            self._scores = None  # the networks are not needed again
            self._take(self._pruned)  # type: ignore[arg-type]
            return self._pruned, None, None  # type: ignore[return-value]
        told = [id for id, metrics in self.metrics.items() if metrics is not None]
        best = max(told, key=lambda id: (self.score(id), -id), default=None)
        start = self._pruned if best is None else self.trials[best].arch
        return self._unseen(lambda: self.space.mutate(start, self.rng)), None, best


def prune(sizes: Sequence[int], scores: Scores) -> tuple[int, ...]:
    """What is left of `sizes[p]` values at every position p when one at each is taken away round after round.

    The value goes without which what remains has the highest sum of ranks, among all removals of the round; ties are
    broken by order.
    """
    kept: Kept = tuple(tuple(range(size)) for size in sizes)
    while any(len(values) > 1 for values in kept):
        removals = [(p, v) for p, values in enumerate(kept) if len(values) > 1 for v in values]
        rest = [_without(kept, p, v) for p, v in removals]
        found = np.asarray(scores(rest), float).reshape(len(removals), -1)
        worth = np.sum([average_ranks(column) for column in found.T], axis=0)
        best: dict[int, int] = {}
        for k, (p, _) in enumerate(removals):
            if p not in best or worth[k] > worth[best[p]]:
                best[p] = k
        for k in best.values():
            kept = _without(kept, *removals[k])
    return tuple(values[0] for values in kept)


def _without(kept: Kept, position: int, value: int) -> Kept:
    return tuple(tuple(v for v in values if (p, v) != (position, value)) for p, values in enumerate(kept))


class Mixed(nn.Module):
    """The sum of the candidates of a Choice that are kept."""

    def __init__(self, choice: Choice):
        super().__init__()
        self.candidates, self.label = choice.candidates, choice.label
        self.kept: Sequence[int] = range(len(choice.candidates))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return functools.reduce(torch.add, [self.candidates[k](*inputs) for k in self.kept])


def mixed(network: nn.Module) -> dict[str, list[Mixed]]:
    """Put a Mixed in place of every Choice; {label: them}."""
    found: dict[str, list[Mixed]] = {}
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Choice):
                setattr(module, name, Mixed(child))
                found.setdefault(child.label, []).append(getattr(module, name))
    return found


class _MixedNetworks:
    """(-condition number of the kernel, linear regions), averaged over initialisations, of mixed networks."""

    def __init__(
        self,
        space: TupleSpace,
        seeds: Sequence[int],
        scoring: Mapping[str, Any],
        regions: int,
        size: int,
        thin: Mapping[str, Any] | None,
    ):
        from nas.scoring import ScoringTask

        try:
            task = ScoringTask(space_text(space), **scoring)
        except TypeError:
            raise UserError(list(scoring), "settings of ScoringTask, such as data and batch_size") from None
        narrow = {**task.network, **({"channels": 1} if thin is None else thin)}
        data = task.opened()
        self.places, self.device, self.few = places(space), task.device, task.few
        self.initial = []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(seed)
                wide = space.choices(in_channels=data.shape[0], num_classes=data.num_classes, **task.network)
                slim = space.choices(in_channels=1, num_classes=data.num_classes, **narrow).to(task.device)
                noise = torch.randn(regions, 1, size, size).to(task.device)
            images = task.batch(seed)[0][0][: task.few]
            self.initial.append((wide, images, slim, noise, [mixed(wide), mixed(slim)]))

    def __call__(self, rest: Sequence[Kept]) -> np.ndarray:
        """[N, 2]; NaN where a mixed network has no value."""
        return np.array([np.mean([self._both(kept, *given) for given in self.initial], axis=0) for kept in rest])

    def _both(self, kept: Kept, wide: nn.Module, images: Any, slim: nn.Module, noise: Any, mixes: Any) -> list[float]:
        for found in mixes:
            for position, values in enumerate(kept):
                for label, indices in self.places[position].items():
                    for mix in found[label]:
                        mix.kept = [indices[v] for v in values]
        kernel = zero_cost.score(wide, images, "ntk-condition", device=self.device, few=self.few)
        return [kernel["ntk-condition"], float(linear_regions(slim, noise))]


def linear_regions(network: nn.Module, inputs: torch.Tensor) -> int:
    """How many different codes of ReLU signs the inputs have.

    As the proxy `linear-regions`, which compares every two inputs, but by a hash of each code, for thousands of inputs.
    """
    generator = torch.Generator().manual_seed(0)
    codes = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)

    def handle(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_relu(func, args, kwargs):
            signs = argument("input", 0, args, kwargs).flatten(1) > 0
            factors = torch.randint(-(2**62), 2**62, (signs.shape[1],), generator=generator).to(codes.device)
            codes.add_(torch.where(signs, factors, 0).sum(1))  # modulo 2^64
        return func(*args, **kwargs)

    with torch.no_grad(), Watch(handle):
        network.train()(inputs)
    return len(codes.unique())
