"""Readable Python source of a layer: a module that needs torch only and has GraphLayer's state dict."""

from __future__ import annotations

import keyword
import math
import textwrap
from dataclasses import dataclass, field, replace

import torch

from search_spaces.common.errors import UserError
from search_spaces.layers.evaluate import LAYOUTS, evaluate
from search_spaces.layers.formula import format_formula
from search_spaces.layers.graph import LEAVES, V0, V1, ZERO, LayerGraph, Node, X
from search_spaces.layers.module import buffer_names, parameter_names
from search_spaces.layers.ops import PARAMETERS
from search_spaces.layers.patterns import NONE, patterns
from search_spaces.layers.pointwise import UNARY as POINTWISE
from search_spaces.layers.source_parts import DIMS, HELPERS, OVER_GROUP

ATOM, UNARY, PRODUCT, SUM = 4, 3, 2, 1  # how tightly an expression binds
LONGEST, LARGEST = 72, 6  # an expression beyond so many characters or operations gets a name of its own
MOMENT = {"mean": "mean", "std": "variance", "rms": "mean_square", "l1": "mean_absolute"}
WIDENS = (
    "exp",
    "log",
    "rsqrt",
    "softplus",
    "expm1",
    "sinh",
    "cosh",
    "pow",
    "cube",
    "reciprocal",
    "logabs",
    "gaussian",
)  # operations that autocast may lift to float32
WORDS = {
    "add": "total",
    "sub": "difference",
    "mul": "product",
    "div": "ratio",
    "max": "largest",
    "min": "smallest",
    "neg": "negative",
    "sigmoid": "gate",
    "tanh": "bounded",
    "exp": "exponential",
    "log": "logarithm",
    "abs": "magnitude",
    "square": "squared",
    "sqrt": "root",
    "rsqrt": "inverse_root",
    "erf": "error",
    "softplus": "softened",
}


def to_source(
    graph: LayerGraph,
    class_name: str,
    *,
    channels: int | None = None,
    layout: str = "channels-first",
    formula_text: str | None = None,
) -> str:
    """The source of a file that defines the layer as class `class_name(channels)`.

    channels: the default of that argument. formula_text: what the docstring gives as the formula, by default that of
    `format_formula`. The class has the parameters, buffers and values of `GraphLayer(graph, channels)`, but
    takes batch statistics of its own process only. Errors: UserError for a name that is no class name, an unknown
    layout, channels below 1.
    """
    part = layer_part(graph, class_name, channels=channels, layout=layout, formula_text=formula_text)
    body = [line for text in part.helpers.values() for line in ["", *text.strip("\n").split("\n"), ""]]
    body += ["", *part.lines]
    head = [
        f'"""{class_name}: a layer for PyTorch, written out by nasforge; it needs torch only."""',
        "",
        "from __future__ import annotations",
        "",
        *["import torch"] * any("torch." in line for line in body),
        "from torch import Tensor, nn",
        "",
    ]
    return "\n".join([*head, *body]) + "\n"


@dataclass(frozen=True)
class LayerPart:
    """A layer's part of a file: the functions it calls, by name and in order, and the lines of its class."""

    helpers: dict[str, str]
    lines: list[str]


def layer_part(
    graph: LayerGraph,
    class_name: str,
    *,
    channels: int | None = None,
    layout: str = "channels-first",
    formula_text: str | None = None,
    track_running_stats: bool = True,
    zero_init_gamma: bool = False,
) -> LayerPart:
    """What `to_source` puts below the imports, for files of several classes; arguments and errors as there.

    track_running_stats, zero_init_gamma: as GraphLayer has them.
    """
    check_class_name(class_name)
    if layout not in LAYOUTS:
        raise UserError(layout, f"a layout: {' or '.join(LAYOUTS)}")
    if channels is not None and channels < 1:
        raise UserError(channels, "at least one channel")
    graph = graph.compact()
    formula = format_formula(graph) if formula_text is None else formula_text
    draft = _draft(graph, layout, buffer_names(graph) if track_running_stats else {})
    helpers = {name: text for name, text in HELPERS.items() if name in draft.helpers}
    for (of, axes), text in OVER_GROUP.items():
        if of == layout and _over(axes) in draft.helpers:
            helpers[_over(axes)] = text
    return LayerPart(helpers, _class(class_name, channels, formula, draft, zero_init_gamma))


