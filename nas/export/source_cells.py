"""Cells as classes: the constructor names every edge or vertex, `forward` shows how they are wired."""

from __future__ import annotations

from typing import Any

from torch import nn

from nas.export.source_blocks import INPUTS, OUTPUTS, Group, Kind, Param, Site, Writer, conv, write_class
from nas.export.source_kinds import CHANNELS, block_kind, numbers_of
from nas.export.source_layout import Code, Items, add, call, layout, text
from nas.export.source_leaves import unknown_module
from search_spaces.cells import darts_network, nas_bench_101_network, nas_bench_201
from search_spaces.cells.operations import ActConvNorm, Zero

DEAD = "  # leads nowhere, but tracks its batch statistics"


# -- NAS-Bench-201 and NATS-Bench size ---------------------------------------------------------------------------


def _role(edge: nn.Module, writer: Writer) -> str:
    """What an edge is: nothing, its input, its input or a projection of it, a block, or a module as it is written."""
    if isinstance(edge, Zero):
        return "zero"
    if type(edge) is nn.Identity or (type(edge) is nn.Sequential and _is_projection(edge)):
        return "skip"
    if type(edge) is ActConvNorm:
        return "block"
    return str(writer.leaves.write(edge))


def _is_projection(edge: nn.Module) -> bool:
    return isinstance(edge, nn.Sequential) and len(edge) == 2 and type(edge[0]) is nn.Conv2d


def _edge_numbers(module: Any) -> dict[str, int]:
    """inputs and outputs of a cell; its edges from node 0 change the width."""
    widths = [(i, edge.conv) for edge, (i, _) in zip(module.edges, nas_bench_201.EDGES) if type(edge) is ActConvNorm]
    widths += [(0, edge[0]) for edge in module.edges if _is_projection(edge)]
    outputs = widths[0][1].out_channels if widths else 0
    return {"inputs": next((c.in_channels for i, c in widths if i == 0), outputs), "outputs": outputs}


def _cell_201(group: Group, writer: Writer) -> list[str]:
    example: Any = group.modules[0]
    if any(len(module.edges) != len(nas_bench_201.EDGES) for module in group.modules):
        raise unknown_module(example)
    # Edges without a value are left out: zeros, and those that take zeros to zeros (not blocks: their norm has a bias).
    edges: dict[int, list[tuple[int, int, nn.Module]]] = {1: [], 2: [], 3: []}
    zeros = set()
    for node in edges:
        for index, (edge, (i, j)) in enumerate(zip(example.edges, nas_bench_201.EDGES, strict=True)):
            if j == node and not isinstance(edge, Zero) and (i not in zeros or list(edge.parameters())):
                edges[node].append((index, i, edge))
        if not edges[node]:
            zeros.add(node)
    needed = {3}  # whatever reaches the output or tracks statistics
    for node in (3, 2, 1):
        needed |= {i for _, i, edge in edges[node] if node in needed or list(edge.buffers())}
    body, forward = [], []
    for node, entering in edges.items():
        terms = []
        for index, i, edge in entering:
            stateful = bool(edge.state_dict())
            if not stateful and node not in needed:
                continue
            lines = _edge(group, writer, index, edge, i)
            body += lines
            if node in needed:
                terms.append(f'self.edges["{index}"](node_{i})' if lines else f"node_{i}")
            elif list(edge.buffers()):
                forward.append(f'        self.edges["{index}"](node_{i}){DEAD}')
        if node in needed:
            prefix = "return " if node == 3 else f"node_{node} = "
            forward += layout(prefix, add(terms or ["torch.zeros_like(node_0)"]))
    body = ["        self.edges = nn.ModuleDict()", *body] if body else []
    about = "Four nodes, each the sum of its incoming edges."
    return write_class(group.name, about, group.arguments(), body, forward, ["node_0: Tensor"])


def _edge(group: Group, writer: Writer, index: int, edge: Any, source: int) -> list[str]:
    """The lines that make one edge; none for an edge that hands on its input."""
    setting = f'self.edges["{index}"] = '
    inputs, outputs = group["inputs"] if source == 0 else group["outputs"], group["outputs"]
    if type(edge) is ActConvNorm:
        kernel = edge.conv.kernel_size[0]
        return layout(setting, writer.group(edge).call(inputs=inputs, outputs=outputs, kernel=kernel, stride=1))
    if _role(edge, writer) != "skip":
        return layout(setting, writer.leaves.write(edge))
    projections = [m.edges[index] for m in group.modules if _is_projection(m.edges[index])]
    if not projections:
        return []
    norm = writer.over([(p[1], p[0].out_channels, "outputs") for p in projections], str(outputs))
    projection = call("nn.Sequential", conv(inputs, outputs, 1), norm)
    if len(projections) == len(group.modules):
        return layout(setting, projection)
    return [f"        {setting}nn.Identity()", f"        if {inputs} != {outputs}:", *layout(setting, projection, 12)]


