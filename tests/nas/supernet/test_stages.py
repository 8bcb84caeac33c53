"""Stages: who stays, what goes on, depth and dropout; killed between and within them they go on bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nas.supernet.building import make_supernet, search_data
from nas.supernet.phases import begin, inherit, phases_of, survivors, total_epochs
from nas.supernet.recipe import Recipe
from nas.supernet.recipes import recipe, scaled
from nas.supernet.search import SearchTask, open_supernet, read_log, search_run
from nas.supernet.skip_dropout import DroppedIdentity, probability
from nas.supernet.state import start
from nas.training.checkpoints import checkpoints, read
from nas.training.data import load_data
from search_spaces.cells.darts_network import FactorizedReduce
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

SPACE = load_space("nas-bench-201")


def small(name: str, **changes) -> Recipe:
    base = {"channels": 4, "batch_size": 16, "epochs": 1, "alpha_warmup_epochs": 0, "drop_last": True}
    return scaled(recipe(name), "tiny", flip=False).replaced({**base, **changes})


def supernet(found: Recipe, space=SPACE, seed: int = 0):
    return make_supernet(space, found, load_data("digits"), seed=seed)


def test_the_published_stages():
    first, second, third = phases_of(recipe("p-darts"), 0)
    assert [p.recipe.layers for p in (first, second, third)] == [5, 11, 17]
    assert [3 * p.recipe.cells_per_stage + 2 for p in (first, second, third)] == [5, 11, 17]
    assert [p.recipe.skip_dropout for p in (first, second, third)] == [0.1, 0.4, 0.7]
    assert [p.candidates for p in (first, second, third)] == [None, (5, 8), (3, 8)]
    assert [p.end for p in (first, second, third)] == [25, 25, 25]
    first, second = phases_of(recipe("drnas-progressive"), 0)
    assert (first.recipe.partial, second.recipe.partial, second.candidates) == (4, 2, (3, 5))
    # One schedule over both stages.
    assert (first.recipe.epochs, first.end, second.recipe.epochs, second.end, second.length) == (100, 50, 100, 100, 50)
    assert total_epochs(phases_of(recipe("darts-pt"), 6)) == 100 + 5 * 5
    assert phases_of(recipe("darts-v1"), 0)[0].recipe == recipe("darts-v1")


def test_the_largest_alphas_survive_and_shares_round_up():
    net = supernet(small("p-darts"))
    with torch.no_grad():
        for label in net.labels:
            net.alphas[label].copy_(torch.tensor([0.3, -1.0, 0.3, 2.0, 0.1]))
    assert survivors(net, 8, 8)["edge_0_1"] == (0, 1, 2, 3, 4)
    assert survivors(net, 5, 8)["edge_0_1"] == (0, 2, 3, 4)  # 5 * 5 / 8 = 3.1
    assert survivors(net, 3, 8)["edge_0_1"] == (0, 3)  # 1.9; the first of equals
    net.restrict("edge_1_3", (1, 2, 4))
    assert survivors(net, 3, 8)["edge_1_3"] == (2, 4)


def test_wider_candidates_compute_what_the_narrow_ones_did():
    found = small("drnas-progressive", channels=8)
    narrow = supernet(found.replaced({"partial": 4}))
    wide = supernet(found.replaced({"partial": 2}), seed=1)
    kept = wide.network.cells[0].edges[0].candidates[3].conv.weight.detach().clone()
    inherit(wide, narrow)
    x = torch.randn(3, 4, 6, 6)
    for k in (2, 3):  # the convolutions
        one, other = (net.network.cells[0].edges[0].candidates[k] for net in (narrow, wide))
        torch.testing.assert_close(other(x)[:, :2], one(x[:, :2]))
    assert torch.equal(wide.network.cells[0].edges[0].candidates[3].conv.weight[2:], kept[2:])
    assert torch.equal(wide.network.classifier.weight, narrow.network.classifier.weight)
    assert all(torch.equal(wide.alphas[label], narrow.alphas[label]) for label in narrow.labels)
    assert torch.equal(wide.generator.get_state(), narrow.generator.get_state())


@pytest.mark.parametrize(("name", "counts"), [("p-darts", [5, 4, 2]), ("drnas-progressive", [5, 3])])
def test_candidates_leave_between_stages_and_a_killed_search_goes_on_bit_for_bit(name, counts, tmp_path):
    changes = {"stages_cells_per_stage": (1, 2, 1)} if name == "p-darts" else {}
    task = SearchTask(small(name, epochs=2, alpha_rate=0.1, **changes), images=70)  # two steps an epoch
    whole = search_run(task, tmp_path / "whole")
    for step in (3, 4, 5, 7):  # within a stage, at its end, after its end, at the end of the next's first epoch

        def progress(done: int, total: int | None, step: int = step) -> None:
            assert total == 4 * len(counts)
            if done == step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            search_run(task, tmp_path / "killed", progress=progress)
    again = search_run(task, tmp_path / "killed")
    rows = [[{k: v for k, v in r.items() if k != "seconds"} for r in read_log(run)] for run in (whole, again)]
    assert rows[0] == rows[1]
    contents = [read(checkpoints(run.path / "checkpoints" / "seed-0")[0]) for run in (whole, again)]
    for part in ("supernet", "optimizer", "alpha_optimizer"):
        same = [torch.equal(a, b) for a, b in zip(*(list(_tensors(content[part])) for content in contents))]
        assert same
        assert all(same)
    assert [t.arch for t in whole.trials()] == [t.arch for t in again.trials()]

    assert [row["stage"] for row in rows[0]] == [s + 1 for s in range(len(counts)) for _ in range(2)]
    assert [row["epoch"] for row in rows[0]] == list(range(1, 2 * len(counts) + 1))
    for row in rows[0]:
        there = {label: {k for k, v in enumerate(values) if v} for label, values in row["alphas"].items()}
        assert all(len(kept) == counts[row["stage"] - 1] for kept in there.values())
        if row["stage"] > 1:
            last = [r for r in rows[0] if r["stage"] == row["stage"] - 1][-1]
            for label, kept in there.items():
                ranked = sorted(range(5), key=lambda k: -last["alphas"][label][k])
                assert kept == set(ranked[: len(kept)])
    assert all(sum(values) == pytest.approx(1) for values in rows[0][-1]["alphas"].values())

    opened, state, _ = open_supernet(again)
    assert opened.recipe.partial == (1 if name == "p-darts" else 2)
    assert len(state.supernet.network.cells) == 3 * opened.recipe.cells_per_stage + 2
    assert state.all_epochs == 2 * len(counts)


def _tensors(found):
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, dict):
        for value in found.values():
            yield from _tensors(value)


def test_a_stage_is_new_unless_it_inherits():
    data = search_data(load_data("digits", val_share=0.0), small("p-darts"), images=40, seed=0)
    for name, new in (("p-darts", True), ("drnas-progressive", False)):
        phases = phases_of(small(name), 0)
        rest = {"space": SPACE, "data": data, "seed": 0, "device": torch.device("cpu")}
        first = begin(phases, 0, **rest)
        with torch.no_grad():
            for alpha in first.supernet.alphas.values():
                alpha += 1
        first.step = first.batches.steps_per_epoch
        second = begin(phases, 1, before=first, **rest)
        assert (second.step == 0) == new
        assert second.all_steps == first.all_steps
        goes_on = [torch.equal(a, b) for a, b in zip(first.supernet._alphas, second.supernet._alphas)]
        assert goes_on == [not new] * 6
        stems = [state.supernet.network.stem[0].weight for state in (first, second)]
        assert torch.equal(*stems) != new


def test_dropout_is_behind_identities_and_falls_as_published():
    # rate 0.4, 25 epochs, alphas frozen in the first 10: a line to 0 at epoch 24, then exp(-.2 t) from .4
    assert probability(0, 25, 10, 0.4) == pytest.approx(0.4 * 24 / 25)
    assert probability(9, 25, 10, 0.4) == pytest.approx(0.4 * 15 / 25)
    assert probability(10, 25, 10, 0.4) == 0.4
    assert probability(24, 25, 10, 0.4) == pytest.approx(0.4 * math.exp(-2.8))
    found = small("p-darts", stages_layers=(3, 3, 3)).replaced({"skip_dropout": 0.5})
    first = phases_of(found, 0)[0].recipe
    data = search_data(load_data("digits", val_share=0.0), first, images=40, seed=0)
    state = start(make_supernet(load_space("darts"), first, data, seed=0), data, first, seed=0)
    (part,) = state.parts.values()
    part.begin_epoch(state, first)
    skips = [c for places in state.supernet._mixed.values() for m in places for c in m.candidates]
    plain = [c for c in skips if isinstance(c, DroppedIdentity)]
    assert len(plain) == 14 + 2 * 6  # a normal cell's, and those between nodes of two reduction cells
    assert not any(type(c) is nn.Identity for c in skips)
    assert any(isinstance(c, FactorizedReduce) for c in skips)
    assert {c.p for c in plain} == {probability(0, first.epochs, 0, 0.1)}
    plain[0].p = 0.25
    x = torch.ones(20000)
    torch.manual_seed(0)
    y = plain[0].train()(x)
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(plain[0].eval()(x), x)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stages_candidates": (8, 5)}, "2 numbers for layers"),
        ({"stages_candidates": (3, 5, 8)}, "fewer"),
        ({"stages_layers": (3, 0, 3)}, "positive numbers for layers"),
        ({"stages_inherit": True}, "one depth"),
        ({"early_stop": True}, "stages"),
        ({"skip_cap": -1}, "skip_cap"),
        ({"gate_threshold": 1.5}, "gate_threshold"),
        ({"skip_dropout": 1.0}, "skip_dropout"),
        ({"discretization": "perturbation"}, "projection"),
    ],
)
def test_nonsense_is_refused(changes, named):
    with pytest.raises(UserError, match=named):
        recipe("p-darts").replaced(changes)


@pytest.mark.parametrize("scale", ["small", "tiny"])
def test_scales_bound_depth_and_partial_channels(scale):
    found = scaled(recipe("p-darts"), scale)
    assert found.stages.layers == (3, 3, 3)
    assert found.stages.cells_per_stage == (1, 1, 1)
    assert abs(total_epochs(phases_of(found, 0)) - scaled(recipe("darts-v1"), scale).epochs) <= 1
    assert found.stages.skip_dropout == (0.1, 0.4, 0.7)
    wide = scaled(recipe("drnas-progressive-darts"), scale)
    assert (wide.partial, wide.stages.partial) == (4, (4, 2))  # of 8 channels; 6 and 3 do not divide them
