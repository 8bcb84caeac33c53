"""Training: data, recipes, the one loop, trainings as runs. Nothing heavy is imported before it is used."""

from __future__ import annotations

import importlib
from typing import Any

HOMES = {
    "Dataset": "nas.training.data",
    "Split": "nas.training.data",
    "load_data": "nas.training.data",
    "CropFlip": "nas.training.augment",
    "Batches": "nas.training.batches",
    "evaluation_batches": "nas.training.batches",
    "Recipe": "nas.training.recipe",
    "preset": "nas.training.presets",
    "STOP": "nas.training.loop",
    "TrainResult": "nas.training.loop",
    "evaluate": "nas.training.loop",
    "train": "nas.training.loop",
    "recalibrate": "nas.training.recalibrate",
    "Task": "nas.training.task",
    "train_run": "nas.training.runs",
    "load_trained": "nas.training.trained",
    "save_state": "nas.training.checkpoints",
    "load_state": "nas.training.checkpoints",
}
__all__ = sorted(HOMES)


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
