"""Presets: the training settings of papers, each with the place it was taken from.

A preset is a recipe, the scale of the network and the share of validation images that go with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nas.training.recipe import Recipe
from search_spaces.common.names import match

CROP_FLIP: dict[str, Any] = {"padding": 4, "flip": True}


@dataclass(frozen=True)
class Preset:
    """recipe: how to train. network: keywords of `space.build`, for networks of `space` only. val_share: of the
    training images. sources: where each setting stands; `recollection` marks what was not checked against the paper.
    """

    recipe: Recipe
    space: str | None = None
    network: Mapping[str, Any] = field(default_factory=dict)
    val_share: float = 0.1
    sources: Mapping[str, str] = field(default_factory=dict)


_NB201 = "D-X-Y/AutoDL-Projects, configs/nas-benchmark/hyper-opts/200E.config"
_NB101 = "google-research/nasbench, nasbench/lib/config.py"
_NB101_CODE = "google-research/nasbench, nasbench/lib/model_builder.py"
_DARTS = "quark0/darts, cnn/train.py"
_EVONORM = "recollection of Liu et al. 2020 (arXiv 2004.02967), appendix C"

PRESETS: dict[str, Preset] = {
    "nas-bench-201": Preset(
        Recipe(
            epochs=200,
            batch_size=256,
            learning_rate=0.1,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            decay="all",
            schedule="cosine",
            warmup_steps=0,
            drop_last=False,
            batch_statistics=False,
            source="Dong and Yang, NAS-Bench-201, ICLR 2020, section 2.2 and table 1",
            **CROP_FLIP,
        ),
        space="nas-bench-201",
        network={"channels": 16, "cells_per_stage": 5},
        val_share=0.5,
        sources={
            "epochs, learning_rate, momentum, nesterov, weight_decay, schedule, batch_size": _NB201,
            "padding, flip": "the paper, section 2.2: flip with probability 1/2, crop of 32x32 with padding 4",
            "decay": "D-X-Y/AutoDL-Projects: the optimiser gets all parameters in one group",
            "drop_last": "D-X-Y/AutoDL-Projects: torch's data loader, which keeps the last batch",
            "channels, cells_per_stage": "the paper, figure 1",
            "val_share": "cifar10-valid: 25,000 images to train, 25,000 to validate; 0 is the benchmark's cifar10",
        },
    ),
    "nas-bench-101": Preset(
        Recipe(
            epochs=108,
            batch_size=256,
            learning_rate=0.2,
            optimizer="rmsprop",
            momentum=0.9,
            weight_decay=1e-4,
            decay="all",
            schedule="cosine",
            warmup_steps=0,
            drop_last=True,
            batch_statistics=False,
            source="Ying et al., NAS-Bench-101, ICML 2019, section 2.3 and supplement S.3",
            **CROP_FLIP,
        ),
        space="nas-bench-101",
        network={"channels": 128, "cells_per_stage": 3},
        val_share=0.2,
        sources={
            "epochs, batch_size, momentum, weight_decay": _NB101,
            "learning_rate": f"{_NB101} and model_builder.py: .1 for each of two TPU shards",
            "optimizer": f"{_NB101_CODE}: RMSProp with eps 1; decay .9 is TensorFlow's default",
            "channels, cells_per_stage": f"{_NB101}: stem_filter_size, num_modules_per_stack",
            "schedule": f"{_NB101}: COSINE_BY_STEP",
            "drop_last": "recollection: batches of one size, as TPUs want them",
            "decay": f"{_NB101_CODE}: L2 loss over all trainable variables",
            "val_share": "40,000 images to train, 10,000 to validate",
            "padding, flip": "the paper, supplement: as He et al. 2016",
        },
    ),
    "darts-cifar10": Preset(
        Recipe(
            epochs=600,
            batch_size=96,
            learning_rate=0.025,
            momentum=0.9,
            weight_decay=3e-4,
            decay="all",
            schedule="cosine",
            rate_per_epoch=True,
            warmup_steps=0,
            clip_norm=5.0,
            cutout=16,
            drop_path=0.2,
            auxiliary_weight=0.4,
            drop_last=False,
            batch_statistics=False,
            source="Liu, Simonyan and Yang, DARTS, ICLR 2019, appendix A.1 and quark0/darts, cnn/train.py",
            **CROP_FLIP,
        ),
        space="darts",
        network={"channels": 36, "layers": 20, "auxiliary": True},
        val_share=0.0,
        sources={
            "epochs, batch_size, learning_rate, momentum, weight_decay, schedule, rate_per_epoch, clip_norm": _DARTS,
            "cutout, drop_path, auxiliary_weight, channels, layers, auxiliary": _DARTS,
            "decay, drop_last": f"{_DARTS}: all parameters in one group; torch's data loader keeps the last batch",
            "padding, flip": "quark0/darts, cnn/utils.py",
            "val_share": f"{_DARTS}: all 50,000 images train; the accuracy reported is that of the test images",
        },
    ),
    "evonorm-proxy": Preset(
        Recipe(
            steps=2000,
            batch_size=128,
            learning_rate=0.1,
            momentum=0.9,
            weight_decay=5e-4,
            schedule="linear",
            warmup_steps=0,
            decay_share=0.2,
            batch_statistics=False,
            source="Liu et al., Evolving Normalization-Activation Layers, NeurIPS 2020: proxy training on CIFAR-10",
            **CROP_FLIP,
        ),
        sources={
            "steps, batch_size, momentum": _EVONORM,
            "learning_rate, weight_decay, schedule": "our choice; the paper's were not at hand",
            "padding, flip": "our choice: the paper crops 24x24, recollection too",
        },
    ),
    "digits-tiny": Preset(
        Recipe(
            epochs=10,
            batch_size=64,
            learning_rate=0.1,
            nesterov=True,
            weight_decay=5e-4,
            schedule="cosine",
            warmup_steps=0,
            warmup_epochs=1.0,
            padding=1,
            drop_last=True,
            batch_statistics=False,
            source="ours: seconds on a CPU, for tests and first steps",
        ),
        val_share=0.1,
        sources={"all": "ours"},
    ),
}


def preset(name: str) -> Preset:
    """The preset called `name`. Errors: UserError with the nearest name."""
    return PRESETS[match(name, PRESETS, "a preset")]
