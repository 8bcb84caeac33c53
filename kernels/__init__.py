"""Fused Triton kernels for searched layers: `kernels.fuse(model)`. Importing this imports neither torch nor Triton."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "fuse": "kernels.fusion",
    "unfuse": "kernels.fusion",
    "is_fused": "kernels.fusion",
    "Fused": "kernels.fusion",
    "Fusion": "kernels.fusion",
    "FusedLayer": "kernels.layer",
    "BACKENDS": "kernels.backend",
    "obstacle": "kernels.backend",
    "Unsupported": "kernels.nodes",
}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from kernels.backend import BACKENDS, obstacle
    from kernels.fusion import Fused, Fusion, fuse, is_fused, unfuse
    from kernels.layer import FusedLayer
    from kernels.nodes import Unsupported


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
