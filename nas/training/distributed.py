"""Several processes that train one model: who this process is, and sums over all of them.

Begun by torchrun, which sets RANK, WORLD_SIZE and LOCAL_RANK; alone, everything here does nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
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

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            distributed.barrier()


ALONE = Processes()


@contextlib.contextmanager
def joined(device: str = "cpu") -> Iterator[Processes]:
    """The group that torchrun began, for the length of a block: gloo on CPUs, nccl on GPUs."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    if not distributed.is_available():
        raise UserError(f"WORLD_SIZE={world}", "a PyTorch with torch.distributed")
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes(distributed.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        distributed.destroy_process_group()
