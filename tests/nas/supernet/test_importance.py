"""PA&DA: probabilities against brute force, draws against probabilities, resumed bit for bit."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from supernet_searches import assert_resumes, tiny_search
from torch import nn

from nas.supernet.importance import ImportanceSampling, mixed_with_uniform
from nas.supernet.network import Supernet
from nas.supernet.recipes import recipe
from nas.supernet.relaxation import SampledPath
from nas.supernet.settings import Importance
from nas.supernet.steps import run_epoch
from nas.training.batches import Batches
from search_spaces.choice import Choice
from search_spaces.common.errors import UserError


def test_probabilities_are_shares_mixed_with_uniform_ones():
    sizes = [3.0, 0.0, 1.0, 4.0]
    for share in (0.0, 0.4, 1.0):
        expected = [share * size / 8 + (1 - share) / 4 for size in sizes]
        assert mixed_with_uniform(np.array(sizes), share) == pytest.approx(expected, rel=1e-12)
    assert mixed_with_uniform(np.zeros(5), 0.9) == pytest.approx([0.2] * 5)


def test_paths_have_the_probabilities_that_alphas_hold():
    probabilities = torch.tensor([0.5, 0.05, 0.15, 0.3])
    alpha, generator, counts = probabilities.log(), torch.Generator().manual_seed(0), torch.zeros(4)
    for _ in range(4000):
        weights = SampledPath().draw(alpha, generator, 0.0)
        (chosen,) = weights.active
        assert torch.equal(weights.values, torch.eye(4)[chosen])
        assert not weights.gated
        counts[chosen] += 1
    deviation = (probabilities * (1 - probabilities) / 4000).sqrt()
    assert ((counts / 4000 - probabilities).abs() < 4 * deviation).all()


# -- images --------------------------------------------------------------------------------------------------------


def batches(seed: int = 3, count: int = 50) -> Batches:
    return Batches(torch.zeros(count, 1, 2, 2), torch.zeros(count, dtype=torch.int64), 10, seed=seed)


def test_images_are_drawn_with_their_probabilities():
    sizes = np.arange(50.0)
    found, probabilities = batches(), mixed_with_uniform(sizes, 0.8)
    found.draw_by(probabilities)
    rows = np.concatenate([found.rows(step) for step in range(2000)])
    counts = np.bincount(rows, minlength=50) / len(rows)
    assert (abs(counts - probabilities) < 5 * np.sqrt(probabilities / len(rows))).all()
    # What a draw contributes divided by N p is without bias the mean over all images.
    values = np.sin(np.arange(50.0)) + 2
    weighed = values[rows] / (50 * probabilities[rows])
    assert weighed.mean() == pytest.approx(values.mean(), abs=4 * weighed.std() / math.sqrt(len(rows)))
    assert abs(values[rows].mean() - values.mean()) < 1  # and the draws are not the same image over and over
    assert len(np.unique(rows[:50])) > 20


def test_draws_depend_on_seed_and_epoch_alone():
    first, second, plain = batches(), batches(), batches()
    before = [plain.rows(step) for step in range(10)]
    for found in (first, second):
        found.draw_by(mixed_with_uniform(np.arange(50.0), 0.5))
    order = [first.rows(step) for step in range(10)]
    assert all((second.rows(step) == order[step]).all() for step in (7, 2, 9, 0))
    assert not (np.sort(np.concatenate(order[:5])) == np.sort(np.concatenate(order[5:]))).all()
    first.draw_by(None)
    assert all((first.rows(step) == before[step]).all() for step in range(10))
    assert (np.sort(np.concatenate(before[:5])) == np.arange(50)).all()


# -- a search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_two_steps_against_the_authors_bookkeeping_written_out(shared, monkeypatch):
    found, state = tiny_search("pa-da", importance_shared=shared, clip_norm=0.3, epochs=4)
    net = copy.deepcopy(state.supernet)
    state.step, part = 2, state.parts["importance"]  # the second epoch, after which a quarter is by importance
    part.images = mixed_with_uniform(np.arange(len(state.batches.images)) ** 8.0, 0.9)  # some twice in a batch
    state.batches.draw_by(part.images)
    rows = [state.batches.rows(step) for step in (2, 3)]
    assert any(len(np.unique(r)) < 16 for r in rows)
    assert set(rows[0]) & set(rows[1])
    given = [state.batches.batch(step) for step in (2, 3)]
    rates = [found.training.resolved(2).rate(step, 2) for step in (2, 3)]
    drawn, real = [], Supernet.draw
    monkeypatch.setattr(Supernet, "draw", lambda self: drawn.append(real(self)) or drawn[-1])
    run_epoch(state, found)
    monkeypatch.undo()

    norms = {key: [0.0] * 5 for key in (["all"] if shared else net.labels)}
    scores = [0.0] * len(state.batches.images)
    optimizer = torch.optim.SGD(net.weight_parameters(), 1.0, 0.9, weight_decay=2.5e-4)
    net.train()
    for draw, batch, own, rate in zip(drawn, given, rows, rates):
        path = {label: weights.active[0] for label, weights in draw.weights.items()}
        net.select(path)
        optimizer.zero_grad()
        outputs = net(batch.images)
        nn.functional.cross_entropy(outputs, batch.labels).backward()
        nn.utils.clip_grad_norm_(net.weight_parameters(), 0.3)
        for row, logits, target in zip(own, outputs.detach(), batch.labels):
            p = logits.softmax(0)
            p[target] -= 1
            scores[row] = (scores[row] + p.norm().item()) / 2 if scores[row] else p.norm().item()
        sizes = {
            label: sum(
                p.grad.norm().item()
                for place in net._mixed[label]
                for p in place.candidates[k].parameters()
                if p.grad is not None
            )
            for label, k in path.items()
        }
        for key, values in norms.items():
            for k in range(5):
                same = [size for label, size in sizes.items() if key in ("all", label) and path[label] == k]
                if sum(same):
                    values[k] = (values[k] + sum(same) / len(same)) / 2
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    assert any(sum(values) > 0 for values in norms.values())
    for label, alpha in state.supernet.alphas.items():
        sizes = norms["all" if shared else label]
        expected = [0.25 * n / sum(sizes) + 0.75 / 5 if sum(sizes) else 0.2 for n in sizes]
        assert alpha.softmax(0).tolist() == pytest.approx(expected, rel=1e-3)
        assert alpha.exp().sum().item() == pytest.approx(1, rel=1e-5)  # logarithms of probabilities
    expected = [0.25 * score / sum(scores) + 0.75 / len(scores) for score in scores]
    assert part.images == pytest.approx(expected, rel=1e-3)
    assert max(abs(a.softmax(0) - 0.2).max().item() for a in state.supernet.alphas.values()) > 0.01


def test_labels_share_probabilities_where_their_candidates_are_alike():
    places = [Choice([nn.Linear(2, 2), nn.Identity()], "a"), Choice([nn.Linear(2, 2), nn.ReLU()], "b")]
    places.append(Choice([nn.Linear(2, 2), nn.Identity()], "c"))
    net = Supernet(nn.Sequential(*places), SampledPath(), generator=torch.Generator())
    assert ImportanceSampling(net, Importance()).groups == [["a", "c"], ["b"]]
    assert ImportanceSampling(net, Importance(shared=False)).groups == [["a"], ["b"], ["c"]]


def test_the_first_epochs_are_uniform():
    """Of all images once in the first, of draws in the second, whose weight of importance is still 0."""
    found, state = tiny_search("pa-da", images=64)
    count = len(state.batches.images)
    for _ in range(2):
        assert all(a.softmax(0).tolist() == pytest.approx([0.2] * 5) for a in state.supernet.alphas.values())
        run_epoch(state, found)
    assert state.parts["importance"].row()["effective_images"] < count - 1e-3
    assert sum(state.parts["importance"].row()["path_probabilities"]["edge_0_1"]) == pytest.approx(1)


def test_either_can_be_left_out():
    found, state = tiny_search("pa-da", importance_paths=False, epochs=3)
    for _ in range(2):
        run_epoch(state, found)
    assert not any(a.any() for a in state.supernet.alphas.values())
    assert state.batches.probabilities is not None
    found, state = tiny_search("pa-da", importance_images=False, epochs=3)
    for _ in range(2):
        run_epoch(state, found)
    assert state.batches.probabilities is None
    assert any(a.std() > 0 for a in state.supernet.alphas.values())


def test_it_resumes_bit_for_bit():
    assert_resumes("pa-da", epochs=3)


def test_it_wants_paths_sampled_and_weights_alone():
    with pytest.raises(UserError, match="sampled-path"):
        recipe("pa-da").replaced({"relaxation": "uniform-path"})
