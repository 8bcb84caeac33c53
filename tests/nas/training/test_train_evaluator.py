"""The evaluator `train`: rungs that go on from each other, caches, kills, workers, what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import nas.training.evaluator as evaluator_module
import nas.training.paused as paused
from benchmarks.table import TestSplitError
from nas.evaluators import Rejected, make_evaluator, space_of
from nas.loop import search
from nas.objectives import parse_objectives
from nas.run import Run
from nas.training.data import Split, load_data
from nas.training.evaluator import TrainEvaluator, train_evaluator
from nas.training.loop import train
from nas.training.runs import train_run
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

SPACE = load_space("nas-bench-201")
ARCH = (3, 1, 3, 0, 2, 4)
EPOCHS, STEPS = 3, 5  # of the training, of an epoch
SCALE = {"channels": 4, "cells_per_stage": 1}
SHORT = {"epochs": EPOCHS, "batch_size": 256, "warmup_epochs": 0.0}
TIMES = ("train_seconds", "cost_seconds")
COMMAND = (
    *("search", "--evaluator", "train", "--space", "nas-bench-201", "--set", "epochs=2", "--set", "batch_size=256"),
    *("--scale", "channels=4", "--scale", "cells_per_stage=1"),
)


def make(**settings) -> TrainEvaluator:
    changes = {**SHORT, **settings.pop("changes", {})}
    return train_evaluator("nas-bench-201", changes=changes, scale=SCALE, **settings)


def values(metrics) -> dict[str, float]:
    """Everything but measured times."""
    return {name: value for name, value in metrics.items() if name not in TIMES}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No training of another test is known."""
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "cache" / "training"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def steps_taken(monkeypatch) -> list[int]:
    """[0] counts the optimiser's steps of all trainings."""
    taken = [0]

    def advance(state, recipe, *, steps):
        before = state.step
        found = paused_advance(state, recipe, steps=steps)
        taken[0] += state.step - before
        return found

    paused_advance = paused.advance
    monkeypatch.setattr(paused, "advance", advance)
    return taken


def plain_training(recipe, seed: int = 0):
    """The same training without any of the evaluator: the loop in one go."""
    data = load_data("digits")
    torch.manual_seed(seed)
    network = SPACE.build(ARCH, in_channels=1, num_classes=10, **SCALE)
    return train(network, data, recipe, seed=seed)


def test_rungs_go_on_from_each_other_exactly(steps_taken):
    evaluator = make()
    first = evaluator.evaluate(ARCH, 1, seed=1)
    assert steps_taken == [STEPS]
    last = evaluator.evaluate(ARCH, EPOCHS, seed=2)
    assert steps_taken == [EPOCHS * STEPS]
    assert last["cost_seconds"] == pytest.approx(last["train_seconds"] - first["train_seconds"])
    at_once = replace(evaluator, cache=False).evaluate(ARCH, seed=3)
    assert values(last) == values(at_once)
    assert at_once["cost_seconds"] == at_once["train_seconds"]
    reference = plain_training(evaluator.recipe)
    assert last["val_acc"] == reference.metrics["val_acc"]
    assert last["val_loss"] == reference.metrics["val_loss"]
    assert last["train_loss"] == pytest.approx(np.mean(reference.losses[-STEPS:]))
    assert first["val_loss"] != last["val_loss"]


def test_nas_train_repeats_a_trial(tmp_path):
    evaluator = make(train_seed=5)
    found = evaluator.evaluate(ARCH, seed=0)
    run = train_run(evaluator.task(SPACE.encode(ARCH)), tmp_path / "run", seeds=(5,))
    metrics = run.trial(0).metrics
    assert {k: metrics[k] for k in ("val_acc", "val_loss")} == {k: found[k] for k in ("val_acc", "val_loss")}
    assert make(train_seed=6).evaluate(ARCH, seed=0)["val_loss"] != found["val_loss"]


def test_a_result_is_kept_and_a_shorter_fidelity_is_found_afterwards(steps_taken, home):
    evaluator = make()
    whole = evaluator.evaluate(ARCH, seed=0)
    assert evaluator.evaluate(ARCH, EPOCHS, seed=9) == whole
    assert steps_taken == [EPOCHS * STEPS]
    assert not list(home.glob("*/step-*.pt"))  # nothing comes after the end
    short = evaluator.evaluate(ARCH, 1, seed=0)
    assert values(short) == values(make(cache=False).evaluate(ARCH, 1, seed=0))
    assert list(home.glob("*/step-*.pt"))


