"""Recipes: the authors' settings as the facts have them, sources for all of them, plain values, scales."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from nas.supernet.recipe import Recipe, diff
from nas.supernet.recipes import RECIPES, SCALES, SOURCES, recipe, scaled
from search_spaces.common.errors import UserError

# As the authors' code has them.
PUBLISHED = {
    "darts-v1": {"batch_size": 64, "learning_rate": 0.025, "final_rate": 0.001, "epochs": 50, "alpha_rate": 3e-4},
    "darts-v2": {"solver": "second-order", "clip_norm": 5.0, "weight_decay": 3e-4, "alpha_decay": 1e-3},
    "pc-darts": {"partial": 4, "batch_size": 256, "learning_rate": 0.1, "alpha_rate": 6e-4, "alpha_warmup_epochs": 15},
    "pc-darts-imagenet": {
        **{"partial": 2, "batch_size": 1024, "learning_rate": 0.5, "warmup_epochs": 5.0, "alpha_rate": 6e-3},
        **{"alpha_clip": 5.0, "alpha_warmup_epochs": 35, "weight_images": 0.1, "alpha_images": 0.025},
    },
    "gdas": {"epochs": 250, "nesterov": True, "weight_decay": 5e-4, "temperature": (10.0, 0.1)},
    "drnas": {"epochs": 100, "relaxation": "dirichlet", "partial": 1, "alpha_rate": 3e-4, "alpha_decay": 1e-3},
    "spos": {
        **{"batch_size": 1024, "learning_rate": 0.5, "weight_decay": 4e-5, "label_smoothing": 0.1},
        **{"evolution_population": 50, "evolution_generations": 20, "evolution_max_macs": 330_000_000},
    },
    "beta-darts": {"epochs": 100, "regularizer_weight": 50.0},
    "proxylessnas": {
        **{"epochs": 120, "batch_size": 256, "learning_rate": 0.025, "nesterov": True, "weight_decay": 4e-5},
        **{"schedule": "cosine", "label_smoothing": 0.1, "clip_norm": None, "alpha_rate": 1e-3, "alpha_decay": 0.0},
        **{"alpha_betas": (0.0, 0.999), "alpha_every": 5, "alpha_warmup_epochs": 40, "latency_form": "mul-log"},
        **{"latency_alpha": 0.2, "latency_beta": 0.3, "latency_weight": 0.1},
    },
    "fairnas": {"epochs": 250, "batch_size": 256, "learning_rate": 0.05, "weight_decay": 2.5e-4, "clip_norm": 5.0},
    "pa-da": {"epochs": 250, "batch_size": 256, "learning_rate": 0.05, "weight_decay": 2.5e-4, "clip_norm": 5.0},
    "fairdarts": {"batch_size": 128, "learning_rate": 0.005, "alpha_rate": 3e-3, "regularizer_weight": 10.0},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_authors(name):
    found = recipe(name).flat()
    assert {key: found[key] for key in PUBLISHED[name]} == PUBLISHED[name]


def test_spos_runs_as_many_iterations_as_published():
    found = recipe("spos")
    iterations = found.epochs * found.weight_images * 1_281_167 / found.training.batch_size
    assert iterations == pytest.approx(150_000, rel=0.005)


@pytest.mark.parametrize("name", RECIPES)
def test_every_difference_to_darts_has_a_source(name):
    sourced = {key for keys in SOURCES[name] for key in keys.split(", ")}
    sourced |= {key for keys in SOURCES["pc-darts" if name.startswith("pc-") else name] for key in keys.split(", ")}
    assert set(diff(recipe("darts-v1"), recipe(name))) <= sourced
    assert sourced <= set(recipe(name).flat())
    assert recipe(name).source


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name):
    assert Recipe.from_json(json.loads(json.dumps(asdict(recipe(name))))) == recipe(name)


def test_diff_names_exactly_what_differs():
    assert diff(recipe("darts-v1"), recipe("darts-v2")) == {"solver": ("first-order", "second-order")}
    assert diff(recipe("gdas"), recipe("gdas")) == {}
    changed = recipe("spos").replaced({"evolution_population": 60, "learning_rate": 1})
    assert diff(recipe("spos"), changed) == {"evolution_population": (50, 60), "learning_rate": (0.5, 1.0)}


@pytest.mark.parametrize("name", RECIPES)
def test_scales_keep_rate_per_image_and_the_share_of_warm_up(name):
    full = recipe(name)
    assert scaled(full, "full") == full
    for scale in ("small", "tiny"):
        found, limit = scaled(full, scale), SCALES[scale].batch_size
        assert found.training.batch_size == min(full.training.batch_size, limit)
        rate = full.training.learning_rate / full.training.batch_size
        assert found.training.learning_rate / found.training.batch_size == pytest.approx(rate)
        share = full.alpha_warmup_epochs / full.epochs
        assert abs(found.alpha_warmup_epochs - share * found.epochs) <= 0.5
        assert (found.channels, found.cells_per_stage) == (8, 1)
    assert not scaled(full, "tiny", flip=False).training.flip


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("darts-v1", {"alfa_rate": 1.0}, "alpha_rate"),
        ("darts-v1", {"relaxation": "softmaks"}, "softmax"),
        ("darts-v1", {"relaxation": "gumbel-hard"}, "temperature"),
        ("gdas", {"temperature": (10.0, -1.0)}, "temperature"),
        ("pc-darts", {"partial": 0}, "partial"),
        ("darts-v1", {"weight_images": 0.7}, "at most 1"),
        ("darts-v2", {"optimizer": "adamw"}, "sgd"),
        ("spos", {"solver": "first-order"}, "weights-only"),
        ("darts-v1", {"discretization": "evolution"}, "evolution"),
        ("snas", {"perturbation": "random"}, "single-level"),
        ("darts-v1", {"epochs": None}, "epochs"),
        ("darts-v1", {"alpha_rate": 0.0}, "alpha_rate"),
        ("darts-v1", {"partial": "four"}, "int"),
        ("proxylessnas", {"alpha_every": 0}, "alpha_every"),
        ("proxylessnas", {"solver": "weights-only"}, "latency"),
        ("proxylessnas", {"latency_form": "mul#logs"}, "mul-log"),
        ("proxylessnas", {"latency_reference_ms": 0.0}, "milliseconds"),
        ("pa-da", {"strict_fairness": True}, "uniform-path"),
    ],
)
def test_nonsense_is_refused(name, changes, named):
    with pytest.raises(UserError, match=named):
        recipe(name).replaced(changes)


def test_unknown_names_get_the_nearest():
    with pytest.raises(UserError, match="pc-darts"):
        recipe("pcdarts")
    with pytest.raises(UserError, match="tiny"):
        scaled(recipe("gdas"), "tinny")
