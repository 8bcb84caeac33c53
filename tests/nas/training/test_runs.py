"""Trainings as runs: killed, damaged, stopped, failed and gone on with; what is refused before the first step."""

from __future__ import annotations

import multiprocessing
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_trainings import DEAD_EDGE, outcome, own_model, own_task, pictures
from torch import nn

from nas.run import Run
from nas.training import runs
from nas.training.checkpoints import checkpoints, load_state, read
from nas.training.curves import read_curves
from nas.training.loop import advance, evaluate_split, start
from nas.training.recipe import Recipe
from nas.training.runs import train_run
from nas.training.task import Task
from nas.training.trained import best_record, load_trained, weights_path
from search_spaces.common.errors import RunError, UserError

RECIPE = Recipe(
    epochs=4,
    batch_size=30,
    learning_rate=0.05,
    warmup_steps=0,
    schedule="cosine",
    batch_statistics=False,
    ema_decay=0.7,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """What an undisturbed training of two seeds leaves."""
    run = train_run(own_task(RECIPE), tmp_path_factory.mktemp("whole") / "run", seeds=(0, 5))
    return outcome(run.path)


def interrupted(out: Path, seed: int, epoch: int, recipe: Recipe = RECIPE, **settings) -> None:
    """Train until the row of an epoch has been written, and be interrupted before its checkpoint."""

    def stop(at: int, row: dict[str, float]) -> None:
        if (at, row["epoch"]) == (seed, epoch):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(own_task(recipe), out, on_epoch=stop, **settings)


# -- what a run holds --------------------------------------------------------------------------------------------


def test_a_run_is_the_loop_epoch_by_epoch(tmp_path):
    """Weights, curves and metrics are those of the loop and of evaluations called by hand."""
    task = own_task(RECIPE)
    run = train_run(task, tmp_path / "run", seeds=(3,), checkpoint_steps=2)
    data = task.open_data()
    state = start(task.make_network(data, seed=3), data, RECIPE, seed=3)
    rows = read_curves(run.path / "curves.parquet")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    for epoch, row in enumerate(rows):
        state.hits = state.seen = 0
        advance(state, RECIPE, steps=5 * (epoch + 1))
        found = evaluate_split(state.evaluated, data, data.val, RECIPE)
        assert (row["val_acc"], row["val_loss"]) == (found["acc"], found["loss"])
        assert row["train_loss"] == pytest.approx(np.mean(state.losses[-5:]), rel=1e-12)
        assert row["train_acc"] == 100 * state.hits / 150
        assert row["learning_rate"] == pytest.approx(0.025 * (1 + np.cos(np.pi * (5 * epoch + 4) / 20)))
    test = evaluate_split(state.evaluated, data, data.test, RECIPE)
    [record] = run.trials()
    assert record.status == "done"
    assert record.metrics["test_acc"] == test["acc"]
    assert record.metrics["val_loss"] == rows[-1]["val_loss"]
    assert record.metrics["val_acc"] > 60  # guessing gives 33
    saved = load_file(weights_path(run, 3))
    assert all(torch.equal(saved[k], v) for k, v in state.evaluated.state_dict().items())
    assert [p.name for p in checkpoints(run.path / "checkpoints" / "seed-3")] == [
        "step-000000020.pt",
        "step-000000018.pt",
    ]


def test_two_runs_are_identical(whole, tmp_path):
    assert outcome(train_run(own_task(RECIPE), tmp_path / "run", seeds=(0, 5)).path) == whole
    assert whole["weights"]["seed-0.safetensors"] != whole["weights"]["seed-5.safetensors"]


def test_a_trained_network_comes_back(tmp_path):
    run = train_run(own_task(RECIPE), tmp_path / "run", seeds=(0, 5))
    best = max(run.trials(), key=lambda r: r.metrics["val_acc"])
    assert best_record(run) == best
    for reference, record in ((run.path, best), (f"{run.path}:best", best), (f"{run.path}:1", run.trial(1))):
        found = load_trained(str(reference))
        assert found.record.id == record.id
        assert not found.model.training
        measured = evaluate_split(found.model, found.data, found.data.test, RECIPE)
        assert measured["acc"] == found.metrics["test_acc"] == record.metrics["test_acc"]
    with pytest.raises(UserError, match="best or the number"):
        load_trained(f"{run.path}:worst")
    weights_path(run, run.trial(1).seed).write_bytes(b"nothing")
    with pytest.raises(RunError, match="cannot be loaded"):
        load_trained(f"{run.path}:1")


# -- going on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (0, 3), (5, 4)])
def test_interrupted_between_curve_and_checkpoint(seed, epoch, whole, tmp_path):
    interrupted(tmp_path / "run", seed, epoch, seeds=(0, 5), checkpoint_steps=3)
    ahead = read_curves(tmp_path / "run" / "curves.parquet")
    assert ahead[-1]["epoch"] == epoch  # the row is there, its checkpoint is not
    assert outcome(train_run(own_task(RECIPE), tmp_path / "run", seeds=(0, 5), checkpoint_steps=3).path) == whole


def test_interrupted_before_the_weights_are_written(whole, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "as_safetensors", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_run(own_task(RECIPE), tmp_path / "run", seeds=(0, 5))
    assert outcome(train_run(own_task(RECIPE), tmp_path / "run", seeds=(0, 5)).path) == whole


def test_a_finished_run_is_left_alone(whole, tmp_path):
    out = tmp_path / "run"
    train_run(own_task(RECIPE), out, seeds=(0, 5))
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".pt", ".safetensors", ".parquet")}

    def never(*_):
        raise AssertionError("something was trained")

    train_run(own_task(RECIPE), out, seeds=(0, 5), progress=never, on_forecast=never, on_epoch=never)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert outcome(out) == whole


