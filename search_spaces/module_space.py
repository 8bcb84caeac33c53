"""ModuleSpace: a space made from any module in which some parts are a Choice."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from search_spaces.choice import Choice, find_choices, select
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.graph import OpGraph
from search_spaces.module_choices import READABLE, NamedChoice
from search_spaces.module_cost import module_cost
from search_spaces.space import LayerFactory, SearchSpace, TupleSpace

Factory = Callable[..., nn.Module]
Selected = tuple[int, ...]
SHAPE = {"in_channels": 3, "num_classes": 10}


class ModuleSpace(TupleSpace):
    """The modules that `make` gives, one candidate at each of their Choices.

    make: a function or a class of modules, best at the top of a file, so that runs find it again. It is called with
    `in_channels`, `num_classes` and further keywords, as far as its signature has them. Which Choices there are must
    not depend on these. path: `package.module:object`, by which `load_space` gives the space (default: make's own).

    An architecture is a tuple of indices, one for each label that leaves a choice, in the order in which the module
    has them. Text: `stem=conv3x3,act=relu`, with the candidates' names (NamedChoice), else their classes where these
    differ, else their indices. A Choice inside a candidate counts where that candidate is selected: elsewhere its
    index changes neither `key` nor `graph`, in which each label in force is a node of a chain.

    Errors: UserError where `make` gives no module, or one without a Choice to be made; where it fails; for a label
    whose Choices differ in their number of candidates or that cannot be written.
    """

    def __init__(self, make: Factory, path: str | None = None):
        if isinstance(make, nn.Module):
            raise UserError(
                path or type(make).__name__, "a class or a function that makes a new module, not one module"
            )
        if not callable(make):
            raise UserError(path or repr(make), "a class or a function that makes an nn.Module with Choices")
        self.make, self.path = make, path or _path(make)
        self.name = self.path
        self._outline = _outline(make, self.path)
        self.places = {place.label: place for place in self._outline if len(place.names) > 1}
        if not self.places:
            raise UserError(self.name, "a module with a Choice of two candidates or more")
        self.sizes = tuple(len(place.names) for place in self.places.values())  # type: ignore[misc]
        operations = [f"{place.label}={name}" for place in self.places.values() for name in place.names]
        self.vocabulary = ("input", "output", *operations)

    def __reduce__(self):
        return type(self), (self.make, self.path)

    def __repr__(self) -> str:
        return f"ModuleSpace({self.path})"

    # -- architectures -----------------------------------------------------------------------------------------

    def sample(self, rng: np.random.Generator) -> Selected:
        """Uniform over all tuples."""
        return tuple(int(rng.integers(size)) for size in self.sizes)

    def encode(self, arch: Selected) -> str:
        """`label=candidate` for every label, with commas between them."""
        return ",".join(
            f"{label}={place.names[i]}" for (label, place), i in zip(self.places.items(), arch, strict=True)
        )

    def decode(self, text: str) -> Selected:
        """Inverse of `encode`. Errors: UserError with the nearest candidate."""
        parts = text.strip().split(",")
        if [part.partition("=")[0] for part in parts] != list(self.places):
            raise UserError(text, f"a candidate for every label, such as '{self.encode((0,) * len(self.sizes))}'")
        arch = []
        for part, (label, place) in zip(parts, self.places.items(), strict=True):
            name = part.removeprefix(f"{label}=")
            if name not in place.names:
                raise UserError(part, f"for {label} {one_of(place.names)}", nearest(name, place.names))
            arch.append(place.names.index(name))
        return tuple(arch)

    def key(self, arch: Selected) -> str:
        """The text, with the first candidate at Choices that are not in force."""
        active = self._active(arch)
        return self.encode(tuple(index if label in active else 0 for label, index in zip(self.places, arch)))

    def graph(self, arch: Selected) -> OpGraph:
        """A chain of the candidates in force, `label=candidate`, in the order of the labels; `parts` are the labels."""
        active = self._active(arch)
        kept = [(label, i) for label, i in zip(self.places, arch) if label in active]
        ops = ("input", *(f"{label}={self.places[label].names[i]}" for label, i in kept), "output")
        labels = [label for label, _ in kept]
        return OpGraph(ops, np.eye(len(ops), k=1, dtype=bool), (labels[0], *labels, labels[-1]))

    def codes(self, archs: Sequence[Selected]) -> np.ndarray:
        """As in all spaces of tuples; of spaces too large for that, a number made from the text."""
        return super().codes(archs) if self._countable() else SearchSpace.codes(self, archs)

    def __len__(self) -> int:
        if not self._countable():
            raise UserError(self.name, "a space that can be enumerated; this one has too many architectures")
        return math.prod(self.sizes)

    def __iter__(self) -> Iterator[Selected]:
        len(self)
        return super().__iter__()

    def select(self, arch: Selected) -> dict[str, int]:
        """{label: candidate index}; labels with one candidate have 0."""
        return {place.label: 0 for place in self._outline} | dict(zip(self.places, arch, strict=True))

    # -- networks ----------------------------------------------------------------------------------------------

    def choices(
        self,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        norm: LayerFactory | None = None,
        act: LayerFactory | None = None,
        **scale: Any,
    ) -> nn.Module:
        """The module that `make` gives for those of the keywords which it takes.

        Errors: UserError for further keywords that it does not take, and where Choices are not as with the defaults.
        """
        layers = {name: given for name, given in (("norm", norm), ("act", act)) if given is not None}
        known = self.keywords()
        for name in (*layers, *scale):
            if name not in known and not takes_any(self.make):
                expected = f"a keyword of {self.name} ({one_of(known) if known else 'it has none'})"
                raise UserError(name, expected, nearest(name, known))
        shape = {"in_channels": in_channels, "num_classes": num_classes}
        module = _made(self.make, self.name, {**shape, **layers, **scale})
        found = _places(module, self.name)
        if [(p.label, len(p.names)) for p in found] != [(p.label, len(p.names)) for p in self._outline]:
            given = ", ".join(f"{name}={value!r}" for name, value in scale.items()) or "no keyword"
            raise UserError(given, f"keywords with which {self.name} has the same Choices as by default")
        return module

    def build(self, arch: Selected, **net: Any) -> nn.Module:
        """The module with the selected candidate in place of each Choice; takes what `choices` takes.

        Weights have the names of `selected_state_dict`; after the same torch seed they are those of `choices`.
        """
        module = self.choices(**net)
        select(module, self.select(arch))
        return without_choices(module)

    def cost(self, arch: Selected, *, input_size: int = 32, **net: Any) -> dict[str, int]:
        """Counted on one square image by `module_cost`; `in_channels` (3) should be those of the images.

        Errors: UserError for images that the module does not take.
        """
        with torch.random.fork_rng(devices=[]):
            module = self.build(arch, **net)
            image = torch.zeros(1, net.get("in_channels", SHAPE["in_channels"]), input_size, input_size)
            try:
                return module_cost(module, image)
            except (RuntimeError, ValueError, TypeError) as error:
                raise UserError(
                    "x".join(map(str, image.shape[1:])), f"images that the module takes ({_line(error)})"
                ) from None

    def keywords(self) -> list[str]:
        """The keywords that `make` names."""
        return list(_parameters(self.make))

    # -- pieces ------------------------------------------------------------------------------------------------

    def _active(self, arch: Selected) -> set[str]:
        selection = self.select(arch)

        def holds(way: Mapping[str, int]) -> bool:
            return all(selection[label] == index for label, index in way.items())

        return {place.label for place in self._outline if any(map(holds, place.ways))}

    def _countable(self) -> bool:
        return math.prod(self.sizes) <= sys.maxsize


@dataclass(frozen=True)
class Place:
    """A label. names: of its candidates. ways: for each of its Choices {label: index} of the candidates around it."""

    label: str
    names: tuple[str, ...]
    ways: tuple[Mapping[str, int], ...]


def without_choices(module: nn.Module) -> nn.Module:
    """The module, changed in place, with its selected candidate instead of every Choice."""
    for part in list(module.modules()):
        for name, child in part._modules.items():
            part._modules[name] = _selected(child)
    found = _selected(module)
    assert found is not None
    return found


def takes_any(make: Factory) -> bool:
    """Whether a factory takes keywords that it does not name."""
    return any(p.kind is p.VAR_KEYWORD for p in _parameters(make, everything=True).values())


def _selected(module: nn.Module | None) -> nn.Module | None:
    while isinstance(module, Choice):
        module = module.candidates[module.selected]
    return module


def _path(make: Factory) -> str:
    return f"{getattr(make, '__module__', '')}:{getattr(make, '__qualname__', type(make).__name__)}"


def _parameters(make: Factory, everything: bool = False) -> dict[str, inspect.Parameter]:
    try:
        found = dict(inspect.signature(make).parameters)
    except (TypeError, ValueError):
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in found.items() if everything or p.kind in named}


def _made(make: Factory, name: str, given: Mapping[str, Any]) -> nn.Module:
    known = _parameters(make)
    arguments = {key: value for key, value in given.items() if key in known or takes_any(make)}
    called = f"called with {', '.join(f'{k}={v!r}' for k, v in arguments.items()) or 'no keyword'}"
    try:
        module = make(**arguments)
    except UserError:
        raise
    except Exception as error:  # whatever a user's code says
        expected = f"a class or a function that makes an nn.Module; {called} it failed"
        raise UserError(name, f"{expected} ({type(error).__name__}: {_line(error)})") from error
    if not isinstance(module, nn.Module):
        raise UserError(
            name, f"a class or a function that makes an nn.Module; {called} it gave a {type(module).__name__}"
        )
    return module


@functools.lru_cache(maxsize=32)
def _outline(make: Factory, name: str) -> tuple[Place, ...]:
    """The labels of the module that the factory makes by default."""
    with torch.random.fork_rng(devices=[]):
        return _places(_made(make, name, SHAPE), name)


def _places(module: nn.Module, name: str) -> tuple[Place, ...]:
    found = find_choices(module)
    if not found:
        raise UserError(name, "a module with a Choice in it; this one has none")
    ways: dict[str, list[dict[str, int]]] = {label: [] for label in found}
    _visit(module, {}, ways)
    for label in found:
        if not READABLE.fullmatch(label):
            raise UserError(label, "a label for a Choice, without blank, comma, equals sign and #")
    return tuple(Place(label, _names(choices), tuple(ways[label])) for label, choices in found.items())


def _visit(module: nn.Module, way: dict[str, int], ways: dict[str, list[dict[str, int]]]) -> None:
    if isinstance(module, Choice):
        ways[module.label].append(way)
        for index, candidate in enumerate(module.candidates):
            if way.get(module.label, index) == index:  # a label inside itself cannot have two values
                _visit(candidate, {**way, module.label: index}, ways)
        return
    for child in module.children():
        _visit(child, way, ways)


def _names(choices: Sequence[Choice]) -> tuple[str, ...]:
    """Names of the candidates of a label: their own or their classes where all places agree, else their indices."""
    of_places = [
        choice.names if isinstance(choice, NamedChoice) else tuple(type(c).__name__ for c in choice.candidates)
        for choice in choices
    ]
    counts = Counter(of_places[0])
    return tuple(
        name if counts[name] == 1 and all(names[i] == name for names in of_places) else str(i)
        for i, name in enumerate(of_places[0])
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
