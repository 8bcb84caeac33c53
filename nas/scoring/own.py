"""Scores of a user's own network, which no space made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import zero_cost
from nas.scoring.task import ScoringTask, find_proxy, proxy_names
from nas.scoring.trained import BN_ONLY
from nas.training.data.dataset import NAMES
from search_spaces.common.errors import UserError
from search_spaces.common.names import load_object


def score_own(
    model: str,
    proxies: str,
    *,
    data: str,
    root: Path | None = None,
    size: int | None = None,
    batch_size: int = 64,
    batches: int = 2,
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
) -> tuple[list[str], np.ndarray, dict[str, str]]:
    """(proxies, values [P, K], reasons) of the network at `package.module:object`.

    A module is scored as it is; a class or function is called without arguments, with the weights of each seed. data:
    a data set as in `load_data`, or `package.module:object` of batches as `zero_cost.score` takes them, or of a
    function that returns them; what batches are not is read as a data set. Errors: UserError.
    """
    names = proxy_names(proxies)
    if BN_ONLY in names:
        raise UserError(BN_ONLY, "a score that does not train; `nas train --factory` trains a network of your own")
    chosen = [find_proxy(name) for name in names]
    values = np.full((len(names), len(seeds)), np.nan)
    reasons: dict[str, str] = {}
    own = None if data in NAMES or ":" not in data else load_object(data, "batches or a data set")
    if isinstance(own, Iterator):
        own = list(islice(own, batches))  # the same for every seed
    task = ScoringTask("", data, None if root is None else str(root), size, batch_size, batches)
    for k, seed in enumerate(seeds):
        batch = _own_batches(own) if own is not None else None
        found = zero_cost.score(
            _model(model, seed),
            task.batch(seed) if batch is None else batch,
            chosen,
            seed=seed,
            device=device,
            batches=batches,
        )
        values[:, k] = [found[proxy.name] for proxy in chosen]
        for name, proxy in zip(names, chosen, strict=True):
            if proxy.name in found.reasons:
                reasons.setdefault(name, found.reasons[proxy.name])
    return names, values, reasons


def _model(path: str, seed: int) -> nn.Module:
    found: Any = load_object(path, "a network")
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise UserError(path, "a module, or a class or function that makes one without arguments")
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        try:
            found = found()
        except TypeError as error:
            raise UserError(path, f"a class or function that makes a module without arguments ({error})") from None
    if not isinstance(found, nn.Module):
        raise UserError(path, f"a module, not {type(found).__name__}")
    return found


def _own_batches(found: Any) -> Any:
    """What `zero_cost.score` can read, or None for what is a data set instead: batches have a first dimension more
    than one image has."""
    if callable(found) and not hasattr(found, "__getitem__"):
        found = found()
    if isinstance(found, torch.utils.data.DataLoader | torch.Tensor):
        return found
    if isinstance(found, torch.utils.data.Dataset | dict):
        return None
    if isinstance(found, tuple | list) and found:
        first = found[0] if isinstance(found[0], torch.Tensor) else found[0][0]
        if not isinstance(first, torch.Tensor):
            return None
        return found if isinstance(found[0], torch.Tensor) or first.dim() != 3 else None
    return found if hasattr(found, "__iter__") else None
