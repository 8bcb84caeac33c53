"""Every proxy of the toolkit by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from zero_cost.definition import Proxy
from zero_cost.proxies import (
    activations,
    counts,
    features,
    gradients,
    jacobian,
    ntk,
    recurrent,
    spectrum,
    synflow,
    transformers,
)

_MODULES = (counts, gradients, synflow, jacobian, activations, ntk, features, transformers, recurrent, spectrum)
PROXIES: Mapping[str, Proxy] = MappingProxyType(
    {found.name: found for module in _MODULES for found in vars(module).values() if isinstance(found, Proxy)}
)