def test_who_pays_depends_on_the_account_and_not_on_the_cache():
    first = make(account="first")
    first.evaluate(ARCH, 1, seed=0)
    first.evaluate(ARCH, 3, seed=0)
    whole = replace(first, account="second").evaluate(ARCH, 3, seed=0)
    assert whole["cost_seconds"] == whole["train_seconds"]
    rungs = [replace(first, account="third").evaluate(ARCH, fidelity, seed=0) for fidelity in (1, 2, 3)]
    assert sum(r["cost_seconds"] for r in rungs) == pytest.approx(rungs[-1]["train_seconds"])
    again = replace(first, account="third").evaluate(ARCH, 1, seed=0)
    assert again["cost_seconds"] == rungs[0]["cost_seconds"]


def test_successive_halving_trains_the_best_on(steps_taken, tmp_path):
    result = search(
        SPACE,
        make(account="run"),
        "successive-halving",
        budget=4,
        objectives="val_acc,macs",
        strategy_settings={"fidelities": (1, 3), "configurations": 3},
        out=tmp_path / "run",
    )
    assert [r.fidelity for r in result.records] == [1, 1, 1, 3]
    assert steps_taken == [(3 + 2) * STEPS]  # 3 + 3 epochs if the promoted one began anew
    promoted = result.records[3]
    parent = result.records[promoted.parent]
    assert promoted.arch == parent.arch
    assert promoted.metrics["cost_seconds"] < promoted.metrics["train_seconds"]
    assert parent.metrics["val_acc"] == max(r.metrics["val_acc"] for r in result.records[:3])


def test_own_schedules_are_whole_trainings():
    evaluator = make(own_schedule=True)
    found = evaluator.evaluate(ARCH, 2, seed=0)
    reference = plain_training(replace(evaluator.recipe, epochs=2))
    assert found["val_loss"] == reference.metrics["val_loss"]
    assert found["val_loss"] != make(cache=False).evaluate(ARCH, 2, seed=0)["val_loss"]
    longer = evaluator.evaluate(ARCH, EPOCHS, seed=0)
    assert longer["cost_seconds"] == longer["train_seconds"]
    assert values(longer) == values(make(cache=False).evaluate(ARCH, seed=0))


KILLED = """
import os, signal, sys
import nas.training.paused as paused
from nas.training.evaluator import TrainEvaluator
import json
paused.SAVE_SECONDS, paused.LOOK_STEPS = 0.0, 1
save = paused.PausedTraining._save
def save_and_die(self, state):
    save(self, state)
    if state.step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
paused.PausedTraining._save = save_and_die
TrainEvaluator.from_json(json.loads(sys.argv[1])).evaluate((3, 1, 3, 0, 2, 4), seed=0)
"""


def test_a_killed_evaluation_goes_on_from_its_checkpoint(steps_taken):
    evaluator = make()
    arguments = [sys.executable, "-c", KILLED, json.dumps(evaluator.as_json())]
    assert subprocess.run(arguments, check=False, timeout=100).returncode == -signal.SIGKILL
    found = evaluator.evaluate(ARCH, seed=0)
    assert steps_taken == [EPOCHS * STEPS - 8]
    assert values(found) == values(replace(evaluator, cache=False).evaluate(ARCH, seed=0))


