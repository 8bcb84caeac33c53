"""One suite over every search space; one that is registered joins by itself, its small network by a line in SMALL."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from search_spaces import OpGraph, SearchSpace, UserError, load_space, space_names
from search_spaces.choice import find_choices, select, selected_state_dict
from search_spaces.layered import with_layers

IMAGE, GRAPH = {"in_channels": 2, "num_classes": 7}, {"in_features": 6, "num_classes": 7}
SMALL: dict[str, dict[str, Any]] = {  # arguments of `build` and `cost` that make small networks, of spaces of networks
    "nas-bench-101": {**IMAGE, "channels": 6, "cells_per_stage": 1},
    "nas-bench-201": {**IMAGE, "channels": 4, "cells_per_stage": 1},
    "nats-size": {**IMAGE, "stem_stride": 2},
    "nas-bench-macro": {**IMAGE, "channels": 2},
    "nas-bench-graph": {**GRAPH, "hidden": 8},
    "nas-bench-graph-proteins": {**GRAPH, "hidden": 8},
    "darts": {**IMAGE, "channels": 4, "layers": 3},
}
COST = {"params", "macs", "live_macs", "depth", "paths"}
ENUMERABLE = 50_000  # spaces up to this size are run through, of others the first architectures are taken


@dataclass(frozen=True)
class Case:
    name: str
    space: SearchSpace
    net: dict[str, Any] = field(default_factory=dict)

    def archs(self, count: int, seed: int = 0) -> list:
        rng = np.random.default_rng(seed)
        return [self.space.sample(rng) for _ in range(count)]

    @property
    def on_graphs(self) -> bool:
        return "in_features" in self.net

    def inputs(self) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        if self.on_graphs:
            return torch.randn(5, 6, generator=generator), torch.randint(5, (2, 12), generator=generator)
        return (torch.randn(2, 2, 8, 8, generator=generator),)

    def cost(self, arch) -> dict[str, int]:
        size = {"nodes": 5} if self.on_graphs else {"input_size": 8}
        return self.space.cost(arch, **size, **self.net)


PLAIN = [Case(name, load_space(name), SMALL.get(name, {})) for name in space_names()]
PRODUCTS = [
    Case(
        f"{case.name} with layers",
        with_layers(case.space, norms=["batch-norm", "layer-norm"], acts=["relu", "silu"]),
        case.net,
    )
    for case in PLAIN
    if case.name in ("nas-bench-201", "darts", "nas-bench-graph")
]
every_space = pytest.mark.parametrize("case", PLAIN + PRODUCTS, ids=lambda case: case.name)
every_network = pytest.mark.parametrize("case", [c for c in PLAIN + PRODUCTS if c.net], ids=lambda case: case.name)
plain_network = pytest.mark.parametrize("case", [c for c in PLAIN if c.net], ids=lambda case: case.name)
plain_space = pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)


def assert_valid(space: SearchSpace, arch) -> None:
    """`arch` is what its own text spells, and hashable."""
    assert space.decode(space.encode(arch)) == arch
    assert len({arch, space.decode(space.encode(arch))}) == 1


@plain_space
def test_name(case):
    assert case.space.name == case.name
    assert case.space.vocabulary[:2] == ("input", "output")
    assert len(set(case.space.vocabulary)) == len(case.space.vocabulary)


@every_space
def test_samples_are_valid_and_follow_the_generator(case):
    first = case.archs(30)
    for arch in first:
        assert_valid(case.space, arch)
    assert first == case.archs(30)
    assert first != case.archs(30, seed=1)
    assert len(set(first)) > 15


@every_space
def test_text_round_trips_exactly(case):
    for arch in case.archs(30):
        text = case.space.encode(arch)
        assert case.space.encode(case.space.decode(text)) == text
        assert case.space.decode(f" {text}\n") == arch


@every_space
def test_nonsense_is_refused(case):
    text = case.space.encode(case.archs(1, seed=2)[0])
    written = [op for op in case.space.vocabulary[2:] if op in text]
    misspelt = text.replace(written[0], written[0][:-1] + "q", 1) if written else "q" + text[1:]
    truncated = [text[:length] for length in range(len(text))]
    garbage = [text + extra for extra in ("x", "0", "|", " 1", ":", ",", text)]
    for wrong in ["", "nonsense", "0", "::::", "|~0|", "\x00", "٣" * 8, misspelt, *truncated, *garbage]:
        if wrong.strip() != text:
            with pytest.raises(UserError):
                pytest.fail(f"{wrong!r} was read as {case.space.decode(wrong)}")


@every_space
def test_mutations_are_valid_and_differ(case, rng):
    for arch in case.archs(10):
        for _ in range(5):
            child = case.space.mutate(arch, rng)
            assert_valid(case.space, child)
            assert child != arch
        assert case.space.mutate(arch, np.random.default_rng(3)) == case.space.mutate(arch, np.random.default_rng(3))


@every_space
def test_crossovers_are_valid(case, rng):
    archs = case.archs(12)
    try:
        children = [case.space.crossover(a, b, rng) for a, b in itertools.pairwise(archs) for _ in range(4)]
    except UserError:
        pytest.skip("no crossover")
    for child in children:
        assert_valid(case.space, child)
    assert set(children) - set(archs)


@every_space
def test_neighbors_are_valid_distinct_and_others(case):
    for arch in case.archs(3):
        found = list(case.space.neighbors(arch))
        assert len(found) == len(set(found)) > 0
        assert arch not in found
        for other in found:
            assert_valid(case.space, other)


@every_space
def test_keys_and_codes_belong_to_the_architecture(case):
    archs = case.archs(20)
    copies = [case.space.decode(case.space.encode(arch)) for arch in archs]
    for arch, copy in zip(archs, copies, strict=True):
        for key in (case.space.key, case.space.function_key):
            assert isinstance(key(arch), str)
            assert key(arch) == key(copy)
    codes = case.space.codes(archs)
    assert codes.dtype == np.int64
    assert codes.shape == (20,)
    assert (codes >= 0).all()
    np.testing.assert_array_equal(codes, case.space.codes(copies))
    keys = [case.space.key(arch) for arch in archs]
    for (key_a, code_a), (key_b, code_b) in itertools.combinations(zip(keys, codes, strict=True), 2):
        assert key_a == key_b or code_a != code_b  # rows of a table never mix two classes
    assert case.space.codes([]).shape == (0,)


@plain_network
def test_equal_function_keys_do_equal_work(case):
    classes: dict[str, set[int]] = {}
    for arch in case.archs(3):
        for other in (arch, *itertools.islice(case.space.neighbors(arch), 60)):
            classes.setdefault(case.space.function_key(other), set()).add(case.cost(other)["live_macs"])
    assert all(len(macs) == 1 for macs in classes.values())


@every_space
def test_graphs_are_over_the_vocabulary_and_stack(case):
    archs = case.archs(10)
    ops, adjacency, mask = case.space.graphs(archs)
    assert (ops.dtype, adjacency.dtype, mask.dtype) == (np.int8, bool, bool)
    assert ops.shape == mask.shape == adjacency.shape[:2]
    assert adjacency.shape[1] == adjacency.shape[2]
    for i, arch in enumerate(archs):
        graph = case.space.graph(arch)
        assert isinstance(graph, OpGraph)
        n = len(graph)
        assert tuple(case.space.vocabulary[op] for op in ops[i, :n]) == graph.ops
        np.testing.assert_array_equal(adjacency[i, :n, :n], graph.adjacency)
        assert mask[i].sum() == n == mask[i, :n].sum()
        assert not adjacency[i, n:].any()
        assert not adjacency[i, :, n:].any()
        assert graph == case.space.graph(case.space.decode(case.space.encode(arch)))


def counted_macs(network: nn.Module, inputs: tuple[torch.Tensor, ...], on_graphs: bool) -> int:
    """Multiply-adds of convolutions and linear layers, by hooks; on graphs of all matrix products, as dispatched."""
    if on_graphs:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(*inputs)
        return counter.get_total_flops() // 2
    total = 0

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        total += output[0].numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(*inputs)
    return total


@every_network
def test_costs_are_those_of_the_built_network(case):
    for arch in case.archs(6):
        cost = case.cost(arch)
        assert set(cost) == COST
        assert all(type(value) is int and value >= 0 for value in cost.values())
        network = case.space.build(arch, **case.net).eval()
        assert cost["params"] == sum(p.numel() for p in network.parameters())
        assert cost["macs"] == counted_macs(network, case.inputs(), case.on_graphs)
        assert cost["live_macs"] <= cost["macs"]


@every_network
def test_default_networks_have_their_cost_s_parameters(case):
    arch = case.archs(1, seed=5)[0]
    with torch.device("meta"):
        network = case.space.build(arch)
    assert case.space.cost(arch)["params"] == sum(p.numel() for p in network.parameters())


@every_network
def test_networks_run_forward_backward_and_by_parts(case):
    inputs = case.inputs()
    for arch in case.archs(3):
        network = case.space.build(arch, **case.net)
        output = network(*inputs)
        assert output.shape == (len(inputs[0]), 7)
        output.sum().backward()
        assert network.classifier.weight.grad is not None
        network.eval()
        torch.testing.assert_close(network.classifier(network.forward_features(*inputs)), network(*inputs))
        modules = dict(network.named_modules())
        assert network.stages()
        assert all(name in modules for name in network.stages())
        assert len(set(network.stages())) == len(network.stages())


class MarkedNorm(nn.Module):
    """Checks that it is given the channels that it was made for."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.ndim == 4
        assert x.shape[1] == self.channels
        return 2 * x


