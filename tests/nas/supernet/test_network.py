"""Supernets: fixed choices equal the built architecture, mixtures equal a naive forward pass, draws are shared."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn

from nas.supernet.edges import edges_into_nodes
from nas.supernet.mixed import Mixed
from nas.supernet.network import PartialChannels, Supernet, supernet_of
from nas.supernet.relaxation import GumbelHard, Relaxation, Softmax, UniformPath
from search_spaces.cells.darts_network import EDGES as DARTS_EDGES
from search_spaces.cells.nas_bench_201 import EDGES
from search_spaces.choice import Choice, find_choices, selected_state_dict
from search_spaces.common.errors import UserError
from search_spaces.layered import with_layers
from search_spaces.primitives.registry import act_factory, norm_factory
from search_spaces.registry import load_space

SCALES = {
    "nas-bench-201": {"channels": 4, "cells_per_stage": 1},
    "darts": {"channels": 4, "layers": 3},
    "nas-bench-macro": {"channels": 4},
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(name: str = "nas-bench-201", relaxation: Relaxation = Softmax(), **options) -> Supernet:  # noqa: B008
    torch.manual_seed(0)
    return supernet_of(load_space(name), relaxation, generator=generator(), **{**SCALES[name], **options}).double()


def images(count: int = 2, size: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=generator(1))


class Own(nn.Module):
    """A user's module: two activations chosen together, a normalisation, whole layers with a choice inside."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = Choice([norm_factory(name)(4) for name in ("batch-norm", "evonorm-s0")], "my.norm")
        self.act = Choice([act_factory(name)(4) for name in ("relu", "silu", "prelu")], "act")
        act = Choice([act_factory(name)(4) for name in ("relu", "silu", "prelu")], "act")
        layers = [nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), act), nn.Identity()]
        self.layer = Choice(layers, "layer")
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.layer(self.act(self.norm(self.first(x)))).mean((2, 3)))


def own_plain(norm: str, act: str, layer: int) -> nn.Module:
    model = Own()
    model.norm, model.act = norm_factory(norm)(4), act_factory(act)(4)
    model.layer = model.layer.candidates[layer]
    if layer == 1:
        model.layer[1] = act_factory(act)(4)
    return model.double()


@pytest.mark.parametrize("name", list(SCALES))
def test_fixed_choices_equal_the_built_architecture(name, rng):
    space, supernet, x = load_space(name), small(name), images()
    supernet(x).sum().backward()  # running statistics of all candidates
    for _ in range(2):
        arch = space.sample(rng)
        supernet.select(space.select(arch))
        built = space.build(arch, **SCALES[name]).double()
        built.load_state_dict(selected_state_dict(supernet.network))
        for mode in (True, False):
            assert torch.equal(supernet.train(mode)(x), built.train(mode)(x))
            # A call beside forward computes the same.
            assert torch.equal(supernet.network.forward_features(x), built.forward_features(x))
        supernet.train()
    supernet.release()
    assert not torch.allclose(supernet(x), built.train()(x))


def test_fixed_choices_of_a_module_of_ones_own():
    torch.manual_seed(0)
    supernet, x = Supernet(Own(), Softmax(), generator=generator()).double(), images()
    assert supernet.labels == ("my.norm", "act", "layer")
    for norm, act, layer in [(0, 2, 1), (1, 1, 0), (1, 0, 2)]:
        supernet.select({"my.norm": norm, "act": act, "layer": layer})
        plain = own_plain(("batch-norm", "evonorm-s0")[norm], ("relu", "silu", "prelu")[act], layer)
        plain.load_state_dict(selected_state_dict(supernet.network))
        assert torch.equal(supernet(x), plain(x))
    supernet.release(["act"])
    assert supernet.fixed == {"my.norm", "layer"}
    with supernet.drawn() as network:
        hidden = network.norm(network.first(x))
        weights = supernet.alphas["act"].softmax(0)
        expected = sum(w * f(hidden) for w, f in zip(weights, network.act.candidates))
        torch.testing.assert_close(network.act(hidden), expected)


def test_with_layers_and_checkpoints():
    """Choices of norm and act inside candidates of an edge: fixed as built; checkpointed as plain."""
    space = with_layers(load_space("nas-bench-201"), norms=("batch-norm", "group-norm"), acts=("relu", "silu"))
    scale, x, gradients = SCALES["nas-bench-201"], images(), []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        supernet = supernet_of(space, Softmax(), generator=generator(), checkpointed=checkpointed, **scale).double()
        loss = supernet(x).pow(2).sum()
        gradients.append(torch.autograd.grad(loss, supernet.architecture_parameters() + supernet.weight_parameters()))
    assert set(supernet.labels) == {"norm", "act", *(f"edge_{i}_{j}" for i, j in EDGES)}
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    arch = space.sample(np.random.default_rng(3))
    supernet.select(space.select(arch))
    built = space.build(arch, **scale).double()
    built.load_state_dict(selected_state_dict(supernet.network))
    assert torch.equal(supernet(x), built(x))


