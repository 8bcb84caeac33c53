"""Evolution over the PANGAEA set on CIFAR-10, and the found function beside ReLU, GELU and SiLU; resumable.

    python docs/experiments/activation_search.py --data-root FOLDER --out runs/activation-search [--budget 90]

FOLDER holds CIFAR-10's train.parquet and test.parquet. The anchor keeps its batch normalisation, only the function
behind it is searched. After the search the best of the run are trained longer with new seeds, the first of them goes on
to the finals: five seeds in the anchor of the search and in one that the search did not see, every function at its own
best of two learning rates by mean validation accuracy, test accuracies reported. Writes OUT/record.json,
OUT/finals.json and OUT/found.svg; trainings that are done stand in OUT/run and OUT/finals.sqlite.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nas.layers.activation_search import ActivationEvaluator, FilteredActivations
from nas.layers.cache import cached_result
from nas.layers.search import funnel_counts, search_layers
from nas.training.loop import evaluate_split, train
from nas.training.recipe import Recipe
from search_spaces.layers.activation_space import activation
from search_spaces.layers.evaluate import evaluate
from search_spaces.layers.formula import format_formula
from search_spaces.layers.graph import LayerGraph
from search_spaces.layers.identity import fingerprint
from search_spaces.layers.simplify import simplify

BASELINES = ("elu", "relu", "selu", "sigmoid", "softplus", "softsign", "silu", "tanh")
SETTINGS = {"population": 24, "tournament": 6}
OBJECTIVE = "resnet_train_loss"  # ranks short trainings better than their accuracy
KNOWN = ("relu", "gelu", "silu")
CONTROL = "relu(x + x + x)"  # ReLU as steep as what was found: is it the shape or the scale?
ANCHORS = ("resnet", "vgg")  # the search's, and one that it did not see
RATES = (0.1, 0.2)
INTERVAL = 2.776  # Student's t, 4 degrees of freedom, two-sided 95 %


def measure(graph: LayerGraph, anchor: str, rate: float, seed: int, given: argparse.Namespace) -> dict:
    """Validation and test accuracy of one training; zero if it broke down."""
    recipe = Recipe(steps=given.final_steps, learning_rate=rate)
    evaluator = ActivationEvaluator("cifar10", given.data_root, 16, (anchor,), recipe=recipe, train_seed=seed)

    def compute() -> dict:
        data = evaluator.dataset()
        network = evaluator.network(graph, anchor)
        found = train(network, data, recipe, seed=seed)
        if found.failed:
            return {"val_acc": 0.0, "test_acc": 0.0}
        test = evaluate_split(network, data, data.test, recipe)["acc"]
        return {"val_acc": found.metrics["val_acc"], "test_acc": test}

    settings = {"anchor": anchor, "rate": rate, "seed": seed, "steps": given.final_steps}
    return cached_result(given.out / "finals.sqlite", "finals", graph.stable_hash(), settings, compute)


def run_search(given: argparse.Namespace) -> list[LayerGraph]:
    """The six best functions of the run, which is written to OUT/record.json."""
    recipe = Recipe(steps=given.steps)
    evaluator = ActivationEvaluator("cifar10", given.data_root, 16, ("resnet",), recipe=recipe)
    space = FilteredActivations("pangaea", first=BASELINES)
    result = search_layers(
        space, evaluator, budget=given.budget, objectives=OBJECTIVE, seed=0, out=given.out / "run",
        strategy_settings=SETTINGS,
    )  # fmt: skip
    trained: list[dict[str, Any]] = [
        {"function": space.readable(space.decode(r.arch)), "arch": r.arch, **(r.metrics or {})}
        for r in result.records
        if r.status == "done"
    ]
    trained.sort(key=lambda t: t[OBJECTIVE])
    rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in t.items() if k != "arch"} for t in trained]
    record = {"recipe": asdict(recipe), "strategy": SETTINGS, "objective": OBJECTIVE, "funnel": funnel_counts(result)}
    (given.out / "record.json").write_text(json.dumps({**record, "trained": rows}, indent=0))
    candidates: dict[str, LayerGraph] = {}
    for t in trained:
        graph = space.decode(t["arch"])
        candidates.setdefault(fingerprint(graph, refit=True), graph)
    return list(candidates.values())[:6]


def rerank(candidates: list[LayerGraph], given: argparse.Namespace) -> list[dict]:
    """The candidates after longer training in the anchor of the search, two new seeds each, best first."""
    rows = []
    for graph in candidates:
        scores = [measure(graph, ANCHORS[0], 0.1, seed, given)["val_acc"] for seed in (100, 101)]
        rows.append({"graph": graph, "function": format_formula(simplify(graph)), "val_acc": statistics.mean(scores)})
        print(f"rerank {rows[-1]['val_acc']:.2f}  {rows[-1]['function']}", flush=True)
    return sorted(rows, key=lambda row: -row["val_acc"])


def finals(functions: dict[str, LayerGraph], given: argparse.Namespace) -> list[dict]:
    """Test accuracies of every function in both anchors, at its own best rate."""
    rows = []
    for anchor in ANCHORS:
        for name, graph in functions.items():
            by_rate = {r: [measure(graph, anchor, r, s, given) for s in range(given.seeds)] for r in RATES}
            rate = max(RATES, key=lambda r: statistics.mean(m["val_acc"] for m in by_rate[r]))
            test = [m["test_acc"] for m in by_rate[rate]]
            rows.append(
                {"function": name, "anchor": anchor, "learning_rate": rate, "test_accs": [round(t, 2) for t in test]}
            )
            half = INTERVAL * statistics.stdev(test) / len(test) ** 0.5
            rows[-1] |= {"test_acc": statistics.mean(test), "interval": half}
            print(f"{anchor:8s} {name:40s} rate {rate:g}  test {rows[-1]['test_acc']:.2f} ± {half:.2f}", flush=True)
    return rows


def paired(rows: list[dict], found: str) -> list[dict]:
    """Differences of the found function to each known one, paired by seed, with a 95 % interval."""
    differences = []
    for anchor in ANCHORS:
        by_name = {row["function"]: row["test_accs"] for row in rows if row["anchor"] == anchor}
        for name in (*KNOWN, CONTROL):
            gaps = [a - b for a, b in zip(by_name[found], by_name[name], strict=True)]
            half = INTERVAL * statistics.stdev(gaps) / len(gaps) ** 0.5
            differences.append({"anchor": anchor, "against": name, "mean": statistics.mean(gaps), "interval": half})
            print(f"{anchor:8s} found - {name:5s} {statistics.mean(gaps):+.2f} ± {half:.2f}")
    return differences


def draw(found: LayerGraph, path: Path) -> None:
    """The found function and its derivative over ReLU, GELU and SiLU, with initial parameters."""
    from matplotlib.figure import Figure

    x = torch.linspace(-5, 5, 1001, dtype=torch.float64).view(-1, 1).requires_grad_()
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = {"found": found, **{name: activation(name) for name in KNOWN}}
    for (name, graph), color in zip(shown.items(), ("#0b6e99", "#b0b7bd", "#d1600a", "#6a9a3d"), strict=True):
        value = evaluate(graph, x)
        slope = torch.autograd.grad(value.sum(), x)[0]
        style = {"color": color, "linewidth": 2.2 if name == "found" else 1.2, "zorder": 3 if name == "found" else 2}
        left.plot(x.detach().numpy(), value.detach().numpy(), label=name, **style)
        right.plot(x.detach().numpy(), slope.numpy(), **style)
    for axes, title in ((left, "f(x)"), (right, "f'(x)")):
        axes.set_title(title, fontsize=10)
        axes.grid(color="#e5e8eb", linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    left.set_ylim(-3, 5)
    left.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Search, rerank, finals, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=int, default=90, help="functions that reach training")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--final-steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    given.out.mkdir(parents=True, exist_ok=True)
    ranked = rerank(run_search(given), given)
    found = ranked[0]
    draw(found["graph"], given.out / "found.svg")
    functions = {"found": found["graph"], **{name: activation(name) for name in (*KNOWN, CONTROL)}}
    rows = finals(functions, given)
    about = {"steps": given.final_steps, "found": found["function"], "graph": found["graph"].to_json()}
    about |= {"reranked": [{k: row[k] for k in ("function", "val_acc")} for row in ranked]}
    about |= {"rows": rows, "differences": paired(rows, "found")}
    (given.out / "finals.json").write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