class MarkedAct(MarkedNorm):
    """The same for activations."""


@plain_network
def test_factories_replace_every_normalisation_and_activation(case):
    standard = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)
    for arch in case.archs(3):
        plain = case.space.build(arch, **case.net)
        network = case.space.build(arch, norm=MarkedNorm, act=MarkedAct, **case.net)
        assert not [module for module in network.modules() if isinstance(module, standard)]
        for marked, kind in ((MarkedNorm, nn.BatchNorm2d), (MarkedAct, nn.ReLU)):
            replaced = [name for name, module in network.named_modules() if type(module) is marked]
            assert replaced == [name for name, module in plain.named_modules() if isinstance(module, kind)]
        network(*case.inputs())


@plain_space
def test_choices_contain_every_network(case):
    try:
        supernet = case.space.choices(**case.net).eval()
    except UserError:
        pytest.skip("no network of choices")
    for arch in case.archs(4):
        selection = case.space.select(arch)
        assert set(selection) <= set(find_choices(supernet))
        select(supernet, selection)
        network = case.space.build(arch, **case.net).eval()
        missing = network.load_state_dict(selected_state_dict(supernet), strict=False).missing_keys
        assert not missing  # of what is left over, `none` edges and the like, the outputs tell
        with torch.no_grad():
            torch.testing.assert_close(network(*case.inputs()), supernet(*case.inputs()))


