"""Evolution against the same funnel without evolution, on CIFAR-10 with small anchors; resumable, two runs at a time.

    python docs/experiments/layer_search.py --data-root FOLDER --out runs/layer-search [--seeds 5] [--steps 100]

FOLDER holds CIFAR-10's train.parquet and test.parquet. Both arms draw normalising layers of ten nodes from the 24
primitives, refuse the same candidates for the same reasons, and spend the same number of training steps. Measurements
are shared through $NASFORGE_HOME/cache/layers.sqlite. Writes OUT/record.json (settings, every trained layer with its
accuracy and the clock, rejections) and OUT/curves.svg; prints the paired difference of the mean of each run's top five.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from nas.budget import Budget
from nas.layers.evaluator import LayerEvaluator
from nas.layers.funnel import FilteredLayers
from nas.loop import search
from nas.training.recipe import Recipe
from search_spaces.layers.formula import format_formula
from search_spaces.layers.simplify import simplify

ARMS = {
    "evolution": ("regularized-evolution", {"population": 16, "tournament": 5, "winner": "pareto"}),
    "random": ("random-search", {}),
}
OBJECTIVES = "val_acc,resnet_val_acc,mobilenetv2_val_acc"
ANCHORS = ("resnet", "mobilenetv2")
TIMES_CHANCE = 1.5  # twice chance after 100 steps rejects FRN and ReLU on mobilenetv2


def run(arm: str, seed: int, root: str, steps: int, layers: int, out: Path) -> dict:
    """One arm with one seed: what it found after how many training steps."""
    import torch

    torch.set_num_threads(1)
    strategy, settings = ARMS[arm]
    recipe = Recipe(steps=steps)
    # Without the signal test: stability and quality decide.
    evaluator = LayerEvaluator("cifar10", root, 16, ANCHORS, recipe=recipe, times_chance=TIMES_CHANCE, signal=False)
    space = FilteredLayers(sampling="normalizing", group_size=4, immigrants=0.1, mutations=("replace", "rewire"))
    budget = Budget(simulated_seconds=float(layers * steps * len(ANCHORS)))
    result = search(
        space,
        evaluator,
        strategy,
        budget=budget,
        objectives=OBJECTIVES,
        seed=seed,
        out=out / f"{arm}-{seed}",
        strategy_settings=settings,
    )
    clock, trained = 0.0, []
    for record in result.records:
        clock += (record.metrics or {}).get("cost_seconds", 0.0)
        if record.status == "done":
            formula = format_formula(simplify(space.decode(record.arch)))
            trained.append({"steps": clock, "val_acc": record.metrics["val_acc"], "layer": formula})
    reasons: dict[str, int] = {}
    for record in result.records:
        if record.status == "failed":
            reasons[record.error] = reasons.get(record.error, 0) + 1
    return {"arm": arm, "seed": seed, "trained": trained, "failed": reasons, "drawn": dict(space.counts)}


def main() -> None:
    """All arms and seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--layers", type=int, default=100, help="budget: full trainings that the steps would pay for")
    given = parser.parse_args()
    tasks = [(arm, seed) for seed in range(given.seeds) for arm in ARMS]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        rest = (given.data_root, given.steps, given.layers, given.out)
        runs = list(pool.map(run, *zip(*((arm, seed, *rest) for arm, seed in tasks), strict=True)))
    record = {"objectives": OBJECTIVES, "arms": ARMS, "recipe": asdict(Recipe(steps=given.steps)), "runs": runs}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "record.json").write_text(json.dumps(record))
    summarise(runs)
    draw(runs, given.out / "curves.svg", given.layers * given.steps * len(ANCHORS))


def top_five(found: dict) -> float:
    """The mean accuracy of a run's five best layers."""
    return statistics.mean(sorted((t["val_acc"] for t in found["trained"]), reverse=True)[:5])


def summarise(runs: list[dict]) -> None:
    """Print each run and the paired comparison of the arms."""
    from scipy.stats import ttest_rel

    for found in runs:
        refused = ", ".join(f"{reason} {n}" for reason, n in found["failed"].items())
        best = max(found["trained"], key=lambda t: t["val_acc"])
        print(f"{found['arm']:10s} {found['seed']}  trained {len(found['trained']):3d}  top five {top_five(found):.3f}"
              f"  best {best['val_acc']:.2f}  {best['layer']}  ({refused})")  # fmt: skip
    scores = {arm: [top_five(r) for r in runs if r["arm"] == arm] for arm in ARMS}
    differences = [e - r for e, r in zip(scores["evolution"], scores["random"], strict=True)]
    if len(differences) > 1:
        error = statistics.stdev(differences) / len(differences) ** 0.5
        p = ttest_rel(scores["evolution"], scores["random"], alternative="greater").pvalue
        mean = statistics.mean(differences)
        print(f"evolution - random: {mean:.3f} +- {error:.3f}, one-sided paired t test p = {p:.4f}")


def draw(runs: list[dict], path: Path, budget: int) -> None:
    """Best-so-far accuracy over training steps: mean of the runs and its standard error."""
    import numpy as np
    from matplotlib.figure import Figure

    grid = np.linspace(0, budget, 400)[1:]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for arm, color in zip(ARMS, ("#0b6e99", "#d1600a"), strict=True):
        curves = []
        for found in (r for r in runs if r["arm"] == arm):
            steps = np.array([t["steps"] for t in found["trained"]])
            best = np.maximum.accumulate([t["val_acc"] for t in found["trained"]])
            at = np.searchsorted(steps, grid, side="right")
            curves.append(np.where(at > 0, best[np.maximum(at, 1) - 1], np.nan))
        stacked = np.array(curves)
        mean, error = stacked.mean(axis=0), stacked.std(axis=0, ddof=1) / len(stacked) ** 0.5
        axes.plot(grid, mean, color=color, label=f"{arm}, {len(stacked)} seeds")
        axes.fill_between(grid, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
    axes.set_xlabel("training steps spent")
    axes.set_ylabel("best validation accuracy so far (%)")
    axes.legend(frameon=False, loc="lower right")
    axes.grid(color="#e5e8eb", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
