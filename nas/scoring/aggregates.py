"""Scores that exist only within a population: ranks of several proxies put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nas.scoring.many import ScoreTable
from nas.scoring.task import proxy_names
from search_spaces.common.errors import UserError
from search_spaces.graph import OpGraph
from search_spaces.space import SearchSpace
from zero_cost.correlation import average_ranks, log_rank_sum, majority_vote, share_of_best_sum
from zero_cost.proxies import PROXIES


@dataclass(frozen=True)
class Aggregate:
    """A combination of proxies over the architectures that are scored together; not comparable between populations."""

    name: str
    parts: tuple[str, ...]
    combine: Callable[[Sequence[np.ndarray]], np.ndarray]
    formula: str
    source: str
    of_graph: Callable[[OpGraph], float] | None = None  # of each architecture, combined as the last column


def _rank_sum(columns: Sequence[np.ndarray]) -> np.ndarray:
    return np.sum([average_ranks(column) for column in columns], axis=0)


def skipped_layers(graph: OpGraph) -> float:
    """How many operations the skip connections of a graph pass by, on average; 0 without any.

    Beside a skip connection stands the longest way between what it reads and what reads it; in NAS-Bench-201 an edge
    from node i to node j passes by j - i - 1 of them.
    """
    n = len(graph.ops)
    after = graph.adjacency.astype(bool)
    found = []
    for skip in (k for k, op in enumerate(graph.ops) if "skip" in op):
        ways = [1.0]
        for start in np.flatnonzero(after[:, skip]):
            between = np.full(n, -np.inf)  # operations on the longest way from `start` to a node
            between[start] = -1
            for node in range(start + 1, n):
                between[node] = max((between[p] + 1 for p in np.flatnonzero(after[:, node])), default=-np.inf)
            ways += [between[end] for end in np.flatnonzero(after[skip])]
        found.append(max(ways) - 1)
    return float(np.mean(found)) if found else 0.0


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
        Aggregate(
            "freerea",
            ("logsynflow", "nwot"),
            share_of_best_sum,
            "logsynflow + nwot + skipped layers, each divided by its maximum; skipped layers: mean over skip "
            "connections of the operations on the longest way beside one, less one",
            "Cavagnero et al., FreeREA, WACV 2023, section 3.2 and released code",
            skipped_layers,
        ),
        Aggregate(
            "majority-vote",
            ("synflow", "jacov", "snip"),
            majority_vote,
            "share of the others that at least two of the three rank below",
            "Abdelfattah et al., Zero-Cost Proxies for Lightweight NAS, ICLR 2021, section 4.2",
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


def with_aggregates(table: ScoreTable, names: Sequence[str], space: SearchSpace | None = None) -> ScoreTable:
    """The columns `names`, aggregates formed over the architectures of the table for every seed by itself.

    An architecture without a value of some part has the worst rank there. space: of the architectures, for those that
    look at their graphs (`freerea`). Errors: UserError without it.
    """
    columns = []
    for name in names:
        aggregate = find_aggregate(name)
        if aggregate is None:
            columns.append(table.column(name))
            continue
        parts = [table.column(part) for part in aggregate.parts]
        if aggregate.of_graph is not None:
            parts.append(np.repeat(_of_graphs(aggregate, table, space)[:, None], len(table.seeds), 1))
        columns.append(np.stack([aggregate.combine([p[:, k] for p in parts]) for k in range(len(table.seeds))], 1))
    return replace(table, proxies=tuple(names), values=np.stack(columns, 1))


def _of_graphs(aggregate: Aggregate, table: ScoreTable, space: SearchSpace | None) -> np.ndarray:
    if space is None:
        raise UserError(aggregate.name, "a proxy that needs no graphs of the architectures here")
    if not any("skip" in word for word in space.vocabulary):
        raise UserError(aggregate.name, f"a space with skip connections among its operations, not {space.name}")
    assert aggregate.of_graph is not None
    return np.array([aggregate.of_graph(space.graph(space.decode(text))) for text in table.archs])
