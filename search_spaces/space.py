"""SearchSpace: what every space offers, and the tuple spaces that most tables use."""

from __future__ import annotations

import abc
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np

from search_spaces.common.errors import UserError
from search_spaces.graph import OpGraph, stack_graphs

if TYPE_CHECKING:
    from torch import nn

A = TypeVar("A")
LayerFactory = Callable[[int], "nn.Module"]  # channels -> module, for `norm=` and `act=`


class SearchSpace(abc.ABC, Generic[A]):
    """A set of architectures; A is a small immutable, hashable value. Spaces hold no mutable state but caches.

    A space of one's own needs `name`, `vocabulary`, `sample`, `mutate`, `encode`, `decode` and `graph`;
    `neighbors`, `crossover`, `build`, `choices`, `cost`, `__len__` and `__iter__` where something asks for them.
    """

    name: str
    vocabulary: tuple[str, ...]  # operation names, `input` and `output` first

    @abc.abstractmethod
    def sample(self, rng: np.random.Generator) -> A:
        """A random architecture."""

    @abc.abstractmethod
    def mutate(self, arch: A, rng: np.random.Generator) -> A:
        """A copy with one random change."""

    @abc.abstractmethod
    def encode(self, arch: A) -> str:
        """The public notation; `decode` inverts it exactly."""

    @abc.abstractmethod
    def decode(self, text: str) -> A:
        """The architecture that `text` spells. Errors: UserError on anything else."""

    @abc.abstractmethod
    def graph(self, arch: A) -> OpGraph:
        """The architecture as an OpGraph over `vocabulary`."""

    def crossover(self, first: A, second: A, rng: np.random.Generator) -> A:
        """A child of two architectures."""
        raise UserError(self.name, "a space with a crossover; this one defines none")

    def neighbors(self, arch: A) -> Iterator[A]:
        """All architectures one change away."""
        raise UserError(self.name, "a space with neighbours; this one defines none")

    def readable(self, arch: A) -> str:
        """One line for people, where the notation is made for machines."""
        return self.encode(arch)

    def key(self, arch: A) -> str:
        """The published identity of `arch`: equal keys count as one architecture."""
        return self.encode(arch)

    def function_key(self, arch: A) -> str:
        """Equal only if both architectures compute the same function of their weights."""
        return self.key(arch)

    def codes(self, archs: Sequence[A]) -> np.ndarray:
        """int64 [N]: the integer under which a table files each architecture."""
        return np.fromiter((_digest(self.encode(a)) for a in archs), np.int64, len(archs))

    def graphs(self, archs: Sequence[A]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ops int8 [N, n] as indices into `vocabulary`, adjacency bool [N, n, n], mask bool [N, n])."""
        return stack_graphs([self.graph(a) for a in archs], self.vocabulary)

    def cost(self, arch: A, **net: Any) -> dict[str, int]:
        """`params`, `macs`, `live_macs`, `depth`, `paths` of the network that `build(arch, **net)` makes."""
        raise UserError(self.name, "a space that states its costs; this one defines none")

    def build(
        self,
        arch: A,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        norm: LayerFactory | None = None,
        act: LayerFactory | None = None,
        **scale: Any,
    ) -> nn.Module:
        """The network of the space's paper around `arch`."""
        raise UserError(self.name, "a space whose architectures can be built; this one defines no network")

    def choices(self, *, in_channels: int = 3, num_classes: int = 10, **scale: Any) -> nn.Module:
        """One network with a Choice at every searchable place."""
        raise UserError(self.name, "a space with a network of choices; this one defines none")

    def select(self, arch: A) -> dict[str, int]:
        """The candidate index of every Choice label that turns `choices()` into `build(arch)`."""
        raise UserError(self.name, "a space with a network of choices; this one defines none")

    def __len__(self) -> int:
        raise UserError(self.name, "a space that can be enumerated")

    def __iter__(self) -> Iterator[A]:
        raise UserError(self.name, "a space that can be enumerated")

    def __reduce__(self):
        return type(self), ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class TupleSpace(SearchSpace[tuple[int, ...]]):
    """A space whose architectures are tuples of small integers, position i below `sizes[i]`."""

    sizes: ClassVar[tuple[int, ...]]

    def sample(self, rng: np.random.Generator) -> tuple[int, ...]:
        """Uniform over all tuples."""
        return self.from_code(int(rng.integers(len(self))))

    def mutate(self, arch: tuple[int, ...], rng: np.random.Generator) -> tuple[int, ...]:
        """Another value at one position, both uniform."""
        position = int(rng.integers(len(self.sizes)))
        value = int(rng.integers(self.sizes[position] - 1))
        value += value >= arch[position]
        return (*arch[:position], value, *arch[position + 1 :])

    def crossover(self, first: tuple[int, ...], second: tuple[int, ...], rng: np.random.Generator) -> tuple[int, ...]:
        """Uniform crossover: every position from either parent with probability one half."""
        pick = rng.random(len(first)) < 0.5
        return tuple(a if p else b for a, b, p in zip(first, second, pick, strict=True))

    def neighbors(self, arch: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """All tuples that differ in one position, in order."""
        for position, size in enumerate(self.sizes):
            for value in range(size):
                if value != arch[position]:
                    yield (*arch[:position], value, *arch[position + 1 :])

    def codes(self, archs: Sequence[tuple[int, ...]]) -> np.ndarray:
        """Mixed radix, first position most significant: the rank in iteration order."""
        flat = np.fromiter(itertools.chain.from_iterable(archs), np.int64, len(archs) * len(self.sizes))
        return flat.reshape(-1, len(self.sizes)) @ self._radix()

    def from_code(self, code: int) -> tuple[int, ...]:
        """The tuple of rank `code` in iteration order."""
        values = []
        for size in reversed(self.sizes):
            code, value = divmod(code, size)
            values.append(value)
        return tuple(reversed(values))

    def _radix(self) -> np.ndarray:
        return np.cumprod((1, *self.sizes[:0:-1]))[::-1].astype(np.int64)

    def __len__(self) -> int:
        return math.prod(self.sizes)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*(range(size) for size in self.sizes))


def places(space: TupleSpace) -> list[dict[str, list[int]]]:
    """Per position of an architecture {label of a Choice: candidate index of every value}.

    Errors: UserError where a label depends on several positions, or the space has no choices.
    """
    base = (0,) * len(space.sizes)
    found: list[dict[str, list[int]]] = []
    for position, size in enumerate(space.sizes):
        options = [space.select((*base[:position], v, *base[position + 1 :])) for v in range(size)]
        labels = [label for label in options[0] if len({option[label] for option in options}) > 1]
        found.append({label: [option[label] for option in options] for label in labels})
    every = [label for labels in found for label in labels]
    if len(set(every)) < len(every) or not all(found):
        raise UserError(space.name, "a space with choices of its own for each position of an architecture")
    return found


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
