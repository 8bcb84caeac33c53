"""LayerGraph: construction, JSON, identity, and everything that is no such graph."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from layer_reference import live_graphs, random_graph, reference

from search_spaces.common.errors import UserError
from search_spaces.layers.graph import LEAVES, LayerGraph, Node, make_node
from search_spaces.layers.ops import preset, split_name

B0 = LayerGraph(
    (
        make_node("std-batch", (0,)),
        make_node("std-instance", (0,)),
        make_node("mul", (3, 0)),
        make_node("add", (6, 5)),
        make_node("max", (4, 7)),
        make_node("div", (0, 8), 0.0),
    ),
    output=9,
)


def test_json_round_trip(rng):
    for _ in range(200):
        graph = random_graph(rng, groups=int(rng.integers(1, 40)), momentum=None, unbiased=True, group_size=3)
        assert LayerGraph.from_json(graph.to_json()) == graph
        assert LayerGraph.from_json(json.dumps(graph.to_json())) == graph
    clamped = LayerGraph((make_node("exp", (0,), clamp=30.0), make_node("log", (4,), 1e-3)), 5, affine=False)
    assert LayerGraph.from_json(json.dumps(clamped.to_json())) == clamped


def test_live_nodes():
    dead = LayerGraph(
        (make_node("tanh", (0,)), *(replace(n, inputs=tuple(map(shift, n.inputs))) for n in B0.nodes)), 10
    )
    assert dead.live == (0, 3, 5, 6, 7, 8, 9, 10)
    assert dead.compact() == B0
    assert B0.compact() == B0
    assert B0.batch_aggregates() == [4]
    assert LayerGraph((), 0).live == (0,)
    assert LayerGraph((), 1).depends_on_x == {0}


def shift(id: int) -> int:
    """The id of a value after one node more was put behind the leaves."""
    return id if id < len(LEAVES) else id + 1


def insert_dead(graph: LayerGraph, rng: np.random.Generator) -> LayerGraph:
    """The same layer with a dead node somewhere."""
    at = int(rng.integers(len(graph.nodes) + 1))
    moved = [replace(n, inputs=tuple(i + (i >= len(LEAVES) + at) for i in n.inputs)) for n in graph.nodes]
    nodes = (*moved[:at], make_node("tanh", (0,)), *moved[at:])
    return replace(graph, nodes=nodes, output=graph.output + (graph.output >= len(LEAVES) + at))


def test_the_hash_ignores_dead_nodes_and_nothing_else(rng):
    seen = {}
    for graph in live_graphs(rng, 100):
        other = insert_dead(insert_dead(graph, rng), rng)
        assert other.nodes != graph.nodes
        assert other.stable_hash() == graph.stable_hash()
        seen.setdefault(graph.stable_hash(), graph.compact())
        assert seen[graph.stable_hash()] == graph.compact()
    changed = [
        replace(B0, affine=False),
        replace(B0, groups=16),
        replace(B0, group_size=8),
        replace(B0, momentum=0.01),
        replace(B0, unbiased=True),
        replace(B0, output=8),
        replace(B0, nodes=(replace(B0.nodes[0], eps=1e-3), *B0.nodes[1:])),
    ]
    assert len({g.stable_hash() for g in (B0, *changed)}) == len(changed) + 1


def test_the_hash_is_the_same_in_another_process():
    code = (
        "import sys; from search_spaces.layers.graph import *; print(LayerGraph.from_json(sys.argv[1]).stable_hash())"
    )
    command = [sys.executable, "-c", code, json.dumps(B0.to_json())]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == B0.stable_hash()


def test_dependence_on_x_is_what_a_perturbation_shows(rng):
    """A node that does not depend on x has the same value for every x (the other way round, x - x would fool us)."""
    x, other = rng.normal(size=(2, 2, 4, 3))
    params = {"v0": rng.normal(size=4), "v1": rng.normal(size=4)}
    for _ in range(100):
        graph = random_graph(rng)
        if graph.output not in graph.depends_on_x:
            np.testing.assert_array_equal(reference(graph, x, params), reference(graph, other, params))
    assert LayerGraph((make_node("add", (2, 3)), make_node("mul", (4, 0))), 5).depends_on_x == {0, 5}


def changed(**fields):
    return {**B0.to_json(), **fields}


def with_node(entry):
    return changed(nodes=[entry, *B0.to_json()["nodes"][1:]])


MALFORMED = {
    "text": ("{not json", "a layer as JSON"),
    "list": ([], "a JSON object with `nodes` and `output`"),
    "nothing": ({}, "a JSON object with `nodes` and `output`"),
    "no output": ({"nodes": []}, "a JSON object with `nodes` and `output`"),
    "nodes": (changed(nodes={}), "a JSON object with `nodes`"),
    "format": (changed(format=2), "update nasforge"),
    "format text": (changed(format="new"), "format 1"),
    "field": (changed(afine=True), "did you mean 'affine'"),
    "output range": (changed(output=10), "values 0 to 9"),
    "output negative": (changed(output=-1), "values 0 to 9"),
    "output text": (changed(output="9"), "values 0 to 9"),
    "output bool": (changed(output=True), "values 0 to 9"),
    "groups": (changed(groups=0), "positive number of groups"),
    "groups text": (changed(groups="32"), "positive number of groups"),
    "group size": (changed(group_size=-4), "positive group size"),
    "momentum": (changed(momentum=1.5), "momentum from 0 to 1"),
    "momentum text": (changed(momentum="a"), "momentum from 0 to 1"),
    "affine": (changed(affine="yes"), "true or false as `affine`"),
    "unbiased": (changed(unbiased=1), "true or false as `unbiased`"),
    "no object": (with_node("add"), "an object with `op` and `inputs`"),
    "no op": (with_node({"inputs": [0]}), "an object with `op`"),
    "no inputs": (with_node({"op": "tanh"}), "`inputs` as a list of ids"),
    "inputs text": (with_node({"op": "tanh", "inputs": "0"}), "a list of ids"),
    "operation": (with_node({"op": "sigmod", "inputs": [0]}), "did you mean 'sigmoid'"),
    "axes": (with_node({"op": "std-grup", "inputs": [0]}), "did you mean 'std-group'"),
    "no axes": (with_node({"op": "std", "inputs": [0]}), "a moment with its axes, such as std-group"),
    "axes of add": (with_node({"op": "add-batch", "inputs": [0, 0]}), "a primitive"),
    "arity": (with_node({"op": "add", "inputs": [0]}), "2 inputs of add, found 1"),
    "cycle": (with_node({"op": "tanh", "inputs": [4]}), "no cycles"),
    "later": (with_node({"op": "tanh", "inputs": [7]}), "no cycles"),
    "negative input": (with_node({"op": "tanh", "inputs": [-1]}), "inputs among the earlier values"),
    "input bool": (with_node({"op": "tanh", "inputs": [True]}), "inputs among the earlier values"),
    "input text": (with_node({"op": "tanh", "inputs": ["x"]}), "inputs among the earlier values"),
    "node field": (with_node({"op": "tanh", "inputs": [0], "epsilon": 1}), "a field of node 4"),
    "eps negative": (with_node({"op": "log", "inputs": [0], "eps": -1e-5}), "an eps of at least 0 at node 4"),
    "eps nan": (with_node({"op": "log", "inputs": [0], "eps": float("nan")}), "an eps of at least 0"),
    "eps text": (with_node({"op": "log", "inputs": [0], "eps": "small"}), "an eps of at least 0"),
    "eps nowhere": (with_node({"op": "tanh", "inputs": [0], "eps": 1e-5}), "tanh has no guard"),
    "clamp": (with_node({"op": "exp", "inputs": [0], "clamp": "30"}), "no clamp, or a finite one of exp"),
    "clamp nowhere": (with_node({"op": "tanh", "inputs": [0], "clamp": 30}), "a finite one of exp"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_json(kind):
    data, expected = MALFORMED[kind]
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        LayerGraph.from_json(data)
    assert "\n" not in str(error.value)
    if isinstance(data, dict):
        with pytest.raises(UserError):
            LayerGraph.from_json(json.dumps(data))


def test_malformed_nodes():
    with pytest.raises(UserError, match="with its axes"):
        LayerGraph((Node("std", (0,)),), 4)
    with pytest.raises(UserError, match="apart from its operation"):
        LayerGraph((Node("std-group", (0,)),), 4)
    with pytest.raises(UserError, match="a primitive"):
        LayerGraph((Node("std", (0,), axes="everything"),), 4)
    with pytest.raises(UserError, match="at least one channel"):
        B0.group_count(0)


def test_names_of_operations():
    for name in preset("extended"):
        op, axes = split_name(name)
        assert make_node(name, [0] * (2 if name in ("add", "mul", "div", "max", "min", "sub") else 1)).name == name
        assert axes == name.removeprefix(op).removeprefix("-")
    with pytest.raises(UserError, match="did you mean 'evonorm24'"):
        preset("evonorm42")
