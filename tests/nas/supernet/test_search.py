"""Searches: every recipe ends with an architecture, a killed one goes on bit for bit, bad input is named."""

from __future__ import annotations

import copy
import json
import runpy
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import nas.supernet.session as module
from nas.references import find_architecture
from nas.run import Run
from nas.supernet import weight_steps
from nas.supernet.building import make_supernet, search_data
from nas.supernet.evolution import evolve, path_accuracy
from nas.supernet.losses import regularization
from nas.supernet.measures import curvature
from nas.supernet.recipe import Evolution, Recipe
from nas.supernet.recipes import RECIPES, recipe, scaled
from nas.supernet.search import SearchTask, open_supernet, read_log, search_run, skip_share
from nas.supernet.state import start, state_dict
from nas.supernet.steps import run_epoch
from nas.training.batches import evaluation_batches
from nas.training.checkpoints import checkpoints, read
from nas.training.data import load_data
from nas.training.loop import evaluate
from nas.training.recalibrate import recalibrate
from search_spaces.choice import select, selected_state_dict
from search_spaces.common.errors import RunError, UserError
from search_spaces.registry import load_space

SPACE = load_space("nas-bench-201")
TINY = {"channels": 4, "batch_size": 16, "epochs": 1, "alpha_warmup_epochs": 0, "drop_last": True}


def tiny(name: str = "darts-v1", **changes) -> Recipe:
    found = scaled(recipe(name), "tiny", flip=False)
    if found.evolution is not None:
        changes |= {"evolution_population": 4, "evolution_generations": 2, "evolution_crossover": 2}
        changes |= {"evolution_mutation": 1, "evolution_recalibration": (1, 20), "evolution_evaluation": (1, 20)}
    return found.replaced({**TINY, **changes})


def task(name: str = "darts-v1", images: int = 70, space: str = "nas-bench-201", **changes) -> SearchTask:
    return SearchTask(tiny(name, **changes), space=space, images=images)


class Killed(Exception):
    """What a test raises where a process would be killed: nothing after it is written."""


def kill_at(last: int):
    def progress(step: int, total: int | None) -> None:
        if step == last:
            raise Killed

    return progress


def outcome(run: Run) -> dict:
    """All that a search leaves, without times."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(run)]
    trials = [
        (t.status, t.arch, {k: v for k, v in (t.metrics or {}).items() if "seconds" not in k}) for t in run.trials()
    ]
    content = read(checkpoints(run.path / "checkpoints" / "seed-0")[0])
    content.pop("seconds")
    content["rows"] = rows
    return {"rows": rows, "trials": trials, "content": content}


def assert_same(a, b, where: str = "") -> None:
    """Equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


# -- every recipe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_ends_with_an_architecture(name, tmp_path):
    run = search_run(task(name, images=40), tmp_path / "run")
    (trial,) = run.trials()
    assert trial.status == "done", trial.error
    arch = SPACE.decode(trial.arch)
    assert len(arch) == 6
    assert SPACE.key(arch) == trial.key
    assert 0 <= trial.metrics["val_acc"] <= 100
    found = RECIPES[name]
    stages = len(found.stages.candidates) if found.stages else 1
    decisions = 6 if found.projection else 0
    assert trial.metrics["steps"] == stages + max(decisions - 1, 0)  # an epoch for each stage and between decisions
    best = find_architecture(f"{run.path}:best")
    assert best.record.arch == trial.arch
    assert best.space.name == SPACE.name
    *before, row = read_log(run)
    assert len(before) + 1 == trial.metrics["steps"] + decisions
    if recipe(name).solver != "weights-only":
        expected = [row["alphas"][f"edge_{i}_{j}"] for i, j in ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))]
        if recipe(name).gate_threshold is None and recipe(name).skip_cap is None:
            assert arch == tuple(int(np.argmax(values)) for values in expected)
        if name != "fairdarts":
            assert [sum(values) for values in expected] == pytest.approx([1] * 6, abs=1e-5)


