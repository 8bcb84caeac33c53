"""`bn-only`: the one score that trains, beside those that do not, with the same cache and seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nas.scoring.cache import ScoreCache
from nas.scoring.many import ScoreTable
from nas.scoring.task import ScoringTask
from nas.training.batch_norm_only import RECIPE, train_batch_norm_only
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

BN_ONLY = "bn-only"
FORMULA = "-(mean training loss over the last 20 of 40 steps that train scales and shifts of normalisation alone)"
SOURCE = "Frankle et al., ICLR 2021; as a score of architectures after Chen et al., BN-NAS, ICCV 2021"


def with_bn_only(
    table: ScoreTable,
    task: ScoringTask,
    *,
    cache: Path | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> ScoreTable:
    """The table and a column `bn-only`: each architecture's normalisation layers trained for 40 steps at every seed.

    What the cache holds is not trained again.
    """
    recipe = replace(RECIPE, batch_size=task.batch_size)
    settings = hashlib.sha256(repr(asdict(recipe)).encode()).hexdigest()[:8]
    store = ScoreCache(cache, f"{task.digest()}-{BN_ONLY}-{settings}", table.archs)
    space = load_space(task.space)
    values = np.full((len(table.archs), 1, len(table.seeds)), np.nan)
    reasons = dict(table.reasons)
    for k, text in enumerate(table.archs):
        for s, seed in enumerate(table.seeds):
            if (text, seed, BN_ONLY) not in store:
                value, reason = _score(task, space.decode(text), seed, recipe)
                store.add(text, seed, {BN_ONLY: value}, {BN_ONLY: reason} if reason else {})
            values[k, 0, s], reason = store[text, seed, BN_ONLY]
            if reason:
                reasons.setdefault((text, BN_ONLY), reason)
        if progress is not None:
            progress(k + 1, len(table.archs))
    return replace(
        table, proxies=(*table.proxies, BN_ONLY), values=np.concatenate([table.values, values], 1), reasons=reasons
    )


def _score(task: ScoringTask, arch: Any, seed: int, recipe: Any) -> tuple[float, str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(task.threads)
    try:
        model = task.model(arch, seed).to(task.device)
        found = train_batch_norm_only(model, task.opened(), recipe, seed=seed)
    except UserError as error:
        if "normalisation layers" not in str(error):
            raise
        return float("nan"), "the model has no normalisation layers with scales and shifts"
    finally:
        torch.set_num_threads(threads)
    return found.score, found.failed or ""


def without_bn_only(names: Sequence[str]) -> list[str]:
    """The names of the scores that do not train; a count where there is no other."""
    return [name for name in names if name != BN_ONLY] or ["params"]
