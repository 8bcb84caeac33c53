"""What each of the processes of `test_distributed` trains; begun by torchrun with the folder for the results.

The same functions train in one process, for comparison.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from small_trainings import DEAD_EDGE, network, own_task, patterns
from torch import nn

from nas.training.checkpoints import load_state, save_state, snapshot
from nas.training.data import Dataset
from nas.training.distributed import ALONE, Processes, joined
from nas.training.loop import LoopState, advance, evaluate_split, start
from nas.training.preflight import forecast
from nas.training.recipe import Recipe
from nas.training.runs import train_run
from nas.training.task import Task
from search_spaces.registry import load_space

PLAIN = Recipe(
    steps=11, batch_size=32, drop_last=False, clip_norm=2.0, padding=1, flip=True, batch_statistics=False, decay="all"
)
# 151 images: the fifth batch has 23, which two processes cannot share evenly.
UNEVEN = 151


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


def cell(norm=group_norm) -> nn.Module:
    """A NAS-Bench-201 cell with a convolution on an edge that leads nowhere."""
    torch.manual_seed(0)
    space = load_space("nas-bench-201")
    return space.build(space.decode(DEAD_EDGE), in_channels=2, num_classes=3, channels=4, cells_per_stage=1, norm=norm)


def darts() -> nn.Module:
    torch.manual_seed(0)
    space = load_space("darts")
    arch = space.decode(DARTS)
    return space.build(arch, in_channels=2, num_classes=3, channels=2, layers=3, auxiliary=True, norm=group_norm)


DARTS = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1), ('skip_connect', 0), ('max_pool_3x3', 1),"
    " ('skip_connect', 0), ('skip_connect', 1), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5],"
    " reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 0),"
    " ('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('avg_pool_3x3', 0)], reduce_concat=[2, 3, 4, 5])"
)
Trained = tuple[Callable[[], nn.Module], Recipe]
CASES: dict[str, Trained] = {
    "group-norm": (cell, PLAIN),
    "mixed": (cell, Recipe(**{**vars(PLAIN), "mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1, "ema_decay": 0.8})),
    "auxiliary": (darts, Recipe(**{**vars(PLAIN), "steps": 4, "auxiliary_weight": 0.4})),
    "unused-auxiliary": (darts, Recipe(**{**vars(PLAIN), "steps": 4})),
    "batch-norm": (lambda: cell(norm=None), PLAIN),
}


def trained(case: str, processes: Processes = ALONE) -> dict[str, object]:
    """Losses, weights and validation of a case."""
    make, recipe = CASES[case]
    data: Dataset = patterns(UNEVEN)
    state = advance(start(make(), data, recipe, seed=3, processes=processes), recipe)
    own = {k: v.clone() for k, v in state.model.state_dict().items()}
    hits = (state.hits, state.seen)
    found = evaluate_split(state.evaluated, data, data.val, recipe, processes)
    after = {k: v.clone() for k, v in state.model.state_dict().items()}
    return {"losses": state.losses, "own": own, "weights": after, "val": found, "hits": hits}


def resumed(folder: Path, processes: Processes) -> dict[str, object]:
    """A training with dropout straight through, and one with a break and a forecast in the middle of an epoch."""
    data = patterns(UNEVEN)

    def begun() -> LoopState:
        return start(network(dropout=0.3), data, PLAIN, seed=3, processes=processes)

    straight = snapshot(advance(begun(), PLAIN))
    half = advance(begun(), PLAIN, steps=7)
    content = folder / "half.pt"
    if processes.leads:
        save_state(content, half, PLAIN)
    else:
        processes.gather(dict(half.random))
    processes.wait()
    torch.manual_seed(1000 + processes.rank)
    again = load_state(content, network(dropout=0.3, seed=9), data, PLAIN, processes=processes)
    forecast(again, PLAIN, 11)
    return {"straight": straight, "resumed": snapshot(advance(again, PLAIN))}


def run_task() -> Task:
    return own_task(Recipe(epochs=4, batch_size=30, drop_last=False, warmup_steps=0, batch_statistics=False))


def runs(folder: Path, processes: Processes) -> None:
    """A run, one that is interrupted and goes on past a damaged checkpoint, and two seeds with a forecast."""
    train_run(run_task(), folder / "whole", processes=processes)

    def stop(seed: int, row: dict[str, float]) -> None:
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        train_run(run_task(), folder / "broken", processes=processes, on_epoch=stop, checkpoint_steps=2)
    processes.wait()
    if processes.leads:
        newest = max((folder / "broken" / "checkpoints" / "seed-0").glob("step-*.pt"))
        newest.write_bytes(newest.read_bytes()[:-100])
    processes.wait()
    told: list[str] = []
    asks = print if processes.leads else None  # as a command line does that shows the leader's alone
    train_run(
        run_task(), folder / "broken", processes=processes, checkpoint_steps=2, on_warning=told.append, on_forecast=asks
    )
    (folder / f"told-{processes.rank}").write_text("\n".join(told))
    train_run(run_task(), folder / "broken", seeds=(0, 4), processes=processes)


def main(folder: Path) -> None:
    with joined() as processes:
        found: dict[str, object] = {case: trained(case, processes) for case in CASES}
        found["resumed"] = resumed(folder, processes)
        runs(folder, processes)
        torch.save(found, folder / f"rank-{processes.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