def test_a_darts_search_gives_a_genotype_and_narrow_pools_are_normalised(tmp_path):
    run = search_run(task("pc-darts", images=40, space="darts", partial=2), tmp_path / "run")
    (trial,) = run.trials()
    genotype = load_space("darts").decode(trial.arch)
    assert len(genotype.normal) == len(genotype.reduce) == 8
    _, state, _ = open_supernet(run)
    pool = state.supernet.network.cells[0].edges["0_2"].candidates[1]
    assert isinstance(pool[0], torch.nn.MaxPool2d)
    assert not pool[1].affine
    assert pool[1].num_features == 2
    assert state.supernet.network.stem[1].affine  # the stem's keeps its weights


# -- steps against the published algorithm written out -------------------------------------------------------------


def test_one_iteration_is_that_of_darts():
    found = tiny(clip_norm=0.05)
    data = search_data(load_data("digits", val_share=0.0), found, images=40, seed=0)
    state = start(make_supernet(SPACE, found, data, seed=3), data, found, seed=5)
    net = copy.deepcopy(state.supernet)
    train, val = state.batches.batch(0), state.alpha_batches.batch(0)
    run_epoch(state, found)
    assert state.step == 1
    net.train()
    alphas = net.architecture_parameters()
    adam = torch.optim.Adam(alphas, 3e-4, (0.5, 0.999), weight_decay=1e-3)
    torch.nn.functional.cross_entropy(net(val.images), val.labels).backward()
    adam.step()
    net.zero_grad()
    torch.nn.functional.cross_entropy(net(train.images), train.labels).backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in net.weight_parameters() if p.grad is not None))
    assert norm > 0.05
    with torch.no_grad():
        for p in net.weight_parameters():
            p -= found.training.learning_rate * (p.grad * 0.05 / norm + 3e-4 * p)
    for ours, reference in zip(state.supernet.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-4)
    assert not torch.equal(train.images, val.images)


def test_halves_are_disjoint_and_the_test_part_is_left_alone():
    whole = load_data("digits", val_share=0.0)
    marked = whole.train.images.clone()
    marked[:, 0, 0, 0] = torch.arange(len(marked), dtype=marked.dtype)
    object.__setattr__(whole.train, "images", marked)
    for name, images, expected in (("darts-v1", None, (718, 719)), ("darts-v1", 200, (100, 100))):
        found = search_data(whole, recipe(name), images=images, seed=1)
        ids = [set(part.images[:, 0, 0, 0].tolist()) for part in (found.train, found.val)]
        assert not ids[0] & ids[1]
        assert [len(i) for i in ids] == [pytest.approx(e, abs=6) for e in expected]
        assert torch.equal(found.test.images, whole.test.images)
    imagenet = search_data(whole, recipe("pc-darts-imagenet"), images=None, seed=1)
    assert (len(imagenet.train), len(imagenet.val)) == (pytest.approx(144, abs=8), pytest.approx(36, abs=8))


@pytest.mark.parametrize("name", ["darts-v1", "gdas", "drnas", "proxylessnas", "fairdarts"])
def test_curvature_leaves_the_search_as_it_was(name):
    found = tiny(name)
    data = search_data(load_data("digits", val_share=0.0), found, images=40, seed=0)
    state = start(make_supernet(SPACE, found, data, seed=0), data, found, seed=0)
    before = copy.deepcopy(state_dict(state))
    assert np.isfinite(curvature(state, found))
    assert curvature(state, found) != 0
    assert_same(before, state_dict(state))


def test_regularizer_grows_over_the_epochs():
    found = tiny("beta-darts", epochs=10)
    data = search_data(load_data("digits", val_share=0.0), found, images=40, seed=0)
    net = make_supernet(SPACE, found, data, seed=0)
    decay = torch.stack([torch.exp(a).sum().log() for a in net.alphas.values()]).mean().item()
    for epoch in (0, 4):
        assert regularization(net, found, epoch).item() == pytest.approx(50 * epoch / 10 * decay, rel=1e-5)


