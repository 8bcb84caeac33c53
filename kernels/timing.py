"""How long something takes: side by side, so that a machine's mood hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

FLUSH_BYTES = 256 << 20  # written between two measurements on CUDA, more than any level-2 cache holds


def compare(runs: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 20) -> dict[str, float]:
    """Seconds of each run: on CUDA medians between events with a cold level-2 cache; on CPUs the fastest fifth's upper
    bound of the processor's time, which other processes do not advance. All runs take turns inside a round.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # compile, allocate
        for _ in range(3):
            run()
    if device.type == "cuda":
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        for _ in range(rounds):
            for name, run in runs.items():
                flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                torch.cuda.synchronize(device)
                times[name].append(begin.elapsed_time(end) / 1e3)
        return {name: statistics.median(found) for name, found in times.items()}
    repeats = {name: max(1, int(0.01 / max(_processor_seconds(run, 1), 1e-6))) for name, run in runs.items()}
    for index in range(rounds):
        names = list(runs)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            times[name].append(_processor_seconds(runs[name], repeats[name]) / repeats[name])
    return {name: statistics.quantiles(found, n=5)[0] for name, found in times.items()}


def _processor_seconds(run: Callable[[], object], repeats: int) -> float:
    begin = time.process_time()
    for _ in range(repeats):
        run()
    return time.process_time() - begin
