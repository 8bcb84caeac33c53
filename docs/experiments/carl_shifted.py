"""CARL on biased samples of NAS-Bench-201: against itself without interventions, with a random split, and others.

    python docs/experiments/carl_shifted.py --accuracies FILE --out runs/carl [--labels 78,156] [--seeds 10]

FILE is a Parquet file with the columns `arch` (official notation) and `cifar10_test_acc_200` (mean over seeds).

Every shift is a share of the space from which the labelled architectures are drawn; ranked is all of the space by the
mean CIFAR-10 test accuracy, from which the labels are too. Seed k means the same sample and the same random numbers
to every variant. Rows `all shifts` compare the means over the shifts but `iid`, seed by seed. Resumable: results
stand in OUT/results.json as they come. Prints Markdown tables: mean Kendall tau, and the difference from `carl` with
its 95 % interval and the p-value of a paired t-test.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from scipy.stats import t as student
from scipy.stats import ttest_rel

from predictors.graphs import GraphTable, as_table
from predictors.neural.predictor import NeuralPredictor
from predictors.registry import make_predictor
from search_spaces.common.files import atomic_write
from search_spaces.registry import load_space
from zero_cost.correlation import kendall_tau

COLUMN = "cifar10_test_acc_200"
DIRECT = 4  # the node of the operation on the edge from the cell's input to its output
INNER = 3  # and on the edge between the two inner tensors
COMMON: dict[str, Any] = {"width": 64, "epochs": 100, "batch": 20, "device": "cpu"}


def _without(operation: str) -> Callable[[GraphTable, np.ndarray], np.ndarray]:
    return lambda table, y: table.ops[:, DIRECT] != table.vocabulary.index(operation)


# name: which rows may be drawn
SHIFTS: dict[str, Callable[[GraphTable, np.ndarray], np.ndarray]] = {
    "iid": lambda table, y: np.ones(len(y), bool),
    "no-skip": _without("skip_connect"),
    "no-skip-at-all": lambda table, y: (table.ops != table.vocabulary.index("skip_connect")).all(1),
    "no-conv3x3": _without("nor_conv_3x3"),
    "bottom-half": lambda table, y: y < np.median(y),
    "good-pool": lambda table, y: (table.ops[:, INNER] != table.vocabulary.index("avg_pool_3x3")) | (y > np.median(y)),
}
# name: (predictor, settings)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "carl": ("carl", COMMON),
    "no interventions": ("carl", COMMON | {"interventions": 0}),
    "random split": ("carl", COMMON | {"split": "random"}),
    "GCN": ("two-direction", COMMON | {"encoder": "gcn"}),
    "two-direction": ("two-direction", COMMON),
    "gp-graf": ("gp-graf", {}),
}


def read(path: Path) -> tuple[GraphTable, np.ndarray]:
    """All graphs and their mean test accuracies, in the order of the file."""
    space = load_space("nas-bench-201")
    rows = pyarrow.parquet.read_table(path, columns=["arch", COLUMN])
    archs = [space.decode(text) for text in rows["arch"].to_pylist()]
    return as_table([space.graph(arch) for arch in archs], space.vocabulary), rows[COLUMN].to_numpy().astype(float)


def taus(variant: tuple[str, dict[str, Any]], table: GraphTable, y: np.ndarray, samples: list[np.ndarray]) -> list:
    """Kendall tau over the whole table of a predictor fitted to each sample, all seeds in one stack."""
    name, settings = variant
    empty = make_predictor(name, "nas-bench-201", table.vocabulary, **settings)
    rngs = [np.random.default_rng((1, seed)) for seed in range(len(samples))]
    if isinstance(empty, NeuralPredictor):
        fitted: Any = empty.fit_many([(table.take(rows), y[rows], None, None) for rows in samples], rngs)
    else:
        fitted = (
            make_predictor(name, "nas-bench-201", table.vocabulary, **settings).fit(table.take(rows), y[rows], rng=rng)
            for rows, rng in zip(samples, rngs, strict=True)
        )
    return [float(kendall_tau(predictor.predict(table), y)) for predictor in fitted]


def compare(shift: str, labels: int, found: dict[str, list[float]]) -> list[str]:
    """Rows of a Markdown table: each variant's mean, and how far `carl` is above it on the same seeds."""
    rows = []
    own = np.array(found["carl"])
    for name, values in found.items():
        cells = [shift, str(labels), name, f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"]
        if name != "carl":
            above = own - np.array(values)
            half = student.ppf(0.975, len(above) - 1) * above.std(ddof=1) / len(above) ** 0.5
            p = ttest_rel(own, values).pvalue
            cells += [f"{above.mean():+.3f} ± {half:.3f}", f"{(above > 0).sum()} of {len(above)}", f"{p:.3g}"]
        else:
            cells += ["", "", ""]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accuracies", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--labels", default="78,156")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--shifts", default=",".join(SHIFTS))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--stream", type=int, default=0, help="Another number draws other samples.")
    parser.add_argument("--set", action="append", default=[], help="NAME=JSON setting of a variant `carl+NAME=JSON`.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    table, y = read(given.accuracies)
    variants = {name: VARIANTS[name] for name in given.variants.split(",")}
    for item in given.set:
        settings = {k: json.loads(v) for k, _, v in (part.partition("=") for part in item.split(","))}
        variants[f"carl+{item}"] = ("carl", COMMON | settings)
    path = given.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    shifted: dict[int, list[dict[str, list[float]]]] = {}
    lines = ["| drawn from | labels | variant | tau | carl above it | seeds | p |", "|---|---|---|---|---|---|---|"]
    for shift in given.shifts.split(","):
        allowed = np.flatnonzero(SHIFTS[shift](table, y))
        for labels in map(int, given.labels.split(",")):
            rngs = [np.random.default_rng((given.stream, seed)) for seed in range(given.seeds)]
            samples = [rng.choice(allowed, labels, replace=False) for rng in rngs]
            case = f"{shift}/{labels}/{given.stream}/{given.seeds}"
            keys = {name: f"{case}/{json.dumps(variant)}" for name, variant in variants.items()}
            for name, variant in variants.items():
                key = keys[name]
                if key not in results:
                    results[key] = taus(variant, table, y, samples)
                    with atomic_write(path) as file:
                        json.dump(results, file, indent=1)
            found = {name: results[key] for name, key in keys.items()}
            if shift != "iid":
                shifted.setdefault(labels, []).append(found)
            lines += compare(shift, labels, found)
            print("\n".join(lines[-len(keys) :]), flush=True)
    for labels, several in shifted.items():
        means = {name: np.mean([found[name] for found in several], 0).tolist() for name in variants}
        lines += compare("all shifts", labels, means)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
