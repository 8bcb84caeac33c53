"""Recipes in stages: networks that grow while candidates are dropped, and edges decided one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nas.supernet.recipe import Recipe
from nas.supernet.recipes.darts import DARTS_TRAINING, DARTS_V1
from nas.supernet.settings import Projection, Stages

DRNAS = "Chen et al., DrNAS, ICLR 2021 (arXiv 2006.10355), with progressive learning"
LISTED: tuple[Recipe, ...] = (
    replace(
        DARTS_V1,
        name="darts-pt",
        source="Wang et al., DARTS-PT, ICLR 2021 (arXiv 2108.04392), NAS-Bench-201; ruocwang/darts-pt 4ec3149",
        training=replace(DARTS_TRAINING, epochs=100),
        discretization="perturbation",
        projection=Projection(),
    ),
    replace(
        DARTS_V1,
        name="p-darts",
        source="Chen et al., P-DARTS, ICCV 2019 (arXiv 1904.12760); chenxin061/pdarts b880e87",
        training=replace(DARTS_TRAINING, epochs=25, batch_size=96, final_rate=0.0),
        alpha_warmup_epochs=10,
        alpha_rate=6e-4,
        skip_cap=2,
        skip_dropout=0.1,
        stages=Stages(
            candidates=(8, 5, 3),
            layers=(5, 11, 17),
            cells_per_stage=(1, 3, 5),
            skip_dropout=(0.1, 0.4, 0.7),
        ),
        layers=5,
        cells_per_stage=1,
    ),
    replace(
        DARTS_V1,
        name="drnas-progressive",
        source=f"{DRNAS}, NAS-Bench-201; xiangning-chen/DrNAS f2caa4d",
        relaxation="dirichlet",
        partial=4,
        stages=Stages(candidates=(5, 3), partial=(4, 2), inherit=True),
    ),
    replace(
        DARTS_V1,
        name="drnas-progressive-darts",
        source=f"{DRNAS}, the space darts; xiangning-chen/DrNAS f2caa4d",
        training=replace(DARTS_TRAINING, epochs=25, learning_rate=0.1, final_rate=0.0),
        relaxation="dirichlet",
        alpha_rate=6e-4,
        partial=6,
        stages=Stages(candidates=(8, 4), partial=(6, 3), inherit=True),
        channels=36,
        layers=20,
    ),
)

_PT, _PDARTS = "ruocwang/darts-pt 4ec3149", "chenxin061/pdarts b880e87, train_search.py"
_DRNAS = "xiangning-chen/DrNAS f2caa4d"
# Where the settings stand in which a recipe differs from darts-v1.
SOURCES: dict[str, Mapping[str, str]] = {
    "darts-pt": {
        "epochs": f"{_PT}, NAS-Bench-201; 50 in the space darts",
        "discretization, projection_epochs": f"{_PT}; operations, then edges in the space darts",
        "projection_rate": f"{_PT}: a tenth, by a cosine of its own; that alphas stay meanwhile: recollection",
        "projection_fixed_alphas": f"{_PT}: its method blank has them fixed",
    },
    "p-darts": {
        "epochs, batch_size, final_rate, alpha_rate, alpha_warmup_epochs": f"{_PDARTS}; of each stage",
        "layers, stages_layers, stages_candidates, stages_inherit": f"{_PDARTS}; new weights and alphas in each stage",
        "skip_dropout, stages_skip_dropout": "the README of the code, --dropout_rate",
        "stages_partial": "no partial channels",
        "cells_per_stage, stages_cells_per_stage": "ours: with reductions these are 5, 11 and 17 cells too",
        "skip_cap": "the paper, section 3.3.2: 2 in the normal cell; the code prints all caps",
    },
    "drnas-progressive": {
        "relaxation, partial, stages_candidates, stages_partial": f"{_DRNAS}, NAS-Bench-201, progressive",
        "stages_inherit": f"{_DRNAS}: weights and alphas go on under one schedule; recollection",
        "stages_layers, stages_cells_per_stage": "the network keeps its depth",
        "stages_skip_dropout": "no dropout",
    },
    "drnas-progressive-darts": {
        "epochs, learning_rate, final_rate, alpha_rate, channels, layers": f"{_DRNAS}, of each stage",
        "relaxation, partial, stages_candidates": f"{_DRNAS}, the space darts",
        "stages_partial": f"{_DRNAS}: 6, then smaller; 3 is from the paper (recollection)",
        "stages_inherit": f"{_DRNAS}: weights and alphas go on under one schedule; recollection",
        "stages_layers, stages_cells_per_stage": "the network keeps its depth",
        "stages_skip_dropout": "no dropout",
    },
}