def check_class_name(class_name: str) -> None:
    """Errors: UserError for what is no name of a class, or the name of something else in a written file."""
    if not class_name.isidentifier() or keyword.iskeyword(class_name):
        raise UserError(class_name, "a name for a Python class, such as MyNorm")
    taken = {"torch", "nn", "Tensor", "over_group", "over_channel_group", *HELPERS}
    if class_name in taken:
        raise UserError(class_name, "a class name that the file does not use otherwise", class_name.title())


@dataclass
class _Draft:
    """The body of `forward` as it grows. text, binding, size: of every value's expression, by id. over_space: whether
    something is reduced over space alone."""

    graph: LayerGraph
    layout: str
    buffers: dict[int, str]
    text: dict[int, str] = field(default_factory=dict)
    binding: dict[int, int] = field(default_factory=dict)
    size: dict[int, int] = field(default_factory=dict)
    constants: dict[int, float] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    items: list[str | _Batch] = field(default_factory=list)
    helpers: set[str] = field(default_factory=set)
    over_space: bool = False
    result: str = ""

    def put(self, id: int, text: str, binding: int = ATOM, size: int = 0) -> None:
        self.text[id], self.binding[id], self.size[id] = text, binding, size

    def operand(self, id: int, binding: int) -> str:
        """The value's expression, in brackets unless it binds at least as tightly as `binding`."""
        return self.text[id] if self.binding[id] >= binding else f"({self.text[id]})"

    def fresh(self, name: str) -> str:
        """`name`, or with a number if it is taken."""
        self.names[name] = self.names.get(name, 0) + 1
        return name if self.names[name] == 1 else f"{name}_{self.names[name]}"

    def name(self, id: int) -> None:
        """Give the value a line and a name of its own."""
        op = self.graph.node(id).op
        name = self.fresh(WORDS.get(op, f"{op}_value"))
        self.items.append(f"{name} = {self.text[id]}")
        self.put(id, name)

    def tensor(self, id: int) -> str:
        """The value's expression as a tensor where a plain number will not do."""
        if id not in self.constants:
            return self.text[id]
        number = self.constants[id]
        return "x.new_zeros(())" if number == 0 else f"x.new_full((), {self.text[id]})"


@dataclass
class _Batch:
    """A batch aggregate: lines in training, lines in evaluation, lines after both; `defines` are their names."""

    training: list[str]
    evaluation: list[str]
    after: list[str]
    defines: set[str]


def _draft(graph: LayerGraph, layout: str, buffers: dict[int, str]) -> _Draft:
    """Expressions and lines for the live nodes."""
    draft = _Draft(graph, layout, buffers)
    for id in (X, V0, V1):
        draft.put(id, LEAVES[id])
    shapes = patterns(graph)
    uses: dict[int, int] = {}
    for _, node in graph.live_nodes:
        for source in node.inputs:
            uses[source] = uses.get(source, 0) + 1
    reduced = {node.inputs[0] for id, node in graph.live_nodes if node.aggregate}
    if ZERO in graph.live:
        _put_constant(draft, ZERO)
    for id, node in graph.live_nodes:
        if not node.inputs:
            draft.put(id, node.op)
        elif all(source in draft.constants for source in node.inputs):
            _put_constant(draft, id)
        elif node.aggregate:
            spread = shapes[node.inputs[0]].channel
            _put_aggregate(draft, id, node, spread, buffers.get(id))
        else:
            if len(node.inputs) == 2 and sum(len(draft.text[source]) for source in node.inputs) > LONGEST:
                draft.name(max(node.inputs, key=draft.size.__getitem__))
            _put_elementwise(draft, id, node)
            large = draft.size[id] > LARGEST or len(draft.text[id]) > LONGEST
            if uses.get(id, 0) > 1 or id in reduced or (large and id != graph.output):
                draft.name(id)
    _put_result(draft, shapes[graph.output].full)
    return draft


