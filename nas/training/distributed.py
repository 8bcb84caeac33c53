"""Several processes that train one model: who this process is, and sums over all of them.

Begun by torchrun, which sets RANK, WORLD_SIZE and LOCAL_RANK; alone, everything here does nothing.

Each process trains on its share of every batch, gradients are averaged, and the result is that of one process with
the whole batch up to rounding, with two exceptions: layers that normalise over the batch see their share of it, and
running statistics are those of rank 0; dropout and drop-path draw other numbers on every rank.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from search_spaces.common.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process among `world`. The one of rank 0 writes files."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed over all processes."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite each of `tensors` with its mean over all processes; one message for all of a kind."""
        if self.world == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            joint = torch.cat([tensor.detach().flatten() for tensor in same])
            distributed.all_reduce(joint)
            parts = (joint / self.world).split([tensor.numel() for tensor in same])
            for tensor, part in zip(same, parts):
                tensor.detach().copy_(part.view_as(tensor))

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def first(self, value: Any) -> Any:
        """`value` of the leading process, for decisions that all must take alike."""
        return self.gather(value)[0]

    def copy_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite `tensors` with those of the leading process."""
        if self.world > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            distributed.barrier()


ALONE = Processes()


@contextlib.contextmanager
def joined(device: str = "cpu") -> Iterator[Processes]:
    """The group that torchrun began, for the length of a block: gloo on CPUs, nccl on GPUs.

    On GPUs `cuda` means the one of this process's local rank from then on. Errors: UserError if there are too few.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    if not distributed.is_available():
        raise UserError(f"WORLD_SIZE={world}", "a PyTorch with torch.distributed")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = device.startswith("cuda")
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"{local_rank + 1} processes", f"one for each of {torch.cuda.device_count()} GPUs at most")
        torch.cuda.set_device(local_rank)  # nccl's collectives go by the current device
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Processes(distributed.get_rank(), world, local_rank)
    finally:
        distributed.destroy_process_group()