# -- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gdas", "pc-darts", pytest.param("sdarts-rs", marks=pytest.mark.slow)])
def test_killed_between_and_within_epochs_it_goes_on_bit_for_bit(name, tmp_path):
    found = task(name, epochs=3, alpha_warmup_epochs=1 if name == "pc-darts" else 0)
    whole = search_run(found, tmp_path / "whole")
    begun = tmp_path / "killed"
    for step in (2, 3, 6):  # at the end of the first epoch before its checkpoint, in mid-epoch, at the end of the last
        with pytest.raises(Killed):
            search_run(found, begun, progress=kill_at(step))

    def between(row) -> None:
        raise Killed

    with pytest.raises(Killed):
        search_run(found, begun, on_epoch=between)
    assert_same(outcome(whole), outcome(search_run(found, begun)))
    assert len(checkpoints(begun / "checkpoints" / "seed-0")) == 2


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    found = task(epochs=3)
    whole = search_run(found, tmp_path / "whole")
    with pytest.raises(Killed):
        search_run(found, tmp_path / "run", progress=kill_at(5))
    newest, before = checkpoints(tmp_path / "run" / "checkpoints" / "seed-0")
    newest.write_bytes(newest.read_bytes()[:-3000])
    told = []
    run = search_run(found, tmp_path / "run", on_warning=told.append)
    assert "damaged" in told[0]
    assert str(before) in told[0]
    assert_same(outcome(whole), outcome(run))


def test_a_finished_search_is_not_repeated_and_more_seeds_are_added(tmp_path):
    found = task(images=40)
    search_run(found, tmp_path / "run")
    steps_seen = []
    run = search_run(found, tmp_path / "run", seeds=(0, 7), progress=lambda step, total: steps_seen.append(step))
    assert steps_seen == [2]  # of two: the first seed's step was done
    assert [(t.seed, t.status) for t in run.trials()] == [(0, "done"), (7, "done")]
    assert [row["seed"] for row in read_log(run)] == [0, 7]


def test_early_stop_returns_the_architecture_of_its_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "early_stop", lambda values, epochs: 0 if len(values) == 2 else None)
    monkeypatch.setattr(module, "curvature", lambda state, found: 1.0)
    run = search_run(task("r-darts-es", images=40, epochs=4, alpha_rate=1.0), tmp_path / "run")
    rows = read_log(run)
    assert len(rows) == 2
    assert rows[1]["stopped_for_epoch"] == 1
    assert rows[0]["arch"] != rows[1]["arch"]
    assert run.trials()[0].arch == rows[0]["arch"]


# -- failures ------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    real = weight_steps.cross_entropy
    calls = []

    def breaks(outputs, batch, found):
        calls.append(1)
        return real(outputs, batch, found) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(weight_steps, "cross_entropy", breaks)
    told = []
    run = search_run(task(epochs=3), tmp_path / "run", on_warning=told.append)
    (trial,) = run.trials()
    assert trial.status == "failed"
    assert "training loss became nan at step 3, in epoch 2" in trial.error
    (kept,) = checkpoints(tmp_path / "run" / "checkpoints" / "seed-0")
    assert str(kept) in trial.error
    assert "lower learning rate" in told[0]
    _, state, _ = open_supernet(run)
    assert state.step == 2
    assert all(p.isfinite().all() for p in state.supernet.parameters())


def test_a_disk_that_fills_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    found = task(epochs=2)
    with pytest.raises(Killed):
        search_run(found, tmp_path / "run", progress=kill_at(3))
    real = torch.save

    def full(content, file):
        file.write(b"half")
        raise RuntimeError("[enforce fail] PytorchStreamWriter failed writing file: No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match="No space left.*before it is kept|one before it is kept"):
        search_run(found, tmp_path / "run")
    monkeypatch.setattr(torch, "save", real)
    (kept,) = checkpoints(tmp_path / "run" / "checkpoints" / "seed-0")
    assert read(kept)["step"] == 2
    assert search_run(found, tmp_path / "run").trials()[0].status == "done"


def test_resume_with_other_settings_lists_them(tmp_path):
    with pytest.raises(Killed):
        search_run(task(), tmp_path / "run", progress=kill_at(1))
    with pytest.raises(UserError, match=r"learning_rate: 0.5 instead of .*") as error:
        search_run(task("darts-v1", learning_rate=0.5, partial=2), tmp_path / "run")
    assert "partial: 2 instead of 1" in str(error.value)
    with pytest.raises(UserError, match="recipe: 'darts-v2' instead of 'darts-v1'"):
        search_run(task("darts-v2"), tmp_path / "run")
    with pytest.raises(UserError, match="seeds of the search there"):
        search_run(task(), tmp_path / "run", seeds=(1,))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 500}, "batch size from 1"),
        ({"partial": 3}, "divides 4 channels"),
        ({"space": "nats-size"}, "network of choices"),
        ({"space": "nas-bench-202"}, "nas-bench-201"),
        ({"images": 5}, "image"),
        ({"channels": 0}, "channels"),
    ],
)
def test_bad_settings_are_named(change, named, tmp_path):
    with pytest.raises(UserError, match=named):
        search_run(task(**change), tmp_path / "run")


