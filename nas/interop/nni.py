"""Search spaces to and from NNI 3.0 (extra `nni`), at the level of `nni.mutable` and `ModelSpace`; no NNI manager.

>>> space = from_nni(MyModelSpace())             # search it with any strategy, build its networks
>>> mutables = to_nni(load_space("nas-bench-201"))   # labelled choices for NNI; to_sample and from_sample convert
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import numbers
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.graph import OpGraph
from search_spaces.space import LayerFactory, SearchSpace, TupleSpace

if TYPE_CHECKING:
    from torch import nn

Places = tuple[int, ...]
SUBSETS = 4096  # a choice of several out of many is one category per subset, up to this many
SAMPLES, CHANGES = 10_000, 100  # draws until the constraints are kept: of whole architectures, of changes


@dataclass(frozen=True)
class Domain:
    """The values under one label. several: each value is a tuple, chosen together out of a list."""

    label: str
    values: tuple[Any, ...]
    weights: tuple[float, ...]
    several: bool = False

    def __post_init__(self) -> None:
        if not self.values:
            raise UserError(self.label, "a label with at least one value")
        if len(set(self.texts)) < len(self.texts):
            raise UserError(self.label, "a label whose values differ when written as JSON")

    @functools.cached_property
    def texts(self) -> tuple[str, ...]:
        """Each value as JSON."""
        return tuple(_json(value, self.label) for value in self.values)

    def value(self, index: int) -> Any:
        """The value as NNI wants it in a sample."""
        return list(self.values[index]) if self.several else self.values[index]

    def index(self, value: Any) -> int:
        """The index of `value`; the order of several does not matter. Errors: UserError naming label and value."""
        if self.several and isinstance(value, (list, tuple)):
            value = sorted(value, key=lambda v: self._order.get(_json(v, self.label), -1))
        text = _json(value, self.label)
        if text in self.texts:
            return self.texts.index(text)
        if isinstance(value, numbers.Real) and not isinstance(value, bool):  # 1 for 1.0: JavaScript knows one number
            for index, candidate in enumerate(self.values):
                if not isinstance(candidate, bool) and candidate == value:
                    return index
        raise UserError(text, f"a value of {self.label!r} ({one_of(self.texts)})", nearest(text, self.texts))

    @functools.cached_property
    def _order(self) -> dict[str, int]:
        longest_first = sorted(self.values, key=lambda subset: -len(subset)) if self.several else []
        singles = list(dict.fromkeys(_json(v, self.label) for v in itertools.chain.from_iterable(longest_first)))
        return {text: i for i, text in enumerate(singles)}


class NniSpace(SearchSpace[Places]):
    """Labelled choices of an NNI space; an architecture is one value index per label, labels sorted.

    The notation is a JSON object {label: value}. mutable: what `build` freezes and what judges constraints.
    """

    def __init__(
        self,
        domains: Sequence[Domain],
        mutable: Any = None,
        constraints: Sequence[str] = (),
        name: str = "nni",
        in_channels: int = 3,
        num_classes: int = 10,
    ):
        self.name = name
        self.domains = tuple(sorted(domains, key=lambda d: d.label))
        self.sizes = tuple(len(d.values) for d in self.domains)
        self.constraints = tuple(constraints)
        self.in_channels, self.num_classes = in_channels, num_classes
        self._mutable = mutable
        self.vocabulary = ("input", "output", *itertools.chain.from_iterable(map(_operations, self.domains)))

    def __reduce__(self):
        given = self.domains, self._mutable, self.constraints, self.name, self.in_channels, self.num_classes
        return type(self), given

    def __repr__(self) -> str:
        return f"NniSpace({self.name!r}, {len(self.domains)} labels)"

    def allows(self, arch: Places) -> bool:
        """Whether `arch` keeps the constraints of the NNI space."""
        return not self.constraints or self._mutable.contains(to_sample(self, arch))

    def sample(self, rng: np.random.Generator) -> Places:
        """Every label by NNI's weights (subsets uniformly), drawn again until the constraints are kept."""
        for _ in range(SAMPLES):
            arch = tuple(int(rng.choice(len(d.values), p=d.weights)) for d in self.domains)
            if self.allows(arch):
                return arch
        raise UserError(self.name, f"constraints that random samples can keep; none of {SAMPLES:,} did")

    def mutate(self, arch: Places, rng: np.random.Generator) -> Places:
        """Another value under one label, both uniform; where the constraints leave none, a random architecture."""
        open_places = [i for i, size in enumerate(self.sizes) if size > 1]
        if not open_places:
            raise UserError(self.name, "a space of more than one architecture")
        for _ in range(CHANGES):
            place = open_places[int(rng.integers(len(open_places)))]
            value = int(rng.integers(self.sizes[place] - 1))
            child = (*arch[:place], value + (value >= arch[place]), *arch[place + 1 :])
            if self.allows(child):
                return child
        return self.sample(rng)

    def crossover(self, first: Places, second: Places, rng: np.random.Generator) -> Places:
        """Every label from either parent with probability one half; where the constraints forbid it, a mutation."""
        for _ in range(CHANGES):
            pick = rng.random(len(first)) < 0.5
            child = tuple(a if p else b for a, b, p in zip(first, second, pick, strict=True))
            if self.allows(child):
                return child
        return self.mutate(first, rng)

    def neighbors(self, arch: Places) -> Iterator[Places]:
        """All architectures that differ under one label, in order."""
        for place, size in enumerate(self.sizes):
            for value in range(size):
                child = (*arch[:place], value, *arch[place + 1 :])
                if value != arch[place] and self.allows(child):
                    yield child

    def encode(self, arch: Places) -> str:
        """A JSON object {label: value}, labels sorted: `{"depth": 2, "op": "conv"}`."""
        pairs = (f"{_json(d.label, d.label)}: {d.texts[i]}" for d, i in zip(self.domains, arch, strict=True))
        return "{" + ", ".join(pairs) + "}"

    def decode(self, text: str) -> Places:
        """Inverse of `encode`. Errors: UserError naming the label or value that does not fit."""
        try:
            sample = json.loads(text, object_pairs_hook=_without_repeats)
        except json.JSONDecodeError:
            sample = None
        if not isinstance(sample, dict):
            raise UserError(text, "a JSON object {label: value}", self.encode((0,) * len(self.domains)))
        return from_sample(self, sample)

    def graph(self, arch: Places) -> OpGraph:
        """Flat: input, one node `label=value` per label, output; NNI does not say how the data flow."""
        ops = (_operations(domain)[index] for domain, index in zip(self.domains, arch, strict=True))
        return OpGraph(("input", *ops, "output"), _star(len(self.domains)))

    def graphs(self, archs: Sequence[Places]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As for every space; operation indices are int16 where the vocabulary is too long for int8."""
        n = len(self.domains)
        ops = np.ones((len(archs), n + 2), np.int8 if len(self.vocabulary) <= 128 else np.int16)
        ops[:, 0] = 0
        first = 2 + np.cumsum((0, *self.sizes[:-1]))
        ops[:, 1:-1] = np.asarray(archs, np.int64).reshape(len(archs), n) + first
        adjacency = np.broadcast_to(_star(n), (len(archs), n + 2, n + 2)).copy()
        return ops, adjacency, np.ones(ops.shape, bool)

    def build(
        self,
        arch: Places,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        norm: LayerFactory | None = None,
        act: LayerFactory | None = None,
        **scale: Any,
    ) -> nn.Module:
        """The network of `arch` as a plain module with fresh weights and NNI's names.

        The ModelSpace fixed its own scale when it was made: other numbers are refused with a UserError.
        """
        made_for = {"in_channels": self.in_channels, "num_classes": self.num_classes}
        given: dict[str, Any] = {"in_channels": in_channels, "num_classes": num_classes, **scale}
        given |= {name: factory for name, factory in (("norm", norm), ("act", act)) if factory is not None}
        for name, value in given.items():
            if name not in made_for:
                raise UserError(name, "an argument of the ModelSpace itself; make that one with it")
            if value != made_for[name]:
                raise UserError(value, f"{name}={made_for[name]}, which {self.name} was imported with")
        return _network(self._mutable, to_sample(self, arch), self.name)

    def __len__(self) -> int:
        total = math.prod(self.sizes)
        if self.constraints or total > sys.maxsize:
            raise UserError(self.name, "a space that can be counted: no constraints, no more than 2^63 architectures")
        return total

    def __iter__(self) -> Iterator[Places]:
        return filter(self.allows, itertools.product(*map(range, self.sizes)))


# -- from NNI ----------------------------------------------------------------------------------------------------


def from_nni(
    space: Any, *, name: str = "nni", in_channels: int = 3, num_classes: int = 10
) -> SearchSpace[tuple[int, ...]]:
    """An NNI ModelSpace (or any Mutable), or a dict of mutables or plain lists {label: values}, as a SearchSpace.

    name: of the space, for runs and messages. in_channels, num_classes: what the ModelSpace was made for.
    Errors: UserError for a Numerical (its label is named), a mutable without a label, more than 4,096 subsets.
    """
    if not isinstance(space, Mapping):
        mutables = _mutables()
        if not isinstance(space, mutables.Mutable):
            raise UserError(type(space).__name__, "an NNI ModelSpace or a dict {label: choices}")
        domains, constraints = _leaves(space)
        return NniSpace(domains, space, constraints, name, in_channels, num_classes)
    plain = [_domain(str(label), values) for label, values in space.items() if isinstance(values, (list, tuple))]
    rest = {label: values for label, values in space.items() if not isinstance(values, (list, tuple))}
    if not rest:
        return NniSpace(plain, None, (), name, in_channels, num_classes)
    mutables = _mutables()
    for label, value in rest.items():
        if not isinstance(value, mutables.Mutable):
            raise UserError(type(value).__name__, f"a list of choices or an NNI mutable under {label!r}")
    together = mutables.MutableDict(rest)
    domains, constraints = _leaves(together)
    repeated = {d.label for d in domains} & {d.label for d in plain}
    if repeated:
        raise UserError(min(repeated), "every label once")
    return NniSpace([*plain, *domains], together, constraints, name, in_channels, num_classes)


def _leaves(mutable: Any) -> tuple[list[Domain], list[str]]:
    """The domains and the labels of the constraints of a Mutable."""
    nni = _mutables()
    try:
        leaves = mutable.simplify()
    except ValueError as error:  # one label, two meanings
        raise UserError(type(mutable).__name__, f"an NNI space in which a label has one meaning ({error})") from None
    domains, constraints = [], []
    for label, leaf in leaves.items():
        if re.fullmatch(r"global(/\d+)+", label):
            raise UserError(label, f"a mutable with a label of its own: {type(leaf).__name__}(..., label='...')")
        if isinstance(leaf, nni.Categorical):
            domains.append(_domain(label, leaf.values, leaf.weights))
        elif isinstance(leaf, nni.CategoricalMultiple):
            domains.append(_subsets(label, leaf.values, leaf.n_chosen))
        elif isinstance(leaf, nni.MutableAnnotation):
            constraints.append(label)
        elif isinstance(leaf, nni.Numerical):
            raise UserError(label, "a label with a list of values; nni.Numerical is an interval, so list some of it")
        else:
            raise UserError(label, f"a Categorical or CategoricalMultiple, found {type(leaf).__name__}")
    return domains, constraints


def _domain(label: str, values: Sequence[Any], weights: Sequence[float] | None = None) -> Domain:
    for first, second in itertools.combinations(values, 2):
        if first == second:
            raise UserError(label, f"a label whose values differ, not {first!r} and {second!r}")
    share = np.asarray([1.0] * len(values) if weights is None else weights, float)
    return Domain(label, tuple(values), tuple((share / share.sum()).tolist()))


def _subsets(label: str, values: Sequence[Any], count: int | None) -> Domain:
    sizes = range(len(values) + 1) if count is None else (count,)
    total = sum(math.comb(len(values), size) for size in sizes)
    if total > SUBSETS:
        raise UserError(label, f"a choice with at most {SUBSETS:,} subsets, this one has {total:,}")
    subsets = tuple(itertools.chain.from_iterable(itertools.combinations(values, size) for size in sizes))
    return Domain(label, subsets, (1 / total,) * total, several=True)


def _network(mutable: Any, sample: dict[str, Any], name: str) -> nn.Module:
    from torch import nn

    if not isinstance(mutable, nn.Module):
        raise UserError(name, "a space imported from an NNI ModelSpace; this one holds choices and no network")
    model: Any = mutable
    if not hasattr(model, "trace_kwargs"):
        return copy.deepcopy(model.freeze(sample))
    # ModelSpace.freeze hands out the space's own submodules: two networks would share weights. Making the model
    # again under the sample is what NNI does on a worker, and initialises it as its author meant.
    from nni.nas.space import model_context

    model.validate(sample)
    with model_context(sample):
        return type(model)(*model.trace_args, **model.trace_kwargs)


# -- to NNI ------------------------------------------------------------------------------------------------------


def to_nni(space: SearchSpace) -> Any:
    """The MutableDict of labelled choices of a flat space (NAS-Bench-201, NATS size, Macro, an imported one).

    Labels are those of `space.choices()` where there are Choices. Errors: UserError for a space that is not flat.
    """
    nni = _mutables()
    if isinstance(space, NniSpace) and space._mutable is not None:
        return space._mutable
    return nni.MutableDict({d.label: nni.Categorical(list(d.values), label=d.label) for d, _ in _flat(space)})


def to_sample(space: SearchSpace, arch: tuple[int, ...]) -> dict[str, Any]:
    """`arch` as NNI's sample {label: value}; `to_nni(space).contains` accepts it."""
    return {
        domain.label: domain.value(entries.index(entry))
        for (domain, entries), entry in zip(_flat(space), arch, strict=True)
    }


def from_sample(space: SearchSpace, sample: Mapping[str, Any]) -> tuple[int, ...]:
    """The architecture that NNI's sample {label: value} means; entries of NNI's constraints are ignored.

    Errors: UserError naming the label that is missing, unknown or has a value that is not among its choices.
    """
    places = _flat(space)
    labels = [domain.label for domain, _ in places]
    constraints = space.constraints if isinstance(space, NniSpace) else ()
    for label in sample:
        if label not in labels and label not in constraints:
            raise UserError(label, f"a label of {space.name} ({one_of(labels)})", nearest(str(label), labels))
    for label in labels:
        if label not in sample:
            raise UserError(label, f"a value under every label of {space.name}; this one has none")
    arch = tuple(entries[domain.index(sample[domain.label])] for domain, entries in places)
    if isinstance(space, NniSpace) and not space.allows(arch):
        raise UserError(space.encode(arch), f"a sample that keeps the constraints {', '.join(constraints)}")
    return arch


@functools.lru_cache(maxsize=16)
def _flat(space: SearchSpace) -> tuple[tuple[Domain, Sequence[int]], ...]:
    """Per place of an architecture: its domain, and the architecture's entry for each value of it."""
    if isinstance(space, NniSpace):
        return tuple((domain, range(len(domain.values))) for domain in space.domains)
    if not isinstance(space, TupleSpace):
        raise UserError(space.name, "a flat space: one whose architectures are tuples of independent choices")
    first = space.from_code(0)
    variants = [tuple(a[place] for a in _variants(space, place)) for place in range(len(space.sizes))]
    try:
        labels = list(space.select(first))
    except UserError:  # a space without a network of Choices
        labels = []
    if len(labels) != len(space.sizes):
        labels = [f"layer_{place}" for place in range(len(space.sizes))]
    return tuple(
        (_domain(label, _values(space, place, entries)), entries)
        for place, (label, entries) in enumerate(zip(labels, variants, strict=True))
    )


def _variants(space: TupleSpace, place: int) -> list[tuple[int, ...]]:
    """Architecture 0 with every value at `place`, in order."""
    step = math.prod(space.sizes[place + 1 :])
    return [space.from_code(value * step) for value in range(space.sizes[place])]


def _values(space: TupleSpace, place: int, entries: tuple[int, ...]) -> tuple[Any, ...]:
    """Operation names where the space's graph has one node per place, else the entries; numbers stay numbers."""
    graphs = [space.graph(arch) for arch in _variants(space, place)]
    if len(graphs[0]) != len(space.sizes) + 2:
        return entries
    names = tuple(graph.ops[place + 1] for graph in graphs)
    return entries if names == tuple(map(str, entries)) or len(set(names)) < len(names) else names


# -- small things ------------------------------------------------------------------------------------------------


def _mutables() -> Any:
    try:
        import nni.mutable
        import nni.mutable.annotation
    except ImportError as error:
        raise UserError("nni", f"the package nni 3.0: pip install 'nasforge[nni]' ({error})") from None
    return nni.mutable


def _json(value: Any, label: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError):
        raise UserError(
            value, f"a value that JSON can write under {label!r}: text, number, true, false, list"
        ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    sample = dict(pairs)
    if len(sample) < len(pairs):
        labels = [label for label, _ in pairs]
        raise UserError(next(label for label in labels if labels.count(label) > 1), "every label once")
    return sample


def _operations(domain: Domain) -> tuple[str, ...]:
    bare = all(isinstance(value, str) for value in domain.values)
    return tuple(
        f"{domain.label}={value if bare else text}" for value, text in zip(domain.values, domain.texts, strict=True)
    )


def _star(count: int) -> np.ndarray:
    adjacency = np.zeros((count + 2, count + 2), bool)
    adjacency[0, 1:-1] = adjacency[1:-1, -1] = True
    adjacency[0, -1] = count == 0
    return adjacency
