"""The loop's own cost per trial, without and with persistence, and the time of a large comparison.

    python -m benchmarks.speed.speed_loop [--json]

The evaluator is a dictionary look-up, so that what remains is the loop, the strategy and the space. The comparison is
200 seeds x 150 queries x 3 strategies on NAS-Bench-201, all cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from nas.comparison import compare
from nas.evaluators import FunctionEvaluator, TableEvaluator
from nas.loop import search

QUERIES = 1000
REPEATS = 5


def constant(arch, fidelity, seed):
    """An evaluation that costs next to nothing."""
    return {"val_acc": float(sum(arch))}


def milliseconds_per_trial(evaluator, strategy: str, persist: bool) -> float:
    """Median over repeats of the time of a whole search, by its trials."""
    space = TableEvaluator("nas-bench-201/cifar10").table.space
    times = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run" if persist else None
            begin = time.perf_counter()
            result = search(space, evaluator, strategy, budget=QUERIES, objectives="val_acc", out=out)
            times.append((time.perf_counter() - begin) * 1e3 / len(result.records))
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    table = TableEvaluator("nas-bench-201/cifar10", ("val_acc",))
    figures: dict[str, float] = {}
    for strategy in ("random-search", "regularized-evolution", "local-search"):
        for persist in (False, True):
            name = f"{strategy}, {'with' if persist else 'without'} persistence (ms per trial)"
            figures[name] = milliseconds_per_trial(FunctionEvaluator(constant), strategy, persist)
    figures["regularized-evolution on the table, without persistence (ms per trial)"] = milliseconds_per_trial(
        table, "regularized-evolution", False
    )
    begin = time.perf_counter()
    compare(
        "nas-bench-201/cifar100", ["random-search", "local-search", "regularized-evolution"], queries=150, seeds=200
    )
    figures["compare, 200 seeds x 150 queries x 3 strategies (s)"] = time.perf_counter() - begin
    if arguments.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:75s} {value:8.3f}")


if __name__ == "__main__":
    main()