def _put_constant(draft: _Draft, id: int) -> None:
    """Values that depend on neither input nor parameters become numbers."""
    probe = torch.zeros(1, 1, 1, dtype=torch.float64)
    if id == ZERO:
        number = 0.0
    else:
        number = evaluate(replace(draft.graph, output=id, affine=False), probe, layout=draft.layout).item()
    draft.constants[id] = number
    if math.isfinite(number):
        draft.put(id, repr(number), UNARY if math.copysign(1.0, number) < 0 else ATOM)
    else:
        draft.put(id, f'float("{number}")')


def _put_elementwise(draft: _Draft, id: int, node: Node) -> None:
    op, inputs = node.op, node.inputs
    first = inputs[0]
    size = 1 + sum(draft.size[source] for source in inputs)
    if op in ("add", "sub", "mul", "div"):
        sign, binding = {"add": ("+", SUM), "sub": ("-", SUM), "mul": ("*", PRODUCT), "div": ("/", PRODUCT)}[op]
        right = draft.operand(inputs[1], binding + 1)  # brackets keep the order of the graph's roundings
        if op == "add" and right.startswith("-"):
            sign, right = "-", right[1:]
        if op == "div" and node.eps:
            draft.helpers.add("guarded")
            right = f"guarded({draft.tensor(inputs[1])}, {node.eps!r})"
        draft.put(id, f"{draft.operand(first, binding)} {sign} {right}", binding, size)
    elif op in ("max", "min"):
        name = {"max": "torch.maximum", "min": "torch.minimum"}[op]
        draft.put(id, f"{name}({draft.tensor(first)}, {draft.tensor(inputs[1])})", ATOM, size)
    elif op == "neg":
        draft.put(id, f"-{draft.operand(first, UNARY)}", UNARY, size)
    elif op in ("log", "sqrt"):
        draft.helpers.add(f"signed_{op}")
        draft.put(id, f"signed_{op}({draft.text[first]}, {node.eps!r})", ATOM, size)
    elif op == "rsqrt":
        draft.put(id, f"({draft.operand(first, ATOM)}.abs() + {node.eps!r}).rsqrt()", ATOM, size)
    elif op in ("abs", "square"):
        draft.put(id, f"{draft.operand(first, ATOM)}.{op}()", ATOM, size)
    elif op == "exp" and node.clamp is not None:
        draft.put(id, f"torch.exp({draft.operand(first, ATOM)}.clamp(max={node.clamp!r}))", ATOM, size)
    elif op == "reciprocal":
        draft.helpers |= {"guarded"} if node.eps else set()
        text = f"guarded({draft.text[first]}, {node.eps!r})" if node.eps else draft.operand(first, ATOM)
        draft.put(id, f"1 / {text}", PRODUCT, size)
    elif op == "logabs":
        draft.put(id, f"({draft.operand(first, ATOM)}.abs() + {node.eps!r}).log()", ATOM, size)
    elif op == "pow":
        base = f"{draft.tensor(first)}" if not node.eps else f"({draft.tensor(first)}).abs() + {node.eps!r}"
        draft.put(id, f"torch.pow({base}, {draft.tensor(inputs[1])})", ATOM, size)
    elif op in POINTWISE:
        _put_pointwise(draft, id, node, size)
    elif op == "softplus":
        draft.put(id, f"nn.functional.softplus({draft.text[first]})", ATOM, size)
    else:
        draft.put(id, f"torch.{op}({draft.text[first]})", ATOM, size)


def _put_pointwise(draft: _Draft, id: int, node: Node, size: int) -> None:
    """A function of `pointwise.UNARY`, its input clamped and lifted as there."""
    first, function = node.inputs[0], POINTWISE[node.op]
    if node.op == "identity":
        draft.put(id, draft.text[first], draft.binding[first], draft.size[first])
        return
    inside = draft.operand(first, UNARY if node.op in ("hardsigmoid", "sinc") else SUM)
    if node.clamp is not None:
        bounds = f"max={node.clamp!r}"
        if node.op in ("sinh", "cosh"):
            bounds = f"-{abs(node.clamp)!r}, {abs(node.clamp)!r}"
        inside = f"{draft.operand(first, ATOM)}.clamp({bounds})"
    if node.op == "gaussian":
        draft.helpers.add("gaussian")
    if function.wide:
        draft.helpers.add("wide")
        text = function.source.format(a=f"wide({inside})") + ".to(x.dtype)"
    else:
        text = function.source.format(a=inside)
    draft.put(id, text, ATOM, size)


