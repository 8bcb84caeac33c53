"""Many architectures on one network of choices: the values of one by one, for the same weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import zero_cost
from nas.scoring import ScoringTask, batched, score_architectures
from nas.scoring.batched import SharedNetwork
from nas.scoring.initialisations import score_initialisations
from nas.scoring.program import NotTogether, Program, _batch_norms_together
from nas.scoring.task import representative
from search_spaces import load_space
from search_spaces.cells.nas_bench_201 import NasBench201
from search_spaces.choice import select, selected_state_dict
from search_spaces.common.errors import UserError
from zero_cost.passes import redrawn as redrawing

SCALES = {"nas-bench-201": {"channels": 4, "cells_per_stage": 1}, "nas-bench-macro": {"channels": 4}}
WHOLE = ("swap", "linear-regions", "hash-redundancy", "hash-accuracy", "params")  # counts
REAL = ("nwot", "nwot-live", "meco", "meco-opt", "synflow-forward", "l2-norm")
SPACE = NasBench201()
NOTHING, DEAD, PRUNED = (0,) * 6, (3, 3, 0, 1, 0, 3), (0, 3, 0, 1, 0, 3)


def task(space="nas-bench-201"):
    return ScoringTask(space, batch_size=8, network=SCALES[space])


def some(space, count=7):
    rng = np.random.default_rng(1)
    found = load_space(space)
    return [found.sample(rng) for _ in range(count)] + ([NOTHING, DEAD, PRUNED] if space == SPACE.name else [])


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network_of(of, arch, seed=0):
    """`build(arch)` with the weights that the network of choices has for it, without `SharedNetwork`."""
    space, shape = load_space(of.space), {"in_channels": 1, "num_classes": 10, **of.network}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = space.choices(**shape)
    select(whole, space.select(arch))
    model = space.build(arch, **shape)
    model.load_state_dict(selected_state_dict(whole))
    return model


@pytest.mark.parametrize("space", SCALES)
def test_values_are_those_of_one_by_one_with_the_same_weights(space):
    of, archs = task(space), some(space)
    names = [*WHOLE, *REAL]
    found = SharedNetwork(of, 0).score(archs, names)
    for arch, (values, reasons) in zip(archs, found, strict=True):
        expected = zero_cost.score(network_of(of, arch), of.batch(0), names)
        assert reasons.keys() == expected.reasons.keys()
        for name in WHOLE:
            assert values[name] == expected[name], name
        for name in REAL:
            assert values[name] == pytest.approx(expected[name], rel=1e-5, nan_ok=True), name


@pytest.mark.parametrize("space", SCALES)
def test_redrawn_weights_are_shared_too(space, monkeypatch):
    """Zen-score and the spectra of AZ-NAS, with what was drawn for the network of choices put into each network."""
    of, archs = task(space), some(space)
    names = ["zen", "az-expressivity", "az-progressivity"]
    shared = SharedNetwork(of, 0)
    found = shared.score(archs, names)
    original = redrawing.redrawn
    whole = redrawing.Network(shared.network, None, 0)
    for arch, (values, reasons) in zip(archs, found, strict=True):

        def given(network, generator, deviation, arch=arch):
            drawn = original(whole, generator, deviation)
            return {plain: drawn[name] for name, plain in shared.names(arch).items() if name in drawn}

        monkeypatch.setattr(redrawing, "redrawn", given)
        expected = zero_cost.score(network_of(of, arch), of.batch(0), names)
        assert reasons.keys() == expected.reasons.keys()
        for name in names:
            # Progressivity is a difference of entropies that nearly agree.
            assert values[name] == pytest.approx(expected[name], rel=1e-5, abs=2e-5, nan_ok=True), name


@pytest.mark.parametrize("elements", [1, 1 << 12, 1 << 27])
def test_how_many_stand_in_one_call_changes_nothing(elements):
    shared, archs = SharedNetwork(task(), 0), some("nas-bench-201")
    inputs = task().batch(0)[0][0]
    program = Program(shared.network, [SPACE.select(a) for a in archs], inputs)
    found = {}
    wanted = set(program.output.tolist())
    program.run(inputs, wanted, lambda n, v: found.update(zip(n, v, strict=True)), elements=elements)
    for arch, node in zip(archs, program.output.tolist(), strict=True):
        expected = network_of(task(), arch).train()(inputs)
        torch.testing.assert_close(found[node], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_of_several_architectures_has_statistics_of_each(affine):
    """The form that a GPU runs, against BatchNorm of one after another."""
    norm = nn.BatchNorm2d(3, affine=affine, momentum=1.0)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    values = torch.randn(2, 5, 3, 4, 4) * torch.tensor([1.0, 7.0]).view(2, 1, 1, 1, 1) + 3
    found, variances = _batch_norms_together(values, norm.weight, norm.bias, norm.eps)
    for k in range(2):
        torch.testing.assert_close(found[k], norm(values[k]))
        torch.testing.assert_close(variances[k], norm.running_var)


def test_what_architectures_share_is_computed_once():
    """Twins in one program add nothing; two that differ in the last cell's last edge share all cells' other values."""
    of = task()
    shared, inputs = SharedNetwork(of, 0), of.batch(0)[0][0]

    def convolutions(*archs):
        program = Program(shared.network, [SPACE.select(a) for a in archs], inputs)
        nodes = program.behind(set(program.output.tolist()))
        return sum(program.calls[program.node_call[n]].func is torch.conv2d for n in nodes if n)

    assert convolutions(PRUNED) == 1 + 2 * 3 + 3 * 2  # the stem, two reductions, three cells
    assert convolutions(DEAD) == convolutions(PRUNED)  # what leads nowhere is not computed
    assert convolutions(PRUNED, DEAD) == convolutions(PRUNED)
    other = (0, 3, 0, 1, 0, 2)
    # One first cell's 3x3 convolution is shared; the stem is; all that follows is not.
    assert convolutions(PRUNED, other) == 2 * convolutions(PRUNED) - 2


def test_score_architectures_with_shared_weights(tmp_path):
    of, archs = task(), some("nas-bench-201")
    names = ["nwot", "meco", "grad-norm", "macs"]
    arguments = {"weights": "shared", "by_class": False, "cache": tmp_path / "scores.sqlite"}
    table = score_architectures(of, archs, names, seeds=(0, 1), **arguments)
    assert table.notes == ()
    for s, seed in enumerate((0, 1)):
        for k, arch in enumerate(archs):
            expected = zero_cost.score(network_of(of, arch, seed), of.batch(seed), names[:3], seed=seed)
            wanted = [expected[name] for name in names[:3]]
            np.testing.assert_allclose(table.values[k, :3, s], wanted, rtol=1e-5)
    assert score_architectures(of, archs, names, seeds=(0, 1), **arguments).networks == 0
    own = score_architectures(of, archs[:1], names, by_class=False, cache=arguments["cache"])
    assert own.networks == 1  # other weights, other scores
    assert own.values[0, 0, 0] != table.values[0, 0, 0]


def test_classes_share_what_counts_calls_where_nothing_is_dead():
    """A skip before or after a convolution: one function, other weights of the shared network."""
    first, second = (3, 0, 0, 0, 1, 0), (1, 0, 0, 0, 3, 0)
    assert SPACE.function_key(first) == SPACE.function_key(second)
    names = ["nwot", "meco", "zen"]
    table = score_architectures(task(), [first, second, DEAD, PRUNED], names, weights="shared")
    assert representative(SPACE, SPACE.name, DEAD) == PRUNED
    nwot, meco, zen = table.values[:, :, 0].T
    assert nwot[0] == nwot[1]
    assert zen[0] == zen[1]
    assert meco[0] != meco[1]  # counts the maps of skips, wherever they stand
    assert nwot[2] != nwot[3]  # the dead convolution has a ReLU


def test_blocks_and_workers_change_nothing(monkeypatch):
    archs = some("nas-bench-201", 3)
    whole = score_architectures(task(), archs, "nwot,synflow-forward", weights="shared")
    monkeypatch.setattr(batched, "MOST", 2)
    monkeypatch.setattr(batched, "MEMORY", 1)
    parts = score_architectures(task(), archs, "nwot,synflow-forward", weights="shared")
    np.testing.assert_array_equal(parts.values, whole.values)


def test_spaces_without_choices_are_scored_with_own_weights_and_say_so(caplog):
    of = ScoringTask("nas-bench-101", batch_size=4, network={"channels": 4, "cells_per_stage": 1})
    space = load_space("nas-bench-101")
    archs = [space.sample(np.random.default_rng(k)) for k in range(2)]
    table = score_architectures(of, archs, "nwot", weights="shared")
    assert len(table.notes) == 1
    assert "no network of choices" in table.notes[0]
    np.testing.assert_array_equal(table.values, score_architectures(of, archs, "nwot").values)
    with pytest.raises(UserError, match="own"):
        score_architectures(of, archs, "nwot", weights="shred")


def test_what_a_program_cannot_hold_is_scored_one_by_one():
    of = dataclasses.replace(task(), network={**task().network, "act": lambda channels: nn.ReLU(inplace=True)})
    shared = SharedNetwork(of, 0)
    with pytest.raises(NotTogether, match="overwrites"):
        shared.score([PRUNED], ["nwot"])
    table = score_architectures(of, [PRUNED], "nwot", weights="shared")
    assert "one architecture at a time" in table.notes[0]
    expected = zero_cost.score(network_of(of, PRUNED), of.batch(0), ["nwot"])
    assert table.values[0, 0, 0] == pytest.approx(expected["nwot"], rel=1e-5)


def test_several_initialisations_of_one_architecture_at_once():
    of, names = task(), ["nwot", "swap", "linear-regions", "meco", "meco-opt", "l2-norm", "params", "hash-accuracy"]
    for arch in (PRUNED, DEAD, NOTHING):
        found = score_initialisations(of, arch, (0, 3, 4), names)
        for seed, (values, reasons) in zip((0, 3, 4), found, strict=True):
            expected, why = of.score(arch, seed, names)
            assert reasons == why
            for name in names:
                assert values[name] == pytest.approx(expected[name], rel=1e-5, nan_ok=True), name
                assert values[name] == expected[name] or name not in WHOLE
    with pytest.raises(UserError, match="one forward pass"):
        score_initialisations(of, PRUNED, (0, 1), ["grad-norm"])
