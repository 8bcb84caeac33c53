"""TE-NAS: the rule of pruning on scores that are known, and the two scores against independent ones."""

from __future__ import annotations

import itertools

import numpy as np
import proxy_references as reference
import pytest
import torch

from nas.objectives import parse_objectives
from nas.strategies import make_strategy
from nas.strategies.te_nas import _MixedNetworks, linear_regions, places, prune
from search_spaces.cells.nas_bench_201 import NasBench201
from search_spaces.cells.nas_bench_macro import NasBenchMacro
from search_spaces.choice import select
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

SPACE = NasBench201()
OBJECTIVES = parse_objectives("val_acc")
SMALL = {"network": {"channels": 4, "cells_per_stage": 1}, "batch_size": 4, "few": 3}


def test_pruning_keeps_the_best_value_where_positions_do_not_meet():
    """Worth is a sum over positions: without the worst value is best, so the best one is left."""
    rng = np.random.default_rng(0)
    values = rng.random((4, 3))
    seen = []

    def scores(rest):
        seen.append(len(rest))
        return [np.mean([values[p, list(kept)].mean() for p, kept in enumerate(one)]) for one in rest]

    assert prune((3,) * 4, scores) == tuple(values.argmax(1))
    assert seen == [12, 8]  # one goes at every position in a round


def test_a_round_follows_the_sum_of_both_ranks():
    """One round of two positions, by hand: ranks of both scores added, the best removal at each position."""
    first = {(0, 0): 5.0, (0, 1): 9.0, (1, 0): 1.0, (1, 1): 7.0}
    second = {(0, 0): 2.0, (0, 1): np.nan, (1, 0): 9.0, (1, 1): 3.0}  # without a value is worst

    def scores(rest):
        gone = [next((p, v) for p, v in itertools.product((0, 1), (0, 1)) if v not in one[p]) for one in rest]
        return [[first[g], second[g]] for g in gone]

    # Ranks: (0, 0) 2 + 2, (0, 1) 4 + 1, (1, 0) 1 + 4, (1, 1) 3 + 3.
    assert prune((2, 2), scores) == (0, 0)


def test_the_mixed_networks_are_scored_as_by_independent_code():
    kept = ((3, 2), (0, 1, 2, 3, 4), (1,), (0, 3), (2, 4), (3,))
    rest = [kept, tuple((v,) for v in (3, 1, 0, 2, 4, 3)), ((0,),) * 6]
    found = _MixedNetworks(SPACE, [5], SMALL, 40, 3, None)(rest)
    for one, (condition, regions) in zip(rest, found, strict=True):
        wide, images, slim, noise = made(5)
        for network in (wide, slim):
            sum_of(network, one)
        if one == rest[2]:
            assert np.isnan(condition)
        else:
            values = np.linalg.eigvalsh(reference.ntk(wide, images, 3))
            assert -condition == pytest.approx(values[-1] / values[0], rel=1e-3)
        assert regions == reference.linear_regions(slim, noise)


def made(seed):
    """The networks and inputs of a seed, without the strategy's code for it."""
    from nas.scoring import ScoringTask

    shape = {"num_classes": 10, "cells_per_stage": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wide = SPACE.choices(in_channels=1, channels=4, **shape)
        slim = SPACE.choices(in_channels=1, channels=1, **shape)
        noise = torch.randn(40, 1, 3, 3)
    return wide, ScoringTask("nas-bench-201", **SMALL).batch(seed)[0][0][:3], slim, noise


def sum_of(network, kept):
    """Every edge of every cell adds up what is kept."""
    for cell in network.cells:
        for edge, values in enumerate(kept):
            if hasattr(cell, "edges"):
                cell.edges[edge] = Sum([cell.edges[edge].candidates[v] for v in values])


class Sum(torch.nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, x):
        return sum(part(x) for part in self.parts)


def test_regions_of_a_network_whose_regions_are_known():
    """Two ReLUs with kinks at 0 and 1 cut the line into three."""
    layer = torch.nn.Linear(1, 2)
    layer.weight.data[:] = 1.0
    layer.bias.data = torch.tensor([0.0, -1.0])
    inputs = torch.linspace(-1, 2, 50)[:, None]
    assert linear_regions(torch.nn.Sequential(layer, torch.nn.ReLU()), inputs) == 3
    assert linear_regions(torch.nn.Sequential(layer, torch.nn.Tanh()), inputs) == 1


@pytest.mark.parametrize("space", [SPACE, NasBenchMacro()])
def test_places_invert_select(space):
    arch = space.sample(np.random.default_rng(0))
    found = {label: of[arch[p]] for p, labels in enumerate(places(space)) for label, of in labels.items()}
    assert found == space.select(arch)
    select(space.choices(channels=4), found)


def wide_cell(rest):
    """Prefers 3x3 convolutions: the mean index nearest to them."""
    return [-np.mean([abs(v - 3) for kept in one for v in kept]) for one in rest]


def test_the_first_trial_is_the_pruned_one_and_mutations_follow():
    strategy = make_strategy("te-nas", SPACE, OBJECTIVES, np.random.default_rng(0), scores=wide_cell)
    asked = []
    for _ in range(6):
        trial = strategy.ask()
        asked.append(trial)
        strategy.tell(trial.id, {"val_acc": float(sum(trial.arch))})
    assert asked[0].arch == (3,) * 6
    assert len({SPACE.key(t.arch) for t in asked}) == 6
    for trial in asked[1:]:
        parent = asked[trial.parent].arch
        assert sum(a != b for a, b in zip(parent, trial.arch, strict=True)) == 1
        assert sum(parent) == max(sum(t.arch) for t in asked[: trial.id])


def test_a_seed_repeats_itself():
    small = ((0,), (1,), (2, 3), (1,), (0, 3), (3,))
    first, second = (_MixedNetworks(SPACE, [1, 2], SMALL, 30, 3, None)([small]) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_networks_are_pruned_to_one_architecture():
    settings = {"scoring": SMALL, "regions": 50, "repeats": 1}
    found = [
        make_strategy("te-nas", SPACE, OBJECTIVES, np.random.default_rng(3), **settings).ask().arch for _ in range(2)
    ]
    assert found[0] == found[1]
    assert SPACE.cost(found[0])["live_macs"] > SPACE.cost((0,) * 6)["live_macs"]


@pytest.mark.parametrize(
    ("space", "settings", "word"),
    [
        ("darts", {}, "tuples of choices"),
        ("nas-bench-201", {"regions": 1}, "regions"),
        ("nas-bench-201", {"repeats": 0}, "repeats"),
        ("nas-bench-201", {"scoring": {"batchsize": 3}}, "settings of ScoringTask"),
        ("nats-size", {}, "choices"),
    ],
)
def test_bad_settings_are_refused(space, settings, word):
    with pytest.raises(UserError, match=word):
        make_strategy("te-nas", load_space(space), OBJECTIVES, np.random.default_rng(0), **settings)