def naive_cell(cell: nn.Module, x: torch.Tensor, weights: dict, scales: dict) -> torch.Tensor:
    states = [x]
    for node in (1, 2, 3):
        total = torch.zeros_like(x)
        for source in range(node):
            candidates = cell.edges[EDGES.index((source, node))].candidates
            terms = [w * f(states[source]) for w, f in zip(weights[f"edge_{source}_{node}"], candidates)]
            total = total + scales[source, node] * sum(terms)
        states.append(total)
    return states[-1]


@pytest.mark.parametrize("normalised", [False, True])
def test_the_mixed_network_against_a_naive_one(normalised):
    supernet, x = small(edge_normalisation=normalised), images()
    with torch.no_grad():
        for parameter in supernet.architecture_parameters():
            parameter.normal_(generator=generator(5))
    weights = {label: alpha.softmax(0) for label, alpha in supernet.alphas.items()}
    scales = dict.fromkeys(EDGES, torch.tensor(1.0, dtype=torch.float64))
    if normalised:
        for node in (1, 2, 3):
            beta = supernet.betas[f"edge_{node}"].softmax(0)
            scales.update({(source, node): beta[source] for source in range(node)})
    network = supernet.network
    hidden = network.stem(x)
    for cell in network.cells:
        hidden = naive_cell(cell, hidden, weights, scales) if hasattr(cell, "edges") else cell(hidden)
    expected = network.classifier(network.pool(network.last(hidden)).flatten(1))
    found = supernet(x)
    torch.testing.assert_close(found, expected)
    parameters = supernet.architecture_parameters()
    for a, b in zip(
        torch.autograd.grad(found.pow(2).sum(), parameters), torch.autograd.grad(expected.pow(2).sum(), parameters)
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-7)


def test_edges_into_nodes():
    supernet = small("darts", edge_normalisation=True)
    expected = {
        f"{part}_{node}": tuple(f"{part}_{source}_{node}" for source in range(node))
        for part in ("normal", "reduce")
        for node in range(2, 6)
    }
    assert supernet.nodes == expected
    assert sorted(label for labels in expected.values() for label in labels) == sorted(supernet.labels)
    assert {node: len(beta) for node, beta in supernet.betas.items()} == {n: len(e) for n, e in expected.items()}
    assert len(DARTS_EDGES) * 2 == len(supernet.labels)
    assert edges_into_nodes(["c_10_12", "c_9_12", "layer_0", "act"]) == {"c_12": ("c_9_12", "c_10_12")}


def test_parameters_are_apart_and_initialised_as_darts_does():
    supernet = small("darts", edge_normalisation=True)
    weights, architecture = supernet.weight_parameters(), supernet.architecture_parameters()
    assert {id(p) for p in weights}.isdisjoint(id(p) for p in architecture)
    assert {id(p) for p in supernet.parameters()} == {id(p) for p in weights + architecture}
    values = torch.cat([p.detach() for p in architecture])
    assert len(values) == 28 * 8 + 28
    assert 0.8e-3 < float(values.std()) < 1.2e-3
    assert abs(float(values.mean())) < 3e-4


def test_one_draw_for_all_cells():
    supernet, ran = small(relaxation=GumbelHard(), cells_per_stage=2), {}
    for label, places in find_choices(supernet.network).items():
        for place in places:
            for k, candidate in enumerate(place.candidates):
                candidate.register_forward_hook(lambda *_, k=k, label=label: ran.setdefault(label, []).append(k))
    seen = set()
    for _ in range(4):
        ran.clear()
        supernet(images())
        assert {len(runs) for runs in ran.values()} == {6}  # one candidate in every cell
        assert all(len(set(runs)) == 1 for runs in ran.values())
        seen.add(tuple(runs[0] for runs in ran.values()))
    assert len(seen) > 1


def test_a_draw_can_be_given_and_a_seed_repeats():
    supernet, x = small(relaxation=GumbelHard()), images()
    draw = supernet.draw()
    first = supernet(x, draw=draw)
    assert torch.equal(first, supernet(x, draw=draw))
    twin = copy.deepcopy(supernet)
    state, generator_state = copy.deepcopy(supernet.state_dict()), supernet.generator.get_state()
    outputs = [supernet(x) for _ in range(3)]
    assert all(torch.equal(a, twin(x)) for a in outputs)
    resumed = small(relaxation=GumbelHard())
    resumed.load_state_dict(state)
    resumed.generator.set_state(generator_state)
    assert all(torch.equal(a, resumed(x)) for a in outputs)
    assert len({float(a.detach().sum()) for a in outputs}) > 1


