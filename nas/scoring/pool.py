"""The architectures that a search ranks by proxies, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.space import SearchSpace

Scores = str | Sequence[str] | Callable[[list[Any]], np.ndarray]
COUNTS = {"params": "params", "macs": "macs", "live-macs": "live_macs", "depth": "depth", "paths": "paths"}


@dataclass(frozen=True, eq=False)
class Pool:
    """archs: [N], every one of its own key. scores: [N, M], higher is better, NaN where there is no value."""

    archs: list[Any]
    scores: np.ndarray


def make_pool(
    space: SearchSpace,
    scores: Scores,
    rng: np.random.Generator,
    *,
    size: int,
    table: str | None = None,
    task: Mapping[str, Any] | None = None,
) -> Pool:
    """A pool of a space and its scores.

    scores: a function [N architectures] -> [N, M] or [N], or names of proxies. table: a Parquet file of scores; the
    pool is then its architectures, and `scores` names its columns. Without one the pool is the whole space where that
    has at most `size` architectures, else `size` random ones. task: settings of `ScoringTask` (`data`, `batch_size`)
    for proxies that are no counts of the space, besides `seed`, `workers` and `cache`. Errors: UserError.
    """
    if table is not None:
        if callable(scores):
            raise UserError("scores", "names of columns beside a table of scores")
        return _from_table(space, table, scores)
    archs = _architectures(space, rng, size)
    if callable(scores):
        found = np.asarray(scores(archs), float)
    else:
        found = _by_name(space, archs, scores, task or {})
    found = found[:, None] if found.ndim == 1 else found
    if found.ndim != 2 or len(found) != len(archs) or not found.shape[1]:
        raise UserError(found.shape, f"scores of shape [{len(archs)}, number of proxies]")
    return Pool(archs, found)


def unit_scale(scores: np.ndarray) -> np.ndarray:
    """Every column from 0 (least) to 1 (most) over the pool; what is not finite is 0, and so is a constant column."""
    finite = np.where(np.isfinite(scores), scores, np.nan)
    present = np.isfinite(finite).any(0)
    low = np.where(present, np.nanmin(np.where(present, finite, 0.0), axis=0), 0.0)
    high = np.where(present, np.nanmax(np.where(present, finite, 0.0), axis=0), 0.0)
    scaled = (finite - low) / np.where(high > low, high - low, 1.0)
    return np.nan_to_num(scaled)


def _architectures(space: SearchSpace, rng: np.random.Generator, size: int) -> list[Any]:
    try:
        whole = len(space) <= size
    except (UserError, OverflowError):
        whole = False
    drawn = iter(space) if whole else (space.sample(rng) for _ in range(10 * size))
    found: dict[str, Any] = {}
    for arch in drawn:
        found.setdefault(space.key(arch), arch)
        if len(found) == size:
            break
    return list(found.values())


def _names(scores: Any) -> list[str]:
    from nas.scoring.task import proxy_names

    return proxy_names(scores)


def _from_table(space: SearchSpace, path: str, names: Any) -> Pool:
    from nas.scoring.published import read_scores

    table = read_scores(Path(path), space)
    chosen = list(table.proxies) if names == "all" else _names(names)
    for name in chosen:
        if name not in table.proxies:
            raise UserError(name, f"a proxy of {path} ({one_of(table.proxies)})", nearest(name, table.proxies))
    columns = [table.proxies.index(name) for name in chosen]
    rows: dict[str, int] = {}
    archs = [space.decode(text) for text in table.archs]
    for k, arch in enumerate(archs):
        rows.setdefault(space.key(arch), k)
    order = list(rows.values())
    return Pool([archs[k] for k in order], table.values[order][:, columns, 0])


def _by_name(space: SearchSpace, archs: list[Any], scores: Any, task: Mapping[str, Any]) -> np.ndarray:
    names = _names(scores)
    if not task and set(names) <= set(COUNTS):
        costs = [space.cost(arch) for arch in archs]
        return np.array([[float(cost[COUNTS[name]]) for name in names] for cost in costs])
    from nas.scoring import ScoringTask, score_architectures
    from nas.scoring.aggregates import needed, with_aggregates
    from nas.scoring.cache import default_cache
    from search_spaces.registry import space_text

    settings = dict(task)
    workers, cache, seed = settings.pop("workers", 1), settings.pop("cache", True), settings.pop("seed", 0)
    try:
        scoring = ScoringTask(space_text(space), **settings)
    except TypeError:
        raise UserError(list(settings), "settings of ScoringTask, such as data and batch_size") from None
    path = default_cache() if cache else None
    table = score_architectures(scoring, archs, needed(names), seeds=(seed,), workers=workers, cache=path)
    return with_aggregates(table, names, space).values[:, :, 0]
