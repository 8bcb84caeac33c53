"""Checkpoints: nothing lost, what does not fit is refused, damage is seen, a full disk leaves the old one."""

from __future__ import annotations

import os
import resource
from dataclasses import replace

import pytest
import torch
from small_trainings import equal, network, patterns, same, weights
from torch import nn

from nas.training.checkpoints import (
    DamagedCheckpoint,
    checkpoint_path,
    checkpoints,
    keep_newest,
    load_state,
    load_state_dict,
    read,
    save_state,
    snapshot,
)
from nas.training.loop import advance, start
from nas.training.recipe import Recipe
from search_spaces.common.errors import RunError, UserError

RECIPE = Recipe(steps=12, batch_size=32, padding=1, clip_norm=2.0, ema_decay=0.9)


def state_after(steps: int, recipe: Recipe = RECIPE, seed: int = 0):
    return advance(start(network(), patterns(), recipe, seed=seed), recipe, steps=steps)


def timeless(content: dict) -> dict:
    return {k: v for k, v in content.items() if k != "seconds"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "adamw", "learning_rate": 0.01},
        {"optimizer": "rmsprop"},
        {"nesterov": True, "ema_decay": None, "mixup": 0.3},
        {"precision": "float16"},
        {"precision": "bfloat16", "channels_last": True},
        {"drop_last": False, "cutmix": 1.0},
    ],
)
def test_every_part_comes_back(settings, tmp_path):
    """At each of the steps of two epochs: weights, optimiser, scaler, average, generators, place, curve."""
    recipe = replace(RECIPE, **settings)
    whole = timeless(snapshot(state_after(12, recipe)))
    for broken in (1, 4, 5, 9):
        path = tmp_path / f"{broken}.pt"
        save_state(path, state_after(broken, recipe), recipe)
        torch.manual_seed(broken)
        state = load_state(path, network(seed=broken), patterns(), recipe)
        assert state.step == broken
        assert equal(timeless(snapshot(advance(state, recipe))), whole)


def test_a_snapshot_is_put_back():
    state = state_after(3)
    before = snapshot(state)
    advance(state, RECIPE, steps=7)
    assert not equal(snapshot(state)["model"], before["model"])
    load_state_dict(state, before)
    assert equal(snapshot(state), before)


def test_what_stands_beside_the_state_comes_back(tmp_path):
    more = {"curve": [{"epoch": 1, "val_acc": 0.1 + 0.2}], "best": {"model": {"a": torch.ones(2)}}}
    save_state(tmp_path / "c.pt", state_after(1), RECIPE, more)
    assert equal(read(tmp_path / "c.pt")["more"], more)


def test_schedules_may_change_and_other_settings_not(tmp_path):
    path = tmp_path / "c.pt"
    save_state(path, state_after(2), RECIPE)
    free = replace(RECIPE, steps=40, schedule="cosine", learning_rate=0.05, warmup_steps=0)
    assert load_state(path, network(), patterns(), free).step == 2
    other = replace(RECIPE, batch_size=16, momentum=0.8, steps=40)
    with pytest.raises(
        UserError, match=r"the same recipe; batch_size: 16 instead of 32; momentum: 0.8 instead of 0.9$"
    ):
        load_state(path, network(), patterns(), other)


def test_what_is_not_this_training(tmp_path):
    path = tmp_path / "c.pt"
    save_state(path, state_after(2), RECIPE)
    with pytest.raises(UserError, match="a checkpoint of this model"):
        load_state(path, nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), patterns(), RECIPE)
    with pytest.raises(UserError, match="153: expected 150 training images"):
        load_state(path, network(), patterns(153), RECIPE)
    with pytest.raises(UserError, match="a checkpoint that exists"):
        load_state(tmp_path / "d.pt", network(), patterns(), RECIPE)
    for version, message in ((3, "of format 2 or older, found 3; update"), (1, "of format 2; found 1")):
        torch.save({**torch.load(path, weights_only=True), "format": version}, tmp_path / "v.pt")
        with pytest.raises(UserError, match=message) as caught:
            read(tmp_path / "v.pt")
        assert not isinstance(caught.value, DamagedCheckpoint)


def test_damage_is_seen_wherever_it_is(tmp_path):
    """Cut off anywhere, or one byte changed in any stored tensor: never loaded as if it were whole."""
    path, state = tmp_path / "c.pt", state_after(2)
    save_state(path, state, RECIPE)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpoint, match="a complete checkpoint"):
            read(path)
    value = state.model[0].weight.detach().numpy().tobytes()
    at = whole.index(value)
    for place in (at, at + len(value) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedCheckpoint):
            read(path)
    path.write_bytes(whole)
    assert read(path)["step"] == 2


class Malicious:
    def __reduce__(self):
        return os.system, ("true",)


def test_foreign_pickles_are_not_run(tmp_path):
    torch.save({"format": 2, "model": Malicious()}, tmp_path / "c.pt")
    with pytest.raises(DamagedCheckpoint):
        read(tmp_path / "c.pt")


def test_two_are_kept(tmp_path):
    (tmp_path / ".step-000000001.pt.half").write_bytes(b"left by a killed process")
    for step in (5, 90, 100, 1000):
        checkpoint_path(tmp_path, step).write_bytes(b"")
        keep_newest(tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000001000.pt", "step-000000100.pt"]
    assert len(list(tmp_path.iterdir())) == 2


def test_the_old_checkpoint_survives_a_write_that_fails(tmp_path, monkeypatch):
    state = state_after(1)
    save_state(tmp_path / "c.pt", state, RECIPE)
    saved = (tmp_path / "c.pt").read_bytes()

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match="No space left"):
        save_state(tmp_path / "c.pt", advance(state, RECIPE, steps=2), RECIPE)
    assert (tmp_path / "c.pt").read_bytes() == saved
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_the_old_checkpoint_survives_a_full_disk(tmp_path):
    """The system itself refuses to write more, in the midst of torch's archive."""
    path, state = tmp_path / "c.pt", state_after(1)
    save_state(path, state, RECIPE)
    before = path.read_bytes()
    advance(state, RECIPE, steps=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(RunError, match="could not be written"):
            save_state(path, state, RECIPE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_loading_changes_the_given_model_only(tmp_path):
    state = state_after(2)
    save_state(tmp_path / "c.pt", state, RECIPE)
    kept, other = weights(state.model), network(seed=5)
    advance(load_state(tmp_path / "c.pt", other, patterns(), RECIPE), RECIPE, steps=4)
    assert same(kept, weights(state.model))
    assert not same(kept, weights(other))