def test_damaged_files_cost_time_only(home, steps_taken):
    evaluator = make()
    evaluator.evaluate(ARCH, 1, seed=0)
    (checkpoint,) = home.glob("*/step-*.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    found = evaluator.evaluate(ARCH, 2, seed=0)
    assert steps_taken == [3 * STEPS]
    next(home.glob("*/results.json")).write_text('{"format": 1, "mile')
    assert values(evaluator.evaluate(ARCH, 2, seed=0)) == values(found)
    assert values(found) == values(make(cache=False).evaluate(ARCH, 2, seed=0))


def test_two_that_ask_at_once_train_once(steps_taken):
    evaluator, found = make(), []
    evaluator.check()
    asking = [threading.Thread(target=lambda: found.append(evaluator.evaluate(ARCH, seed=0))) for _ in range(2)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert steps_taken == [EPOCHS * STEPS]
    assert found[0] == found[1]


def test_two_workers_give_what_one_gives():
    evaluator = make(changes={"epochs": 1}, cache=False)
    found = [
        {r.id: (r.arch, values(r.metrics)) for r in search(SPACE, evaluator, "random-search", **arguments).records}
        for arguments in ({"budget": 3, "objectives": "val_acc", "workers": n} for n in (1, 2))
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 3


def test_the_oldest_checkpoints_make_room(tmp_path):
    paths = [tmp_path / name / "step-000000005.pt" for name in "abcd"]
    for age, path in enumerate(paths):
        path.parent.mkdir()
        path.write_bytes(bytes(100))
        os.utime(path, (1000 - age, 1000 - age))  # a is the latest
    paused.make_room(tmp_path, 250)
    assert [p.exists() for p in paths] == [True, True, False, False]
    paused.make_room(tmp_path, 10)
    assert [p.exists() for p in paths] == [True, False, False, False]  # what is under way stays


def test_costs_are_those_of_the_network():
    found = make().evaluate(ARCH, 1, seed=0)
    cost = SPACE.cost(ARCH, in_channels=1, input_size=8, **SCALE)
    assert {k: found[k] for k in ("params", "macs", "live_macs")} == {
        k: cost[k] for k in ("params", "macs", "live_macs")
    }
    plain = make(norm="batch-norm", act="relu").evaluate(ARCH, 1, seed=0)
    layered = make(layer="evonorm-s0").evaluate(ARCH, 1, seed=0)
    assert values(plain) == values(found)
    assert layered["val_loss"] != found["val_loss"]
    assert layered["macs"] == found["macs"]


def test_an_architecture_without_a_path_trains_to_chance():
    found = make(changes={"epochs": 1}).evaluate((0,) * 6, seed=0)
    assert found["val_loss"] == pytest.approx(np.log(10), abs=0.3)
    assert found["val_acc"] < 25


def test_a_loss_that_is_not_finite_is_rejected(home):
    evaluator = make(changes={"learning_rate": 1e25, "schedule": "constant"})
    for _ in range(2):  # the second time from the cache
        with pytest.raises(Rejected, match="non_finite") as rejected:
            evaluator.evaluate(ARCH, seed=0)
        assert rejected.value.cost_seconds > 0
    assert not list(home.glob("*/step-*.pt"))
    result = search(SPACE, evaluator, "random-search", budget=1, objectives="val_acc")
    assert [(r.status, r.error, r.attempts) for r in result.records] == [("failed", "rejected: non_finite", 1)]
    assert result.records[0].metrics["cost_seconds"] > 0


def test_test_images_play_no_part(monkeypatch):
    known = make().evaluate(ARCH, seed=0)
    data = load_data("digits")
    hidden = replace(data, test=Split(torch.full_like(data.test.images, float("nan")), data.test.labels * 0))
    monkeypatch.setattr(evaluator_module, "_open", lambda *arguments: (hidden, {}))
    assert values(make(cache=False).evaluate(ARCH, seed=0)) == values(known)
    assert not any("test" in name for name in known)


def test_lengths_of_a_recipe_in_steps():
    evaluator = make(changes={"epochs": None, "steps": 12})
    assert [evaluator.steps(fidelity) for fidelity in (1, 2, 3, None)] == [5, 10, 12, 12]
    assert evaluator.fidelities() == [1, 3]
    assert make(changes={"epochs": 81}).fidelities() == [3, 9, 27, 81]


def test_settings_survive_json():
    evaluator = make(layer="evonorm-s0", size=8, own_schedule=True, account="run")
    assert TrainEvaluator.from_json(json.loads(json.dumps(evaluator.as_json()))) == evaluator
    assert space_of(evaluator).name == "nas-bench-201"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train_evaluator("nas-bench-201", "digit-tiny"), "did you mean 'digits-tiny'"),
        (lambda: train_evaluator("nas-bench-2O1"), "did you mean 'nas-bench-201'"),
        (lambda: train_evaluator("layers"), "whose networks take images"),
        (lambda: train_evaluator("nas-bench-graph"), "whose networks take images"),
        (lambda: train_evaluator("darts", "darts-cifar10"), "share of validation images"),
        (lambda: make(changes={"patience": 2}), "patience"),
        (lambda: make(changes={"momentun": 0.5}), "did you mean 'momentum'"),
        (lambda: make(layer="evonorm-s0", act="relu"), "not both"),
        (lambda: make(threads=0), "at least one thread"),
        (lambda: make(changes={"batch_size": 5000}).check(), "batch size from 1 to the number of training images"),
        (lambda: replace(make(), network={"chanels": 4}).check(), "did you mean 'channels'"),
        (lambda: make(data="digit").check(), "did you mean 'digits'"),
        (lambda: make().evaluate(ARCH, 4, seed=0), "fidelity from 1 to 3"),
        (lambda: make().evaluate(ARCH, 0, seed=0), "fidelity from 1 to 3"),
    ],
)
def test_errors_name_what_was_expected(call, message):
    with pytest.raises(UserError) as error:
        call()
    assert message in str(error.value)


