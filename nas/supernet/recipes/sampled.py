"""Recipes that train one path at a time: uniform, fair or by importance, and binary gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nas.supernet.recipe import Recipe
from nas.supernet.recipes.darts import DARTS_TRAINING
from nas.supernet.settings import Evolution, Importance, Latency

SPOS_TRAINING = replace(
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
)
# As PA&DA and FairNAS were compared on NAS-Bench-201.
COMPARED_TRAINING = replace(
    DARTS_TRAINING, epochs=250, batch_size=256, learning_rate=0.05, weight_decay=2.5e-4, final_rate=0.0
)
LISTED: tuple[Recipe, ...] = (
    Recipe(
        name="proxylessnas",
        source="Cai, Zhu and Han, ProxylessNAS, ICLR 2019 (arXiv 1812.00332); mit-han-lab/proxylessnas bf58b5c",
        training=replace(
            SPOS_TRAINING,
            epochs=120,
            batch_size=256,
            learning_rate=0.025,
            schedule="cosine",
            decay_share=DARTS_TRAINING.decay_share,
            nesterov=True,
        ),
        relaxation="binary-gates",
        alpha_first=False,
        alpha_warmup_epochs=40,
        alpha_every=5,
        alpha_rate=1e-3,
        alpha_betas=(0.0, 0.999),
        alpha_decay=0.0,
        latency=Latency(),
        weight_images=0.96,
        alpha_images=0.04,
        stem="imagenet",
    ),
    Recipe(
        name="fairnas",
        source="Chu, Zhang and Xu, FairNAS, ICCV 2021 (arXiv 1907.01845); as ShunLu91/PA-DA 9060c3a trains it",
        training=COMPARED_TRAINING,
        relaxation="uniform-path",
        solver="weights-only",
        strict_fairness=True,
        discretization="evolution",
        evolution=Evolution(max_macs=None),
        weight_images=0.9,
        alpha_images=0.1,
    ),
    Recipe(
        name="pa-da",
        source="Lu et al., PA&DA, CVPR 2023 (arXiv 2302.14772); ShunLu91/PA-DA 9060c3a",
        training=COMPARED_TRAINING,
        relaxation="sampled-path",
        solver="weights-only",
        importance=Importance(),
        discretization="evolution",
        evolution=Evolution(max_macs=None),
        weight_images=0.9,
        alpha_images=0.1,
    ),
    Recipe(
        name="spos",
        source="Guo et al., Single Path One-Shot, ECCV 2020 (arXiv 1904.00420); megvii 36eed6c",
        training=SPOS_TRAINING,
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
_PROXYLESS = "mit-han-lab/proxylessnas bf58b5c, search/imagenet_arch_search.py"
_COMPARED = "ShunLu91/PA-DA 9060c3a, nasbench201/train_baselines_201.py"
_PANDA = "ShunLu91/PA-DA 9060c3a, nasbench201/train_panda_201.py"
_EVOLUTION = "discretization, evolution_population, evolution_generations, evolution_crossover, evolution_mutation, "
_EVOLUTION += "evolution_parents, evolution_mutation_probability, evolution_max_macs, evolution_recalibration, "
_EVOLUTION += "evolution_evaluation"
_TRAINED = "epochs, batch_size, learning_rate, final_rate, momentum, weight_decay, clip_norm, schedule, "
_TRAINED += "rate_per_epoch, decay, padding, flip, drop_last, channels, cells_per_stage"
_IMAGES = "weight_images, alpha_images"
_ALL_IMAGES = "own: there the training images for weights and the test images for the ranking"
_AS_SPOS = "as spos, without a bound; there all paths are ranked"
# Where the settings stand.
SOURCES: dict[str, Mapping[str, str]] = {
    "proxylessnas": {
        "epochs, batch_size, learning_rate, nesterov, weight_decay, label_smoothing": _PROXYLESS,
        "alpha_rate, alpha_betas, alpha_decay, alpha_every, weight_images, alpha_images": _PROXYLESS,
        "final_rate, rate_per_epoch, clip_norm, alpha_first": "mit-han-lab/proxylessnas bf58b5c, search/nas_manager.py",
        "relaxation": "mit-han-lab/proxylessnas bf58b5c, search/modules/mix_op.py, full_v2",
        "alpha_warmup_epochs": f"{_PROXYLESS}; there 40 epochs of their own before the 120, at rate .05",
        "latency_form, latency_alpha, latency_beta, latency_weight": f"{_PROXYLESS}; logarithms there of milliseconds",
        "latency_reference_ms": "80 ms on a phone there; here that of uniform probabilities",
        "latency_file, latency_images, latency_repeats": "own: there a table of a phone's latencies is downloaded",
        "padding, stem": "random resized crops of ImageNet there; the data come cropped here (recollection)",
    },
    "fairnas": {
        _TRAINED: _COMPARED,
        _IMAGES: _ALL_IMAGES,
        "relaxation, solver, strict_fairness": f"the paper's algorithm 1; {_COMPARED}",
        _EVOLUTION: _AS_SPOS,
    },
    "pa-da": {
        _TRAINED: _PANDA,
        _IMAGES: _ALL_IMAGES,
        "relaxation, solver, importance_paths, importance_images, importance_shared": _PANDA,
        _EVOLUTION: _AS_SPOS,
    },
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
