"""FairNAS: every candidate once in a step, gradients summed; counted, and against paths run one by one."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from supernet_searches import SPACE, assert_resumes, tiny_search
from torch import nn

from nas.supernet import weight_steps
from nas.supernet.network import Supernet
from nas.supernet.paths import fair_draws
from nas.supernet.recipes import recipe
from nas.supernet.relaxation import UniformPath
from nas.supernet.steps import run_epoch
from search_spaces.choice import Choice
from search_spaces.common.errors import UserError


def supernet(*counts: int) -> Supernet:
    places = [Choice([nn.Linear(2, 2) for _ in range(count)], f"place {i}") for i, count in enumerate(counts)]
    return Supernet(nn.Sequential(*places), UniformPath(), generator=torch.Generator().manual_seed(0))


def counted(net: Supernet) -> dict[str, Counter]:
    draws = fair_draws(net)
    found: dict[str, Counter] = {}
    for draw in draws:
        for label, weights in draw.weights.items():
            (chosen,) = weights.active
            assert torch.equal(weights.values, torch.eye(len(net.alphas[label]))[chosen])
            found.setdefault(label, Counter())[chosen] += 1
    return found


def test_every_candidate_is_in_exactly_one_path():
    net = SPACE.choices(channels=4, cells_per_stage=1)
    net = Supernet(net, UniformPath(), generator=torch.Generator().manual_seed(1))
    for _ in range(20):
        found = counted(net)
        assert found.keys() == set(net.labels)
        assert all(counts == Counter(range(5)) for counts in found.values())


def test_labels_are_permuted_independently_and_evenly():
    net, pairs = supernet(3, 3), Counter()
    for _ in range(1500):
        pairs.update((draw.weights["place 0"].active[0], draw.weights["place 1"].active[0]) for draw in fair_draws(net))
    assert len(pairs) == 9
    assert all(abs(count / 1500 - 1 / 3) < 5 * (2 / 9 / 1500) ** 0.5 for count in pairs.values())


def test_where_labels_differ_counts_differ_by_one_at_most():
    net, total = supernet(5, 2, 1), Counter()
    for _ in range(200):
        found = counted(net)
        assert found["place 0"] == Counter(range(5))
        assert sorted(found["place 1"].values()) == [2, 3]
        assert found["place 2"] == Counter({0: 5})
        total += found["place 1"]
    assert abs(total[0] - 500) < 4 * (200 / 4) ** 0.5


def test_what_is_fixed_or_dropped_stays_out():
    net = supernet(4, 3, 3)
    net.select({"place 0": 2})
    net.restrict("place 1", [0, 2])
    found = counted(net)
    assert found == {"place 1": found["place 1"], "place 2": Counter(range(3))}
    assert sorted(found["place 1"]) == [0, 2]
    assert sorted(found["place 1"].values()) == [1, 2]


def test_a_step_sums_the_gradients_of_paths_run_one_by_one(monkeypatch):
    """Each path as the network that `select` makes of it; the sum is clipped, one step is taken."""
    found, state = tiny_search("fairnas", images=40, clip_norm=0.5)
    net, batch, drawn = copy.deepcopy(state.supernet), state.batches.batch(0), []
    monkeypatch.setattr(weight_steps, "fair_draws", lambda supernet: drawn.extend(fair_draws(supernet)) or drawn)
    means = run_epoch(state, found)
    assert (state.step, len(drawn)) == (1, 5)
    net.train()
    losses = []
    for draw in drawn:
        net.select({label: weights.active[0] for label, weights in draw.weights.items()})
        losses.append(nn.functional.cross_entropy(net(batch.images), batch.labels))
        losses[-1].backward()
    weights = net.weight_parameters()
    # All but weights whose output every later edge of their path throws away.
    assert sum(p.grad is not None for p in weights) > 0.7 * len(weights)
    assert nn.utils.clip_grad_norm_(weights, 0.5) > 0.5
    torch.optim.SGD(weights, found.training.learning_rate, 0.9, weight_decay=2.5e-4).step()
    for ours, expected in zip(state.supernet.weight_parameters(), weights, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)
    assert means["train_loss"] == pytest.approx(sum(loss.item() for loss in losses) / 5, rel=1e-5)


def test_it_resumes_bit_for_bit():
    assert_resumes("fairnas")


def test_it_wants_uniform_paths_and_weights_alone():
    with pytest.raises(UserError, match="strict_fairness"):
        recipe("gdas").replaced({"strict_fairness": True})
