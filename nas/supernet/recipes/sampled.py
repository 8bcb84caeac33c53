"""Recipes that train one path at a time: uniform, fair or by importance, and binary gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nas.supernet.recipe import Recipe
from nas.supernet.recipes.darts import DARTS_TRAINING
from nas.supernet.settings import Evolution

LISTED: tuple[Recipe, ...] = (
    Recipe(
        name="spos",
        source="Guo et al., Single Path One-Shot, ECCV 2020 (arXiv 1904.00420); megvii 36eed6c",
        training=replace(
            DARTS_TRAINING,
            epochs=125,
            batch_size=1024,
            learning_rate=0.5,
            weight_decay=4e-5,
            schedule="linear",
            decay_share=1.0,
            final_rate=0.0,
            rate_per_epoch=False,
            clip_norm=None,
            label_smoothing=0.1,
            padding=0,
        ),
        relaxation="uniform-path",
        solver="weights-only",
        discretization="evolution",
        evolution=Evolution(),
        weight_images=0.96,
        alpha_images=0.04,
        stem="imagenet",
    ),
)

_SPOS = "megvii-model/SinglePathOneShot 36eed6c"
# Where the settings stand.
SOURCES: dict[str, Mapping[str, str]] = {
    "spos": {
        "epochs": f"{_SPOS}: 150,000 iterations of 1,024 images, 125 times 96 % of ImageNet",
        "batch_size, learning_rate, final_rate, schedule, decay_share, rate_per_epoch, weight_decay": _SPOS,
        "label_smoothing, clip_norm, relaxation, solver, discretization": _SPOS,
        "evolution_population, evolution_generations, evolution_crossover, evolution_mutation": _SPOS,
        "evolution_parents, evolution_mutation_probability, evolution_max_macs": _SPOS,
        "evolution_recalibration, evolution_evaluation": _SPOS,
        "weight_images, alpha_images": "the paper: 50,000 of ImageNet's training images to validate; recollection",
        "padding, stem": "random resized crops of ImageNet there; the data come cropped here (recollection)",
    },
}