@pytest.mark.parametrize(
    ("images", "labels", "named"),
    [
        (np.zeros((40, 3, 8, 8), np.float32), np.full(40, 900), "label"),
        (np.zeros((40, 3, 8, 8), np.float32), np.repeat([0, -1], 20), "label -1"),
        (np.full((40, 3, 8, 8), np.nan, np.float32), np.repeat([0, 1], 20), "NaN"),
        (np.zeros((40, 3, 0, 8), np.float32), np.repeat([0, 1], 20), "pixels"),
        (np.zeros((40, 3, 8, 8), np.float32), np.repeat([0, 1], [39, 1]), "class '1'"),
    ],
)
def test_bad_data_are_named(images, labels, named, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "own_data", types.SimpleNamespace(found=(images, labels)))
    with pytest.raises(UserError, match=named):
        search_run(SearchTask(tiny(), data="own_data:found"), tmp_path / "run")


def test_a_batch_of_one_image_is_named(tmp_path, monkeypatch):
    images, labels = np.random.default_rng(0).normal(size=(44, 1, 4, 4)).astype(np.float32), np.repeat([0, 1], 22)
    monkeypatch.setitem(sys.modules, "own_data", types.SimpleNamespace(found=(images, labels)))
    with pytest.raises(UserError, match="two images or more"):
        search_run(SearchTask(tiny(batch_size=17, drop_last=False), data="own_data:found"), tmp_path / "run")


def test_a_folder_of_something_else_is_refused(tmp_path):
    Run.create(tmp_path / "run", {"kind": "training"})
    with pytest.raises(UserError, match="training"):
        search_run(task(), tmp_path / "run")


# -- paths ---------------------------------------------------------------------------------------------------------


def test_path_accuracy_is_that_of_the_built_network_with_the_same_weights():
    found = tiny(affine=True)
    data = search_data(load_data("digits", val_share=0.0), found, images=100, seed=0)
    net = make_supernet(SPACE, found, data, seed=0)
    before = copy.deepcopy(net.state_dict())
    arch = (1, 3, 2, 0, 4, 3)
    measured = path_accuracy(net, SPACE.select(arch), data, recalibration=(2, 20))
    assert_same(before, net.state_dict())
    assert not net.fixed
    shape = {"in_channels": 1, "num_classes": 10}
    built = SPACE.build(arch, channels=4, cells_per_stage=1, **shape)
    other = copy.deepcopy(net.network)
    select(other, SPACE.select(arch))
    built.load_state_dict(selected_state_dict(other))
    recalibrate(built, evaluation_batches(data.train.images[:40], data.train.labels[:40], 20, normalize=data.normalize))
    whole = evaluation_batches(data.val.images, data.val.labels, 500, normalize=data.normalize)
    reference = evaluate(built, whole)
    assert measured["acc"] == reference["acc"]
    assert measured["loss"] == pytest.approx(reference["loss"], rel=1e-5)


def test_skip_share_counts_what_only_passes_on():
    found = tiny()
    net = make_supernet(SPACE, found, load_data("digits"), seed=0)
    for arch, expected in (((1, 1, 3, 3, 2, 4), 2 / 6), ((1, 0, 0, 0, 0, 3), 1 / 2), ((0,) * 6, 0.0)):
        assert skip_share(net, SPACE.select(arch)) == pytest.approx(expected)


