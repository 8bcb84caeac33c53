"""Blocks of ours as classes: instances that differ in numbers only become one class with arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nas.export.source_layout import Call, Code, call, function, layout
from nas.export.source_leaves import Leaves, family, is_function

Site = tuple[nn.Module, int, str]  # a leaf, the channels that its factory got, the variable that holds them


@dataclass(frozen=True)
class Param:
    """A constructor argument. keep: also where it is always the same. same_as: left out where it equals that one."""

    name: str
    keep: bool = False
    default: int | bool | None = None
    same_as: str = ""


INPUTS, OUTPUTS = Param("inputs", keep=True), Param("outputs", keep=True, same_as="inputs")
KERNEL, STRIDE = Param("kernel"), Param("stride", default=1)


@dataclass(frozen=True)
class Kind:
    """How a block is read and written.

    numbers: its arguments. sites: its normalisations and activations by attribute. parts: the blocks inside. flags:
    what makes it another class. write: its class.
    """

    name: str
    params: tuple[Param, ...]
    numbers: Callable[[Any], dict[str, int]]
    write: Callable[[Group, Writer], list[str]]
    sites: Callable[[Any], dict[str, Site]] = lambda module: {}
    parts: Callable[[Any], Sequence[nn.Module]] = lambda module: ()
    flags: Callable[[Any, Writer], tuple] = lambda module, writer: ()


@dataclass
class Group:
    """The modules that one class stands for. texts: every argument inside the class, a name or a number."""

    kind: Kind
    name: str
    modules: list[Any] = field(default_factory=list)
    numbers: list[dict[str, int]] = field(default_factory=list)
    texts: dict[str, object] = field(default_factory=dict)
    params: list[Param] = field(default_factory=list)

    def resolve(self) -> None:
        """Decide which arguments the class takes."""
        for param in self.kind.params:
            values = {numbers[param.name] for numbers in self.numbers}
            if param.same_as and all(n[param.name] == n[param.same_as] for n in self.numbers):
                self.texts[param.name] = self.texts[param.same_as] = Code("channels")
            elif param.keep or len(values) > 1:
                self.params.append(param)
                self.texts[param.name] = Code(param.name)
            else:
                self.texts[param.name] = values.pop()

    def __getitem__(self, param: str) -> object:
        return self.texts[param]

    def varies(self, param: str) -> bool:
        """Whether the class takes `param`."""
        return any(known.name == param for known in self.params)

    def arguments(self) -> list[str]:
        """The arguments as the constructor declares them."""
        declared = []
        for param in self.params:
            kind = "bool" if isinstance(param.default, bool) else "int"
            default = "" if param.default is None else f" = {param.default}"
            declared.append(f"{self.texts[param.name]}: {kind}{default}")
        return declared

    def call(self, **values: object) -> Call:
        """A call of the constructor; `values` for all arguments of the kind."""
        listed = [
            (param.name if param.default is not None else "", values[param.name])
            for param in self.params
            if param.default is None or values[param.name] != param.default
        ]
        return Call(self.name, tuple(listed))


class Writer:
    """The classes of a model's blocks. kinds: what may be met, in the order in which it is to be written."""

    def __init__(self, model: nn.Module, kinds: Callable[[nn.Module], Kind | None], reserved: set[str]):
        self.leaves = Leaves(reserved)
        self._kinds = kinds
        self._groups: dict[tuple, Group] = {}
        self._signatures: dict[int, tuple] = {}
        self._sites: dict[tuple, list[tuple[int, Call]]] = {}
        blocks = [module for module in model.modules() if kinds(module) is not None]
        for module in blocks:
            for leaf, channels, _ in self._kind(module).sites(module).values():
                found = self.leaves.write(leaf, channels)
                self._sites.setdefault(family(found), []).append((channels, found))
        for module in blocks:
            self._enter(module)
        for group in self._groups.values():
            group.resolve()

    def classes(self, order: Sequence[Kind]) -> list[str]:
        """The text of every class, kinds in `order`."""
        groups = sorted(self._groups.values(), key=lambda group: order.index(group.kind))
        return ["\n".join(group.kind.write(group, self)) for group in groups]

    def group(self, module: nn.Module) -> Group:
        """The class that `module` is an instance of."""
        return self._groups[self._signature(module)]

    def is_block(self, module: nn.Module) -> bool:
        """Whether `module` gets a class of its own."""
        return self._kinds(module) is not None

    def instance(self, module: nn.Module) -> Call:
        """The call that makes `module`, in numbers."""
        if self.is_block(module):
            return self.group(module).call(**self._kind(module).numbers(module))
        return self.leaves.write(module)

    def leaf(self, group: Group, slot: str) -> Call:
        """The call that makes the normalisation or activation `slot` inside the class."""
        sites = [group.kind.sites(module)[slot] for module in group.modules]
        variable = sites[0][2]
        return self.over(sites, str(group.texts.get(variable, variable)))

    def over(self, sites: Sequence[Site], channels: str) -> Call:
        """One call in terms of the variable `channels` for the leaves of several sites."""
        found = [(n, self.leaves.write(leaf, n)) for leaf, n, _ in sites]
        everywhere = self._sites.get(family(found[0][1]), [])
        return self.leaves.over_channels(everywhere if everywhere and is_function(everywhere) else found, channels)

    def _kind(self, module: nn.Module) -> Kind:
        kind = self._kinds(module)
        assert kind is not None
        return kind

    def _enter(self, module: nn.Module) -> None:
        kind, signature = self._kind(module), self._signature(module)
        if signature not in self._groups:
            taken = {group.name for group in self._groups.values()}
            name, number = kind.name, 1
            while name in taken:
                number += 1
                name = f"{kind.name}{number}"
            self._groups[signature] = Group(kind, name)
        self._groups[signature].modules.append(module)
        self._groups[signature].numbers.append(kind.numbers(module))

    def _signature(self, module: nn.Module) -> tuple:
        if id(module) not in self._signatures:
            kind = self._kind(module)
            leaves = tuple(self._leaf_signature(*site) for site in kind.sites(module).values())
            parts = tuple(self._signature(part) for part in kind.parts(module))
            self._signatures[id(module)] = (kind.name, kind.flags(module, self), leaves, parts)
        return self._signatures[id(module)]

    def _leaf_signature(self, leaf: nn.Module, channels: int, _: str) -> object:
        found = self.leaves.write(leaf, channels)
        key = family(found)
        return key if is_function(self._sites[key]) else (channels, str(found))


