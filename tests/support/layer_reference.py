"""What a LayerGraph means, a second time: NumPy, float64, every value expanded to the input's full shape."""

from __future__ import annotations

import numpy as np
from scipy import special

from search_spaces.layers.graph import LEAVES, LayerGraph, Node, make_node
from search_spaces.layers.ops import arity, preset, split_name
from search_spaces.layers.patterns import with_guards


def full_values(graph: LayerGraph, x: np.ndarray, params: dict[str, np.ndarray]) -> dict[int, np.ndarray]:
    """Every live value of the graph, each [B, C, S], for x of that shape."""
    channels = x.shape[1]
    ones = np.ones_like(x)
    values = {0: x, 1: 0 * ones}
    values[2] = params.get("v0", np.zeros(channels))[None, :, None] * ones
    values[3] = params.get("v1", np.ones(channels))[None, :, None] * ones
    with np.errstate(all="ignore"):
        for id, node in graph.live_nodes:
            inputs = [values[i] for i in node.inputs]
            if node.axes:
                values[id] = moment(node, inputs[0], graph)
            else:
                values[id] = pointwise(node, *inputs)
    return values


def reference(graph: LayerGraph, x: np.ndarray, params: dict[str, np.ndarray], tokens: bool = False) -> np.ndarray:
    """The output for x [B, C, ...] or [B, N, C], parameters [C]."""
    first = np.moveaxis(x, -1, 1) if tokens else x
    flat = first.reshape(*first.shape[:2], -1)
    out = full_values(graph, flat, params)[graph.output]
    if graph.affine:
        out = out * params.get("weight", np.ones(flat.shape[1]))[None, :, None]
        out = out + params.get("bias", np.zeros(flat.shape[1]))[None, :, None]
    out = out.reshape(first.shape)
    return np.moveaxis(out, 1, -1) if tokens else out


def pointwise(node: Node, a: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    eps = node.eps
    if node.op == "div":
        return a / (b + np.copysign(eps, np.where(b == 0, 1.0, b)))
    if node.op == "exp" and node.clamp is not None:
        a = np.minimum(a, node.clamp)
    formulas = {
        "add": lambda: a + b,
        "mul": lambda: a * b,
        "sub": lambda: a - b,
        "max": lambda: np.where(a > b, a, b),
        "min": lambda: np.where(a < b, a, b),
        "neg": lambda: -a,
        "sigmoid": lambda: special.expit(a),
        "tanh": lambda: np.tanh(a),
        "exp": lambda: np.exp(a),
        "log": lambda: np.sign(a) * np.log(np.abs(a) + eps),
        "abs": lambda: np.abs(a),
        "square": lambda: a**2,
        "sqrt": lambda: np.sign(a) * np.sqrt(np.abs(a) + eps),
        "rsqrt": lambda: 1 / np.sqrt(np.abs(a) + eps),
        "erf": lambda: special.erf(a),
        "softplus": lambda: np.logaddexp(a, 0),
    }
    return formulas[node.op]()


def moment(node: Node, a: np.ndarray, graph: LayerGraph) -> np.ndarray:
    """An aggregate by a loop over its cells: the elements of a cell share one value."""
    batch, channels, space = a.shape
    if graph.group_size is None:
        groups = next(g for g in range(min(graph.groups, channels), 0, -1) if channels % g == 0)
    else:
        most = max(channels // graph.group_size, 1)
        groups = next(g for g in range(most, 0, -1) if channels % g == 0)
    of_group = np.arange(channels) // (channels // groups)
    everywhere = slice(None)
    cells = {
        "batch": [(everywhere, c, everywhere) for c in range(channels)],
        "layer": [(b,) for b in range(batch)],
        "instance": [(b, c) for b in range(batch) for c in range(channels)],
        "group": [(b, of_group == g) for b in range(batch) for g in range(groups)],
        "channel": [(b, everywhere, s) for b in range(batch) for s in range(space)],
        "channel-group": [(b, of_group == g, s) for b in range(batch) for g in range(groups) for s in range(space)],
    }[node.axes]
    out = np.empty_like(a)
    for cell in cells:
        values = a[cell]
        if node.op == "mean":
            out[cell] = values.mean()
        elif node.op == "rms":
            out[cell] = np.sqrt((values**2).mean() + node.eps)
        elif node.op == "std":
            out[cell] = np.sqrt(values.var() + node.eps)
        else:
            out[cell] = np.abs(values).mean()
    return out


def random_graph(rng: np.random.Generator, primitives: str = "extended", size: int = 10, **settings) -> LayerGraph:
    """`size` operations drawn uniformly from a preset on inputs drawn uniformly from what is there."""
    nodes: list[Node] = []
    names = preset(primitives)
    for id in range(len(LEAVES), len(LEAVES) + size):
        name = names[rng.integers(len(names))]
        nodes.append(make_node(name, [int(i) for i in rng.integers(id, size=arity(split_name(name)[0]))]))
    return with_guards(LayerGraph(tuple(nodes), len(LEAVES) + size - 1, **settings))


def live_graphs(rng: np.random.Generator, count: int, primitives: str = "extended", size: int = 10, **settings):
    """`count` random graphs whose output depends on x."""
    found = []
    while len(found) < count:
        graph = random_graph(rng, primitives, size, **settings)
        if graph.output in graph.depends_on_x:
            found.append(graph)
    return found