def test_objectives_are_those_of_training_and_validation():
    settings = make().as_json()
    objectives = parse_objectives("val_acc,params<=1e6")
    assert make_evaluator("train", objectives, training=settings) == make()
    with pytest.raises(TestSplitError, match="val_acc"):
        make_evaluator("train", parse_objectives("test_acc"), training=settings)
    with pytest.raises(TestSplitError):
        make_evaluator("train", parse_objectives("val_acc"), "test", training=settings)
    with pytest.raises(UserError, match="'macs'"):
        make_evaluator("train", parse_objectives("val_acc,mac:min"), training=settings)
    with pytest.raises(UserError, match="did you mean 'train'"):
        make_evaluator("trian")


def test_the_command_searches_and_resumes(nas, tmp_path):
    arguments = (*COMMAND, "--queries", "2", "--objectives", "val_acc,params", "--strategy", "nsga-ii", "--out", "run")
    status, out, _ = nas(*arguments, "--json")
    assert status == 0
    found = json.loads(out)
    assert {"val_acc", "val_loss", "params", "macs", "cost_seconds"} <= set(found["best"]["metrics"])
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["evaluator"] == "train"
    assert settings["training"]["recipe"]["epochs"] == 2
    again = json.loads(nas("resume", "run", "--json")[1])
    assert again["best"] == found["best"]
    assert nas(*arguments)[0] == 0
    more = list(arguments)
    more[more.index("--queries") + 1] = "3"
    status, out, _ = nas(*more)
    assert status == 0
    assert "3 architectures" in out
    status, _, error = nas(*arguments[:-2], "--set", "momentum=0.5", "--out", "run")
    assert status == 2
    assert "momentum" in error
    assert nas("report", "run")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strategy", "successive-halving", "--setting", "fidelities=1,5"), "fidelity from 1 to 2"),
        (("--preset", "digits-tine"), "did you mean 'digits-tiny'"),
        (("--objectives", "test_acc"), "did you mean 'val_acc'"),
        (("--size", "9"), "a size not above the images' own"),
    ],
)
def test_the_command_refuses_before_it_begins(nas, tmp_path, arguments, message):
    status, _, error = nas(*COMMAND, *arguments, "--out", "run")
    assert (status, message in error, error.count("\n")) == (2, True, 1), error
    assert not (tmp_path / "run").exists()


def test_options_of_training_need_the_evaluator(nas):
    status, _, error = nas("search", "--evaluator", "small_space:score", "--space", "small_space:Digits", "--size", "8")
    assert status == 2
    assert "--size: expected --evaluator train" in error
    assert nas("search", "--evaluator", "train")[0] == 2


def test_strategies_are_compared_at_equal_cost(nas, tmp_path, steps_taken):
    arguments = ("compare", *COMMAND[1:], "--queries", "4", "--seeds", "2", "--out", "compared")
    strategies = ("--strategies", "random-search,successive-halving")
    found = json.loads(nas(*arguments, *strategies, "--json")[1])
    random, halving = found["strategies"].values()
    best = []
    for seed in (0, 1):
        run = Run.open(tmp_path / "compared" / f"random-search-seed{seed}")
        trials = run.trials()
        best.append(max(t.metrics["val_acc"] for t in trials))
        assert random["train_seconds"][seed] == pytest.approx(sum(t.metrics["train_seconds"] for t in trials))
    assert random["mean_best"]["4"] == pytest.approx(np.mean(best))
    assert halving["mean_best"]["4"] is None  # 4 trials do not fill the lowest rung: nothing is trained to the end
    assert found["common_seconds"] == min(random["train_seconds"] + halving["train_seconds"])
    taken = steps_taken[0]
    assert json.loads(nas(*arguments, *strategies, "--json")[1])["strategies"] == found["strategies"]
    assert steps_taken[0] == taken
    assert nas("compare", "--benchmark", "nas-bench-201/cifar10", "--space", "darts")[0] == 2
    assert nas("compare", "--evaluator", "proxy:nwot")[0] == 2