# -- parts of a class --------------------------------------------------------------------------------------------


def conv(
    inputs: object, outputs: object, kernel: object, *, stride: object = 1, dilation: object = 1, groups: object = None
) -> Call:
    """A convolution without bias that keeps the size up to its stride; numbers or code."""
    named: dict[str, object] = {"stride": stride} if stride != 1 else {}
    half = kernel // 2 if isinstance(kernel, int) else Code(f"{kernel} // 2")
    padding: object = half
    if isinstance(half, int) and isinstance(dilation, int):
        padding = half * dilation
    elif dilation != 1:
        padding = Code(dilation if half == 1 else f"{dilation} * {half if isinstance(half, int) else f'({half})'}")
    if padding != 0:
        named["padding"] = padding
    if dilation != 1:
        named["dilation"] = dilation
    if groups is not None:
        named["groups"] = groups
    return call("nn.Conv2d", inputs, outputs, kernel, **named, bias=False)


def is_identity(value: Call) -> bool:
    """Whether a call makes a module that may be left out."""
    return value.head == "nn.Identity"


def write_class(
    name: str,
    about: str,
    arguments: Sequence[str],
    body: Sequence[str],
    forward: Sequence[str],
    inputs: Sequence[str] = ("x: Tensor",),
) -> list[str]:
    """A module class: `body` and `forward` are lines that are indented already."""
    return [
        f"class {name}(nn.Module):",
        f'    """{about}"""',
        "",
        *function("__init__", arguments),
        "        super().__init__()",
        *body,
        "",
        *function("forward", inputs, "Tensor"),
        *forward,
    ]


def chain(steps: Sequence[tuple[str, Call | None]]) -> tuple[list[str], str]:
    """The lines that set self.<name> for (name, call) pairs, and the expression that applies them to x in turn.

    Identities are left out.
    """
    lines, result = [], "x"
    for name, value in steps:
        if value is not None and not is_identity(value):
            lines += layout(f"self.{name} = ", value)
            result = f"self.{name}({result})"
    return lines, result
