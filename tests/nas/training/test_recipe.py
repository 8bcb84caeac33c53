"""Recipes: every schedule against torch's own, settings as JSON, what is refused; the presets' figures."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from nas.training.presets import PRESETS, preset
from nas.training.recipe import Recipe
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space


def rates(make, steps: int, rate: float = 0.4) -> list[float]:
    """The learning rates of a scheduler of torch."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], rate)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def ours(recipe: Recipe, per_epoch: int = 1) -> list[float]:
    return [recipe.rate(step, per_epoch) for step in range(recipe.steps)]


PLAIN = Recipe(steps=60, learning_rate=0.4, warmup_steps=0)


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        ({"schedule": "constant"}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        ({"schedule": "cosine"}, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=60)),
        (
            {"schedule": "cosine", "final_rate": 0.01},
            lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=60, eta_min=0.01),
        ),
        ({"schedule": "step"}, lambda o: lr_scheduler.MultiStepLR(o, [30, 45], gamma=0.1)),
        (
            {"schedule": "step", "milestones": (0.25,), "gamma": 0.5},
            lambda o: lr_scheduler.MultiStepLR(o, [15], gamma=0.5),
        ),
        ({"schedule": "linear", "decay_share": 1.0}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=60)),
        ({"schedule": "linear", "decay_share": 0.0}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        (
            {"schedule": "linear", "decay_share": 0.25},
            lambda o: lr_scheduler.SequentialLR(
                o,
                [lr_scheduler.ConstantLR(o, factor=1.0), lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=15)],
                [45],
            ),
        ),
        (
            {"schedule": "constant", "warmup_steps": 9},
            lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=9),
        ),
    ],
)
def test_schedules_are_those_of_torch(settings, make):
    assert ours(replace(PLAIN, **settings)) == pytest.approx(rates(make, 60), abs=1e-12)


def test_warm_up_multiplies_any_schedule():
    warm, plain = replace(PLAIN, schedule="cosine", warmup_steps=5), replace(PLAIN, schedule="cosine")
    factors = [min(1.0, (k + 1) / 6) for k in range(60)]
    assert ours(warm) == pytest.approx([f * r for f, r in zip(factors, ours(plain), strict=True)])


def test_a_rate_by_epochs_is_torchs_stepped_by_epochs():
    recipe = Recipe(epochs=6, learning_rate=0.4, schedule="cosine", warmup_steps=0, rate_per_epoch=True).resolved(10)
    by_epoch = rates(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6), 6)
    assert ours(recipe, 10) == pytest.approx([r for r in by_epoch for _ in range(10)])


def test_beyond_the_last_step_no_rate_is_negative():
    for schedule in ("linear", "cosine", "step", "constant"):
        recipe = replace(PLAIN, schedule=schedule)
        assert all(recipe.rate(step) >= 0 for step in range(60, 80))


def test_epochs_become_steps():
    recipe = Recipe(epochs=3, warmup_epochs=0.5, warmup_steps=2).resolved(7)
    assert (recipe.steps, recipe.warmup_steps, recipe.epochs) == (21, 2 + round(3.5), None)
    assert recipe.resolved(7) == recipe
    assert Recipe(steps=5).resolved(7) == Recipe(steps=5)


def test_drop_path_grows_by_epochs():
    recipe = Recipe(epochs=4, drop_path=0.2).resolved(5)
    expected = [0.2 * epoch / 4 for epoch in range(4) for _ in range(5)]
    assert [recipe.drop_path_at(step, 5) for step in range(20)] == pytest.approx(expected)


def test_recipes_come_back_from_json_and_name_their_differences():
    recipe = replace(PLAIN, betas=(0.8, 0.9), milestones=(0.1, 0.2), ema_decay=0.9)
    text = json.loads(json.dumps(asdict(recipe)))
    assert Recipe(**text) == recipe
    assert recipe.differences(text) == []
    assert replace(recipe, flip=True, betas=(0.8, 0.99)).differences(text) == [
        "betas: (0.8, 0.99) instead of [0.8, 0.9]",
        "flip: True instead of False",
    ]


