"""Pre-flight: it leaves no trace, its memory is a hand count, its time that of real steps."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from small_trainings import equal, network, patterns
from torch import nn

from nas.training import preflight
from nas.training.checkpoints import snapshot
from nas.training.loop import advance, start
from nas.training.preflight import Forecast, available_bytes, forecast
from nas.training.recipe import Recipe
from search_spaces.common.errors import RunError

RECIPE = Recipe(steps=40, batch_size=32, padding=1, mixup=0.2, ema_decay=0.9)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize("done", [0, 7])
def test_it_leaves_no_trace(optimizer, done):
    """Dropout, running statistics, average, optimiser, place, times: bit for bit, and so is the training after it."""
    recipe = replace(RECIPE, optimizer=optimizer, learning_rate=0.01, precision="float16" if done else "float32")
    plain, watched = (start(network(), patterns(), recipe, seed=2) for _ in range(2))
    for state in (plain, watched):
        advance(state, recipe, steps=done)
        state.seconds = 0.0
    before = snapshot(watched)
    forecast(watched, recipe, 40)
    assert equal(snapshot(watched), before)
    found, expected = (snapshot(advance(s, recipe, steps=12)) for s in (watched, plain))
    assert equal({**found, "seconds": 0}, {**expected, "seconds": 0})


@pytest.mark.parametrize(
    ("settings", "tensors"),
    [
        ({"momentum": 0.0}, 0),
        ({}, 1),
        ({"optimizer": "adamw", "learning_rate": 0.01}, 2),
        ({"optimizer": "rmsprop"}, 2),
        ({"ema_decay": 0.9}, 2),
    ],
)
def test_memory_is_a_hand_count(settings, tensors):
    """A perceptron of 128, 50 and 3 units on 16 images, float32.

    Kept for the backward pass: the input of both linear layers (that of the second is what ReLU kept), the
    logarithms of the probabilities and cross_entropy's weight sum, the labels.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 50), nn.ReLU(), nn.Linear(50, 3))
    recipe = Recipe(steps=40, batch_size=16, **settings)
    count = 128 * 50 + 50 + 50 * 3 + 3
    counters = 4 * 4 if settings.get("optimizer") == "adamw" else 0  # AdamW's four step counts
    average = 8 if "ema_decay" in settings else 0  # n_averaged, int64
    held = (2 + tensors) * count * 4 + counters + average
    kept = 16 * 128 * 4 + 16 * 50 * 4 + 16 * 3 * 4 + 4 + 16 * 8
    found = forecast(start(model, patterns(), recipe, seed=0), recipe, 40)
    assert found.memory_bytes == held + kept


def test_memory_grows_with_the_batch():
    """Activations are proportional to the batch, weights are not."""
    sizes = [
        forecast(start(network(), patterns(), replace(RECIPE, batch_size=b, mixup=0.0), seed=0), RECIPE, 40)
        for b in (10, 20, 40)
    ]
    first, second, third = (s.memory_bytes for s in sizes)
    assert third - second == pytest.approx(2 * (second - first), rel=0.02)


def test_the_step_time_is_a_real_one():
    """Within a factor of three, the machine's other work included; the best of five attempts."""
    model = nn.Sequential(nn.Conv2d(2, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(512, 3))
    state = start(model, patterns(), RECIPE, seed=0)
    ratios = []
    for _ in range(5):
        found = forecast(state, RECIPE, 40)
        begin = time.perf_counter()
        advance(state, RECIPE, steps=state.step + 5)
        ratios.append(found.step_seconds / ((time.perf_counter() - begin) / 5))
        if 1 / 3 < ratios[-1] < 3:
            return
    pytest.fail(f"predicted / real: {ratios}")


def test_the_time_is_that_of_all_steps_left():
    state = advance(start(network(), patterns(), RECIPE, seed=0), RECIPE, steps=10)
    found = forecast(state, RECIPE, 40, seeds=3)
    assert found.seconds == found.step_seconds * (30 + 2 * 40)


def test_available_memory_and_whether_it_fits(monkeypatch):
    available = available_bytes(torch.device("cpu"))
    assert available is not None
    assert 2**20 < available < 2**50
    assert Forecast(1.0, 1.0, available, available).fits
    assert not Forecast(1.0, 1.0, available + 1, available).fits
    assert Forecast(1.0, 1.0, available, None).fits
    monkeypatch.setattr(preflight.os, "sysconf", lambda name: -1 if name == "SC_AVPHYS_PAGES" else 4096)
    monkeypatch.setattr("builtins.open", _no_file)
    assert available_bytes(torch.device("cpu")) is None


def _no_file(*_, **__):
    raise FileNotFoundError("no /proc here")


class Greedy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        torch.empty(2**60, dtype=torch.uint8)
        return self.inner(x)


def test_running_out_of_memory_leaves_the_state():
    state = start(Greedy(), patterns(), RECIPE, seed=0)
    before = snapshot(state)
    with pytest.raises(RunError, match="out of memory with batches of 32 images; lower batch_size"):
        forecast(state, RECIPE, 40)
    assert equal(snapshot(state), before)