def test_progress_reaches_the_relaxation():
    supernet = small(relaxation=GumbelHard(10, 0.1))
    gradients = []
    for progress in (0.0, 1.0):
        supernet.progress = progress
        supernet.generator.manual_seed(4)
        values = torch.stack([w.values.sum() for w in supernet.draw().weights.values()])
        gradients.append(torch.cat(torch.autograd.grad(values.sum(), supernet.architecture_parameters())))
    assert gradients[0].abs().max() < 0.05 < gradients[1].abs().max()  # slopes grow as 1 / temperature


def test_fixing_one_label_after_another():
    """What perturbation-based selection needs: a fixed edge has weight one, its node stays scaled until all are."""
    supernet = small(edge_normalisation=True)
    supernet.select({"edge_0_2": 3})
    draw = supernet.draw()
    assert "edge_0_2" not in draw.weights
    assert set(draw.scales) == set(supernet.labels)
    supernet.select({"edge_1_2": 0})
    assert supernet.fixed == {"edge_0_2", "edge_1_2"}
    assert set(supernet.draw().scales) == set(supernet.labels) - supernet.fixed


@pytest.mark.parametrize("name", ["nas-bench-201", "darts"])
def test_partial_channels_have_narrow_candidates_and_the_same_interface(name):
    scale = {**SCALES[name], "channels": 8}
    supernet = small(name, channels=8, partial=4, edge_normalisation=True)
    narrow = load_space(name).choices(**{**scale, "channels": 2}).double()
    wide = load_space(name).choices(**scale).double()
    edges = [n for n, part in narrow.named_modules() if isinstance(part, Choice)]
    for module_name in edges:
        found, expected = supernet.network.get_submodule(module_name), narrow.get_submodule(module_name)
        assert isinstance(found, Mixed)
        assert found.partial == 4
        assert [p.shape for p in found.parameters()] == [p.shape for p in expected.parameters()]
    rest = [(n, p.shape) for n, p in wide.named_parameters() if ".candidates." not in n]
    assert rest == [(n, p.shape) for n, p in supernet.network.named_parameters() if ".candidates." not in n]
    out = supernet(images(size=8))
    assert out.shape == (2, 10)
    gradients = torch.autograd.grad(out.pow(2).sum(), supernet.architecture_parameters())
    assert all(g.abs().sum() > 0 for g, p in zip(gradients, supernet.architecture_parameters()) if len(p) > 1)


def test_partial_channels_keep_less_for_backward():
    """DARTS: k = 4 keeps at most .45 of the bytes; checkpointed mixtures keep less than plain ones."""
    kept, x = {}, images(size=8).float()
    for options in ({}, {"partial": 4, "edge_normalisation": True}, {"checkpointed": True}):
        supernet = small("darts", channels=8, **options).float()
        storages: dict[int, int] = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            supernet(x)
        own = {p.untyped_storage().data_ptr() for p in supernet.parameters()}
        kept[next(iter(options), "plain")] = sum(size for where, size in storages.items() if where not in own)
    assert kept["partial"] < 0.45 * kept["plain"]
    assert kept["checkpointed"] < 0.45 * kept["plain"]


def test_choices_that_are_one_module_or_the_whole_module():
    shared = Choice([nn.Tanh(), nn.Identity()], "act")
    supernet = Supernet(nn.Sequential(shared, nn.Linear(3, 3), shared), UniformPath(), generator=generator())
    assert supernet.network[0] is supernet.network[2]
    assert isinstance(supernet.network[0], Mixed)
    alone = Supernet(Choice([nn.Tanh(), nn.Identity()], "act"), Softmax(), generator=generator())
    x, weights = torch.randn(2, 3), alone.alphas["act"].softmax(0)
    torch.testing.assert_close(alone(x), weights[0] * x.tanh() + weights[1] * x)


def test_bad_input_is_refused():
    make = functools.partial(Supernet, relaxation=Softmax(), generator=generator())
    with pytest.raises(UserError, match="a module with a Choice"):
        make(nn.Linear(2, 2))
    with pytest.raises(UserError, match="labels `<cell>_<source>_<node>`"):
        make(Own(), edge_normalisation=True)
    with pytest.raises(UserError, match="divides the 6 channels"):
        small(channels=6, partial=4)
    space = load_space("nas-bench-201")
    scale = {"channels": 4, "cells_per_stage": 1}
    with pytest.raises(UserError, match="the same Choices at the same places"):
        make(space.choices(**{**scale, "cells_per_stage": 2}), partial=PartialChannels(4, space.choices(**scale)))
    supernet = make(space.choices(**scale))
    with pytest.raises(UserError, match="did you mean 'edge_0_1'"):
        supernet.release(["edge_01"])
    with pytest.raises(UserError, match="from 0 to 4"):
        supernet.select({"edge_0_1": 5})
