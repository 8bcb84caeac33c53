"""Which axes a value varies over, and its sign: the types of layer graphs, found without numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from search_spaces.layers.graph import LEAVES, V0, V1, ZERO, LayerGraph, Node, X

NONE, GROUP, FULL = 0, 1, 2  # how far a value varies over channels


@dataclass(frozen=True, slots=True)
class Pattern:
    """Whether a value varies over the batch, over channels (not, by group, by channel) and over space."""

    batch: bool = False
    channel: int = NONE
    space: bool = False

    def join(self, other: Pattern) -> Pattern:
        """The pattern of an element-wise combination."""
        return Pattern(self.batch or other.batch, max(self.channel, other.channel), self.space or other.space)

    def reduced(self, axes: str) -> Pattern:
        """The pattern after an aggregate over `axes`."""
        if axes == "batch":
            return replace(self, batch=False, space=False)
        if axes == "instance":
            return replace(self, space=False)
        if axes == "layer":
            return Pattern(self.batch)
        if axes == "group":
            return Pattern(self.batch, min(self.channel, GROUP))
        if axes == "channel":
            return replace(self, channel=NONE)
        return replace(self, channel=min(self.channel, GROUP))  # channel-group

    @property
    def full(self) -> bool:
        """Whether it varies like an input."""
        return self.batch and self.space and self.channel == FULL


_LEAF = {X: Pattern(True, FULL, True), ZERO: Pattern(), V0: Pattern(channel=FULL), V1: Pattern(channel=FULL)}


def patterns(graph: LayerGraph) -> dict[int, Pattern]:
    """The pattern of every live value."""
    found: dict[int, Pattern] = {}
    for id in graph.live:
        if id < len(LEAVES):
            found[id] = _LEAF[id]
        else:
            node = graph.node(id)
            joined = Pattern() if node.inputs else _LEAF[V1]  # what has no inputs is a channel vector
            for source in node.inputs:
                joined = joined.join(found[source])
            found[id] = joined.reduced(node.axes) if node.aggregate else joined
    return found


UNKNOWN, NON_NEGATIVE, POSITIVE = 0, 1, 2
# Positive where their input is, and zero at zero.
SIGN_KEEPING = ("identity", "cube", "sinh", "expm1", "asinh", "atan", "elu", "selu", "silu", "softsign", "i1e")


def signs(graph: LayerGraph) -> dict[int, int]:
    """For every live value: POSITIVE, NON_NEGATIVE, or UNKNOWN. Positive values are bounded away from zero by an eps,
    or are images of exp and sigmoid."""
    found: dict[int, int] = {X: UNKNOWN, ZERO: NON_NEGATIVE, V0: UNKNOWN, V1: UNKNOWN}
    for id, node in graph.live_nodes:
        found[id] = node_sign(node, [found[i] for i in node.inputs])
    return found


def node_sign(node: Node, inputs: list[int]) -> int:
    """The sign of an operation's value from those of its inputs."""
    op = node.op
    if op in ("exp", "sigmoid", "softplus", "rsqrt", "ones", "cosh", "i0e") or (op in ("rms", "std") and node.eps > 0):
        return POSITIVE
    if op in ("abs", "square", "relu"):
        return max(inputs[0], NON_NEGATIVE)
    if op in ("zeros", "erfc", "hardsigmoid", "gaussian"):
        return NON_NEGATIVE
    if op in ("l1", "rms", "std"):
        return max(NON_NEGATIVE, inputs[0]) if op != "std" else NON_NEGATIVE
    if op == "add":
        return max(inputs) if min(inputs) >= NON_NEGATIVE else UNKNOWN
    if op == "max":
        return max(inputs)
    if op in ("mul", "min", "div"):
        return min(inputs)
    if op in ("mean", "sqrt", "tanh", "erf") or op in SIGN_KEEPING:
        return inputs[0]
    return UNKNOWN


def with_guards(graph: LayerGraph, eps: float = 1e-5) -> LayerGraph:
    """The graph with every division guarded by `eps` unless its denominator is provably positive (then by nothing).

    Dead divisions keep the guard. Graphs are guarded when they are made; executors never analyse.
    """
    known = signs(graph)
    nodes = []
    for node in graph.nodes:
        if node.op == "div":
            node = replace(node, eps=0.0 if known.get(node.inputs[1]) == POSITIVE else eps)
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes))
