"""LayerGraph: the computation graph of a normalisation-activation layer, with everything numeric in it."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.layers.ops import AGGREGATE_EPS, AXES, MOMENTS, OPERATIONS, PARAMETERS, arity, split_name

FORMAT = 1
LEAVES = ("x", "zero", "v0", "v1")  # ids 0 to 3: input, zeros, channel vectors that begin as zeros and ones
X, ZERO, V0, V1 = range(4)
# The operations that have an eps, and those that have a clamp.
GUARDED = ("div", "log", "sqrt", "rsqrt", "rms", "std", "reciprocal", "logabs", "pow")
CLAMPED = ("exp", "expm1", "sinh", "cosh")


@dataclass(frozen=True, slots=True)
class Node:
    """One operation on earlier values.

    axes: of an aggregate, one of ops.AXES. eps: of div a guard a / (b + sign0(b) eps) with sign0(0) = 1, of log and
    sqrt inside the logarithm and the root, of rms and std inside their root, of reciprocal as of div, of logabs
    ln(|a| + eps), of pow (|a| + eps)^b; an eps of 0 is the plain function. clamp: an upper bound of the input of exp
    and expm1, for sinh and cosh of its size. A parameter (`ops.PARAMETERS`) is a node without inputs.
    """

    op: str
    inputs: tuple[int, ...]
    axes: str = ""
    eps: float = 0.0
    clamp: float | None = None

    @property
    def name(self) -> str:
        """The operation with its axes, `std-group`."""
        return f"{self.op}-{self.axes}" if self.axes else self.op

    @property
    def aggregate(self) -> bool:
        """Whether it reduces over axes."""
        return bool(self.axes)


@dataclass(frozen=True)
class LayerGraph:
    """Intermediate nodes with ids from 4 on in topological order, and which value leaves the layer.

    nodes: dead ones are kept, they are neutral material for mutation. output: an id. affine: the output is followed
    by a per-channel weight and bias. groups: at most so many groups, the largest divisor of C not above it; or
    `group_size` channels each. momentum, unbiased: how batch aggregates keep running statistics (momentum None is a
    cumulative average; unbiased multiplies a running variance by n / (n - 1)).
    Errors: UserError for anything that is no such graph.
    """

    nodes: tuple[Node, ...]
    output: int
    affine: bool = True
    groups: int = 32
    group_size: int | None = None
    momentum: float | None = 0.1
    unbiased: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(self.nodes))
        for id, node in enumerate(self.nodes, len(LEAVES)):
            _check_node(id, node)
        values = len(LEAVES) + len(self.nodes)
        if isinstance(self.output, bool) or not isinstance(self.output, int) or not 0 <= self.output < values:
            raise UserError(self.output, f"an output among the values 0 to {values - 1}")
        if not _is_count(self.groups) or not (self.group_size is None or _is_count(self.group_size)):
            wrong = self.groups if not _is_count(self.groups) else self.group_size
            raise UserError(wrong, "a positive number of groups and a positive group size (or none)")
        if self.momentum is not None and not (_is_number(self.momentum) and 0 <= self.momentum <= 1):
            raise UserError(self.momentum, "a momentum from 0 to 1, or None")
        for name in ("affine", "unbiased"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(getattr(self, name), f"true or false as `{name}`")

    def node(self, id: int) -> Node:
        """The intermediate node of an id from 4 on."""
        return self.nodes[id - len(LEAVES)]

    @functools.cached_property
    def live(self) -> tuple[int, ...]:
        """The ids that the output depends on, leaves included, ascending."""
        needed = {self.output}
        for id in range(len(LEAVES) + len(self.nodes) - 1, len(LEAVES) - 1, -1):
            if id in needed:
                needed.update(self.node(id).inputs)
        return tuple(sorted(needed))

    @property
    def live_nodes(self) -> list[tuple[int, Node]]:
        """(id, node) of the live intermediate nodes in order."""
        return [(id, self.node(id)) for id in self.live if id >= len(LEAVES)]

    @functools.cached_property
    def depends_on_x(self) -> frozenset[int]:
        """The ids whose value depends on the input."""
        found = {X}
        for id, node in enumerate(self.nodes, len(LEAVES)):
            if found & set(node.inputs):
                found.add(id)
        return frozenset(found)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The live channel vectors beside v0 and v1 (`ops.PARAMETERS`), in their order."""
        live = {node.op for _, node in self.live_nodes}
        return tuple(name for name in PARAMETERS if name in live)

    def compact(self) -> LayerGraph:
        """The same layer without dead nodes."""
        ids = {id: id for id in range(len(LEAVES))}
        nodes: list[Node] = []
        for id, node in self.live_nodes:
            ids[id] = len(LEAVES) + len(nodes)
            nodes.append(replace(node, inputs=tuple(ids[i] for i in node.inputs)))
        return replace(self, nodes=tuple(nodes), output=ids[self.output])

    def group_count(self, channels: int) -> int:
        """How many groups `channels` fall into: the largest divisor not above `groups`, or by `group_size`."""
        if channels < 1:
            raise UserError(channels, "at least one channel")
        most = self.groups if self.group_size is None else max(1, channels // self.group_size)
        return max(g for g in range(1, min(most, channels) + 1) if channels % g == 0)

    def batch_aggregates(self) -> list[int]:
        """The live nodes that need running statistics in evaluation."""
        return [id for id, node in self.live_nodes if node.axes == "batch" and node.inputs[0] in self.depends_on_x]

    # -- JSON and identity -------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` inverts it exactly."""
        nodes: list[dict[str, Any]] = []
        for node in self.nodes:
            entry: dict[str, Any] = {"op": node.name, "inputs": list(node.inputs)}
            if node.eps:
                entry["eps"] = node.eps
            if node.clamp is not None:
                entry["clamp"] = node.clamp
            nodes.append(entry)
        about: dict[str, Any] = {"format": FORMAT, "nodes": nodes, "output": self.output, "affine": self.affine}
        about |= {"groups": self.groups, "group_size": self.group_size}
        return about | {"momentum": self.momentum, "unbiased": self.unbiased}

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> LayerGraph:
        """The graph that `to_json` wrote, as a mapping or as text. Errors: UserError naming the part that is wrong."""
        if isinstance(data, str):
            text = data
            try:
                data = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(text[:60], f"a layer as JSON ({error})") from None
        if not isinstance(data, Mapping) or not isinstance(data.get("nodes"), list) or "output" not in data:
            raise UserError("layer", "a JSON object with `nodes` and `output`")
        version = data.get("format", FORMAT)
        if not _is_count(version) or version > FORMAT:
            raise UserError(version, f"a layer of format {FORMAT} or older; update nasforge")
        known = {"format", "nodes", "output", "affine", "groups", "group_size", "momentum", "unbiased"}
        for key in data:
            if key not in known:
                raise UserError(key, f"a field of a layer ({one_of(sorted(known))})", nearest(str(key), known))
        nodes = [_node_from_json(id, entry) for id, entry in enumerate(data["nodes"], len(LEAVES))]
        rest = {k: v for k, v in data.items() if k not in ("format", "nodes", "output")}
        return cls(tuple(nodes), data["output"], **rest)

    def canonical_text(self) -> str:
        """The live graph as text: equal for graphs that differ in dead nodes and their numbering only."""
        return json.dumps(self.compact().to_json(), sort_keys=True, separators=(",", ":"))

    def stable_hash(self) -> str:
        """SHA-256 of `canonical_text`, the same on every machine."""
        return hashlib.sha256(self.canonical_text().encode()).hexdigest()


def make_node(name: str, inputs: Iterable[int], eps: float | None = None, clamp: float | None = None) -> Node:
    """A node by its concrete operation name (`std-group`), with the operation's default guard unless `eps` is given."""
    op, axes = split_name(name)
    if eps is None:
        eps = OPERATIONS[op].eps if op in OPERATIONS else AGGREGATE_EPS if op in ("rms", "std") else 0.0
    return Node(op, tuple(inputs), axes, eps, clamp)


def _check_node(id: int, node: Node) -> None:
    if node.axes:
        if node.op not in MOMENTS or node.axes not in AXES:
            split_name(node.name)
    elif node.op not in OPERATIONS:
        split_name(node.op)
        raise UserError(node.op, "the axes of a node apart from its operation")
    if len(node.inputs) != arity(node.op):
        raise UserError(f"node {id}", f"{arity(node.op)} inputs of {node.op}, found {len(node.inputs)}")
    for source in node.inputs:
        if isinstance(source, bool) or not isinstance(source, int) or not 0 <= source < id:
            raise UserError(f"node {id}", f"inputs among the earlier values 0 to {id - 1}, found {source} (no cycles)")
    if not (_is_number(node.eps) and node.eps >= 0):
        raise UserError(node.eps, f"an eps of at least 0 at node {id}")
    if node.eps and node.op not in GUARDED:
        raise UserError(node.eps, f"no eps at node {id}: {node.op} has no guard ({one_of(GUARDED)} have)")
    if node.clamp is not None and not (_is_number(node.clamp) and node.op in CLAMPED):
        raise UserError(node.clamp, f"at node {id} no clamp, or a finite one of {', '.join(CLAMPED)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _node_from_json(id: int, entry: Any) -> Node:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("op"), str):
        raise UserError(f"node {id}", "an object with `op` and `inputs`")
    inputs: Sequence[Any] = entry.get("inputs", ())
    if not isinstance(inputs, list):
        raise UserError(f"node {id}", "`inputs` as a list of ids")
    op, axes = split_name(entry["op"])
    for key in entry:
        if key not in ("op", "inputs", "eps", "clamp"):
            raise UserError(key, f"a field of node {id} (op, inputs, eps, clamp)")
    eps = entry.get("eps", 0.0)
    return Node(op, tuple(inputs), axes, float(eps) if _is_number(eps) else eps, entry.get("clamp"))