# -- DARTS -------------------------------------------------------------------------------------------------------


def _darts_numbers(module: Any) -> dict[str, int]:
    first = module.preprocess_0
    convolution = first.conv if isinstance(first, ActConvNorm) else first.conv_a
    return {
        "inputs_0": convolution.in_channels,
        "inputs_1": module.preprocess_1.conv.in_channels,
        "channels": module.preprocess_1.conv.out_channels,
        "after_reduction": not isinstance(first, ActConvNorm),
    }


def _darts_parts(module: Any) -> list[nn.Module]:
    """All blocks but the first, which is another one after a reduction."""
    return [module.preprocess_1, *(edge for edge in module.edges.values() if block_kind(edge) is not None)]


def _no_sites(module: Any) -> dict[str, Site]:
    return {}


def _edge_flags(cell: Any, writer: Writer) -> tuple:
    edges = []
    for key, edge in cell.edges.items():
        kind = type(edge).__name__ if writer.is_block(edge) else str(writer.leaves.write(edge))
        numbers = numbers_of(edge.depthwise) if isinstance(edge, darts_network.DepthwiseBlock) else {}
        if type(edge) is nn.Sequential:
            numbers = numbers_of(edge[0].depthwise)
        edges.append((key, kind, numbers.get("kernel"), numbers.get("dilation")))
    return tuple(edges)


def _darts_cell(group: Group, writer: Writer) -> list[str]:
    example: Any = group.modules[0]
    reduction = group.kind is REDUCTION_CELL
    channels, after = group["channels"], group["after_reduction"]
    factorized = [m.preprocess_0 for m in group.modules if not isinstance(m.preprocess_0, ActConvNorm)]
    plain = [m.preprocess_0 for m in group.modules if isinstance(m.preprocess_0, ActConvNorm)]
    widths = {"outputs": channels, "kernel": 1, "stride": 1}
    body = []
    for modules, condition in ((factorized, "if after_reduction:"), (plain, "else:")):
        if modules:
            made = writer.group(modules[0]).call(inputs=group["inputs_0"], **widths)
            indent = 8 if after in (True, False) else 12
            body += ([f"        {condition}"] if indent == 12 else []) + layout("self.preprocess_0 = ", made, indent)
    second = writer.group(example.preprocess_1).call(inputs=group["inputs_1"], **widths)
    body += layout("self.preprocess_1 = ", second)
    body.append("        self.edges = nn.ModuleDict()")
    forward = ["        state_0 = self.preprocess_0(before_last)", "        state_1 = self.preprocess_1(last)"]
    for node in range(2, 6):
        terms = []
        for key, edge in example.edges.items():
            if int(key[2]) != node:
                continue
            if type(edge) is nn.Identity:
                terms.append(f"state_{key[0]}")
                continue
            terms.append(f'self.edges["{key}"](state_{key[0]})')
            strided = 2 if reduction and int(key[0]) < 2 else 1
            if writer.is_block(edge):
                values: dict[str, object] = {"channels": channels, "inputs": channels, "outputs": channels}
                if not isinstance(edge, darts_network.FactorizedReduce):
                    block = edge[0] if isinstance(edge, nn.Sequential) else edge
                    numbers = numbers_of(block.depthwise)
                    values |= {name: numbers[name] for name in ("kernel", "dilation")}
                made = writer.group(edge).call(**values, stride=strided)
            else:
                made = writer.leaves.write(edge)
            body += layout(f'self.edges["{key}"] = ', made)
        forward += layout(f"state_{node} = ", add(terms))
    forward.append("        return torch.cat([state_2, state_3, state_4, state_5], dim=1)")
    about = "Two inputs and four nodes, each the sum of two edges; the output is the nodes side by side."
    if reduction:
        about = "As the normal cell, but of half the size: edges from its inputs have stride 2."
    inputs = ["before_last: Tensor", "last: Tensor"]
    return write_class(group.name, about, group.arguments(), body, forward, inputs)


# -- NAS-Bench-101 -----------------------------------------------------------------------------------------------


def _numbers_101(module: Any) -> dict[str, int]:
    return {"inputs": module.channels[0], "outputs": module.channels[-1]}


def _parts_101(module: Any) -> list[nn.Module]:
    blocks = (*module.project.values(), *module.vertices.values())
    return [block for block in blocks if block_kind(block) is not None]


