"""Evolution against the same funnel without evolution, on CIFAR-10 with small anchors; resumable, two runs at a time.

    python docs/experiments/layer_search.py --data-root FOLDER --out runs/layer-search [--seeds 5] [--steps 100]

FOLDER holds CIFAR-10's train.parquet and test.parquet. Both arms draw normalising layers of ten nodes from the 24
primitives, refuse the same candidates for the same reasons, and spend the same number of training steps. Measurements
are shared through $NASFORGE_HOME/cache/layers.sqlite. Writes OUT/record.json: settings, best-so-far curves, top fives.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from nas.budget import Budget
from nas.layers.evaluator import LayerEvaluator
from nas.layers.funnel import FilteredLayers
from nas.loop import search
from nas.training.recipe import Recipe

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
            trained.append({"steps": clock, "val_acc": record.metrics["val_acc"], "layer": record.arch})
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
    for found in runs:
        top = sorted((t["val_acc"] for t in found["trained"]), reverse=True)[:5]
        print(found["arm"], found["seed"], len(found["trained"]), "trained, top five", [round(v, 2) for v in top])


if __name__ == "__main__":
    main()
