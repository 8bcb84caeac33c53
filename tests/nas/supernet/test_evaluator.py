"""The supernet as an evaluator: SPOS's own scores, any strategy, bad input."""

from __future__ import annotations

import json
import pickle

import pytest

from nas.evaluators import make_evaluator, space_of
from nas.loop import search
from nas.objectives import parse_objectives
from nas.references import find_architecture
from nas.run import Run
from nas.supernet.evaluator import METRICS, SupernetEvaluator
from nas.supernet.recipes import recipe, scaled
from nas.supernet.search import SearchTask, search_run
from nas.supernet.trained import open_trained
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

SPACE = load_space("nas-bench-201")
ARCH = (3, 1, 2, 0, 4, 1)


def tiny(name: str = "spos", **changes):
    found = scaled(recipe(name), "tiny", flip=False)
    if found.evolution is not None:
        changes |= {"evolution_population": 4, "evolution_generations": 2, "evolution_crossover": 2}
        changes |= {"evolution_mutation": 1, "evolution_recalibration": (2, 20), "evolution_evaluation": (1, 30)}
    return found.replaced({"channels": 4, "batch_size": 32, "epochs": 1, "alpha_warmup_epochs": 0, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SPOS with the seeds 0 and 5."""
    out = tmp_path_factory.mktemp("evaluator") / "run"
    search_run(SearchTask(tiny(), images=120), out, seeds=(0, 5))
    return out


def test_values_are_those_of_spos_own_evolution(folder):
    for reference, seed in ((f"{folder}", 0), (f"{folder}:0", 0), (f"{folder}:1", 5)):
        evaluator = make_evaluator(f"supernet:{reference}", parse_objectives("val_acc,macs<=1e9"))
        lines = [json.loads(line) for line in (folder / f"evolution-seed-{seed}.jsonl").read_text().splitlines()]
        assert len(lines) == 8
        for line in lines[:3]:
            arch = SPACE.decode(line["arch"])
            found = evaluator.evaluate(arch, seed=17)
            assert set(found) == set(METRICS)
            assert found["val_acc"] == line["acc"]
            assert found["cost_seconds"] > 0
            cost = SPACE.cost(arch, in_channels=1, num_classes=10, input_size=8, channels=4, cells_per_stage=1)
            assert (found["params"], found["macs"]) == (cost["params"], cost["macs"])


def test_without_an_evolution_of_its_own_all_images_count(tmp_path):
    run = search_run(SearchTask(tiny("darts-v1"), images=100), tmp_path / "run")
    found = SupernetEvaluator(str(run.path)).evaluate(ARCH, seed=0)
    expected = open_trained(run).accuracy(ARCH)
    assert (found["val_acc"], found["val_loss"]) == (expected["acc"], expected["loss"])
    (trial,) = run.trials()
    arch = SPACE.decode(trial.arch)
    assert SupernetEvaluator(f"{run.path}:best").evaluate(arch, seed=0)["val_acc"] == trial.metrics["val_acc"]


def test_it_travels_and_gives_the_same_whatever_the_seed(folder):
    evaluator = SupernetEvaluator(str(folder))
    assert space_of(evaluator).name == SPACE.name
    found = [evaluator.evaluate(ARCH, seed=seed) for seed in (0, 1)]
    found.append(pickle.loads(pickle.dumps(evaluator)).evaluate(ARCH, seed=2))
    assert len({(f["val_acc"], f["val_loss"]) for f in found}) == 1


@pytest.mark.parametrize("strategy", ["regularized-evolution", "random-search", "local-search"])
def test_any_strategy_searches_with_it(strategy, folder):
    found = search(SPACE, SupernetEvaluator(str(folder)), strategy, budget=5, objectives="val_acc", seed=1)
    assert [r.status for r in found.records] == ["done"] * 5
    trained = open_trained(Run.open(folder))
    own = trained.task.recipe.evolution
    values = {
        r.arch: trained.accuracy(SPACE.decode(r.arch), recalibration=own.recalibration, evaluation=own.evaluation)[
            "acc"
        ]
        for r in found.records
    }
    assert found.best.metrics["val_acc"] == max(values.values())


def test_the_command_searches_with_it(nas, folder):
    words = ("search", "--space", "nas-bench-201", "--evaluator", f"supernet:{folder}", "--objectives", "val_acc")
    status, out, err = nas(*words, "--queries", 4, "--out", "run", "--json")
    assert status == 0, err
    best = json.loads(out)["best"]
    assert find_architecture("run:best").record.arch == best["arch"]
    assert best["metrics"]["val_acc"] == SupernetEvaluator(str(folder)).evaluate(
        SPACE.decode(best["arch"]), seed=0
    )["val_acc"]  # fmt: skip
    status, out, _ = nas("resume", "run", "--json")
    assert status == 0
    assert json.loads(out)["best"]["arch"] == best["arch"]


def test_the_command_refuses_another_space(nas, folder):
    status, _, err = nas("search", "--evaluator", f"supernet:{folder}", "--space", "darts", "--queries", 2)
    assert status == 2
    assert "the space of the supernet" in err


def test_bad_input_is_named(folder, tmp_path):
    with pytest.raises(UserError, match="settings.json"):
        make_evaluator(f"supernet:{tmp_path}/none")
    Run.create(tmp_path / "training", {"kind": "training"})
    with pytest.raises(UserError, match="this run is a training"):
        make_evaluator(f"supernet:{tmp_path}/training")
    Run.create(tmp_path / "empty", Run.open(folder).settings)
    with pytest.raises(UserError, match="checkpoint"):
        make_evaluator(f"supernet:{tmp_path}/empty")
    with pytest.raises(UserError, match="'val_acc'"):
        make_evaluator(f"supernet:{folder}", parse_objectives("val_rocauc"))
    with pytest.raises(UserError, match="test"):
        make_evaluator(f"supernet:{folder}", parse_objectives("test_acc"))
    with pytest.raises(UserError, match="space of the supernet"):
        SupernetEvaluator(str(folder), space="nas-bench-macro")
    evaluator = SupernetEvaluator(str(folder))
    with pytest.raises(UserError, match="fidelity"):
        evaluator.evaluate(ARCH, 3, seed=0)
    for other in ((0,) * 8, (9,) * 6, "x"):
        with pytest.raises(UserError, match="architecture of nas-bench-201"):
            evaluator.evaluate(other, seed=0)
    with pytest.raises(UserError, match="supernet:<run>"):
        make_evaluator("supernets:")
