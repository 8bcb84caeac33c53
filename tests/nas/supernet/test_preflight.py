"""The forecast of a search: nothing is changed, memory follows what is searched in."""

import copy

import pytest
import torch

from nas.supernet.building import make_supernet, search_data
from nas.supernet.preflight import SavedBytes, forecast
from nas.supernet.recipes import recipe, scaled
from nas.supernet.state import start, state_dict
from nas.supernet.steps import run_epoch
from nas.training.data import load_data
from search_spaces.registry import load_space


def search(name, **changes):
    found = scaled(recipe(name), "tiny", flip=False).replaced({"batch_size": 16, **changes})
    data = search_data(load_data("digits", val_share=0.0), found, images=100, seed=0)
    space = load_space("nas-bench-201")
    return found, start(make_supernet(space, found, data, seed=0), data, found, seed=0)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("name", ["darts-v1", "darts-v2", "pc-darts", "gdas", "spos"])
def test_everything_is_put_back(name):
    found, state = search(name)
    before = copy.deepcopy(state_dict(state))
    expected = forecast(state, found, seeds=2)
    assert same(before, state_dict(state))
    steps = 2 * found.epochs * state.batches.steps_per_epoch
    assert expected.seconds == pytest.approx(expected.step_seconds * steps)
    assert expected.step_seconds > 0


def test_memory_follows_the_batch_and_the_channels():
    plain, wide, partial = (
        forecast(*reversed(search("darts-v1", **changes))).memory_bytes
        for changes in ({"batch_size": 8}, {"batch_size": 16}, {"batch_size": 16, "partial": 4})
    )
    assert plain < wide
    assert partial < wide


def test_saved_bytes_are_counted_once_and_given_back():
    counter = SavedBytes(torch.nn.Linear(1, 1))
    x = torch.randn(100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, counter.unpack):
        y = (x.exp() * x.exp()).sum()  # keeps two results, each once for its own node and once for the product
        assert counter.now == counter.peak == 2 * 400
        y.backward()
        del y
    assert counter.now == 0
    assert counter.peak == 800


def test_checkpointed_mixtures_need_less_memory_for_the_same_search():
    (plain_recipe, plain), (found, lean) = search("darts-v1"), search("darts-v1", checkpointed=True)
    assert forecast(lean, found).memory_bytes < 0.7 * forecast(plain, plain_recipe).memory_bytes
    for state, own in ((plain, plain_recipe), (lean, found)):
        run_epoch(state, own, stop=2)
    for one, other in zip(plain.supernet.parameters(), lean.supernet.parameters(), strict=True):
        torch.testing.assert_close(one, other)