def _put_aggregate(draft: _Draft, id: int, node: Node, spread: int, buffer: str | None) -> None:
    """spread: how far the aggregate's input varies over channels; groups of equal channels are plain."""
    value = draft.text[node.inputs[0]]
    axes = node.axes
    if axes == "group" and spread == NONE:
        axes = "instance"
    moment = MOMENT[node.op]
    draft.helpers |= {"wide", moment}
    if axes == "group" or (axes == "channel-group" and spread != NONE):
        helper = "over_" + axes.replace("-", "_")
        draft.helpers.add(helper)
        call = f"{helper}({moment}, {value}, self.groups)"
    else:
        call = f"{moment}({value}, {DIMS[draft.layout][axes]})"
        draft.over_space |= axes == "instance"
    name = draft.fresh(f"{node.axes.replace('-', '_')}_{node.op}")
    if buffer is None:
        if len(call) > LONGEST - 12:
            draft.items.append(f"{name} = {call}")
            call = name
        draft.items.append(f"{name} = {_finished(node, call)}")
    else:
        known = "batch_" + moment + buffer.removeprefix(buffer.rstrip("_0123456789"))
        tracked = known
        training = [f"{known} = {call}"]
        if draft.graph.unbiased and node.op == "std":
            training.append(f"count = {value}.numel() // {known}.numel()")
            tracked = f"{known} * (count / max(count - 1, 1))"
        training.append(f"self.track(self.{buffer}, {tracked})")
        view = f"self.{buffer}.view(shape)"
        block = _Batch(training, [f"{known} = {view}"], [f"{name} = {_finished(node, known)}"], {known, name})
        last = draft.items[-1] if draft.items else None
        if isinstance(last, _Batch) and value not in last.defines:
            last.training += block.training
            last.evaluation += block.evaluation
            last.after += block.after
            last.defines |= block.defines
        else:
            draft.items.append(block)
    draft.put(id, name)


def _finished(node: Node, moment: str) -> str:
    return f"({moment} + {node.eps!r}).sqrt().to(x.dtype)" if node.op in ("rms", "std") else f"{moment}.to(x.dtype)"


def _put_result(draft: _Draft, full: bool) -> None:
    graph = draft.graph
    out = graph.output
    if out in draft.constants:
        draft.put(out, f"torch.full_like(x, {draft.text[out]})")
    elif not full:
        draft.put(out, f"{draft.operand(out, ATOM)}.expand_as(x)")
    if not graph.affine:
        draft.result = draft.text[out]
    else:
        if draft.size[out] > LARGEST // 2 or len(draft.text[out]) > LONGEST // 2:
            draft.items.append(f"y = {draft.text[out]}")
            draft.put(out, "y")
        draft.result = f"{draft.operand(out, PRODUCT)} * weight + bias"
    if any(node.op in WIDENS and id not in draft.constants for id, node in graph.live_nodes):
        draft.result = f"({draft.result}).to(x.dtype)"


# -- the class ---------------------------------------------------------------------------------------------------


def _class(class_name: str, channels: int | None, formula: str, draft: _Draft, zero_init_gamma: bool) -> list[str]:
    graph = draft.graph
    shape = "[B, C, ...]" if draft.layout == "channels-first" else "[B, N, C]"
    affine = ", then weight and bias per channel" if graph.affine else ""
    about = textwrap.wrap(f"{_escaped(formula)}{affine}.", 112, break_long_words=False, break_on_hyphens=False)
    lines = [
        f"class {class_name}(nn.Module):",
        f'    """{about[0]}',
        *(f"    {line}" for line in about[1:]),
        "",
        f"    Input and output {shape}. Layer graph {graph.stable_hash()[:16]} (nasforge).",
    ]
    if draft.buffers:
        lines.append("    Batch statistics are those of one process; evaluation uses running ones.")
    lines += ['    """', ""]
    lines += _constructor(graph, channels, draft, zero_init_gamma)
    if draft.buffers:
        lines += _tracking(draft)
    return lines + _forward(draft)


