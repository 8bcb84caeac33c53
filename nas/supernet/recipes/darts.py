"""DARTS and the recipes that differ from it in their relaxation, channels, regularisation or perturbation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nas.supernet.recipe import Recipe
from nas.supernet.settings import Relaxed
from nas.training.recipe import Recipe as Training

DARTS_TRAINING = Training(
    epochs=50,
    batch_size=64,
    learning_rate=0.025,
    momentum=0.9,
    weight_decay=3e-4,
    decay="all",
    schedule="cosine",
    final_rate=0.001,
    rate_per_epoch=True,
    warmup_steps=0,
    clip_norm=5.0,
    padding=4,
    flip=True,
    drop_last=False,
    source="quark0/darts f276dd3, cnn/train_search.py",
)
DARTS_V1 = Recipe(
    name="darts-v1",
    source="Liu, Simonyan and Yang, DARTS, ICLR 2019 (arXiv 1806.09055), first order; quark0/darts f276dd3",
    training=DARTS_TRAINING,
)
PC_DARTS = replace(
    DARTS_V1,
    name="pc-darts",
    source="Xu et al., PC-DARTS, ICLR 2020 (arXiv 1907.05737); yuhuixu1993/PC-DARTS b74702f",
    training=replace(DARTS_TRAINING, batch_size=256, learning_rate=0.1, final_rate=0.0),
    partial=4,
    edge_normalisation=True,
    alpha_rate=6e-4,
    alpha_warmup_epochs=15,
)
LISTED: tuple[Recipe, ...] = (
    DARTS_V1,
    replace(DARTS_V1, name="darts-v2", source=DARTS_V1.source.replace("first", "second"), solver="second-order"),
    PC_DARTS,
    replace(
        PC_DARTS,
        name="pc-darts-imagenet",
        training=replace(PC_DARTS.training, batch_size=1024, learning_rate=0.5, warmup_epochs=5.0, padding=0),
        partial=2,
        alpha_rate=6e-3,
        alpha_clip=5.0,
        alpha_warmup_epochs=35,
        weight_images=0.1,
        alpha_images=0.025,
        stem="imagenet",
    ),
    replace(
        DARTS_V1,
        name="gdas",
        source="Dong and Yang, GDAS, CVPR 2019 (arXiv 1910.04465); D-X-Y/AutoDL-Projects, GDAS.config",
        training=replace(DARTS_TRAINING, epochs=250, nesterov=True, weight_decay=5e-4),
        relaxation="gumbel-hard",
        temperature=(10.0, 0.1),
        alpha_first=False,
    ),
    replace(
        DARTS_V1,
        name="drnas",
        source="Chen et al., DrNAS, ICLR 2021 (arXiv 2006.10355), NAS-Bench-201; xiangning-chen/DrNAS f2caa4d",
        training=replace(DARTS_TRAINING, epochs=100),
        relaxation="dirichlet",
        alpha_decay=1e-3,
    ),
    replace(
        DARTS_V1,
        name="beta-darts",
        source="Ye et al., beta-DARTS, CVPR 2022 (arXiv 2203.01665); Sunshine-Ye/Beta-DARTS, NAS-Bench-201",
        training=replace(DARTS_TRAINING, epochs=100),
        regularizer="beta-decay",
        regularizer_weight=50.0,
        regularizer_ramp=True,
    ),
    replace(
        DARTS_V1,
        name="sdarts-rs",
        source="Chen and Hsieh, SDARTS, ICML 2020 (arXiv 2002.05283), random; SmoothDARTS d3dbfed",
        perturbation="random",
    ),
    replace(
        DARTS_V1,
        name="sdarts-adv",
        source="Chen and Hsieh, SDARTS, ICML 2020 (arXiv 2002.05283), adversarial; SmoothDARTS d3dbfed",
        perturbation="adversarial",
    ),
    replace(
        DARTS_V1,
        name="fairdarts",
        source="Chu et al., Fair DARTS, ECCV 2020 (arXiv 1911.12126); xiaomi-automl/FairDARTS 270cfc9",
        training=replace(DARTS_TRAINING, batch_size=128, learning_rate=0.005),
        relaxation="sigmoid",
        discretization="sigmoid",
        gate_threshold=0.85,
        alpha_rate=3e-3,
        regularizer="zero-one",
        regularizer_weight=10.0,
    ),
    replace(
        DARTS_V1,
        name="r-darts-es",
        source="Zela et al., Robust DARTS, ICLR 2020 (arXiv 1909.09656), early stop; automl/RobustDARTS 3dec3fe",
        early_stop=True,
    ),
    replace(
        DARTS_V1,
        name="snas",
        source="Xie et al., SNAS, ICLR 2019 (arXiv 1812.09926); no code was read",
        relaxation="gumbel-soft",
        temperature=(1.0, 0.03),
        solver="single-level",
    ),
    replace(
        DARTS_V1,
        name="rarts",
        source="Xue, Qi and Xin, RARTS, IEEE Access 2022 (arXiv 2008.03901); no code was read",
        solver="relaxed",
        relaxed=Relaxed(),
    ),
)

_SEARCH, _ARCHITECT = "quark0/darts, cnn/train_search.py", "quark0/darts, cnn/architect.py"
_PC_SEARCH = "yuhuixu1993/PC-DARTS b74702f, train_search.py"
_PC_IMAGENET = "yuhuixu1993/PC-DARTS b74702f, train_search_imagenet.py"
# Where the settings stand in which a recipe differs from darts-v1; those of darts-v1 itself in its own entry.
SOURCES: dict[str, Mapping[str, str]] = {
    "darts-v1": {
        "epochs, batch_size, learning_rate, final_rate, momentum, weight_decay, clip_norm, channels, layers": _SEARCH,
        "schedule, rate_per_epoch, weight_images, alpha_images, alpha_first": _SEARCH,
        "alpha_rate, alpha_betas, alpha_decay, solver": _ARCHITECT,
        "decay, drop_last": f"{_SEARCH}: all parameters in one group; torch's data loader keeps the last batch",
        "padding, flip": "quark0/darts, cnn/utils.py",
        "affine, norm_after_pools": "quark0/darts, cnn/model_search.py and operations.py",
        "cells_per_stage": "D-X-Y/AutoDL-Projects, searches in NAS-Bench-201",
    },
    "darts-v2": {"solver": f"{_ARCHITECT}, --unrolled"},
    "pc-darts": {
        "batch_size, learning_rate, final_rate, alpha_rate, alpha_warmup_epochs": _PC_SEARCH,
        "partial, edge_normalisation": "yuhuixu1993/PC-DARTS b74702f, model_search.py",
    },
    "pc-darts-imagenet": {
        "batch_size, learning_rate, final_rate, warmup_epochs": _PC_IMAGENET,
        "alpha_rate, alpha_clip, alpha_warmup_epochs": _PC_IMAGENET,
        "partial, edge_normalisation, stem": "yuhuixu1993/PC-DARTS b74702f, model_search_imagenet.py: C // 2",
        "weight_images, alpha_images": "the code's README: 10 % and 2.5 % of every class",
        "padding": "random resized crops there; the data come cropped here (recollection)",
    },
    "gdas": {
        "epochs, nesterov, weight_decay, relaxation, temperature": "D-X-Y/AutoDL-Projects, GDAS.config",
        "alpha_first": "D-X-Y/AutoDL-Projects, GDAS.py: weights first; recollection",
    },
    "drnas": {
        "epochs, relaxation": "xiangning-chen/DrNAS f2caa4d, NAS-Bench-201 without progressive shrinking",
        "alpha_decay": "reg 1e-3: L2 to Dirichlet(1), which is alpha = 0, as the optimiser's decay",
    },
    "beta-darts": {
        "regularizer, regularizer_weight, regularizer_ramp": "Sunshine-Ye/Beta-DARTS, optimizers/darts/architect.py",
        "epochs": "Sunshine-Ye/Beta-DARTS, on NAS-Bench-201",
    },
    "sdarts-rs": {"perturbation": "xiangning-chen/SmoothDARTS d3dbfed, sota/cnn/train_search.py"},
    "sdarts-adv": {"perturbation": "xiangning-chen/SmoothDARTS d3dbfed, attacker/perturb.py"},
    "fairdarts": {
        "batch_size, learning_rate, alpha_rate": "xiaomi-automl/FairDARTS 270cfc9, without its decay .9 of alpha_rate",
        "regularizer, regularizer_weight, relaxation": "xiaomi-automl/FairDARTS, fairdarts/separate_loss.py",
        "discretization, gate_threshold": "xiaomi-automl/FairDARTS: gates above .85, at most two edges into a node; "
        "darts has two in any case, elsewhere a node keeps its strongest edge where no gate is above",
    },
    "r-darts-es": {"early_stop": "automl/RobustDARTS 3dec3fe, src/search/args.py; searched in spaces S1 to S4 there"},
    "snas": {
        "relaxation, temperature, solver": "the paper; recollection",
    },
    "rarts": {
        "solver": "the paper: both halves of the images move the alphas; its form is recollection",
        "relaxed_train_weight, relaxed_coupling": "no value was found; at 1 steps are as long as DARTS's",
    },
}
