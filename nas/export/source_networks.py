"""The network around the blocks: stem, a loop over cells, head."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import nn

from nas.export.source_blocks import Kind, Writer
from nas.export.source_cells import NORMAL_CELL, REDUCTION_CELL, cell_kind
from nas.export.source_kinds import block_kind
from nas.export.source_layout import Call, Code, function, layout
from search_spaces.cells import darts_network, nas_bench_101_network
from search_spaces.cells.operations import CellNetwork

STAGES = [
    "    def stages(self) -> list[str]:",
    '        """The names of the cells, in order."""',
    '        return [f"cells.{i}" for i in range(len(self.cells))]',
    "",
]
FORWARD = ["    def forward(self, x: Tensor) -> Tensor:", "        return self.classifier(self.forward_features(x))"]


def image_kinds(model: nn.Module):
    """A function: module of `model` -> its kind, or None."""
    reductions: set[int] = set()
    cells: set[int] = set()
    if type(model) is darts_network.Network:
        places = darts_network.reductions(len(model.cells))
        cells = {id(cell) for cell in model.cells}
        reductions = {id(cell) for place, cell in enumerate(model.cells) if place in places}

    def kind(module: nn.Module) -> Kind | None:
        if id(module) in cells:
            return REDUCTION_CELL if id(module) in reductions else NORMAL_CELL
        return cell_kind(module) or block_kind(module)

    return kind


def is_image_network(model: nn.Module) -> bool:
    """Whether `image_network` can write the model's own level."""
    known = (darts_network.Network, nas_bench_101_network.Network)
    return type(model) in known or (isinstance(model, CellNetwork) and type(model).forward is CellNetwork.forward)


def image_network(model: Any, class_name: str, about: str, writer: Writer) -> list[str]:
    """The class of the whole network."""
    if type(model) is darts_network.Network:
        body, features, more = _darts(model, writer)
    elif type(model) is nas_bench_101_network.Network:
        body, features, more = _network_101(model, writer)
    else:
        body, features, more = _cell_network(model, writer)
    first = next(module for module in model.stem.modules() if isinstance(module, nn.Conv2d))
    classes = model.classifier.out_features
    arguments = [f"num_classes: int = {classes}", f"in_channels: int = {first.in_channels}"]
    return [
        f"class {class_name}(nn.Module):",
        f'    """{about}"""',
        "",
        *function("__init__", arguments),
        "        super().__init__()",
        *body,
        "        self.pool = nn.AdaptiveAvgPool2d(1)",
        f"        self.classifier = nn.Linear({model.classifier.in_features}, num_classes)",
        "",
        *STAGES,
        *features,
        "",
        *FORWARD,
        *more,
    ]


def _features(lines: Sequence[str]) -> list[str]:
    return [
        "    def forward_features(self, x: Tensor) -> Tensor:",
        '        """The pooled features before the classifier."""',
        *lines,
    ]


def _stem(model: Any, writer: Writer) -> list[str]:
    """The stem, its first convolution with `in_channels`."""
    stem = writer.instance(model.stem)
    if writer.is_block(model.stem):
        stem = Call(stem.head, (("", Code("in_channels")), *stem.arguments[1:]))
    else:
        (_, first), *others = stem.arguments
        assert isinstance(first, Call)
        stem = Call(stem.head, (("", Call(first.head, (("", Code("in_channels")), *first.arguments[1:]))), *others))
    return layout("self.stem = ", stem)


def _cell_network(model: Any, writer: Writer) -> tuple[list[str], list[str], list[str]]:
    body = [*_stem(model, writer), *_cells([writer.instance(cell) for cell in model.cells])]
    body += layout("self.last = ", writer.leaves.write(model.last))
    features = _features(
        [
            "        x = self.stem(x)",
            "        for cell in self.cells:",
            "            x = cell(x)",
            "        return self.pool(self.last(x)).flatten(1)",
        ]
    )
    return body, features, []


