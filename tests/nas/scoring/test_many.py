"""Many architectures: the values of one by one, the cache, seeds, shared classes, workers."""

from __future__ import annotations

import dataclasses
import weakref

import numpy as np
import pytest
import torch

import zero_cost
from nas.scoring import ScoringTask, score_architectures
from nas.scoring.aggregates import needed, with_aggregates
from nas.scoring.task import find_proxy, follows_function, proxy_names, representative
from nas.training.data import load_data
from search_spaces.cells.nas_bench_201 import NasBench201
from search_spaces.common.errors import RunError, UserError

SPACE = NasBench201()
SMALL = {"channels": 4, "cells_per_stage": 1}
TASK = ScoringTask("nas-bench-201", batch_size=8, network=SMALL)
# A dead edge (0, 1): nothing leaves node 1. The first of its class has `none` there.
DEAD, PRUNED = (3, 3, 0, 1, 0, 3), (0, 3, 0, 1, 0, 3)


@pytest.fixture
def archs():
    rng = np.random.default_rng(5)
    return [SPACE.sample(rng) for _ in range(4)]


def by_hand(arch, seed, proxies):
    """The network, the weights and the images of a seed, made without ScoringTask."""
    data = load_data("digits", val_share=0)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = SPACE.build(arch, in_channels=1, num_classes=10, **SMALL)  # digits are grey
    torch.set_rng_state(state)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(data.train)))
    batches = [(data.normalize(data.train.images[rows]), data.train.labels[rows]) for rows in (order[:8], order[8:16])]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return zero_cost.score(model, batches, proxies, seed=seed)
    finally:
        torch.set_num_threads(threads)


def test_values_are_those_of_one_network_at_a_time(archs):
    proxies = ["nwot", "zico", "synflow", "l2-norm", "jacov"]
    table = score_architectures(TASK, archs, proxies, seeds=(3, 4), by_class=False)
    for k, arch in enumerate(archs):
        for s, seed in enumerate((3, 4)):
            expected = by_hand(arch, seed, proxies)
            np.testing.assert_allclose(table.values[k, :, s], [expected[p] for p in proxies], rtol=1e-9)
    assert table.archs == tuple(map(SPACE.encode, archs))
    column = table.column("nwot")
    np.testing.assert_allclose(table.mean()[:, 0], (column[:, 0] + column[:, 1]) / 2)
    np.testing.assert_allclose(table.spread()[:, 0], abs(column[:, 0] - column[:, 1]) / 2**0.5, rtol=1e-9)


def test_counts_are_those_of_the_space_and_build_no_network(archs):
    table = score_architectures(TASK, archs, "params,macs,live-macs")
    assert table.networks == 0
    for arch, row in zip(archs, table.values[:, :, 0], strict=True):
        assert row[0] == sum(p.numel() for p in SPACE.build(arch, in_channels=1, **SMALL).parameters())
        counted = zero_cost.static_costs(SPACE.build(arch, in_channels=1, **SMALL), torch.zeros(1, 1, 8, 8))
        assert list(row) == [counted.params, counted.macs, counted.live_macs]


def test_equal_functions_share_what_sees_no_dead_branches():
    assert representative(SPACE, "nas-bench-201", DEAD) == PRUNED
    names = ["grad-norm", "nwot-live", "nwot", "l2-norm"]
    table = score_architectures(TASK, [DEAD, PRUNED], names)
    own = by_hand(DEAD, 0, names)
    assert table.values[0, 0, 0] == table.values[1, 0, 0]
    assert table.values[0, 0, 0] == pytest.approx(by_hand(PRUNED, 0, names)["grad-norm"], rel=1e-5)
    assert table.values[0, 1, 0] == table.values[1, 1, 0]
    assert table.values[0, 2, 0] == own["nwot"]  # counts the ReLU of the dead edge
    assert table.values[0, 3, 0] == own["l2-norm"]
    assert own["l2-norm"] > table.values[1, 3, 0]
    assert table.networks == 2


@pytest.mark.parametrize("name", [n for n in proxy_names("all") if n != "reg-swap"])
def test_what_is_shared_sees_no_dead_branches(name):
    """With the live weights of one network in the other, a shared proxy has the same value."""
    if not follows_function(find_proxy(name)) or "stages" in find_proxy(name).needs:  # AZ-NAS draws its own weights
        return
    torch.manual_seed(0)
    dead, pruned = (SPACE.build(arch, in_channels=1, **SMALL) for arch in (DEAD, PRUNED))
    pruned.load_state_dict({k: v for k, v in dead.state_dict().items() if k in pruned.state_dict()})
    batch = TASK.batch(0)
    first, second = (zero_cost.score(m, batch, [name])[name] for m in (dead, pruned))
    assert first == pytest.approx(second, rel=1e-5, nan_ok=True)


