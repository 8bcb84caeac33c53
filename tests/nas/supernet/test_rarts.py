"""RARTS in a network: against its objective descended by hand, resumed bit for bit."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from supernet_searches import assert_resumes, tiny_search

from nas.supernet.recipes import recipe
from nas.supernet.settings import Relaxed
from nas.supernet.steps import run_epoch
from search_spaces.common.errors import UserError

FACTORS = {"relaxed_train_weight": 1.5, "relaxed_coupling": 0.7}


def test_two_iterations_descend_the_relaxed_objective_in_turn():
    """w, then y, then alpha, each on the whole objective with torch's own gradients."""
    found, state = tiny_search("rarts", clip_norm=1.0, **FACTORS)
    first, second = copy.deepcopy(state.supernet), copy.deepcopy(state.supernet)
    second._alphas = first._alphas
    batches = [(state.batches.batch(step), state.alpha_batches.batch(step)) for step in range(2)]
    rates = [found.training.resolved(2).rate(step, 2) for step in range(2)]
    loss = run_epoch(state, found)
    assert state.step == 2

    w, y, alphas = list(first.network.parameters()), list(second.network.parameters()), list(first._alphas)
    settings = {"lr": 1.0, "momentum": 0.9, "weight_decay": 3e-4}
    optimizers = [torch.optim.SGD(w, **settings), torch.optim.SGD(y, **settings)]
    optimizers.append(torch.optim.Adam(alphas, 3e-4, (0.5, 0.999), weight_decay=1e-3))
    cross_entropy = torch.nn.functional.cross_entropy
    losses = []
    for (train, val), rate in zip(batches, rates):
        for own, optimizer in zip((w, y, alphas), optimizers):
            tie = sum((a - b).square().sum() for a, b in zip(y, w))
            losses.append(cross_entropy(first(train.images), train.labels))
            whole = 1.5 * losses[-1] + cross_entropy(second(val.images), val.labels) + 0.7 / 2 * tie
            for p, slope in zip(own, torch.autograd.grad(whole, own, allow_unused=True)):
                p.grad = slope if slope is not None else torch.zeros_like(p)
            if own is not alphas:
                norm = torch.nn.utils.clip_grad_norm_(own, 1.0)
                assert norm > 1.0
                optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(w, y))  # the copies have parted
    twin = state.parts["twin"].supernet
    for ours, expected in (
        (state.supernet.network.parameters(), w),
        (twin.network.parameters(), y),
        (state.supernet.alphas.values(), alphas),
    ):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    assert loss["train_loss"] == pytest.approx((losses[0] + losses[3]).item() / 2, rel=1e-4)


def test_the_copies_share_their_alphas_and_nothing_else():
    _, state = tiny_search("rarts")
    twin = state.parts["twin"].supernet
    for ours, theirs in zip(state.supernet.architecture_parameters(), twin.architecture_parameters(), strict=True):
        assert ours is theirs
    assert twin.generator is state.supernet.generator
    pairs = list(zip(state.supernet.network.parameters(), twin.network.parameters(), strict=True))
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)


def test_it_resumes_bit_for_bit():
    end = assert_resumes("rarts", partial=2, edge_normalisation=True)
    assert end.parts["twin"].state_dict()["optimizer"]["state"]


def test_a_loss_that_is_no_number_is_named():
    found, state = tiny_search("rarts")
    with torch.no_grad():
        next(state.parts["twin"].supernet.network.parameters()).fill_(math.nan)
    run_epoch(state, found)
    assert state.failed
    assert "loss became nan at step 1" in state.stopped  # the copies attract each other: both are broken


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"relaxed_coupling": 0.0}, "positive"),
        ({"alpha_warmup_epochs": 3}, "every step"),
        ({"alpha_every": 2}, "every step"),
        ({"perturbation": "random"}, "relaxed"),
    ],
)
def test_nonsense_is_refused(changes, named):
    with pytest.raises(UserError, match=named):
        recipe("rarts").replaced(changes)


def test_its_settings_and_its_solver_belong_together():
    with pytest.raises(UserError, match="together"):
        replace(recipe("darts-v1"), solver="relaxed")
    with pytest.raises(UserError, match="together"):
        replace(recipe("darts-v1"), relaxed=Relaxed())
