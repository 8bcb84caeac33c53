"""Explanations of NAS-Bench-201 cells by CARL and a Gaussian process: deletion tests, and against the true fall.

    python docs/experiments/carl_explanations.py --accuracies FILE --out runs/explained [--labels 78] [--seeds 5]

FILE: see `carl_shifted.py`. Each seed draws the labelled cells from all of the space, the same for each predictor, and
among the others the cells that are explained, with three operations or more.

Deletion: how far the prediction moves without the k operations that an explanation calls most important, against k
random ones, in standard deviations of the predictions of all cells. The truth: how far the mean CIFAR-10 test accuracy
falls when the operation is set to none. Agreement: Kendall tau-b within a cell between importance and that fall, mean
over cells; the fall without the operation that is named first, in percentage points; how often that is the one
with the largest fall. Beside the predictors stand the truth itself, chance, and a fixed order of the operations.
Prints Markdown tables: mean and standard deviation over seeds.

`--save DIR` writes the first seed's CARL predictor there, for `nas predict explain`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from carl_shifted import COMMON, read

from predictors.explain import deletion_test, explain_many, masked, removable
from predictors.graphs import GraphTable
from predictors.registry import make_predictor
from search_spaces.common.files import atomic_write
from search_spaces.graph import OpGraph
from zero_cost.correlation import kendall_tau

FITTED: dict[str, dict[str, Any]] = {"carl": COMMON, "gp-graf": {}}
EXPLAINED = (("carl", "critical"), ("carl", "ablation"), ("gp-graf", "ablation"))
ORDER = ("avg_pool_3x3", "skip_connect", "nor_conv_1x1", "nor_conv_3x3")  # the fixed one, least important first


def true_falls(graphs: Sequence[OpGraph], vocabulary: Sequence[str], value: dict[OpGraph, float]) -> list[np.ndarray]:
    """For each graph, by operation that can be removed: the accuracy less that without it."""
    return [
        np.array([value[graph] - value[masked(graph, vocabulary, [i])[0]] for i in removable(graph)])
        for graph in graphs
    ]


def agreement(importance: Sequence[np.ndarray], falls: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean tau-b within cells (those where one of the two is constant tell nothing), and what is named first."""
    varied = [(a, b) for a, b in zip(importance, falls, strict=True) if np.ptp(a) > 0 and np.ptp(b) > 0]
    first = [int(np.argmax(a)) for a in importance]
    return {
        "tau": float(np.mean([kendall_tau(a, b) for a, b in varied])),
        "first_fall": float(np.mean([b[k] for k, b in zip(first, falls, strict=True)])),
        "first_right": float(np.mean([b[k] == b.max() for k, b in zip(first, falls, strict=True)])),
    }


def one_seed(table: GraphTable, y: np.ndarray, seed: int, labels: int, cells: int, save: Path | None) -> dict:
    """{row of a table: {statistic: value}}"""
    rng = np.random.default_rng((2, seed))
    order = rng.permutation(len(table))
    sample = order[:labels]
    graphs = [g for g in table.take(order[labels : labels + 3 * cells]) if len(removable(g)) >= 3][:cells]
    value = dict(zip(table, y.tolist(), strict=True))
    falls = true_falls(graphs, table.vocabulary, value)
    found = {
        "truth": agreement(falls, falls),
        "chance": agreement([rng.random(len(f)) for f in falls], falls)
        | {"first_right": float(np.mean([(f == f.max()).mean() for f in falls]))},
        "fixed order": agreement(
            [
                np.array([ORDER.index(g.ops[i]) for i in removable(g)]) + 1e-6 * rng.random(len(removable(g)))
                for g in graphs
            ],
            falls,
        ),
    }
    for name, settings in FITTED.items():
        predictor = make_predictor(name, "nas-bench-201", table.vocabulary, **settings)
        predictor.fit(table.take(sample), y[sample], rng=np.random.default_rng((3, seed)))
        if name == "carl" and save is not None:
            predictor.save(save)
        predictions = predictor.predict(table)
        spread = float(predictions.std())
        for method in (method for known, method in EXPLAINED if known == name):
            explained = explain_many(predictor, graphs, method)
            importance = [e.nodes[removable(g)] for e, g in zip(explained, graphs, strict=True)]
            result = agreement(importance, falls) | {"ranking": float(kendall_tau(predictions, y))}
            for k in (1, 2):
                test = deletion_test(predictor, graphs, k, np.random.default_rng((4, seed)), method=method)
                result[f"top{k}"] = float(test.top.mean() / spread)
                result[f"random{k}"] = float(test.random.mean() / spread)
                result[f"above{k}"] = float((test.top > test.random).mean())
            found[f"{name}, {method}"] = result
    return found


def rows(found: dict[str, dict[str, dict[str, float]]], columns: dict[str, str]) -> list[str]:
    """A Markdown table of mean and standard deviation over seeds."""
    lines = ["| importance | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    names = list(next(iter(found.values())))
    for name in names:
        cells = []
        for key in columns:
            values = [result[name][key] for result in found.values() if key in result[name]]
            cells.append(f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if values else "")
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accuracies", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--labels", type=int, default=78)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    table, y = read(given.accuracies)
    found = {}
    for seed in range(given.seeds):
        found[str(seed)] = one_seed(table, y, seed, given.labels, given.cells, given.save if seed == 0 else None)
        with atomic_write(given.out / f"explained-{given.labels}.json") as file:
            json.dump(found, file, indent=1)
    agree = {
        "tau": "tau with the true fall",
        "first_fall": "true fall without the first",
        "first_right": "first is the largest fall",
        "ranking": "tau of the predictions",
    }
    print("\n".join(rows(found, agree)))
    for k in (1, 2):
        columns = {
            f"top{k}": f"moved by the top {k}",
            f"random{k}": f"by {k} random",
            f"above{k}": "cells top > random",
        }
        print(
            "\n" + "\n".join(rows({s: {n: r for n, r in f.items() if "top1" in r} for s, f in found.items()}, columns))
        )


if __name__ == "__main__":
    main()
