"""The best layer of `layer_search.py` beside known layers, in anchors that the search did not use.

    python docs/experiments/layer_finals.py --data-root FOLDER --out runs/layer-search [--seeds 5] [--steps 300]

First the ten best layers of all runs, one per function up to weight and bias, are trained for as long in the search's
own anchors, and the best of them goes on (or the one given as a formula). Every layer gets its own best of three
learning rates, by mean validation accuracy; reported are test accuracies at that rate. Writes OUT/finals.json;
trainings that are done stand in OUT/finals.sqlite.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from nas.layers.cache import cached_result
from nas.layers.evaluator import LayerEvaluator
from nas.training.recipe import Recipe
from search_spaces.layers.catalog import layer
from search_spaces.layers.formula import format_formula, parse_formula
from search_spaces.layers.graph import LayerGraph
from search_spaces.layers.identity import fingerprint

KNOWN = ("bn-relu", "gn-silu", "evonorm-b0", "evonorm-s0")
SEARCHED = ("resnet", "mobilenetv2")
ANCHORS = ("efficientnet", "vgg")
RATES = (0.05, 0.1, 0.2)


def measure(graph: LayerGraph, anchor: str, rate: float, seed: int, root: str, steps: int, out: Path) -> dict:
    """Validation and test accuracy of one training; NaN if it broke down."""
    import torch

    from nas.training.loop import evaluate_split, train

    torch.set_num_threads(1)
    recipe = Recipe(steps=steps, learning_rate=rate)
    evaluator = LayerEvaluator("cifar10", root, 16, (anchor,), recipe=recipe, train_seed=seed)

    def compute() -> dict:
        data = evaluator.dataset()
        network = evaluator.network(graph, anchor)
        found = train(network, data, recipe, seed=seed)
        if found.failed:
            return {"val_acc": 0.0, "test_acc": 0.0}
        return {
            "val_acc": found.metrics["val_acc"],
            "test_acc": evaluate_split(network, data, data.test, recipe)["acc"],
        }

    settings = {"anchor": anchor, "rate": rate, "seed": seed, "steps": steps}
    return cached_result(out / "finals.sqlite", "finals", graph.stable_hash(), settings, compute)


def rerank(given: argparse.Namespace) -> LayerGraph:
    """The layer of the ten best that does best in the search's anchors after longer training, two seeds each."""
    runs = json.loads((given.out / "record.json").read_text())["runs"]
    candidates: dict[str, LayerGraph] = {}
    for trained in sorted((t for run in runs for t in run["trained"]), key=lambda t: -t["val_acc"]):
        graph = parse_formula(trained["layer"], group_size=4)
        candidates.setdefault(fingerprint(graph, refit=True), graph)
    chosen = list(candidates.values())[:10]
    tasks = [(g, a, 0.1, seed) for g in chosen for a in SEARCHED for seed in (100, 101)]
    arguments = [(*task, given.data_root, given.steps, given.out) for task in tasks]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = list(pool.map(measure, *zip(*arguments, strict=True)))
    per_layer = len(SEARCHED) * 2
    means = [statistics.mean(f["val_acc"] for f in found[i : i + per_layer]) for i in range(0, len(found), per_layer)]
    for graph, mean in sorted(zip(chosen, means, strict=True), key=lambda pair: -pair[1]):
        print(f"rerank, {given.steps} steps: {mean:.2f}  {format_formula(graph)}")
    return chosen[means.index(max(means))]


def main() -> None:
    """All layers, anchors, rates and seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--formula", help="the layer, instead of the best in OUT/record.json")
    given = parser.parse_args()
    layers = {name: replace(layer(name), group_size=4) for name in KNOWN}
    if given.formula:
        found = parse_formula(given.formula, group_size=4)
    else:
        found = rerank(given)
    layers[format_formula(found)] = found
    tasks = [(n, a, r, s) for n in layers for a in ANCHORS for r in RATES for s in range(given.seeds)]
    arguments = [(layers[n], a, r, s, given.data_root, given.steps, given.out) for n, a, r, s in tasks]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        measured = dict(zip(tasks, pool.map(measure, *zip(*arguments, strict=True)), strict=True))
    rows = []
    for name in layers:
        for anchor in ANCHORS:

            def values(rate: float, which: str, name: str = name, anchor: str = anchor) -> list[float]:
                return [measured[name, anchor, rate, s][which] for s in range(given.seeds)]

            rate = max(RATES, key=lambda r: statistics.mean(values(r, "val_acc")))
            test = values(rate, "test_acc")
            error = statistics.stdev(test) / len(test) ** 0.5 if len(test) > 1 else None
            rows.append({"layer": name, "anchor": anchor, "learning_rate": rate, "test_acc": statistics.mean(test)})
            rows[-1] |= {"standard_error": error, "seeds": given.seeds}
            print(f"{name:60s} {anchor:14s} rate {rate:g}  test {rows[-1]['test_acc']:.2f} ± {error or 0:.2f}")
    (given.out / "finals.json").write_text(json.dumps({"steps": given.steps, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