@every_network
def test_unknown_scales_are_refused_with_the_nearest(case):
    known = "hidden" if case.on_graphs else next(name for name in case.net if name not in IMAGE)
    with pytest.raises(UserError) as caught:
        case.space.build(case.archs(1)[0], **{known + "s": 8})
    assert caught.value.suggestion == known


@every_space
def test_enumeration(case):
    try:
        size = len(case.space)
    except (UserError, TypeError):
        pytest.skip("not enumerable")
    archs = list(case.space) if size <= ENUMERABLE else list(itertools.islice(case.space, 500))
    assert len(set(archs)) == len(archs) == min(size, len(archs))
    if size <= ENUMERABLE:
        assert len(archs) == size
        codes = case.space.codes(archs)
        assert len(set(codes.tolist())) == size
        sampled = {case.space.key(arch) for arch in case.archs(20)}
        assert sampled <= {case.space.key(arch) for arch in archs}
    for arch in archs[:: max(len(archs) // 50, 1)]:
        assert_valid(case.space, arch)


@every_space
def test_pickles(case):
    space = pickle.loads(pickle.dumps(case.space))
    assert (space.name, space.vocabulary) == (case.space.name, case.space.vocabulary)
    for arch in case.archs(5):
        copy = pickle.loads(pickle.dumps(arch))
        assert copy == arch
        assert hash(copy) == hash(arch)
        assert space.encode(copy) == case.space.encode(arch)
