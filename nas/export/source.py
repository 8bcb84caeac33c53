"""Readable Python source of a whole network: torch only, with the state dict of the model it was written from."""

from __future__ import annotations

import ast
import textwrap

import torch
from torch import nn

from nas.export.source_blocks import Writer
from nas.export.source_cells import CELL_101, CELL_201, NORMAL_CELL, REDUCTION_CELL
from nas.export.source_graph import NODE, Convolutions, graph_kind, graph_network
from nas.export.source_graph_parts import CONVOLUTIONS, FUNCTIONS
from nas.export.source_kinds import BLOCKS, SEPARABLE
from nas.export.source_leaves import unknown_module
from nas.export.source_networks import image_kinds, image_network, is_image_network
from search_spaces.cells.nas_bench_graph_network import GraphNetwork
from search_spaces.common.errors import UserError
from search_spaces.layers.source import check_class_name
from search_spaces.layers.source_parts import HELPERS

_BLOCKS = list(BLOCKS.values())
ORDER = [*_BLOCKS[:3], SEPARABLE, *_BLOCKS[3:], CELL_201, CELL_101, NORMAL_CELL, REDUCTION_CELL, NODE]
OWN_NAMES = {kind.name for kind in ORDER} | {*CONVOLUTIONS, *FUNCTIONS, *HELPERS}
OWN_NAMES |= {"F", "Tensor", "nn", "torch", "as_image", "largest_divisor", "over_group", "over_channel_group"}


def network_source(
    model: nn.Module,
    *,
    class_name: str = "Network",
    example: tuple[int, int, int] = (3, 32, 32),
    title: str | None = None,
) -> str:
    """The source of a file that defines the network `model` as class `class_name`; it needs torch alone.

    model: a network that one of the spaces built, with any normalisation and activation out of torch.nn, our
    primitives and graph layers. example: channels, height and width of an image, for the docstring. title: what the
    docstring says it is, such as space and architecture. `class_name()` has the state dict of the model, keys, shapes
    and order, and computes the same; its weights begin random. Graph layers take batch statistics of their own
    process only. Errors: UserError for a name that is no class name or that the file needs, and for a model with a
    module that cannot be written.
    """
    check_class_name(class_name)
    if class_name in OWN_NAMES:
        raise UserError(class_name, "a class name that the file does not use otherwise", f"My{class_name}")
    if isinstance(model, GraphNetwork):
        body = _graph_file(model, class_name)
        usage = "logits = model(x, edge_index)  # x [nodes, features], edge_index [2, edges]: from, to"
    elif is_image_network(model):
        body = _image_file(model, class_name)
        usage = f"logits = model(torch.randn(8, {', '.join(map(str, example))}))"
    else:
        raise unknown_module(model)
    tree = ast.parse("\n".join(body.lines))
    source = "\n".join([*_head(class_name, title, usage), *_imports(tree, body.imports), *body.lines]) + "\n"
    _check(source, class_name, model)
    return source


class _Body:
    """The definitions of a file and the imports of copied ones."""

    def __init__(self, writer: Writer, functions: dict[str, str], classes: list[str]):
        leaves = writer.leaves
        functions = {**functions, **leaves.functions}
        texts = [*leaves.copies.texts.values(), *functions.values(), *leaves.classes.values(), *classes]
        self.lines: list[str] = []
        constant = None  # whether the definition before is one; None behind the imports
        for text in dict.fromkeys(texts):
            before, constant = constant, not text.lstrip().startswith(("def ", "class ", "@"))
            blank = {None: 1, True: 0, False: 2}[before] if constant else 2
            self.lines += [*[""] * blank, *text.strip("\n").split("\n")]
        self.imports = leaves.copies.imports


def _image_file(model: nn.Module, class_name: str) -> _Body:
    writer = Writer(model, image_kinds(model), {class_name, *OWN_NAMES})
    network = image_network(model, class_name, _about(model), writer)
    return _Body(writer, {}, [*writer.classes(ORDER), "\n".join(network)])


def _about(model: nn.Module) -> str:
    """What the network's docstring says it is."""
    count = len(model.stages())  # type: ignore[operator]
    return f"Stem, {count} cells, global average pooling, classifier."


def _graph_file(model: GraphNetwork, class_name: str) -> _Body:
    writer = Writer(model, graph_kind, {class_name, *OWN_NAMES})
    convolutions = Convolutions(writer)
    about = "Computing nodes, each on the output of an earlier one; those that feed none are concatenated."
    network = graph_network(model, class_name, about, writer, convolutions)
    functions = {name: text for name, text in FUNCTIONS.items() if name in convolutions.functions}
    return _Body(writer, functions, [*convolutions.texts.values(), *writer.classes(ORDER), "\n".join(network)])


def _head(class_name: str, title: str | None, usage: str) -> list[str]:
    title = (title or f"{class_name}: a network for PyTorch").strip().rstrip(".").replace("\\", "\\\\")
    first, *others = textwrap.wrap(
        title.replace('"""', "'''") + ".", 112, break_long_words=False, break_on_hyphens=False
    )
    return [
        f'"""{first}',
        *others,
        "",
        "Written out by nasforge; it needs torch only. Weights begin random; trained ones load by name:",
        "",
        f"    model = {class_name}()",
        '    model.load_state_dict(torch.load("weights.pt", weights_only=True))',
        f"    {usage}",
        '"""',
        "",
        "from __future__ import annotations",
        "",
    ]


def _imports(tree: ast.Module, copied: set[tuple[str, str, str]]) -> list[str]:
    """The import statements that the definitions need, standard library first."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    known = {
        ("torch", "", "torch"),
        ("torch.nn.functional", "", "F"),
        ("torch", "Tensor", "Tensor"),
        ("torch", "nn", "nn"),
    }
    wanted = {found[2]: found for found in [*sorted(copied), *known] if found[2] in used}
    blocks = []
    for of_torch in (False, True):
        chosen = sorted(found for found in wanted.values() if found[0].startswith("torch") == of_torch)
        lines = [f"import {m}" + (f" as {alias}" if alias != m else "") for m, name, alias in chosen if not name]
        for module in sorted({m for m, name, _ in chosen if name}):
            names = sorted(
                (n if n == alias else f"{n} as {alias}" for m, n, alias in chosen if m == module and n),
                key=lambda name: (not name.isupper(), not name[0].isupper(), name),
            )
            lines.append(f"from {module} import {', '.join(names)}")
        if lines:
            blocks.append(lines)
    return [line for i, lines in enumerate(blocks) for line in ([""] * (i > 0) + lines)]


def _check(source: str, class_name: str, model: nn.Module) -> None:
    """Make the written network without memory and compare its state and its modules with the model's.

    It catches models that somebody changed after they were built. Errors: UserError.
    """
    space: dict = {"__name__": class_name}
    exec(compile(source, f"{class_name}.py", "exec"), space)
    with torch.device("meta"):
        written = space[class_name]()
    shapes = [(name, tuple(value.shape)) for name, value in written.state_dict().items()]
    if shapes != [(name, tuple(value.shape)) for name, value in model.state_dict().items()]:
        raise unknown_module(model)
    modules = dict(written.named_modules())
    for name, module in model.named_modules():
        other = modules.get(name)
        written_so = other is not None and repr(other).split("(", 1)[1] == repr(module).split("(", 1)[1]
        if isinstance(module, nn.Conv2d | nn.Linear) and not written_so:
            raise unknown_module(module)
