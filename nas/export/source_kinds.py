"""The blocks that the image spaces share, and how each is written."""

from __future__ import annotations

from typing import Any

from torch import nn

from nas.export.source_blocks import (
    INPUTS,
    KERNEL,
    OUTPUTS,
    STRIDE,
    Group,
    Kind,
    Param,
    Site,
    Writer,
    chain,
    conv,
    is_identity,
    write_class,
)
from nas.export.source_layout import Call, Code, call, layout
from search_spaces.cells.darts_network import AuxiliaryHead, DepthwiseBlock, FactorizedReduce
from search_spaces.cells.nas_bench_101_network import ConvNormAct
from search_spaces.cells.nas_bench_201 import ResidualReduction
from search_spaces.cells.nas_bench_macro import InvertedBottleneck
from search_spaces.cells.operations import ActConvNorm

WORDS = {"act": "activation", "norm": "normalisation", "conv": "convolution", "pointwise": "1x1 convolution"}


def numbers_of(convolution: Any) -> dict[str, int]:
    """inputs, outputs, kernel, stride and dilation of a block with one convolution."""
    return {
        "inputs": convolution.in_channels,
        "outputs": convolution.out_channels,
        "kernel": convolution.kernel_size[0],
        "stride": convolution.stride[0],
        "dilation": convolution.dilation[0],
    }


def _in_words(steps: list[tuple[str, Call]]) -> str:
    """Activation -> convolution -> normalisation."""
    words = " -> ".join(WORDS.get(name, f"{name} convolution") for name, value in steps if not is_identity(value))
    return f"{words[0].upper()}{words[1:]}."


def _write_steps(group: Group, steps: list[tuple[str, Call]]) -> list[str]:
    lines, result = chain(steps)
    return write_class(group.name, _in_words(steps), group.arguments(), lines, [f"        return {result}"])


def _act_conv_norm(group: Group, writer: Writer) -> list[str]:
    convolution = conv(group["inputs"], group["outputs"], group["kernel"], stride=group["stride"])
    order = ("act", "conv", "norm") if group.kind.name == "ActConvNorm" else ("conv", "norm", "act")
    return _write_steps(group, [(n, convolution if n == "conv" else writer.leaf(group, n)) for n in order])


def _depthwise(group: Group, writer: Writer) -> list[str]:
    channels = group["channels"]
    depthwise = conv(
        channels, channels, group["kernel"], stride=group["stride"], dilation=group["dilation"], groups=channels
    )
    steps = [
        ("act", writer.leaf(group, "act")),
        ("depthwise", depthwise),
        ("pointwise", conv(channels, channels, 1)),
        ("norm", writer.leaf(group, "norm")),
    ]
    return _write_steps(group, steps)


def _separable(group: Group, writer: Writer) -> list[str]:
    block = writer.group(group.modules[0][0])
    values = {"channels": group["channels"], "kernel": group["kernel"], "dilation": 1}
    first, second = block.call(**values, stride=group["stride"]), block.call(**values, stride=1)
    return [
        f"class {group.name}(nn.Sequential):",
        '    """Two depthwise separable convolutions, one after the other; only the first has a stride."""',
        "",
        f"    def __init__(self, {', '.join(group.arguments())}):",
        *layout("", call("super().__init__", first, second)),
    ]


def _factorized(group: Group, writer: Writer) -> list[str]:
    inputs, outputs = group["inputs"], group["outputs"]
    act = writer.leaf(group, "act")
    halves = [Code(f"{outputs} // 2"), Code(f"{outputs} // 2")]
    if any(numbers["outputs"] % 2 for numbers in group.numbers):
        halves[1] = Code(f"{outputs} - {outputs} // 2")
    body, _ = chain(
        [
            ("act", act),
            ("conv_a", conv(inputs, halves[0], 1, stride=2)),
            ("conv_b", conv(inputs, halves[1], 1, stride=2)),
            ("norm", writer.leaf(group, "norm")),
        ]
    )
    joined = "torch.cat([self.conv_a(x), self.conv_b(shifted)], dim=1)"
    forward = [
        *["        x = self.act(x)"] * (not is_identity(act)),
        "        # Odd sizes get a row or column of zeros, without which the shifted half would be one smaller.",
        "        shifted = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))[:, :, 1:, 1:]",
        f"        return {joined if is_identity(writer.leaf(group, 'norm')) else f'self.norm({joined})'}",
    ]
    about = "Halves the size: two 1x1 convolutions of stride 2 side by side, the second a pixel further."
    return write_class(group.name, about, group.arguments(), body, forward)


