"""The one training loop of neural predictors: S networks at once, each with batches of its own."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from predictors.neural.batch import GraphBatch
from predictors.neural.layers import Generators, use_generators
from predictors.neural.losses import loss_at
from search_spaces.common.errors import UserError

log = logging.getLogger("nasforge.predictors")
DEVICES = ("auto", "cpu", "cuda")
PREDICTED_AT_ONCE = 65_536  # graphs turned into tensors at a time
CHUNK = 4096  # graphs at a time in prediction: their activations stay in the cache
Progress = Callable[[int, int], None]  # (epochs done, epochs)
Network = Callable[[GraphBatch], Tensor]


@dataclass(frozen=True)
class Schedule:
    """How to train: AdamW, learning rate from `rate` to 0 along a cosine, `epochs` passes in batches of `batch`.

    loss: see `losses`; warm_up: the share of the epochs after which `first>second` changes. early_stop: the share of
    the labelled graphs kept as the own validation set (0 = none), on which training stops after `patience` epochs
    without a better loss and returns to the best epoch. average: decay of an exponential moving average of the weights
    (0 = none).
    """

    loss: str
    epochs: int
    batch: int
    rate: float
    decay: float
    warm_up: float = 0.5
    early_stop: float = 0.0
    patience: int = 30
    average: float = 0.0


def train(
    model: nn.Module,
    graphs: GraphBatch,
    rows: Tensor,
    targets: Tensor,
    schedule: Schedule,
    generators: Generators,
    *,
    frozen: list[nn.Module] | None = None,
    progress: Progress | None = None,
) -> None:
    """Train member k of the stack on the graphs at `rows[k]` (int64 [S, N]) with `targets[k]` (float32 [S, N]).

    Everything random of member k is drawn from generator k (on the CPU), so that it does not see the others. Modules
    in `frozen` keep their weights and statistics. A model with a method `objective` (graphs, targets, loss, share of
    the training done -> [S]) is trained on that.
    """
    device = targets.device
    stack = len(generators)
    use_generators(model, on_device(device, generators))
    for module in frozen or []:
        module.requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=schedule.rate, weight_decay=schedule.decay, fused=True)
    members = torch.arange(stack, device=device)[:, None]
    split = _permutations(rows.shape[1], generators) if schedule.early_stop else None
    held = _held_out(rows.shape[1], schedule.early_stop)
    stop = None
    if split is not None:
        split = split.to(device)
        stop = _EarlyStop(model, graphs.rows(rows[members, split[:, :held]]), targets[members, split[:, :held]])
        rows, targets = rows[members, split[:, held:]], targets[members, split[:, held:]]
    steps = max(1, round(rows.shape[1] / schedule.batch))
    average = [p.detach().clone() for p in weights] if schedule.average else None
    loss = loss_at(schedule.loss, 0, schedule.warm_up)
    objective = getattr(model, "objective", None)  # of a network with more losses than that of its scores
    for epoch in range(schedule.epochs):
        _train_mode(model, frozen or [])
        changed = loss_at(schedule.loss, epoch / schedule.epochs, schedule.warm_up)
        if stop is not None and changed is not loss:
            stop.best.fill_(math.inf)  # values of two losses do not compare
        loss = changed
        order = _permutations(rows.shape[1], generators).to(device)
        for step, batch in enumerate(order.tensor_split(steps, 1)):
            share = (epoch + step / steps) / schedule.epochs
            optimizer.param_groups[0]["lr"] = schedule.rate * (1 + math.cos(math.pi * share)) / 2
            given, wanted = graphs.rows(rows[members, batch]), targets[members, batch]
            value = loss(model(given), wanted) if objective is None else objective(given, wanted, loss, share)
            optimizer.zero_grad(set_to_none=True)
            value.sum().backward()
            optimizer.step()
            if average is not None:
                torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - schedule.average)
        if progress is not None:
            progress(epoch + 1, schedule.epochs)
        if stop is not None and stop.after(epoch, loss, schedule.patience):
            break
    if stop is not None:
        stop.restore()
    elif average is not None:
        with torch.no_grad():
            for parameter, mean in zip(weights, average, strict=True):
                parameter.copy_(mean)
    model.eval()


class _EarlyStop:
    """Best weights of each member by the loss on its own held-out graphs; a member that ran out of patience is done,
    whatever the others do, as it would be alone."""

    def __init__(self, model: nn.Module, graphs: GraphBatch, targets: Tensor):
        self.model, self.graphs, self.targets = model, graphs, targets
        self.best = torch.full((len(targets),), math.inf, device=targets.device)
        self.epoch = torch.zeros(len(targets), dtype=torch.int64, device=targets.device)
        self.done = torch.zeros(len(targets), dtype=torch.bool, device=targets.device)
        self.state = {name: value.clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def after(self, epoch: int, loss, patience: int) -> bool:
        self.model.eval()
        value = loss(self.model(self.graphs), self.targets)
        better = (value < self.best) & ~self.done
        self.best = torch.where(better, value, self.best)
        self.epoch[better] = epoch
        for name, now in self.model.state_dict().items():
            self.state[name][better] = now[better]
        self.done |= epoch - self.epoch >= patience
        return bool(self.done.all())

    def restore(self) -> None:
        self.model.load_state_dict(self.state)


@torch.inference_mode()
def predict(model: nn.Module, stack: int, graphs: GraphBatch) -> Tensor:
    """float32 [S, N] on the CPU: every member's scores of all graphs [N, ...], which it reads in chunks."""
    model.eval()
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(graphs), CHUNK):
        rows = torch.arange(start, min(start + CHUNK, len(graphs)))
        parts.append(model(graphs.rows(rows.to(graphs.ops.device)).to(device).stacked(stack)).cpu())
    return torch.cat(parts, 1)


def _permutations(count: int, generators: Generators) -> Tensor:
    return torch.stack([torch.randperm(count, generator=generator) for generator in generators])


def _held_out(count: int, share: float) -> int:
    return min(max(2, round(share * count)), count - 2) if share else 0


def _train_mode(model: nn.Module, frozen: list[nn.Module]) -> None:
    model.train()
    for module in frozen:
        module.eval()


def device_of(wanted: str) -> torch.device:
    """auto, cpu or cuda as a device. Errors: UserError for cuda where there is no GPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("cuda", "a device of this machine: there is no GPU", "cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def on_device(device: torch.device, generators: Generators) -> Generators:
    """The generators, or ones of their seeds on the device that dropout runs on."""
    if device.type == "cpu":
        return generators
    return [torch.Generator(device).manual_seed(g.initial_seed()) for g in generators]
