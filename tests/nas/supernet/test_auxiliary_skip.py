"""Auxiliary skip connections: against the sum written out, where they are, that they fade and are not selected."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from nas.supernet.auxiliary import add_auxiliary_skips, skipped
from nas.supernet.building import make_supernet
from nas.supernet.mixed import Mixed
from nas.supernet.network import Supernet
from nas.supernet.recipes import recipe, scaled
from nas.supernet.relaxation import Softmax, Weights
from nas.supernet.search import SearchTask, open_supernet, read_log, search_run
from nas.supernet.state import load_state_dict, start, state_dict
from nas.supernet.steps import run_epoch
from nas.training.data import load_data
from search_spaces.cells.darts_network import OPERATIONS, FactorizedReduce, make_operation
from search_spaces.choice import Choice, selected_state_dict
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

DIGITS = load_data("digits", val_share=0.5)


def tiny(**changes):
    small = {"channels": 4, "batch_size": 16, "epochs": 4, "drop_last": True}
    return scaled(recipe("darts-minus"), "tiny", flip=False).replaced({**small, **changes})


def mixture(stride: int, checkpointed: bool = False, partial: int = 1) -> Mixed:
    torch.manual_seed(0)
    network = Choice([make_operation(name, 4, stride) for name in OPERATIONS], "cell_0_1")
    supernet = Supernet(network, Softmax(), generator=torch.Generator().manual_seed(0))
    add_auxiliary_skips(supernet, 0.7)
    found = supernet.network.double()
    assert isinstance(found, Mixed)
    found.partial, found.checkpointed = partial, checkpointed
    return found


@pytest.mark.parametrize("stride", [1, 2])
def test_it_is_added_to_the_mixture(stride):
    mixed = mixture(stride)
    candidates, auxiliary = copy.deepcopy(mixed.candidates), copy.deepcopy(mixed.auxiliary)
    assert isinstance(auxiliary, nn.Identity if stride == 1 else FactorizedReduce)
    x, values = torch.randn(3, 4, 6, 6, dtype=torch.float64), torch.linspace(-1, 1, 8, dtype=torch.float64).softmax(0)
    mixed.weights, mixed.scale = Weights(values), torch.tensor(0.3, dtype=torch.float64)
    mixed.auxiliary_weight = 0.6
    terms = [value * candidate(x) for value, candidate in zip(values, candidates)]
    expected = 0.3 * (sum(terms) + 0.6 * auxiliary(x))
    torch.testing.assert_close(mixed(x), expected)
    mixed.auxiliary_weight = 0.0
    torch.testing.assert_close(mixed(x), 0.3 * sum(terms))


def test_with_partial_channels_it_sees_what_the_candidates_see():
    mixed = mixture(1, partial=2)
    x, values = torch.randn(3, 8, 6, 6, dtype=torch.float64), torch.ones(8, dtype=torch.float64) / 8
    candidates = copy.deepcopy(mixed.candidates)
    mixed.weights = Weights(values)
    part = sum(candidate(x[:, :4]) / 8 for candidate in candidates) + 0.7 * x[:, :4]
    torch.testing.assert_close(mixed(x), nn.ChannelShuffle(2)(torch.cat([part, x[:, 4:]], 1)))


def test_checkpointed_equals_plain_whatever_the_factor_is_later():
    found = {}
    for checkpointed in (False, True):
        mixed = mixture(2, checkpointed)
        values = (torch.ones(8, dtype=torch.float64) / 8).requires_grad_()
        x = torch.randn(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        mixed.weights = Weights(values)
        y = mixed(x.requires_grad_())
        mixed.auxiliary_weight, mixed.weights = 0.1, None
        slopes = torch.autograd.grad(y.pow(2).sum(), [x, values, *mixed.auxiliary.parameters()])
        found[checkpointed] = [y, *slopes, *mixed.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(found[False], found[True], strict=True))


@pytest.mark.parametrize(("space", "reduced"), [("nas-bench-201", 0), ("darts", 16)])
def test_every_mixture_of_a_space_has_one_of_its_own(space, reduced):
    found = tiny()
    net = make_supernet(load_space(space), found, DIGITS, seed=0)
    places = skipped(net)
    assert len(places) == sum(isinstance(part, Mixed) for part in net.network.modules())
    halving = [place.auxiliary for place in places if isinstance(place.auxiliary, FactorizedReduce)]
    assert len(halving) == reduced  # two reduction cells with eight edges from their inputs
    assert not any(module.norm.affine for module in halving)
    trained = {id(p) for group in start(net, DIGITS, found, seed=0).optimizer.param_groups for p in group["params"]}
    owned = [p for module in halving for p in module.parameters()]
    assert len(owned) == 2 * reduced
    assert all(id(p) in trained for p in owned)
    plain = make_supernet(load_space(space), tiny(auxiliary_skip=0.0), DIGITS, seed=0)
    assert not skipped(plain)


def test_a_selected_architecture_has_none():
    space = load_space("nas-bench-201")
    net = make_supernet(space, tiny(affine=True), DIGITS, seed=0)
    arch, x = (1, 3, 2, 0, 4, 3), torch.randn(5, 1, 8, 8)
    mixed = net(x)
    net.select(space.select(arch))
    built = space.build(arch, channels=4, cells_per_stage=1, in_channels=1, num_classes=10)
    built.load_state_dict(selected_state_dict(net.network))
    torch.testing.assert_close(net(x), built(x))
    assert not torch.allclose(net(x), mixed)


def test_it_fades_over_the_epochs_is_logged_and_comes_back_with_a_search(tmp_path):
    run = search_run(SearchTask(tiny(), images=40), tmp_path / "run")
    assert [row["auxiliary_skip"] for row in read_log(run)] == [1.0, 0.75, 0.5, 0.25]
    _, state, _ = open_supernet(run)
    assert {place.auxiliary_weight for place in skipped(state.supernet)} == {0.25}


def test_a_search_goes_on_as_if_it_had_not_stopped():
    found, space = tiny(layers=1), load_space("darts")
    data = load_data("digits", val_share=0.95)
    data = type(data)(**{**vars(data), "val": data.train})

    def fresh():
        return start(make_supernet(space, found, data, seed=1), data, found, seed=2)

    whole, before = fresh(), fresh()
    run_epoch(before, found, stop=2)
    after = fresh()
    load_state_dict(after, copy.deepcopy(state_dict(before)))
    for state in (whole, after):
        run_epoch(state, found, stop=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.supernet.parameters(), after.supernet.parameters(), strict=True))


def test_what_has_no_skip_connection_and_no_shape_is_refused():
    supernet = Supernet(Choice([nn.Tanh(), nn.ReLU()], "act"), Softmax(), generator=torch.Generator())
    with pytest.raises(UserError, match="skip connection"):
        add_auxiliary_skips(supernet, 1.0)
    with pytest.raises(UserError, match="slow-cosine"):
        tiny(auxiliary_skip_decay="slow-cosin")
    with pytest.raises(UserError, match="auxiliary_skip"):
        tiny(auxiliary_skip=-1.0)


def test_the_weights_of_a_selection_are_those_of_the_built_network_without_the_auxiliary_skips():
    found, space = tiny(norm_after_pools=False), load_space("darts")
    supernet = make_supernet(space, found, DIGITS, seed=0)
    arch = space.sample(np.random.default_rng(0))
    supernet.select(space.select(arch))
    scale = {"channels": 4, "layers": found.layers, "in_channels": 1, "num_classes": 10}
    built = space.build(arch, **scale)
    missing = set(built.state_dict()) ^ set(selected_state_dict(supernet.network))
    assert all(name.rsplit(".", 1)[1] in ("weight", "bias") and "norm" in name for name in missing)