def _residual_reduction(group: Group, writer: Writer) -> list[str]:
    example: Any = group.modules[0]
    a, b = writer.group(example.conv_a), writer.group(example.conv_b)
    inputs, outputs = group["inputs"], group["outputs"]
    body = [
        *layout("self.conv_a = ", a.call(inputs=inputs, outputs=outputs, kernel=3, stride=2)),
        *layout("self.conv_b = ", b.call(inputs=outputs, outputs=outputs, kernel=3, stride=1)),
        "        self.pool = nn.AvgPool2d(2, ceil_mode=True)",
        *layout("self.project = ", conv(inputs, outputs, 1)),
    ]
    about = "Halves the size: two 3x3 convolutions, beside them average pooling and a 1x1 convolution."
    forward = ["        return self.project(self.pool(x)) + self.conv_b(self.conv_a(x))"]
    return write_class(group.name, about, group.arguments(), body, forward)


def _bottleneck_sites(module: Any) -> dict[str, Site]:
    hidden, outputs = module.depthwise[0].in_channels, module.project[0].out_channels
    return {
        "norm_1": (module.expand[1], hidden, "hidden"),
        "act_1": (module.expand[2], hidden, "hidden"),
        "norm_2": (module.depthwise[1], hidden, "hidden"),
        "act_2": (module.depthwise[2], hidden, "hidden"),
        "norm_3": (module.project[1], outputs, "outputs"),
    }