def test_the_cache_serves_again_and_an_interrupted_call_goes_on(archs, tmp_path, monkeypatch):
    cache = tmp_path / "scores.sqlite"
    whole = score_architectures(TASK, archs, "nwot,snip", seeds=(0, 1))
    scored = []

    def interrupted(self, arch, seed, proxies):
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append((arch, seed))
        return original(self, arch, seed, proxies)

    original = ScoringTask.score
    monkeypatch.setattr(ScoringTask, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score_architectures(TASK, archs, "nwot,snip", seeds=(0, 1), cache=cache)
    monkeypatch.undo()
    seen = []
    again = score_architectures(
        TASK, archs, "nwot,snip", seeds=(0, 1), cache=cache, progress=lambda done, total: seen.append((done, total))
    )
    assert again.networks == whole.networks - 3
    assert seen[0] == (0, again.networks)
    assert seen[-1] == (again.networks, again.networks)
    np.testing.assert_array_equal(again.values, whole.values)
    assert score_architectures(TASK, archs, "snip", seeds=(1,), cache=cache).networks == 0
    other = dataclasses.replace(TASK, batch_size=9)
    assert score_architectures(other, archs[:1], "snip", cache=cache).networks == 1


def test_a_missing_value_keeps_its_reason_in_the_cache(tmp_path):
    nothing = (0,) * 6  # the output does not depend on the input
    for _ in range(2):
        table = score_architectures(TASK, [nothing], "jacov,nwot", cache=tmp_path / "scores.sqlite")
        assert np.isnan(table.values[0, 0, 0])
        assert table.reasons[SPACE.encode(nothing), "jacov"]
    assert table.networks == 0


def test_a_damaged_cache_is_named(tmp_path):
    file = tmp_path / "scores.sqlite"
    file.write_bytes(b"no database" * 100)
    with pytest.raises(RunError, match=r"scores\.sqlite"):
        score_architectures(TASK, [DEAD], "nwot", cache=file)


def test_workers_change_nothing(archs):
    one = score_architectures(TASK, archs[:2], "nwot,own_proxies:weight_peak")
    two = score_architectures(TASK, archs[:2], "nwot,own_proxies:weight_peak", workers=2)
    np.testing.assert_array_equal(one.values, two.values)


def test_networks_are_built_one_after_the_other(archs, monkeypatch):
    """However many architectures: none is kept once it has its scores."""
    built: list[weakref.ref] = []
    original = ScoringTask.model

    def model(self, arch, seed):
        assert not any(earlier() for earlier in built)
        network = original(self, arch, seed)
        built.append(weakref.ref(network))
        return network

    monkeypatch.setattr(ScoringTask, "model", model)
    score_architectures(TASK, archs, "nwot,fisher,gradsign,zen,grasp")
    assert len(built) >= 4


def test_aggregates_rank_within_the_population(archs):
    names = ["az-nas", "snip+nwot", "snip"]
    table = score_architectures(TASK, archs, needed(names))
    found = with_aggregates(table, names)
    expected = np.zeros(4)
    for part in ("snip", "nwot"):
        column = table.column(part)[:, 0]
        expected += [np.log(sum(other <= mine for other in column) / 4) for mine in column]
    np.testing.assert_allclose(found.column("snip+nwot")[:, 0], expected)
    np.testing.assert_array_equal(found.column("snip"), table.column("snip"))
    assert np.isfinite(found.column("az-nas")).all()


@pytest.mark.parametrize(
    ("proxies", "value", "suggestion"),
    [("nwto", "nwto", "nwot"), ("", "", None), ("own_proxies:network", "own_proxies:network", None)],
)
def test_unknown_proxies_are_refused(proxies, value, suggestion):
    with pytest.raises(UserError) as caught:
        score_architectures(TASK, [DEAD], proxies)
    assert caught.value.value == value
    assert suggestion is None or caught.value.suggestion == suggestion


def test_too_few_images_are_named():
    with pytest.raises(UserError, match="5000: expected a batch of at most"):
        dataclasses.replace(TASK, batch_size=5000).batch(0)
    with pytest.raises(UserError, match="batches"):
        dataclasses.replace(TASK, batches=0)