def _cells(calls: Sequence[Call]) -> list[str]:
    """A list of cells: a loop over stages where their widths double, otherwise one line for equal neighbours."""
    runs = [(found, len(list(group))) for found, group in itertools.groupby(calls)]
    (first, count), rest = runs[0], runs[1:]
    width = first.arguments[0][1] if len(first.arguments) == 1 else None
    if rest and isinstance(width, int) and len(rest) % 2 == 0:
        reduction = rest[0][0].head
        widths = [width * 2 ** (i + 1) for i in range(len(rest) // 2)]
        expected = []
        for outputs in widths:
            expected.append((Call(reduction, (("", outputs // 2), ("", outputs))), 1))
            expected.append((Call(first.head, (("", outputs),)), count))
        if rest == expected:
            repeated = f"{first.head}(channels) for _ in range({count})"
            return [
                f"        self.cells = nn.ModuleList({first} for _ in range({count}))",
                f"        for channels in ({', '.join(map(str, widths))}{',' * (len(widths) == 1)}):",
                f"            self.cells.append({reduction}(channels // 2, channels))",
                f"            self.cells.extend({repeated})",
            ]
    lines = ["        self.cells = nn.ModuleList()"]
    for found, times in runs:
        if times > 1:
            lines.append(f"        self.cells.extend({found} for _ in range({times}))")
        else:
            lines += layout("", Call("self.cells.append", (("", found),)))
    return lines


def _network_101(model: Any, writer: Writer) -> tuple[list[str], list[str], list[str]]:
    calls = [writer.group(cell) for cell in model.cells]
    cell, per_stage = calls[0], model.cells_per_stage
    widths = [module.channels[-1] for module in model.cells][::per_stage]
    made = cell.call(inputs=Code("inputs"), outputs=Code("outputs"))
    start = model.cells[0].channels[0]
    body = [
        *_stem(model, writer),
        "        self.reduce = nn.MaxPool2d(2, ceil_mode=True)",
        "        self.cells = nn.ModuleList()",
    ]
    if len(made.arguments) == 1 or any(group is not cell for group in calls):
        body += _cells([writer.instance(module) for module in model.cells])[1:]
    else:
        body += [f"        inputs = {start}", f"        for outputs in ({', '.join(map(str, widths))}):"]
        if per_stage > 1:
            body.append(f"            for _ in range({per_stage}):")
        space = " " * (16 if per_stage > 1 else 12)
        body += [f"{space}self.cells.append({made})", f"{space}inputs = outputs"]
    starts = list(range(per_stage, len(model.cells), per_stage))
    features = _features(
        [
            "        x = self.stem(x)",
            "        for index, cell in enumerate(self.cells):",
            f"            if {_is_in('index', starts)}:",
            "                x = self.reduce(x)",
            "            x = cell(x)",
            "        return self.pool(x).flatten(1)",
        ]
    )
    return body, features, []


def _darts(model: Any, writer: Writer) -> tuple[list[str], list[str], list[str]]:
    count = len(model.cells)
    places = sorted(set(darts_network.reductions(count)))
    after = [i for i, cell in enumerate(model.cells) if isinstance(cell.preprocess_0, darts_network.FactorizedReduce)]
    body = _stem(model, writer)
    last = "x"
    if model.stem_last is not None:
        body += layout("self.stem_last = ", writer.instance(model.stem_last))
        last = "self.stem_last(x)"
    first = writer.group(model.cells[0]).kind.numbers(model.cells[0])
    channels = first["channels"] // 2 if 0 in places else first["channels"]
    body.append("        self.cells = nn.ModuleList()")
    loop = [
        f"        inputs_0, inputs_1, channels = {first['inputs_0']}, {first['inputs_1']}, {channels}",
        f"        for layer in range({count}):",
    ]
    values: dict[str, object] = {name: Code(name) for name in ("inputs_0", "inputs_1", "channels")}
    values["after_reduction"] = Code(_is_in("layer", after))
    normal = next((i for i in range(count) if i not in places), None)
    reduction = writer.group(model.cells[places[0]]).call(**values)
    groups = {writer.group(cell).name for cell in model.cells}
    if normal is None or len(groups) > 2:
        body += _cells([writer.instance(cell) for cell in model.cells])[1:]
    else:
        body += loop
        body += [
            f"            if {_is_in('layer', places)}:",
            "                channels *= 2",
            *layout("cell = ", reduction, 16),
            "            else:",
            *layout("cell = ", writer.group(model.cells[normal]).call(**values), 16),
            "            self.cells.append(cell)",
            "            inputs_0, inputs_1 = inputs_1, 4 * channels",
        ]
    if model.auxiliary_head is None:
        lines = [
            "        x = self.stem(x)",
            f"        before_last, last = x, {last}",
            "        for cell in self.cells:",
            "            before_last, last = last, cell(before_last, last)",
            "        return self.pool(last).flatten(1)",
        ]
        return body, _features(lines), []
    head = writer.group(model.auxiliary_head)
    width = head.kind.numbers(model.auxiliary_head)["inputs"]
    body += layout("self.auxiliary_head = ", head.call(inputs=width, num_classes=Code("num_classes")))
    outputs = [
        "    def _cell_outputs(self, x: Tensor) -> list[Tensor]:",
        "        x = self.stem(x)",
        f"        before_last, last = x, {last}",
        "        outputs = []",
        "        for cell in self.cells:",
        "            before_last, last = last, cell(before_last, last)",
        "            outputs.append(last)",
        "        return outputs",
        "",
    ]
    more = [
        "",
        "    def forward_with_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor]:",
        '        """The logits, and those of the auxiliary head, for a training loss."""',
        "        outputs = self._cell_outputs(x)",
        "        logits = self.classifier(self.pool(outputs[-1]).flatten(1))",
        f"        return logits, self.auxiliary_head(outputs[{2 * count // 3}])",
    ]
    return body, [*outputs, *_features(["        return self.pool(self._cell_outputs(x)[-1]).flatten(1)"])], more


def _is_in(name: str, values: Sequence[int]) -> str:
    return f"{name} == {values[0]}" if len(values) == 1 else f"{name} in ({', '.join(map(str, values))})"