def _flags_101(module: Any, writer: Writer) -> tuple:
    operations = tuple(
        numbers_of(m.conv)["kernel"] if writer.is_block(m) else str(writer.leaves.write(m))
        for m in module.vertices.values()
    )
    return operations, tuple(module.project), tuple(map(tuple, module.inner))


def _cell_101(group: Group, writer: Writer) -> list[str]:
    example: Any = group.modules[0]
    modules: list[Any] = list(group.modules)
    last = len(example.inner) - 1
    feeding = example.inner[-1]
    share, shares = len(feeding), False
    inputs, outputs = group["inputs"], group["outputs"]
    texts: list[object] = [inputs]
    for v in range(1, last + 1):
        found = [(module.channels[v], module.channels[-1]) for module in modules]
        if all(width == whole for width, whole in found):
            texts.append(outputs)
        elif all(width * share == whole for width, whole in found):
            texts.append(Code("width"))
        else:
            place = next(
                i for i in range(share) if all(width == whole // share + (i < whole % share) for width, whole in found)
            )
            texts.append(Code(f"widths[{place}]"))
            shares = True
    cuts = {
        (w, v) for v in range(1, last) for w in example.inner[v] if any(m.channels[w] != m.channels[v] for m in modules)
    }
    body = []
    if shares:
        body.append("        # What the output concatenates shares its channels; the first ones take the remainder.")
        body.append(f"        widths = [{outputs} // {share} + (i < {outputs} % {share}) for i in range({share})]")
        if cuts:
            body.append("        self.widths = widths")
    elif Code("width") in texts:
        body.append(f"        width = {outputs} // {share}")
    body.append("        self.project = nn.ModuleDict()")
    for key, projection in example.project.items():
        made = writer.group(projection).call(inputs=inputs, outputs=texts[int(key)], kernel=1, stride=1)
        body += layout(f'self.project["{key}"] = ', made)
    body.append("        self.vertices = nn.ModuleDict()")
    forward = []
    for v in range(1, last):
        vertex = example.vertices[str(v)]
        if writer.is_block(vertex):
            kernel = numbers_of(vertex.conv)["kernel"]
            made = writer.group(vertex).call(inputs=texts[v], outputs=texts[v], kernel=kernel, stride=1)
        else:
            made = writer.leaves.write(vertex)
        body += layout(f'self.vertices["{v}"] = ', made)
        terms = [f"vertex_{w}[:, : self.{texts[v]}]" if (w, v) in cuts else f"vertex_{w}" for w in example.inner[v]]
        if str(v) in example.project:
            terms.append(f'self.project["{v}"](x)')
        forward += layout(f"vertex_{v} = ", call(f'self.vertices["{v}"]', add(terms)))
    terms = [f"vertex_{w}" for w in feeding]
    if len(terms) > 1:
        terms = [text(call("torch.cat", Items(tuple(Code(t) for t in terms)), dim=1))]
    if str(last) in example.project:
        terms.append(f'self.project["{last}"](x)')
    forward += layout("return ", add(terms))
    if last == 1:
        body = [line for line in body if "vertices" not in line]
    if not example.project:
        body = [line for line in body if "self.project = " not in line]
    about = "Vertices 1 and up work on sums of what they read; the cell's input reaches them by 1x1 projections."
    return write_class(group.name, about, group.arguments(), body, forward)


CELL_201 = Kind(
    "Cell",
    (INPUTS, OUTPUTS),
    _edge_numbers,
    _cell_201,
    parts=lambda module: [edge for edge in module.edges if type(edge) is ActConvNorm],
    flags=lambda module, writer: tuple(_role(edge, writer) + _kernel(edge) for edge in module.edges),
)
_DARTS = (Param("inputs_0", keep=True), Param("inputs_1", keep=True), CHANNELS, Param("after_reduction", default=False))
NORMAL_CELL = Kind("NormalCell", _DARTS, _darts_numbers, _darts_cell, _no_sites, _darts_parts, _edge_flags)
REDUCTION_CELL = Kind("ReductionCell", _DARTS, _darts_numbers, _darts_cell, _no_sites, _darts_parts, _edge_flags)
CELL_101 = Kind("Cell", (INPUTS, OUTPUTS), _numbers_101, _cell_101, _no_sites, _parts_101, _flags_101)


def _kernel(edge: nn.Module) -> str:
    return str(edge.conv.kernel_size[0]) if type(edge) is ActConvNorm else ""


def cell_kind(module: nn.Module) -> Kind | None:
    """The kind of a cell but DARTS's, None for anything else."""
    kinds = {nas_bench_201.CellModule: CELL_201, nas_bench_101_network.CellModule: CELL_101}
    return kinds.get(type(module))
