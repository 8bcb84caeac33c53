"""Training-free scores of any module on any batch, from one shared pass; and rank statistics.

>>> scores = score(model, (images, labels), ["nwot", "synflow", "grad-norm"])
>>> scores["nwot"], scores.reasons            # NaN with a reason where a proxy has no value
>>> PROXIES["nwot"].formula, PROXIES["nwot"].source, PROXIES["nwot"].labels
>>> static_costs(model, images).macs          # no arithmetic

A proxy of your own is a pure function of what the passes capture (`Captured`), given by itself:

>>> @proxy("gradient-peak", needs=("gradients",), formula="max_l max |g_l|", source="mine")
... def gradient_peak(captured):
...     return max(g.abs().max() for g in captured.gradients.values())
>>> score(model, (images, labels), ["nwot", gradient_peak])

Every value is oriented so that higher predicts better; `Proxy.sign` is -1 where the published quantity is the negative.
`score` reads and never writes the model: weights, gradients, buffers, modes, hooks and random state stay as they were.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "score": "zero_cost.scoring",
    "Scores": "zero_cost.scoring",
    "PROXIES": "zero_cost.proxies",
    "Proxy": "zero_cost.definition",
    "proxy": "zero_cost.definition",
    "Captured": "zero_cost.captured",
    "static_costs": "zero_cost.static",
    "StaticCosts": "zero_cost.static",
    "NoValue": "zero_cost.errors",
    "UserError": "zero_cost.errors",
}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from zero_cost.captured import Captured
    from zero_cost.definition import Proxy, proxy
    from zero_cost.errors import NoValue, UserError
    from zero_cost.proxies import PROXIES
    from zero_cost.scoring import Scores, score
    from zero_cost.static import StaticCosts, static_costs


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
