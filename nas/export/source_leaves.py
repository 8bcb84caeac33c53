"""How modules without structure of ours are written: torch's own by their constructor calls, our primitives by a copy
of their class, GraphLayers by the source of their graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from nas.export.source_copy import Copies
from nas.export.source_layout import Call, Code
from search_spaces.common.errors import UserError
from search_spaces.layers.catalog import layer, names
from search_spaces.layers.graph import LayerGraph
from search_spaces.layers.module import GraphLayer
from search_spaces.layers.source import layer_part

NOT_WRITTEN = ("device", "dtype")
PLAIN = (bool, int, float, str, tuple, type(None))
COUNTS = ("channels", "num_channels", "num_features", "features", "num_parameters", "dim")  # names for a channel count
LARGEST_DIVISOR = '''
def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is not above `limit`."""
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)
'''


def unknown_module(module: nn.Module) -> UserError:
    """What is said of a module that cannot be written."""
    return UserError(
        f"{type(module).__module__}.{type(module).__qualname__}",
        "a network of torch.nn modules, graph layers and the toolkit's own blocks to write as Python; "
        "`--to model.pt2` or `--to model.onnx` can take any network",
    )


@dataclass
class Leaves:
    """The definitions that leaves need, as they are met, under other names than `reserved`; text by name."""

    reserved: set[str]
    functions: dict[str, str] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    copies: Copies = field(init=False)
    _layers: dict[tuple, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.copies = Copies(self.reserved)

    def write(self, module: nn.Module, channels: int | None = None) -> Call:
        """The call that makes `module`, numbers as they are; what it calls is defined. channels: what its factory got.

        Errors: UserError for a module that is none of torch, of `search_spaces.primitives` and no GraphLayer.
        """
        kind = type(module)
        if isinstance(module, GraphLayer) and kind is GraphLayer:
            return Call(self._layer(module), (("", module.channels),))
        if isinstance(module, nn.Sequential) and kind is nn.Sequential:
            parts = list(module)
            while len(parts) > 1 and type(parts[-1]) is nn.Identity:  # others keep their place in the state's names
                parts.pop()
            return Call("nn.Sequential", tuple(("", self.write(part, channels)) for part in parts))
        if getattr(nn, kind.__name__, None) is kind:
            return Call(f"nn.{kind.__name__}", _arguments(module, channels))
        if kind.__module__.startswith("search_spaces.primitives"):
            given = _arguments(module, channels)
            arguments = [(n, self.write(v, channels) if isinstance(v, nn.Module) else v) for n, v in given]
            return Call(self.copies.add(kind), tuple(arguments))
        raise unknown_module(module)

    def _layer(self, module: GraphLayer) -> str:
        """The name of the class of a graph layer."""
        if module.layout != "channels-first":
            raise UserError(module.layout, "a graph layer of layout channels-first inside a network")
        settings = module.track_running_stats, module.zero_init_gamma
        key = (module.graph, *settings)
        if key not in self._layers:
            name = base = _layer_name(module.graph)
            while name in self._layers.values() or name in self.reserved:
                name = f"{base}{2 + sum(known.startswith(base) for known in self._layers.values())}"
            part = layer_part(module.graph, name, track_running_stats=settings[0], zero_init_gamma=settings[1])
            self.functions |= part.helpers
            self.classes[name] = "\n".join(part.lines)
            self._layers[key] = name
        return self._layers[key]

    def over_channels(self, sites: Iterable[tuple[int, Call]], channels: str) -> Call:
        """One call in terms of the variable `channels`, for what a factory gave at several channel counts."""
        listed = list(sites)
        return self._unify([count for count, _ in listed], [found for _, found in listed], channels)

    def _unify(self, counts: list[int], calls: list[Call], channels: str) -> Call:
        arguments: list[tuple[str, object]] = []
        for (name, first), *others in zip(*(found.arguments for found in calls), strict=True):
            values = [first, *(value for _, value in others)]
            if isinstance(first, Call):
                arguments.append((name, self._unify(counts, values, channels)))  # type: ignore[arg-type]
            else:
                arguments.append((name, self._in_terms(counts, values, channels)))
        return replace(calls[0], arguments=tuple(arguments))

    def _in_terms(self, counts: list[int], values: list[Any], channels: str) -> object:
        pairs = sorted(set(zip(counts, values, strict=True)))
        if isinstance(values[0], int) and not isinstance(values[0], bool):
            if all(value == count for count, value in pairs):
                return Code(channels)
            if len({value for _, value in pairs}) == 1:
                return values[0]
            if all(value * (pairs[0][0] // pairs[0][1]) == count for count, value in pairs if pairs[0][1]):
                return Code(f"{channels} // {pairs[0][0] // pairs[0][1]}")
            for limit in (32, max(value for _, value in pairs)):
                if all(value == _divisor(count, limit) for count, value in pairs):
                    self.functions["largest_divisor"] = LARGEST_DIVISOR
                    return Code(f"largest_divisor({channels}, {limit})")
        if len(set(values)) == 1:
            return values[0]
        table = ", ".join(f"{count}: {value!r}" for count, value in pairs)
        return Code(f"{{{table}}}[{channels}]")


def family(found: Call) -> tuple:
    """What a call has in common with those of the same factory at other channel counts: all but whole numbers."""
    parts = [(name, family(v) if isinstance(v, Call) else _kind(v)) for name, v in found.arguments]
    return (found.head, *parts)


def _kind(value: object) -> object:
    return int if isinstance(value, int) and not isinstance(value, bool) else repr(value)


def is_function(sites: Iterable[tuple[int, Call]]) -> bool:
    """Whether equal channel counts got equal calls."""
    known: dict[int, str] = {}
    return all(known.setdefault(count, str(found)) == str(found) for count, found in sites)


def _divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)


def _arguments(module: nn.Module, channels: int | None) -> tuple[tuple[str, object], ...]:
    """The arguments of the constructor call, without those that have their default value.

    They are read from the attributes of the same names, and checked by making the module again.
    """
    given: dict[str, Any] = {}
    required = []
    for name, parameter in inspect.signature(type(module)).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name in NOT_WRITTEN:
            continue
        value = _attribute(module, name, parameter.default, channels)
        if parameter.default is parameter.empty:
            required.append(name)
        elif value == parameter.default and type(value) is type(parameter.default):
            continue
        given[name] = value
    with torch.device("meta"):
        try:
            again = type(module)(**given)
        except Exception:  # whatever a constructor says to arguments that were guessed wrong
            raise unknown_module(module) from None
    if _looks(again) != _looks(module):
        raise unknown_module(module)
    positional = [("", given[name]) for name in required]
    return (*positional, *((name, value) for name, value in given.items() if name not in required))


def _attribute(module: nn.Module, name: str, default: Any, channels: int | None) -> Any:
    if name in dict(module.named_children()):  # what it wraps
        return module.get_submodule(name)
    for attribute in (name, f"_{name}"):
        value = getattr(module, attribute, NotImplemented)
        if isinstance(value, PLAIN) and not (name in ("bias", "affine") and value is None):
            if isinstance(value, tuple) and value and name != "normalized_shape" and len(set(value)) == 1:
                return value[0]  # (3, 3) was given as 3
            return value
    if name in ("bias", "elementwise_affine", "affine"):
        return getattr(module, "weight" if name != "bias" else name, None) is not None
    if default is not inspect.Parameter.empty:
        return default
    if name in COUNTS:
        lengths = [len(value) for value in module.state_dict().values() if value.ndim]
        return channels if channels is not None else max(lengths, default=1)
    raise unknown_module(module)


def _looks(module: nn.Module) -> tuple:
    """All that a constructor decides: printed form, shapes of the state and plain attributes."""
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    plain = {
        f"{prefix}.{name}": repr(value)
        for prefix, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, PLAIN) and name != "training"
    }
    return repr(module), list(shapes.items()), plain


def _layer_name(graph: LayerGraph) -> str:
    """The name of a class: that of the catalogue's layer where it is one."""
    for name in names():
        if layer(name).stable_hash() == graph.stable_hash():
            return "".join(part.capitalize() for part in name.split("-")).replace("Evonorm", "EvoNorm")
    return "Layer"