@pytest.mark.parametrize("checkpoints_kept", [True, False])
def test_more_seeds_later(checkpoints_kept, whole, tmp_path):
    out, forecasts = tmp_path / "run", []
    train_run(own_task(RECIPE), out)
    if not checkpoints_kept:
        for path in checkpoints(out / "checkpoints" / "seed-0"):
            path.unlink()
    train_run(own_task(RECIPE), out, seeds=(0, 5), on_forecast=forecasts.append)
    assert outcome(out) == whole
    assert len(forecasts) == 1
    with pytest.raises(UserError, match=r"\[5\]: expected the seeds of the training there, \[0, 5\]"):
        train_run(own_task(RECIPE), out, seeds=(5,))


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_checkpoint_is_passed_over_and_told(damaged, whole, tmp_path):
    out, told = tmp_path / "run", []
    interrupted(out, 0, 4, seeds=(0, 5), checkpoint_steps=2)
    found = checkpoints(out / "checkpoints" / "seed-0")
    for path in found[:damaged]:
        whole_file, weight = path.read_bytes(), read(path)["model"]["0.weight"].numpy().tobytes()
        path.write_bytes(whole_file.replace(weight, bytes(len(weight))))
    train_run(own_task(RECIPE), out, seeds=(0, 5), checkpoint_steps=2, on_warning=told.append)
    assert outcome(out) == whole
    assert len(told) == damaged
    before = found[1] if damaged == 1 else "the beginning"
    assert told[-1] == f"{found[damaged - 1]} is damaged; going back to {before}"
    assert len(list((out / "checkpoints" / "seed-0").glob("*.damaged"))) == damaged


