"""Scores that exist only within a population: ranks of several proxies put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nas.scoring.many import ScoreTable
from nas.scoring.task import proxy_names
from search_spaces.common.errors import UserError
from zero_cost.correlation import average_ranks, log_rank_sum
from zero_cost.proxies import PROXIES


@dataclass(frozen=True)
class Aggregate:
    """A combination of proxies over the architectures that are scored together; not comparable between populations."""

    name: str
    parts: tuple[str, ...]
    combine: Callable[[Sequence[np.ndarray]], np.ndarray]
    formula: str
    source: str


def _rank_sum(columns: Sequence[np.ndarray]) -> np.ndarray:
    return np.sum([average_ranks(column) for column in columns], axis=0)


LOG_RANKS = "sum over the parts of log(rank / n), the best rank is n"
AGGREGATES = {
    a.name: a
    for a in (
        Aggregate(
            "az-nas",
            ("az-expressivity", "az-progressivity", "az-trainability", "macs"),
            log_rank_sum,
            LOG_RANKS,
            "Lee and Ham, AZ-NAS, CVPR 2024, equation 8",
        ),
        Aggregate(
            "te-nas",
            ("linear-regions", "ntk-condition"),
            _rank_sum,
            "rank of linear-regions + rank of ntk-condition",
            "Chen et al., TE-NAS, ICLR 2021, section 3.2",
        ),
    )
    if set(a.parts) <= set(PROXIES)
}


def find_aggregate(name: str) -> Aggregate | None:
    """An aggregate by name; `a+b+c` is the log-rank sum of proxies of one's choice. None for a single proxy."""
    if name in AGGREGATES:
        return AGGREGATES[name]
    if "+" not in name:
        return None
    parts = tuple(proxy_names(name.replace("+", ",")))
    if len(parts) < 2 or set(parts) & set(AGGREGATES):
        raise UserError(name, "two or more proxies with + between, such as nwot+logsynflow+live-macs")
    return Aggregate(name, parts, log_rank_sum, LOG_RANKS, "AZ-NAS's aggregation, proxies of one's own choice")


def needed(names: Iterable[str]) -> list[str]:
    """The proxies that must be computed for `names`, aggregates among them, each once."""
    found: dict[str, None] = {}
    for name in names:
        aggregate = find_aggregate(name)
        found |= dict.fromkeys([name] if aggregate is None else aggregate.parts)
    return list(found)


def with_aggregates(table: ScoreTable, names: Sequence[str]) -> ScoreTable:
    """The columns `names`, aggregates formed over the architectures of the table for every seed by itself.

    An architecture without a value of some part has the worst rank there.
    """
    columns = []
    for name in names:
        aggregate = find_aggregate(name)
        if aggregate is None:
            columns.append(table.column(name))
            continue
        parts = [table.column(part) for part in aggregate.parts]
        columns.append(np.stack([aggregate.combine([p[:, k] for p in parts]) for k in range(len(table.seeds))], 1))
    return replace(table, proxies=tuple(names), values=np.stack(columns, 1))
