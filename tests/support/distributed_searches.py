"""What each of the processes of `test_several_processes` searches; begun by torchrun with the folder for the results.

The same functions search in one process, for comparison.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.supernet.network import supernet_of
from nas.supernet.recipe import Recipe
from nas.supernet.recipes import recipe
from nas.supernet.search import SearchTask, search_run
from nas.supernet.state import start
from nas.supernet.steps import run_epoch
from nas.training.data import Dataset, Split
from nas.training.distributed import ALONE, Processes, joined
from search_spaces.registry import load_space

# 47 and 45 images: the last batches have 15 and 13, which two processes cannot share evenly.
WEIGHTS, ALPHAS, EPOCHS = 47, 45, 2
CASES: tuple[str, ...] = ("darts-v1", "darts-v2", "pc-darts", "gdas", "drnas", "snas", "beta-darts", "oles", "rarts")
CASES += ("fairnas", "pa-da", "proxylessnas")


def images(count: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    patterns = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    return Split(patterns[labels] + torch.randn(count, 3, 8, 8, generator=generator), labels)


def data() -> Dataset:
    train, val = images(WEIGHTS, 0), images(ALPHAS, 1)
    return Dataset("patterns", train, val, images(4, 2), classes=("a", "b", "c"), mean=(0.0,) * 3, std=(1.0,) * 3)


def settings(name: str) -> Recipe:
    changes: dict[str, Any] = {"epochs": EPOCHS, "batch_size": 16, "drop_last": False, "alpha_warmup_epochs": 0}
    return recipe(name).replaced({**changes, "learning_rate": 0.05, "padding": 1, "warmup_epochs": 0.0})


def searched(name: str, processes: Processes = ALONE) -> dict[str, Any]:
    """Two epochs in a network that normalises by groups, so that shares of a batch make no difference."""
    found = settings(name)
    scale: dict[str, Any] = {"channels": 4, "cells_per_stage": 1, "num_classes": 3}
    torch.manual_seed(0)
    net = supernet_of(
        load_space("nas-bench-201"),
        found.make_relaxation(),
        generator=torch.Generator().manual_seed(0),
        partial=2 if found.partial > 1 else 1,
        edge_normalisation=found.edge_normalisation,
        norm=lambda channels: nn.GroupNorm(2, channels),
        **scale,
    )
    state = start(net, data(), found, seed=0, processes=processes)
    rows = [run_epoch(state, found) for _ in range(EPOCHS)]
    return {
        "rows": rows,
        "alphas": [a.detach().clone() for a in net.architecture_parameters()],
        "weights": [w.detach().clone() for w in net.weight_parameters()],
    }


def main(folder: Path) -> None:
    with joined() as processes:
        found = {name: searched(name, processes) for name in CASES}
        task = SearchTask(settings("darts-v1").replaced({"channels": 4, "cells_per_stage": 1}), images=100)
        with contextlib.suppress(ZeroDivisionError):
            search_run(task, folder / "run", seeds=(0,), processes=processes, on_epoch=_stop)
        search_run(task, folder / "run", seeds=(0,), processes=processes)  # goes on
        torch.save(found, folder / f"rank-{processes.rank}.pt")


def _stop(row: Any) -> None:
    raise ZeroDivisionError


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
