"""Training: data, the one loop, recalibration of running statistics. Nothing heavy is imported before it is used."""

from __future__ import annotations

import importlib
from typing import Any

HOMES = {
    "Dataset": "nas.training.data",
    "Split": "nas.training.data",
    "load_data": "nas.training.data",
    "CropFlip": "nas.training.augment",
    "batches": "nas.training.augment",
    "evaluation_batches": "nas.training.augment",
    "Recipe": "nas.training.loop",
    "STOP": "nas.training.loop",
    "TrainResult": "nas.training.loop",
    "evaluate": "nas.training.loop",
    "train": "nas.training.loop",
    "recalibrate": "nas.training.recalibrate",
}
__all__ = sorted(HOMES)


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