def _over(axes: str) -> str:
    return "over_" + axes.replace("-", "_")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"""', "'''")


def _constructor(graph: LayerGraph, channels: int | None, draft: _Draft, zero_init_gamma: bool) -> list[str]:
    arguments = ["self", "channels: int" + (f" = {channels}" if channels is not None else "")]
    grouped = bool({"over_group", "over_channel_group"} & draft.helpers)
    if grouped:
        sized = graph.group_size is not None
        arguments.append(f"group_size: int = {graph.group_size}" if sized else f"groups: int = {graph.groups}")
    buffers = draft.buffers
    if buffers and graph.momentum is not None:
        arguments.append(f"momentum: float = {graph.momentum!r}")
    lines = [f"    def __init__({', '.join(arguments)}):", "        super().__init__()"]
    if grouped:
        if graph.group_size is not None:
            lines.append("        groups = max(1, channels // group_size)")
        lines.append("        # The largest divisor of the channels that is not above `groups`.")
        lines.append("        self.groups = max(g for g in range(1, min(groups, channels) + 1) if channels % g == 0)")
    if buffers and graph.momentum is not None:
        lines.append("        self.momentum = momentum")
    for name in parameter_names(graph):
        initial = (
            "ones" if name == "v1" or name in PARAMETERS or (name == "weight" and not zero_init_gamma) else "zeros"
        )
        lines.append(f"        self.{name} = nn.Parameter(torch.{initial}(channels))")
    for name in buffers.values():
        lines.append(f'        self.register_buffer("{name}", torch.{_begin(name)}(channels))')
    if buffers and graph.momentum is None:
        lines.append('        self.register_buffer("num_batches_tracked", torch.tensor(0))')
    return [*lines, ""]


def _begin(buffer: str) -> str:
    return "zeros" if buffer.startswith("running_mean") else "ones"


def _tracking(draft: _Draft) -> list[str]:
    graph = draft.graph
    share = "/ self.num_batches_tracked" if graph.momentum is None else "* self.momentum"
    lines = [
        "    def track(self, running: Tensor, moment: Tensor) -> None:",
        '        """Move a running statistic towards that of the batch."""',
        f"        running += (moment.detach().flatten() - running) {share}",
        "",
        "    def reset_running_stats(self) -> None:",
        '        """Running statistics as they begin."""',
    ]
    for name in draft.buffers.values():
        lines.append(f"        self.{name}.{'zero_()' if _begin(name) == 'zeros' else 'fill_(1)'}")
    if graph.momentum is None:
        lines.append("        self.num_batches_tracked.zero_()")
    return [*lines, ""]


def _forward(draft: _Draft) -> list[str]:
    graph = draft.graph
    body: list[str] = []
    for item in draft.items:
        if isinstance(item, str):
            body.append(item)
        else:
            body += ["if self.training:", *("    " + line for line in item.training)]
            body += ["else:", *("    " + line for line in item.evaluation), *item.after]
    body.append(f"return {draft.result}")
    first = draft.layout == "channels-first"
    names = parameter_names(graph)
    used = "\n".join(body)
    start = []
    if first and draft.over_space:
        start += ["if x.dim() < 3:", '    raise ValueError(f"expected [B, C, ...] with space, got {tuple(x.shape)}")']
    if first and "space)" in used:
        start.append("space = tuple(range(2, x.dim()))")
    if names or "(shape)" in used:
        start.append("shape = (1, -1) + (1,) * (x.dim() - 2)" if first else "shape = (1, 1, -1)")
    start += [f"{name} = self.{name}.to(x.dtype).view(shape)" for name in names]
    if graph.momentum is None and draft.buffers:
        start += ["if self.training:", "    self.num_batches_tracked += 1"]
    return ["    def forward(self, x: Tensor) -> Tensor:", *("        " + line for line in [*start, *body])]