def test_evolution_scores_no_architecture_twice_keeps_bounds_and_beats_chance():
    target, scored = (3, 3, 3, 1, 3, 3), []

    def score(arch) -> float:
        scored.append(arch)
        return float(sum(a == b for a, b in zip(arch, target)))

    settings = Evolution(population=20, generations=10, crossover=10, mutation=10, parents=5, max_macs=4)
    ranked = evolve(SPACE, score, settings, np.random.default_rng(0), macs=lambda arch: arch.count(3))
    assert len(scored) == len(set(scored)) == 200
    assert all(arch.count(3) <= 4 for arch in scored)
    assert [s for _, s in ranked] == sorted((s for _, s in ranked), reverse=True)
    assert ranked[0][1] == 5.0  # the most that the bound allows; 1 architecture in 780 has it
    with pytest.raises(UserError, match="max_macs"):
        evolve(SPACE, score, settings, np.random.default_rng(0), macs=lambda arch: 5)


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_searches_resumes_shows_and_lists(nas):
    small = ["--epochs", 1, "--images", 40, "--set", "batch_size=16", "--set", "channels=4", "--set", "drop_last=True"]
    base = ["supernet", "search", "--recipe", "PC_DARTS", "--scale", "tiny", "--out", "run", *small]
    status, out, err = nas(*base, "--json")
    found = json.loads(out)
    assert status == 0, err
    assert found["command"] == "supernet search"
    assert found["epochs"] == 1
    assert 0 <= found["val_acc"] <= 100
    assert SPACE.decode(found["arch"])
    status, out, _ = nas("show", "run:best", "--json")
    assert status == 0
    assert json.loads(out)["arch"] == found["arch"]
    status, out, _ = nas("resume", "run", "--json")
    assert status == 0
    assert json.loads(out)["arch"] == found["arch"]
    status, out, _ = nas("runs", ".")
    assert status == 0
    assert "supernet:pc-darts" in out
    status, _, err = nas(*base[:-2], "--set", "channels=8")
    assert status == 2
    assert "channels: 8 instead of 4" in err


def test_the_command_lists_recipes_and_their_difference(nas):
    status, out, _ = nas("supernet", "recipes", "--json")
    assert status == 0
    assert set(json.loads(out)["recipes"]) == set(RECIPES)
    status, out, _ = nas("supernet", "recipes", "darts-v1", "darts-v2", "--json")
    assert status == 0
    assert json.loads(out)["diff"] == {"solver": ["first-order", "second-order"]}
    status, out, _ = nas("supernet", "recipes", "gdas")
    assert status == 0
    assert "temperature" in out
    assert "GDAS.config" in out
    status, _, err = nas("supernet", "recipes", "gdass")
    assert status == 2
    assert "'gdas'" in err


@pytest.mark.slow
def test_kill_minus_nine_loses_nothing(tmp_path):
    command = [sys.executable, "-m", "nas", "supernet", "search", "--recipe", "gdas", "--scale", "tiny", "--json"]
    command += ["--images", "200", "--set", "channels=4", "--epochs", "4"]
    finished = subprocess.run([*command, "--out", tmp_path / "whole"], capture_output=True, check=True)
    log = tmp_path / "killed" / "epochs.jsonl"
    process = subprocess.Popen([*command, "--out", tmp_path / "killed"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not log.exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert len(log.read_text().splitlines()) < 4  # killed before its end
    again = subprocess.run([*command, "--out", tmp_path / "killed"], capture_output=True, check=True)
    assert json.loads(again.stdout)["arch"] == json.loads(finished.stdout)["arch"]
    assert_same(outcome(Run.open(tmp_path / "whole")), outcome(Run.open(tmp_path / "killed")))


@pytest.mark.slow
def test_what_was_found_is_exported_for_the_images_of_the_search(nas, tmp_path):
    search_run(task("gdas", images=40), tmp_path / "run")
    status, _, err = nas(
        "export", "run:best", "--to", "model.py", "--scale", "channels=4", "--scale", "cells_per_stage=1"
    )
    assert status == 0, err
    network = runpy.run_path("model.py")["Network"]
    assert network()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_report_and_plot_tell_of_the_epochs_and_the_recipe(nas, tmp_path):
    search_run(task(epochs=2), tmp_path / "run", seeds=(0, 1))
    status, out, _ = nas("report", tmp_path / "run", "--json")
    assert status == 0
    page = Path(json.loads(out)["report"]).read_text()
    assert "darts-v1 found" in page
    assert "Found with seed 1" in page
    assert "quark0/darts, cnn/architect.py" in page
    assert "given or by the scale; the recipe has 50" in page
    status, _, _ = nas("plot", tmp_path / "run", "--out", tmp_path / "curves.svg")
    assert status == 0
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")
