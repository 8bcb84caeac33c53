"""The network of NAS-Bench-Graph, its graph convolutions in plain torch."""

from __future__ import annotations

from typing import Any

from torch import nn

from nas.export.source_blocks import Group, Kind, Param, Writer, is_identity
from nas.export.source_graph_parts import CONVOLUTIONS, FUNCTIONS, NEEDS
from nas.export.source_layout import Call, Code, Items, call, function, layout
from nas.export.source_leaves import unknown_module
from search_spaces.cells import nas_bench_graph_network as network

POINTWISE = tuple(
    getattr(nn, name)
    for name in ("ReLU", "SiLU", "GELU", "LeakyReLU", "Hardswish", "ELU", "SELU", "Mish", "Tanh", "Sigmoid", "ReLU6")
)
AS_IMAGE = '''
def as_image(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer of images to [nodes, channels] seen as [1, channels, nodes, 1]."""
    return layer(x.t().contiguous()[None, :, :, None])[0, :, :, 0].t()
'''
ARGUMENTS = ["x: Tensor", "edge_index: Tensor"]


def graph_kind(module: nn.Module) -> Kind | None:
    """The kind of a block of a graph network, None for anything else."""
    return NODE if type(module) is network.Node else None


def _node_width(module: Any) -> int:
    """The channels that a node's normalisation and activation were made for."""
    operation = module.operation
    if hasattr(module.norm, "num_features"):
        return module.norm.num_features
    for name in ("out_channels", "out_features"):
        if hasattr(operation, name):
            return getattr(operation, name) * getattr(operation, "heads", 1)
    if hasattr(operation, "nn"):
        return operation.nn.out_features
    return max((p.shape[0] for p in (*module.norm.parameters(), *module.act.parameters())), default=0)


def _layer(writer: Writer, value: Call) -> tuple[Call, str]:
    """A layer of images for [nodes, channels]: its call, and how it is applied."""
    if value.head == "nn.BatchNorm2d":  # the same numbers without the detour
        return Call("nn.BatchNorm1d", value.arguments), "self.{}({})"
    if value.head.removeprefix("nn.") in {kind.__name__ for kind in POINTWISE}:
        return value, "self.{}({})"
    writer.leaves.functions["as_image"] = AS_IMAGE
    return value, "as_image(self.{}, {})"


def _node(group: Group, writer: Writer) -> list[str]:
    modules: list[Any] = list(group.modules)
    body, applied = [], "x"
    for slot in ("norm", "act"):
        value = writer.leaf(group, slot)
        if not is_identity(value):
            value, how = _layer(writer, value)
            body += layout(f"self.{slot} = ", value)
            applied = how.format(slot, applied)
    raw = group["raw"]
    if any(not module.raw for module in modules) and modules[0].dropout.p:
        body.append(f"        self.dropout = nn.Dropout({modules[0].dropout.p})")
        applied = f"self.dropout({applied})"
    body.append("        self.operation = operation")
    if group.varies("raw"):
        body.append("        self.raw = raw")
    forward = []
    if group.varies("raw"):
        forward += ["        if not self.raw:", f"            x = {applied}"]
    elif not raw:
        forward.append(f"        x = {applied}")
    on_edges = {module.on_edges for module in modules}
    if on_edges == {True, False}:
        kinds = sorted({f"nn.{type(m.operation).__name__}" for m in modules if not m.on_edges})
        forward += [
            f"        if isinstance(self.operation, {' | '.join(kinds)}):",
            "            return self.operation(x)",
        ]
    forward.append(f"        return self.operation(x{', edge_index' * (True in on_edges)})")
    if not group.varies("raw") and raw:
        about = "An operation on the input features; the normalisation is for the count of parameters alone."
    else:
        about = "Normalisation, activation and dropout, then an operation."
        if group.varies("raw"):
            about += " On raw input features the operation stands alone."
    declared = group.arguments()
    return [
        f"class {group.name}(nn.Module):",
        f'    """{about}"""',
        "",
        *function("__init__", [declared[0], "operation: nn.Module", *declared[1:]]),
        "        super().__init__()",
        *body,
        "",
        *function("forward", ARGUMENTS, "Tensor"),
        *forward,
    ]


NODE = Kind(
    "Node",
    (Param("channels", keep=True), Param("raw", default=False)),
    lambda module: {"channels": _node_width(module), "raw": bool(module.raw)},
    _node,
    sites=lambda module: {
        "norm": (module.norm, _node_width(module), "channels"),
        "act": (module.act, _node_width(module), "channels"),
    },
    flags=lambda module, writer: (module.dropout.p,),
)


