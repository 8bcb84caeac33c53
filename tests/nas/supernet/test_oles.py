"""OLES: agreement of gradients by loops, which operations freeze, that they stay as they are, resume."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from nas.supernet.building import make_supernet
from nas.supernet.oles import OperationFreezing, agreement, operations
from nas.supernet.recipes import recipe, scaled
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
    small = {"channels": 4, "batch_size": 16, "epochs": 3, "freezing_steps": 1}
    return scaled(recipe("oles"), "tiny", flip=False).replaced({**small, **changes})


def state_of(found, seed=0):
    return start(make_supernet(SPACE, found, DATA, seed=seed), DATA, found, seed=seed)


def part_of(state) -> OperationFreezing:
    part = state.parts["freezing"]
    assert isinstance(part, OperationFreezing)
    return part


def test_agreement_is_the_mean_cosine_along_output_channels():
    torch.manual_seed(0)
    pairs = [(torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)), (torch.randn(5, 1), torch.randn(5, 1))]
    means = []
    for a, b in pairs:
        found = []
        for x, y in zip(a.flatten(1).T.tolist(), b.flatten(1).T.tolist()):
            norms = sum(v * v for v in x) ** 0.5 * sum(v * v for v in y) ** 0.5
            found.append(sum(v * w for v, w in zip(x, y)) / norms)
        means.append(sum(found) / len(found))
    first, second = zip(*pairs)
    assert float(agreement(first, second)) == pytest.approx(sum(means) / 2, rel=1e-5)
    assert float(agreement(first, first)) == pytest.approx(1)
    assert float(agreement([first[0]], [-2 * first[0]])) == pytest.approx(-1)
    assert float(agreement([None], [first[0]])) == 0
    assert float(agreement([torch.zeros(3, 1)], [torch.ones(3, 1)])) == 0


def test_operations_are_candidates_with_weights_at_each_place():
    state = state_of(tiny())
    assert len(part_of(state).operations) == 3 * 6 * 2  # cells, edges, convolutions
    darts = make_supernet(load_space("darts"), tiny(layers=3), DATA, seed=0)
    assert len(operations(darts)) == 3 * 14 * 4  # separable and dilated convolutions; strided skips are none


def test_an_operation_freezes_where_its_gradients_disagree():
    """Gradients of both losses computed here, at the weights before their step and the alphas each saw."""
    found = tiny()
    state = state_of(found)
    net, train, val = copy.deepcopy(state.supernet), state.batches.batch(0), state.alpha_batches.batch(0)
    net.train()
    watched = operations(net)
    torch.nn.functional.cross_entropy(net(val.images), val.labels).backward()
    held_out = [[p.grad.clone() for p in weights] for weights in watched.values()]
    torch.optim.Adam(
        net.architecture_parameters(), found.alpha_rate, found.alpha_betas, weight_decay=found.alpha_decay
    ).step()
    net.zero_grad()
    torch.nn.functional.cross_entropy(net(train.images), train.labels).backward()
    pairs = zip(held_out, watched.values())
    expected = torch.stack([agreement(other, [p.grad for p in weights]) for other, weights in pairs])
    middle = float(expected.median()) + 1e-4
    assert 0 < int((expected < middle).sum()) < len(expected)

    found = tiny(freezing_threshold=middle)
    state = state_of(found)
    part = part_of(state)
    run_epoch(state, found, stop=1)
    assert part.frozen == (expected < middle).tolist()
    assert part.row() == {"frozen": sum(part.frozen)}
    part.settings = dataclasses.replace(part.settings, steps=100)
    before = [[p.detach().clone() for p in weights] for weights in part.operations.values()]
    run_epoch(state, found)
    for still, old, new in zip(part.frozen, before, part.operations.values()):
        assert all(torch.equal(a, b) for a, b in zip(old, new)) == still


def test_the_mean_of_so_many_steps_decides_and_begins_anew():
    found = tiny(freezing_steps=3, freezing_threshold=-1.0)
    state = state_of(found)
    part = part_of(state)
    run_epoch(state, found, stop=2)
    assert part.steps == 2
    assert part.sums.abs().max() > 0
    part.sums[:] = torch.linspace(-8, 8, len(part.sums))
    run_epoch(state, found, stop=3)
    assert (part.steps, float(part.sums.abs().max())) == (0, 0)
    # Means from about -8 / 3 to 8 / 3, moved by at most 1 / 3.
    assert part.frozen[0]
    assert not part.frozen[-1]
    assert 0 < sum(part.frozen) < len(part.frozen) / 2


def test_alphas_that_do_not_move_freeze_nothing():
    found = tiny(alpha_warmup_epochs=1, freezing_threshold=1.0)
    state = state_of(found)
    run_epoch(state, found)
    assert not any(part_of(state).frozen)
    run_epoch(state, found)
    assert all(part_of(state).frozen)
    run_epoch(state, found)  # the rest still learns
    assert not state.failed


def test_a_search_goes_on_as_if_it_had_not_stopped():
    found = tiny(freezing_steps=3, freezing_threshold=0.1)
    whole, before = state_of(found), state_of(found)
    for state in (whole, before):
        run_epoch(state, found)
    run_epoch(whole, found)
    after = state_of(found, seed=7)
    after.batches, after.alpha_batches = before.batches, before.alpha_batches
    load_state_dict(after, copy.deepcopy(state_dict(before)))
    assert 0 < sum(part_of(after).frozen) < len(part_of(after).frozen)
    run_epoch(after, found)
    assert all(torch.equal(a, b) for a, b in zip(whole.supernet.parameters(), after.supernet.parameters(), strict=True))
    assert part_of(whole).frozen == part_of(after).frozen
    assert torch.equal(part_of(whole).sums, part_of(after).sums)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"solver": "second-order"}, "first-order"),
        ({"alpha_first": False}, "alphas first"),
        ({"freezing_steps": 0}, "one step"),
        ({"freezing_threshold": 4.0}, "cosine"),
    ],
)
def test_nonsense_is_refused(change, named):
    with pytest.raises(UserError, match=named):
        tiny(**change)
