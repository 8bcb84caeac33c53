"""Pre-training of encoders on unlabelled graphs of a space: context (CAP), masked operations, path features.

Pre-trained weights are kept in the home folder and can be shared as one safetensors file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from predictors.graphs import GraphTable
from predictors.neural.encoders import Encoder
from predictors.neural.layers import initialize, use_generators
from predictors.neural.tasks import TASKS, Task
from predictors.neural.training import on_device
from search_spaces.common.errors import UserError
from search_spaces.common.files import atomic_write, home, locked

FORMAT = 1
RATE, DECAY = 1e-3, 1e-4  # of AdamW, both networks (CAP, supplement, table 8)
WINDOW = 50  # steps over which a loss is averaged for the log and the plateau
PATIENCE = 6  # windows without an improvement before a plateau ends the training
IMPROVEMENT = 2e-3  # of the loss, relative, that counts as one
log = logging.getLogger("nasforge.predictors")


@dataclass(frozen=True, eq=False)
class Pretrained:
    """Weights of one pre-trained encoder (a stack of one) and how they came about.

    weights: tensors [1, ...] by name. parts: the parts of the graphs that the encoder tells apart. task, steps:
    what was trained and how long; figure: the last window's pair accuracy (context), accuracy (masked) or explained
    share of variance (features).
    """

    weights: dict[str, Tensor]
    parts: tuple[str, ...]
    about: dict[str, Any]

    @property
    def steps(self) -> int:
        return int(self.about["steps"])

    @property
    def figure(self) -> float:
        return float(self.about["figure"])

    def into(self, encoder: Encoder) -> None:
        """Give every member of a stack these weights."""
        state = encoder.state_dict()
        encoder.load_state_dict({name: self.weights[name].expand_as(value) for name, value in state.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file that `pretrained=PATH` takes."""
        from safetensors.torch import save

        about = {"nasforge": json.dumps({"format": FORMAT, "parts": self.parts, **self.about})}
        with atomic_write(path, "wb") as file:
            file.write(save({name: value.contiguous() for name, value in self.weights.items()}, about))


def load_pretrained(path: str | os.PathLike[str]) -> Pretrained:
    """What `Pretrained.save` wrote. Errors: UserError for no such file, another kind of file or a newer format."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            about = json.loads((file.metadata() or {})["nasforge"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written, parts = int(about.pop("format")), tuple(about.pop("parts"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(str(path), "a file of pre-trained weights") from None
    except (SafetensorError, KeyError, ValueError, TypeError):
        raise UserError(str(path), "a file of pre-trained weights as nasforge writes them") from None
    if written > FORMAT:
        raise UserError(written, f"pre-trained weights of format {FORMAT} or older; a newer nasforge wrote these")
    return Pretrained(weights, parts, about)


def pretrained_encoder(
    space_name: str,
    vocabulary: Sequence[str],
    unlabelled: GraphTable | None,
    settings: Any,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Pretrained:
    """Pre-trained weights for the NeuralSettings: from the file they name, the cache, or by training (then cached).

    Errors: UserError without unlabelled graphs or a file; for a file of another space, vocabulary or encoder.
    """
    wanted = {
        "space": space_name,
        "vocabulary": list(vocabulary),
        "encoder": settings.encoder,
        "width": settings.width,
        "layers": settings.layers,
    }
    if settings.pretrained is not None:
        found = load_pretrained(settings.pretrained)
        for name, value in wanted.items():
            if found.about.get(name) != value:
                expected = f"weights pre-trained for {name} {value}, not {found.about.get(name)}"
                raise UserError(str(settings.pretrained), expected)
        return found
    if unlabelled is None:
        raise UserError(
            f"mode={settings.mode}",
            "unlabelled graphs for pre-training (`unlabelled=` of fit) or a file of weights (`pretrained=`)",
            "scratch",
        )
    wanted |= {
        "task": settings.pretraining,
        "score": settings.score if settings.pretraining == "context" else None,
        "budget": settings.pretrain_steps,
        "batch": settings.pretrain_batch,
        "seed": settings.pretrain_seed,
        "pool": _digest(unlabelled),
    }
    key = hashlib.sha256(json.dumps({"format": FORMAT, **wanted}).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "-", space_name)
    path = home() / "pretrained" / f"{name}-{settings.pretraining}-{settings.encoder}-{key}.safetensors"
    with locked(path.with_suffix(".lock")):  # two processes of one command wait for one training
        if not path.exists():
            pretrain(unlabelled, wanted, device, progress).save(path)
    return load_pretrained(path)


def pretrain(
    pool: GraphTable, wanted: dict[str, Any], device: torch.device, progress: Callable[[int, int], None] | None = None
) -> Pretrained:
    """Train an encoder on the graphs of `pool`; `wanted` as `pretrained_encoder` makes it.

    AdamW with weight decay 1e-4, learning rate 1e-3 (constant for the released context task, as published, else along
    a cosine to 0), ends at the budget of steps or on a plateau of the loss.
    """
    generator = torch.Generator().manual_seed(int(wanted["seed"]))
    parts = tuple(sorted(pool.part_names))
    task: Task = TASKS[wanted["task"]](pool, parts, wanted, generator).to(device)
    initialize(task, [generator])
    use_generators(task, on_device(device, [generator]))
    constant = wanted["score"] == "released"
    optimizer = torch.optim.AdamW(task.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
    budget, size = wanted["budget"], min(wanted["batch"], len(pool))
    order, at = torch.randperm(len(pool), generator=generator), 0
    losses: list[Tensor] = []
    figures: list[Tensor] = []
    windows: list[float] = []
    task.train()
    for step in range(budget):
        if at + size > len(pool):
            order, at = torch.randperm(len(pool), generator=generator), 0
        rows, at = order[at : at + size].numpy(), at + size
        if not constant:
            optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / budget)) / 2
        loss, figure = task(pool.take(rows), generator, device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        figures.append(figure.detach())
        if len(losses) == WINDOW or step == budget - 1:
            windows.append(float(torch.stack(losses).mean()))
            last = float(torch.stack(figures).mean())
            log.info("pre-training step %d of %d: loss %.4f, %s %.3f", step + 1, budget, windows[-1], task.figure, last)
            losses, figures = [], []
            if progress is not None:
                progress(step + 1, budget)
            if _plateau(windows):
                log.info("pre-training stops on a plateau after %d steps", step + 1)
                break
    weights = {name: value.detach().cpu().clone() for name, value in task.encoder.state_dict().items()}
    return Pretrained(weights, parts, wanted | {"steps": step + 1, "figure": last, "figure_name": task.figure})


def _plateau(windows: Sequence[float]) -> bool:
    """Whether the last windows brought no improvement on the best before them."""
    if len(windows) <= PATIENCE:
        return False
    before = min(windows[:-PATIENCE])
    return min(windows[-PATIENCE:]) > before - IMPROVEMENT * abs(before)


def _digest(table: GraphTable) -> str:
    found = hashlib.sha256(repr((table.part_names, table.ops.shape)).encode())
    for array in (table.ops, table.adjacency, table.parts):
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()[:16]
