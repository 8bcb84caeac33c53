"""ProxyEvaluator: what an architecture is worth by training-free scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from nas.evaluators import Rejected
from nas.scoring.aggregates import find_aggregate
from nas.scoring.cache import default_cache
from nas.scoring.many import score_architectures
from nas.scoring.task import ScoringTask, find_proxy, proxy_names
from nas.scoring.trained import BN_ONLY, with_bn_only, without_bn_only
from search_spaces.common.errors import UserError


@dataclass(frozen=True)
class ProxyEvaluator:
    """Scores architectures without training; the metric of a proxy is its name with underscores, higher is better.

    proxies: names, `bn-only` (which trains) among them. space, data, root, size, batch_size, batches, network, few,
    repeats, regularisation, device, threads: as in `ScoringTask`. seeds: of weights and images; a metric is the mean
    over them. The trial's own seed is not used, so that all architectures are measured alike. cache: whether scores
    are kept in $NASFORGE_HOME.
    Raises Rejected where a proxy has no value. Errors: UserError, also for a rank over a population (`az-nas`), which
    one architecture does not have.
    """

    space: str
    proxies: tuple[str, ...]
    data: str = "digits"
    root: str | None = None
    size: int | None = None
    batch_size: int = 64
    batches: int = 2
    network: Mapping[str, Any] = field(default_factory=dict)
    few: int = 16
    repeats: int = 1
    regularisation: tuple[float, float] | None = None
    device: str = "cpu"
    threads: int = 1
    seeds: tuple[int, ...] = (0,)
    cache: bool = True

    def __post_init__(self) -> None:
        for name in proxy_names(self.proxies):
            if name == BN_ONLY:
                continue
            if find_aggregate(name) is not None:
                raise UserError(name, "a proxy of one architecture; this one ranks a population")
            find_proxy(name)
        for name in ("proxies", "seeds", "regularisation"):  # lists, where they come from JSON
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        if not self.seeds:
            raise UserError(self.seeds, "at least one seed")

    def task(self) -> ScoringTask:
        """How the architectures are scored."""
        return ScoringTask(**{f.name: getattr(self, f.name) for f in fields(ScoringTask)})

    def as_json(self) -> dict[str, Any]:
        """Plain values; `ProxyEvaluator(**found)` inverts it."""
        return asdict(self)

    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics, in the order of the proxies."""
        return tuple(metric_of(name) for name in self.proxies)

    def evaluate(self, arch: Any, fidelity: int | None = None, *, seed: int) -> dict[str, float]:
        """The scores of one architecture. Errors: UserError for a fidelity, which scores do not have."""
        if fidelity is not None:
            raise UserError(fidelity, "no fidelity: nothing is trained")
        path = default_cache() if self.cache else None
        table = score_architectures(
            self.task(), [arch], without_bn_only(self.proxies), seeds=self.seeds, by_class=False, cache=path
        )  # fmt: skip
        if BN_ONLY in self.proxies:
            table = with_bn_only(table, self.task(), cache=path)
        values = [float(table.column(name).mean()) for name in self.proxies]
        for name, value in zip(self.proxies, values, strict=True):
            if not np.isfinite(value):
                raise Rejected(f"{name}: {table.reasons.get((table.archs[0], name), 'no value')}")
        return dict(zip(self.metrics(), values, strict=True))


def metric_of(proxy: str) -> str:
    """`live-macs` -> `live_macs`; of one's own the name after the colon."""
    return proxy.rpartition(":")[2].replace("-", "_").replace(".", "_")