class Convolutions:
    """The graph convolutions that a network uses. texts, functions: definitions by name."""

    def __init__(self, writer: Writer):
        self.writer = writer
        self.texts: dict[str, str] = {}
        self.functions: dict[str, str] = {}

    def write(self, operation: Any) -> Call:
        """The call that makes the operation of a node. Errors: UserError for one that the space does not have."""
        name = type(operation).__name__
        if isinstance(operation, nn.Linear | nn.Identity):
            return self.writer.leaves.write(operation)
        if name not in CONVOLUTIONS or not type(operation).__module__.startswith("torch_geometric"):
            raise unknown_module(operation)
        text = CONVOLUTIONS[name]
        if name == "ARMAConv":
            text = self._arma(text, operation)
        if self.texts.setdefault(name, text) != text:
            raise unknown_module(operation)
        self.functions |= {needed: FUNCTIONS[needed] for needed in FUNCTIONS if needed in NEEDS[name]}
        if name == "GINConv":
            return call(name, operation.nn.in_features, operation.nn.out_features)
        if name == "GATConv":
            return call(name, operation.in_channels, operation.out_channels, operation.heads)
        return call(name, operation.in_channels, operation.out_channels)

    def _arma(self, text: str, operation: Any) -> str:
        width = operation.out_channels
        made = self.writer.leaves.write(operation.act.act, width)
        made = self.writer.leaves.over_channels([(width, made)], "outputs")
        if is_identity(made):
            return text.replace("        ACT_LINE\n", "").replace("ACT_CALL", "out")
        made, how = _layer(self.writer, made)
        if operation.act.state_dict():  # its place in the state is act.act
            line = f'self.act = nn.ModuleDict({{"act": {made}}})'
            applied = how.format('act["act"]', "out")
        else:
            line, applied = f"self.act = {made}", how.format("act", "out")
        return text.replace("ACT_LINE", line).replace("ACT_CALL", applied)


def graph_network(model: Any, class_name: str, about: str, writer: Writer, convolutions: Convolutions) -> list[str]:
    """The class of the whole network; the convolutions it needs are entered into `convolutions`."""
    body, x = [], "x"
    if isinstance(model.stem, nn.Linear):
        body.append(f"        self.stem = nn.Linear(in_features, {model.stem.out_features})")
    in_features = _in_features(model)
    body.append("        self.nodes = nn.ModuleList()")
    raw = [not isinstance(model.stem, nn.Linear)]
    for node in model.nodes:
        operation = convolutions.write(node.operation)
        if node.raw and operation.arguments:
            operation = Call(operation.head, (("", Code("in_features")), *operation.arguments[1:]))
        group = writer.group(node)
        made = group.call(channels=_node_width(node), raw=bool(node.raw))
        made = Call(made.head, (*made.arguments[:1], ("", operation), *made.arguments[1:]))
        body += layout("", Call("self.nodes.append", (("", made),)))
    raw = raw[:1]
    if model.dropout.p:
        body.append(f"        self.dropout = nn.Dropout({model.dropout.p})")
        x = "self.dropout(x)"
    if isinstance(model.stem, nn.Linear):
        x = f"self.stem({x})"
    merged = len(model.leaves) * _node_width(model.nodes[0])
    act = writer.leaves.write(model.act, merged)
    joined = [f"node_{leaf}" for leaf in model.leaves]
    result = str(call("torch.cat", Items(tuple(Code(leaf) for leaf in joined)), dim=1)) if joined[1:] else joined[0]
    if not is_identity(act):
        act, how = _layer(writer, act)
        body += layout("self.act = ", act)
        result = how.format("act", result)
    if isinstance(model.merge, nn.Linear):
        body += layout("self.merge = ", writer.leaves.write(model.merge))
        result = f"self.merge({result})"
    body.append(f"        self.classifier = nn.Linear({model.classifier.in_features}, num_classes)")
    features = [f"        node_0 = {x}"] if x != "x" else []
    source = "node_0" if x != "x" else "x"
    for index, link in enumerate(model.links):
        value = f"node_{link}" if link else source
        features.append(f"        node_{index + 1} = self.nodes[{index}]({value}, edge_index)")
    features.append(f"        return {result}")
    arguments = [f"num_classes: int = {model.classifier.out_features}", f"in_features: int = {in_features}"]
    return [
        f"class {class_name}(nn.Module):",
        f'    """{about}"""',
        "",
        *function("__init__", arguments),
        "        super().__init__()",
        *body,
        "",
        "    def stages(self) -> list[str]:",
        '        """The names of the computing nodes, in order."""',
        '        return [f"nodes.{i}" for i in range(len(self.nodes))]',
        "",
        *function("forward_features", ARGUMENTS, "Tensor"),
        '        """Node features before the classifier."""',
        *features,
        "",
        *function("forward", ARGUMENTS, "Tensor"),
        "        return self.classifier(self.forward_features(x, edge_index))",
    ]


def _in_features(model: Any) -> int:
    if isinstance(model.stem, nn.Linear):
        return model.stem.in_features
    for node in model.nodes:
        if node.raw and not isinstance(node.operation, nn.Identity):
            operation = getattr(node.operation, "nn", node.operation)
            return getattr(operation, "in_features", None) or operation.in_channels
    raise unknown_module(model)