def _bottleneck_numbers(module: Any) -> dict[str, int]:
    inputs, hidden = module.expand[0].in_channels, module.expand[0].out_channels
    depthwise = numbers_of(module.depthwise[0])
    return {**depthwise, "inputs": inputs, "outputs": module.project[0].out_channels, "expansion": hidden // inputs}


def _bottleneck(group: Group, writer: Writer) -> list[str]:
    inputs, outputs = group["inputs"], group["outputs"]
    hidden = Code("hidden")
    expand = conv(inputs, hidden, 1)
    depthwise = conv(hidden, hidden, group["kernel"], stride=group["stride"], groups=hidden)
    norm_1, act_1, norm_2, act_2, norm_3 = (writer.leaf(group, slot) for slot in _bottleneck_sites(group.modules[0]))
    body = [
        f"        hidden = {inputs} * {group['expansion']}",
        *layout("self.expand = ", call("nn.Sequential", expand, norm_1, act_1)),
        *layout("self.depthwise = ", call("nn.Sequential", depthwise, norm_2, act_2)),
        *layout("self.project = ", call("nn.Sequential", conv(hidden, outputs, 1), norm_3)),
    ]
    residual = {module.residual for module in group.modules}
    y = "self.project(self.depthwise(self.expand(x)))"
    forward = [f"        return {'x + ' if residual == {True} else ''}{y}"]
    about = "1x1 expansion, depthwise convolution, linear 1x1 projection (MobileNetV2)"
    if len(residual) == 2:
        body.append("        self.residual = stride == 1 and inputs == outputs")
        forward = [f"        y = {y}", "        return x + y if self.residual else y"]
        about += "; a residual where the shape stays"
    return write_class(group.name, f"{about}.", group.arguments(), body, forward)


def _auxiliary(group: Group, writer: Writer) -> list[str]:
    head: Any = group.modules[0]
    features = writer.leaves.write(head.features)
    (_, first), *others = features.arguments
    assert isinstance(first, Call)
    features = Call("nn.Sequential", (("", Call(first.head, (("", Code("inputs")), *first.arguments[1:]))), *others))
    act = writer.leaf(group, "act")
    pooled = f"F.avg_pool2d(x, 5, {head.stride}, count_include_pad=False)"
    steps = [("act", act), ("features", features)]
    lines, _ = chain(steps)
    body = [*lines, f"        self.classifier = nn.Linear({head.classifier.in_features}, num_classes)"]
    forward = [
        *["        x = self.act(x)"] * (not is_identity(act)),
        f"        large = min(x.shape[-2:]) >= {5 + head.stride}",
        f"        x = {pooled} if large else F.adaptive_avg_pool2d(x, 2)",
        "        return self.classifier(self.features(x).mean((2, 3)))",
    ]
    about = "The second classifier, for training."
    return write_class(group.name, about, ["inputs: int", "num_classes: int"], body, forward)


def _two_sites(conv_of, act_channels: str):
    def sites(module: Any) -> dict[str, Site]:
        numbers = numbers_of(conv_of(module))
        numbers["channels"] = numbers["outputs"]
        return {
            "act": (module.act, numbers[act_channels], act_channels),
            "norm": (module.norm, numbers["channels"], "channels" if act_channels == "channels" else "outputs"),
        }

    return sites


def _depthwise_numbers(module: Any) -> dict[str, int]:
    numbers = numbers_of(module.depthwise)
    return {**numbers, "channels": numbers["outputs"]}


CHANNELS, DILATION = Param("channels", keep=True), Param("dilation", default=1)
CONVOLUTION = (INPUTS, OUTPUTS, KERNEL, STRIDE)

ACT_CONV_NORM = Kind(
    "ActConvNorm",
    CONVOLUTION,
    lambda module: numbers_of(module.conv),
    _act_conv_norm,
    sites=_two_sites(lambda module: module.conv, "inputs"),
)
CONV_NORM_ACT = Kind(
    "ConvNormAct",
    CONVOLUTION,
    lambda module: numbers_of(module.conv),
    _act_conv_norm,
    sites=_two_sites(lambda module: module.conv, "outputs"),
)
DEPTHWISE = Kind(
    "DepthwiseBlock",
    (CHANNELS, KERNEL, STRIDE, DILATION),
    _depthwise_numbers,
    _depthwise,
    sites=_two_sites(lambda module: module.depthwise, "channels"),
)
SEPARABLE = Kind(
    "SeparableConv",
    (CHANNELS, KERNEL, STRIDE),
    lambda module: _depthwise_numbers(module[0]),
    _separable,
    parts=lambda module: list(module),
)
FACTORIZED = Kind(
    "FactorizedReduce",
    (INPUTS, OUTPUTS),
    lambda module: {"inputs": module.conv_a.in_channels, "outputs": _factorized_width(module)},
    _factorized,
    sites=lambda module: {
        "act": (module.act, module.conv_a.in_channels, "inputs"),
        "norm": (module.norm, _factorized_width(module), "outputs"),
    },
)
RESIDUAL_REDUCTION = Kind(
    "ResidualReduction",
    (INPUTS, OUTPUTS),
    lambda module: numbers_of(module.project),
    _residual_reduction,
    parts=lambda module: (module.conv_a, module.conv_b),
)
BOTTLENECK = Kind(
    "InvertedBottleneck",
    (Param("inputs", keep=True), Param("outputs", keep=True), KERNEL, Param("expansion"), STRIDE),
    _bottleneck_numbers,
    _bottleneck,
    sites=_bottleneck_sites,
)
AUXILIARY = Kind(
    "AuxiliaryHead",
    (Param("inputs", keep=True), Param("num_classes", keep=True)),
    lambda module: {"inputs": module.features[0].in_channels, "num_classes": module.classifier.out_features},
    _auxiliary,
    sites=lambda module: {"act": (module.act, module.features[0].in_channels, "inputs")},
)
BLOCKS = {
    ActConvNorm: ACT_CONV_NORM,
    ConvNormAct: CONV_NORM_ACT,
    DepthwiseBlock: DEPTHWISE,
    FactorizedReduce: FACTORIZED,
    ResidualReduction: RESIDUAL_REDUCTION,
    InvertedBottleneck: BOTTLENECK,
    AuxiliaryHead: AUXILIARY,
}


def _factorized_width(module: Any) -> int:
    return module.conv_a.out_channels + module.conv_b.out_channels


def block_kind(module: nn.Module) -> Kind | None:
    """The kind of a block that several spaces use, None for anything else."""
    if type(module) is nn.Sequential and len(module) == 2 and all(type(part) is DepthwiseBlock for part in module):
        return SEPARABLE
    return BLOCKS.get(type(module))