def test_a_disk_that_fills_leaves_a_run_that_goes_on(whole, tmp_path, monkeypatch):
    out, calls = tmp_path / "run", []
    real = torch.save

    def save(content, file):
        calls.append(1)
        if len(calls) == 3:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        real(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(RunError, match="No space left"):
            train_run(own_task(RECIPE), out, seeds=(0, 5))
    assert read(checkpoints(out / "checkpoints" / "seed-0")[0])["step"] == 10
    assert outcome(train_run(own_task(RECIPE), out, seeds=(0, 5)).path) == whole


# -- killed ------------------------------------------------------------------------------------------------------


def train_in_a_process(out: str, begun) -> None:
    torch.set_num_threads(1)
    begun.set()
    train_run(own_task(KILLED), out, seeds=(0, 1), checkpoint_steps=3)


KILLED = replace(RECIPE, epochs=40)


def killed(kills: int, out: Path, reference: dict, seconds: float, rng: random.Random) -> None:
    """Train, killed `kills` times after a random time, then to the end: the same as the undisturbed training."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nas.training.runs", "small_trainings"])
    done = 0
    while done < kills:
        begun = context.Event()
        process = context.Process(target=train_in_a_process, args=(str(out), begun))
        process.start()
        assert begun.wait(120)
        time.sleep(rng.uniform(0, seconds / (0.5 * kills + 1)))
        process.kill()
        process.join()
        done += 1
        if process.exitcode == 0:  # it was done before
            break
        assert process.exitcode == -9
    assert done > kills // 2
    assert outcome(train_run(own_task(KILLED), out, seeds=(0, 1), checkpoint_steps=3).path) == reference
    assert not list(out.rglob(".step-*"))


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills, tmp_path):
    begin = time.perf_counter()
    reference = outcome(train_run(own_task(KILLED), tmp_path / "whole", seeds=(0, 1), checkpoint_steps=3).path)
    seconds = time.perf_counter() - begin
    killed(kills, tmp_path / "killed", reference, seconds, random.Random(kills))


# -- early stopping, failures ------------------------------------------------------------------------------------


def test_early_stopping_keeps_the_best_weights(tmp_path):
    """A rate so high that the accuracy goes up and down; the weights measured are those of the best epoch."""
    recipe = replace(RECIPE, epochs=30, patience=3, schedule="constant", learning_rate=0.5, ema_decay=None)
    told: list[str] = []
    out = tmp_path / "run"
    interrupted(out, 0, 3, recipe)
    run = train_run(own_task(recipe), out, on_warning=told.append)
    accuracies = [row["val_acc"] for row in read_curves(run.path / "curves.parquet")]
    best = int(np.argmax(accuracies))
    assert len(accuracies) == best + 1 + 3 < 30
    [record] = run.trials()
    assert record.metrics["val_acc"] == accuracies[best]
    assert record.metrics["epochs"] == best + 1
    assert told == [
        f"seed 0: no better validation accuracy for 3 epochs, at step {5 * (best + 4)};"
        f" the weights are those of epoch {best + 1}"
    ]
    assert load_trained(str(out)).metrics["val_acc"] == accuracies[best]
    assert outcome(train_run(own_task(recipe), tmp_path / "straight").path) == outcome(out)


class Fails(nn.Module):
    """Its weights, gradient or loss break in the forward pass number `at`."""

    def __init__(self, how: str, at: int):
        super().__init__()
        self.inner, self.how, self.at, self.calls = own_model(dropout=0.0), how, at, 0
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        self.calls += self.training
        breaks = self.training and self.calls == self.at
        if breaks and self.how == "statistics":
            self.norm.running_var.fill_(float("inf"))
        x = self.norm(x)
        if breaks:
            if self.how == "loss":
                return self.inner(x) * float("nan")
            if self.how == "gradient":
                found = self.inner(x)
                return found + found.detach().sub(found).abs().sqrt()  # the derivative of sqrt at 0: 0 * inf
        return self.inner(x)


def fails(how: str, at: int = 8) -> nn.Module:
    return Fails(how, at)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("loss", "the training loss became nan at step 8"),
        ("gradient", "the norm of the gradient became nan at step 8"),
        ("statistics", "weights or running statistics became infinite by step 10"),
    ],
)
def test_what_is_not_finite_fails_and_keeps_the_last_good_state(how, message, tmp_path):
    recipe = replace(RECIPE, ema_decay=None)
    task = own_task(recipe, factory=f"{__name__}:fails", network={"how": how})
    told: list[str] = []
    run = train_run(task, tmp_path / "run", on_warning=told.append)
    [record] = run.trials()
    kept = checkpoints(run.path / "checkpoints" / "seed-0")
    assert record.status == "failed"
    assert record.error == f"{message}; the last good state is {kept[0]}"
    assert "a lower learning rate or clip_norm=5 may help" in told[0]
    assert [read(path)["step"] for path in kept] == [5]
    state = load_state(kept[0], Fails("none", 0), task.open_data(), recipe)
    assert all(t.isfinite().all() for t in state.model.state_dict().values())
    assert not weights_path(run, 0).exists()
    before = outcome_of_failed(run)
    train_run(task, run.path)
    assert outcome_of_failed(Run.open(run.path)) == before
    with pytest.raises(UserError, match="a training with a finished seed"):
        load_trained(str(run.path))
    with pytest.raises(UserError, match="a finished training; this one is failed"):
        load_trained(f"{run.path}:0")


def outcome_of_failed(run: Run) -> tuple:
    return run.trials(), run.events(), [p.name for p in checkpoints(run.path / "checkpoints" / "seed-0")]


def test_memory_that_runs_out_says_what_to_lower(tmp_path):
    task = own_task(RECIPE, factory=f"{__name__}:greedy")
    with pytest.raises(RunError, match="out of memory with batches of 30 images; lower batch_size, channels"):
        train_run(task, tmp_path / "run")


class Greedy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = own_model()

    def forward(self, x):
        if self.training:
            torch.empty(2**60, dtype=torch.uint8)  # an exbibyte
        return self.inner(x)


def greedy() -> nn.Module:
    return Greedy()


# -- refused before the first step -------------------------------------------------------------------------------


def test_another_training_in_the_folder(tmp_path):
    out = tmp_path / "run"
    interrupted(out, 0, 2)
    other = replace(RECIPE, momentum=0.8, flip=True)
    with pytest.raises(UserError, match="momentum: 0.8 instead of 0.9; flip: True instead of False") as caught:
        train_run(own_task(other, network={"dropout": 0.1}), out)
    assert "network: {'dropout': 0.1} instead of {}" in str(caught.value)
    (tmp_path / "note").write_text("")
    with pytest.raises(UserError, match="a new or empty folder"):
        train_run(own_task(RECIPE), tmp_path)
    Run.create(tmp_path / "search", {"kind": "search"})
    with pytest.raises(UserError, match="this run is a search"):
        train_run(own_task(RECIPE), tmp_path / "search")


changed = False


def changing() -> dict:
    found = pictures()
    if changed:
        found["train"] = (found["train"][0][1:], found["train"][1][1:])
    return found


def test_other_data_under_the_same_name(tmp_path, monkeypatch):
    import sys

    task = own_task(RECIPE, data=f"{__name__}:changing")
    train_run(task, tmp_path / "run")
    monkeypatch.setattr(sys.modules[__name__], "changed", True)
    with pytest.raises(UserError, match="the data the training in .* began with; .*149.*150"):
        train_run(task, tmp_path / "run", seeds=(0, 1))


def test_settings_in_tuples_are_the_same_after_json(tmp_path):
    task = own_task(replace(RECIPE, milestones=(0.3,)), factory=f"{__name__}:widths", network={"hidden": (4, 5)})
    train_run(task, tmp_path / "run")
    train_run(task, tmp_path / "run")
    assert task.differences(Task.from_json(Run.open(tmp_path / "run").settings["task"])) == []


def widths(hidden, num_classes: int) -> nn.Module:
    first, second = hidden
    return nn.Sequential(nn.Flatten(), nn.Linear(128, first), nn.Linear(first, second), nn.Linear(second, num_classes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": {"num_classes": 5}}, "5 outputs.*as many as .* has, 3"),
        ({"network": {"in_channels": 3}}, "images of 2x8x8.*images that the model takes"),
        ({"factory": "small_trainings:patterns"}, "it gave a Dataset"),
        ({"recipe": replace(RECIPE, batch_size=200)}, "a batch size from 1 to the number of training images, 150"),
        ({"recipe": replace(RECIPE, auxiliary_weight=0.4)}, "a network without auxiliary head"),
        ({"recipe": replace(RECIPE, drop_path=0.2)}, "a network with drop_path_modules"),
        ({"factory": None, "space": "darts", "arch": DEAD_EDGE}, "expected"),
        ({"factory": None, "space": "nas-bench-201", "arch": "Genotype(normal=[])"}, "a NAS-Bench-201 cell"),
    ],
)
def test_bad_input_is_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train_run(replace(own_task(RECIPE), **changes), tmp_path / "run")


def empty_class() -> dict:
    found = pictures()
    images, labels = found["train"]
    return {**found, "train": (images[labels != 1], labels[labels != 1])}


def odd_labels() -> dict:
    found = pictures()
    return {**found, "train": (found["train"][0], found["train"][1] - 1)}


@pytest.mark.parametrize(
    ("data", "message"), [("empty_class", "images of every class"), ("odd_labels", "labels from 0")]
)
def test_bad_data_are_refused(data, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train_run(own_task(RECIPE, data=f"{__name__}:{data}"), tmp_path / "run")


def normalised(in_channels: int, num_classes: int) -> nn.Module:
    """BatchNorm over single pixels."""
    convolution = nn.Conv2d(in_channels, 4, 8)
    return nn.Sequential(convolution, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, num_classes))


def test_a_batch_of_one_image_that_is_normalised(tmp_path):
    task = own_task(replace(RECIPE, batch_size=149, drop_last=False), factory=f"{__name__}:normalised")
    with pytest.raises(UserError, match="a batch of one image.*drop_last leaves a last image out"):
        train_run(task, tmp_path / "run")
    task = own_task(replace(RECIPE, batch_statistics=True, eval_batch_size=44), factory=f"{__name__}:normalised")
    with pytest.raises(UserError, match="a batch of one image.*another eval_batch_size"):
        train_run(task, tmp_path / "other")


def test_bad_arguments(tmp_path):
    for seeds in ((), (1, 1)):
        with pytest.raises(UserError, match="seeds that differ"):
            train_run(own_task(RECIPE), tmp_path / "run", seeds=seeds)
    with pytest.raises(UserError, match="a positive number of steps between checkpoints"):
        train_run(own_task(RECIPE), tmp_path / "run", checkpoint_steps=0)
    assert not (tmp_path / "run").exists()
