"""How many random layers a second are made, checked, simplified and identified on one core.

    python -m benchmarks.speed.speed_layers [--count 20000] [--json]

`static`: sampling, the static checks and the simplification of what passes them. `identified`: the same with the
fingerprint of what passes. `fingerprints`: fingerprints alone, of graphs that pass. `normalizing`: samples of the
normalising space. All in one process with one thread; every figure is the median of five parts of the work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from search_spaces.layers.filters import numeric, static
from search_spaces.layers.identity import fingerprint
from search_spaces.layers.simplify import simplify
from search_spaces.layers.space import LayerSpace

PARTS = 5


def per_second(work: Callable[[int], object], count: int) -> float:
    """Median over parts of how many of `count` calls are done in a second."""
    rates = []
    for part in range(PARTS):
        begin = time.perf_counter()
        for index in range(part * count // PARTS, (part + 1) * count // PARTS):
            work(index)
        rates.append(count / PARTS / (time.perf_counter() - begin))
    return statistics.median(rates)


def figures(count: int) -> dict[str, float]:
    """Graphs a second, by sampling and by what is done to them."""
    found: dict[str, float] = {}
    for sampling in ("flat", "nested"):
        space, rng = LayerSpace(sampling=sampling), np.random.default_rng(0)

        def checked(index: int, space: LayerSpace = space, rng: np.random.Generator = rng):
            graph = space.sample(rng)
            return simplify(graph) if static(graph) is None else None

        def identified(index: int, checked: Callable[[int], object] = checked):
            graph = checked(index)
            return graph and fingerprint(graph)

        valid = [graph for graph in map(checked, range(count // 5)) if graph is not None]
        found[f"{sampling}, static (graphs a second)"] = per_second(checked, count)
        found[f"{sampling}, identified (graphs a second)"] = per_second(identified, count)
        found[f"{sampling}, fingerprints (of passing graphs, a second)"] = per_second(
            lambda i, valid=valid: fingerprint(valid[i % len(valid)]), count // 10
        )
        found[f"{sampling}, numeric checks (of passing graphs, a second)"] = per_second(
            lambda i, valid=valid: numeric(valid[i % len(valid)]), count // 50
        )
    space, rng = LayerSpace(sampling="normalizing"), np.random.default_rng(0)
    found["normalizing, samples (a second)"] = per_second(lambda i: space.sample(rng), count // 50)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = figures(arguments.count)
    if arguments.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:60s} {value:10.0f}")


if __name__ == "__main__":
    main()
