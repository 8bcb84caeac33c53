"""Shapley values by Monte Carlo against enumeration, the game of candidates, how alphas follow."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import nas.supernet.shapley as module
from nas.supernet.building import make_supernet
from nas.supernet.recipes import recipe, scaled
from nas.supernet.shapley import ShapleyAlphas, accuracy_game, contributions, standardised
from nas.supernet.state import load_state_dict, start, state_dict
from nas.supernet.steps import run_epoch
from nas.training.data import Split, load_data
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

SPACE = load_space("nas-bench-201")
WHOLE = load_data("digits", val_share=0.5)
DATA = dataclasses.replace(
    WHOLE,
    train=Split(WHOLE.train.images[:64], WHOLE.train.labels[:64]),
    val=Split(WHOLE.val.images[:64], WHOLE.val.labels[:64]),
)


def tiny(**changes):
    small = {
        "channels": 4,
        "batch_size": 32,
        "epochs": 3,
        "alpha_warmup_epochs": 1,
        "shapley_permutations": 2,
        "shapley_images": 32,
    }
    return scaled(recipe("shapley-nas"), "tiny", flip=False).replaced({**small, **changes})


def state_of(found, seed=0):
    return start(make_supernet(SPACE, found, DATA, seed=seed), DATA, found, seed=0)


class Table:
    """A game with a random value for every coalition of n players."""

    def __init__(self, players: int):
        self.players = players
        self.values = np.random.default_rng(3).normal(size=2**players)
        self.values[-1] = 5.0

    def __call__(self, coalition: np.ndarray) -> float:
        return float(self.values[int(coalition @ (1 << np.arange(self.players)))])

    def exact(self) -> np.ndarray:
        """Shapley's sum over the coalitions without a player."""
        n, found = self.players, []
        for player in range(n):
            others, total = [p for p in range(n) if p != player], 0.0
            for size in range(n):
                share = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
                for members in itertools.combinations(others, size):
                    without = np.isin(np.arange(n), members)
                    total += share * (self(without | (np.arange(n) == player)) - self(without))
            found.append(total)
        return np.array(found)


def test_all_orders_give_the_exact_values():
    game, orders = Table(4), list(itertools.permutations(range(4)))
    found = contributions(itertools.repeat(game), orders)
    assert found.shape == (24, 4)
    np.testing.assert_allclose(found.mean(0), game.exact(), atol=1e-12)
    # Whatever the order, all that the coalition has over none is shared out.
    np.testing.assert_allclose(found.sum(1), game(np.ones(4, bool)) - game(np.zeros(4, bool)))


def test_random_orders_come_close_as_their_number_says():
    game, rng = Table(6), np.random.default_rng(0)
    found = contributions(itertools.repeat(game), [rng.permutation(6) for _ in range(3000)])
    errors = found.std(0) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - game.exact()) < 4 * errors).all()
    assert errors.max() < 0.1


def test_an_order_ends_where_the_value_is_too_low():
    asked = []

    def game(coalition: np.ndarray) -> float:
        asked.append(coalition.copy())
        return float(coalition @ np.array([1.0, 2.0, 4.0, 3.0]))

    found = contributions([game, game], [(1, 2, 0, 3), (3, 0, 1, 2)], truncation=0.5)
    # 10 -> 8 -> 4, below 5: the others are not asked for; 10 -> 7 -> 6 -> 4.
    np.testing.assert_array_equal(found, [[0, 2, 4, 0], [1, 2, 0, 3]])
    assert len(asked) == 3 + 4