def test_replaced_settings():
    assert PLAIN.replaced({"learning-rate": 1, "epochs": 3}) == replace(PLAIN, learning_rate=1.0, epochs=3)
    with pytest.raises(UserError, match="did you mean 'batch_size'"):
        PLAIN.replaced({"batch_sise": 3})
    with pytest.raises(UserError, match="batch_size as int"):
        PLAIN.replaced({"batch_size": 1.5})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "0: expected a positive number for steps"),
        ({"epochs": 0}, "0: expected a positive number for epochs"),
        ({"patience": 0}, "0: expected a positive number for patience"),
        ({"learning_rate": -1.0}, "a positive learning rate"),
        ({"learning_rate": float("nan")}, "a positive learning rate"),
        ({"schedule": "lineer"}, "did you mean 'linear'"),
        ({"optimizer": "sdg"}, "did you mean 'sgd'"),
        ({"precision": "bfloat"}, "did you mean 'bfloat16'"),
        ({"kernels": "compiled"}, "did you mean 'compile'"),
        ({"decay": "weight"}, "did you mean 'weights'"),
        ({"momentum": 1.0}, "momentum of at least 0, below 1"),
        ({"momentum": 0.0, "nesterov": True}, "a momentum above 0"),
        ({"clip_norm": 0.0}, "a positive gradient norm"),
        ({"label_smoothing": 1.0}, "label smoothing of at least 0, below 1"),
        ({"ema_decay": 1.0}, "ema decay of at least 0, below 1"),
        ({"drop_path": -0.1}, "drop path of at least 0"),
        ({"final_rate": 0.2}, "final rate of at least 0, at most 0.1"),
        ({"decay_share": float("nan")}, "decay share of at least 0, at most 1"),
    ],
)
def test_recipes_that_are_none(settings, message):
    with pytest.raises(UserError, match=message):
        Recipe(**settings)


# -- presets -----------------------------------------------------------------------------------------------------


def test_presets_have_the_published_figures():
    """From the texts: NAS-Bench-201 section 2.2; NAS-Bench-101 section 2.3; DARTS appendix A.1."""
    found = preset("nas_bench_201").recipe
    assert (found.epochs, found.batch_size, found.learning_rate, found.weight_decay) == (200, 256, 0.1, 5e-4)
    assert (found.nesterov, found.momentum, found.schedule, found.padding) == (True, 0.9, "cosine", 4)
    found = preset("nas-bench-101").recipe
    assert (found.epochs, found.batch_size, found.learning_rate, found.weight_decay) == (108, 256, 0.2, 1e-4)
    assert (found.optimizer, found.schedule) == ("rmsprop", "cosine")
    found = preset("darts-cifar10").recipe
    assert (found.epochs, found.batch_size, found.learning_rate, found.weight_decay) == (600, 96, 0.025, 3e-4)
    assert (found.drop_path, found.auxiliary_weight, found.cutout, found.clip_norm) == (0.2, 0.4, 16, 5.0)


def test_the_rate_of_darts_in_an_epoch():
    """0.025 * (1 + cos(pi * 300 / 600)) / 2 in the middle, the same over the whole epoch of 521 steps."""
    recipe = preset("darts-cifar10").recipe.resolved(521)
    found = {recipe.rate(step, 521) for step in range(300 * 521, 301 * 521)}
    assert len(found) == 1
    assert found.pop() == pytest.approx(0.0125)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_state_their_sources(name):
    found = preset(name)
    assert found.sources
    named = {n for names in found.sources for n in names.split(", ")}
    assert named <= {*asdict(found.recipe), *found.network, "val_share", "all"}
    if found.space is not None:
        space = load_space(found.space)
        arch = space.sample(np.random.default_rng(0))
        assert space.cost(arch, **found.network)["params"] > 0


def test_an_unknown_preset():
    with pytest.raises(UserError, match="did you mean 'nas-bench-201'"):
        preset("nasbench201")


def test_steps_take_the_place_of_epochs():
    assert Recipe(epochs=5).replaced({"steps": 7}).resolved(100).steps == 7
    assert Recipe(epochs=5).replaced({"steps": 7, "epochs": 2}).resolved(100).steps == 200
    assert Recipe(steps=7).replaced({"epochs": 2}).resolved(100).steps == 200
