"""Time of `import nas` against `import torch`, each in fresh processes, taken in turns.

python -m benchmarks.speed.speed_imports [--repeats 7] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

STATEMENTS = ("import nas", "import search_spaces", "import torch")
PROGRAM = "import time; begin = time.perf_counter(); {}; print(time.perf_counter() - begin)"


def seconds(statement: str) -> float:
    """Of one statement in a new interpreter, without the interpreter's own start."""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(statement)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="processes per statement (7), after one to warm up")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    for turn in range(arguments.repeats + 1):
        for statement in STATEMENTS:
            taken = seconds(statement)
            if turn:  # the first turn warms the file cache
                times[statement].append(taken)
    medians = {statement: 1000 * statistics.median(values) for statement, values in times.items()}
    figures = {f"{statement} (ms)": median for statement, median in medians.items()}
    figures |= {f"import torch / {s}": medians["import torch"] / medians[s] for s in STATEMENTS if s != "import torch"}
    if arguments.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:40} {value:10.2f}")


if __name__ == "__main__":
    main()