class Nothing(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def test_the_game_is_the_accuracy_without_the_absent_candidates():
    found = tiny(partial=1)
    state = state_of(found)
    for _ in range(2):
        run_epoch(state, tiny(alpha_warmup_epochs=3, partial=1))
    net, batch = state.supernet, state.alpha_batches.batch(0)
    part = state.parts["shapley"]
    assert isinstance(part, ShapleyAlphas)
    assert len(part.players) == 6 * 4
    net.train()
    game, rng = accuracy_game(net, part.players, batch), np.random.default_rng(0)
    coalitions = [np.ones(24, bool), np.zeros(24, bool), *(rng.random(24) < 0.7 for _ in range(4))]
    whole_edge = np.array([label != "edge_0_1" for label, _ in part.players])
    values = []
    for coalition in (*coalitions, whole_edge):
        other = copy.deepcopy(net)
        for (label, index), present in zip(part.players, coalition):
            for place in other._mixed[label]:
                if not present:
                    place.candidates[index] = Nothing()
        with torch.no_grad():
            expected = 100 * float((other(batch.images).argmax(1) == batch.labels).float().mean())
            values.append(game(coalition))
        assert values[-1] == pytest.approx(expected)
    assert len(set(values)) > 3


def test_scores_are_standardised_in_each_table():
    values = torch.tensor([1.0, 5.0, 3.0, 10.0, 20.0, 7.0, 7.0], dtype=torch.float64)
    labels = ["normal_0_2", "normal_0_2", "normal_1_2", "reduce_0_2", "reduce_1_2", "act", "norm"]
    expected = [-1, 1, 0, -(0.5**0.5), 0.5**0.5, 0, 0]
    torch.testing.assert_close(standardised(values, labels), torch.tensor(expected, dtype=torch.float64))


def test_alphas_follow_the_average_of_the_scores(monkeypatch):
    found = tiny()
    state = state_of(found)
    players = state.parts["shapley"].players
    rng, tables = np.random.default_rng(0), []

    def known(games, orders, truncation):
        assert truncation == 0.5
        assert sorted(next(iter(orders))) == list(range(len(players)))
        tables.append(rng.normal(size=(2, len(players))))
        return tables[-1]

    monkeypatch.setattr(module, "contributions", known)
    before = {label: alpha.detach().clone() for label, alpha in state.supernet.alphas.items()}
    run_epoch(state, found)
    assert all(torch.equal(alpha, before[label]) for label, alpha in state.supernet.alphas.items())
    for _ in range(2):
        run_epoch(state, found)
    assert len(tables) == 2
    average, moved = np.zeros(len(players)), np.zeros(len(players))
    for table in tables:
        value = table.mean(0) - table.std(0)
        average = 0.8 * average + 0.2 * (value - value.mean()) / value.std(ddof=1)
        moved += 0.1 * average
    for (label, index), step in zip(players, moved):
        difference = state.supernet.alphas[label][index] - before[label][index]
        assert float(difference.detach()) == pytest.approx(step, abs=1e-6)
    assert all(torch.equal(alpha[0], before[label][0]) for label, alpha in state.supernet.alphas.items())


def test_estimating_leaves_everything_else_and_goes_on_after_a_stop():
    found = tiny(epochs=2, shapley_permutations=1)
    whole, before = state_of(found), state_of(found)
    for state in (whole, before):
        run_epoch(state, found)
    held = copy.deepcopy(before.supernet.network.state_dict())
    before.parts["shapley"]._values(before, found)
    assert all(torch.equal(value, held[name]) for name, value in before.supernet.network.state_dict().items())
    assert before.supernet.training
    before = state_of(found)
    run_epoch(before, found)
    after = state_of(found, seed=5)
    load_state_dict(after, copy.deepcopy(state_dict(before)))
    for state in (whole, after):
        while state.epoch < found.epochs:
            run_epoch(state, found)
    assert all(torch.equal(a, b) for a, b in zip(whole.supernet.parameters(), after.supernet.parameters(), strict=True))
    assert whole.parts["shapley"].row() == after.parts["shapley"].row()
    assert whole.parts["shapley"].row()["shapley_evaluations"] >= 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"edge_normalisation": True}, "betas"),
        ({"solver": "first-order"}, "shapley"),
        ({"shapley_permutations": 0}, "permutation"),
        ({"shapley_momentum": 1.0}, "momentum"),
        ({"shapley_step": 0.0}, "step"),
    ],
)
def test_nonsense_is_refused(change, named):
    with pytest.raises(UserError, match=named):
        tiny(**change)
