"""Pre-training against none: the same encoder, the same labelled graphs, the same seeds, on NAS-Bench-101.

    python docs/experiments/cap_against_scratch.py --out runs/cap [--labels 100,172,424] [--seeds 10]

The table `nas-bench-101/cifar10` must be there (`nas bench list`). Labels and targets are its mean test accuracies;
ranked are 20,000 graphs drawn once. Every pre-trained variant is compared with its own encoder from scratch. Resumable:
results stand in OUT/results.json as they come. Prints Markdown tables with the 95 % interval of the difference and the
p-value of a paired t-test.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from scipy.stats import ttest_rel

from benchmarks.registry import open_table
from nas.prediction.tables import graphs_of, labels_and_targets
from predictors.neural.predictor import NeuralPredictor
from predictors.registry import make_predictor
from search_spaces.common.files import atomic_write
from zero_cost.correlation import kendall_tau

RANKED = 20_000
SCRATCH: dict[str, Any] = {"least_batch": 50}
CONTEXT: dict[str, Any] = SCRATCH | {"pretraining": "context", "pretrain_steps": 2000, "pretrain_batch": 512}
# encoder from scratch, then what is compared with it: {name: (predictor, settings)}
FAMILIES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "GIN": {
        "from scratch": ("gin", SCRATCH),
        "CAP, scaled score, all weights": ("cap", CONTEXT),
        "CAP, scaled score, first block kept": ("cap", CONTEXT | {"mode": "partial"}),
        "CAP, score and dropout as released, all weights": ("cap", CONTEXT | {"score": "released"}),
    },
    "two-direction": {
        "from scratch": ("two-direction", SCRATCH),
        "CAP, scaled score, all weights": ("two-direction", CONTEXT | {"mode": "full"}),
        "CAP, scaled score, first block kept": ("two-direction", CONTEXT | {"mode": "partial"}),
        "path features distilled, first block kept": ("feature-distilled", {}),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--labels", default="100,172,424")
    parser.add_argument("--seeds", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = open_table("nas-bench-101/cifar10")
    known = labels_and_targets(table, "test-mean", "test-mean")
    graphs, y = graphs_of(table).take(known.rows), known.targets
    ranked = np.sort(np.random.default_rng(2024).permutation(len(y))[:RANKED])
    test, truth = graphs.take(ranked), y[ranked]
    path = given.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for labels in map(int, given.labels.split(",")):
        samples = [np.random.default_rng(seed).permutation(len(y))[:labels] for seed in range(given.seeds)]
        for family, variants in FAMILIES.items():
            for name, (kind, settings) in variants.items():
                key = f"{labels}/{given.seeds}/{family}/{kind}/{json.dumps(settings)}"
                if key not in results:
                    empty = make_predictor(kind, "nas-bench-101", graphs.vocabulary, **settings)
                    assert isinstance(empty, NeuralPredictor)
                    problems = [(graphs.take(rows), y[rows], None, graphs) for rows in samples]
                    rngs = [np.random.default_rng((1, seed)) for seed in range(given.seeds)]
                    fitted = empty.fit_many(problems, rngs)
                    results[key] = [float(kendall_tau(predictor.predict(test), truth)) for predictor in fitted]
                    with atomic_write(path) as file:
                        json.dump(results, file, indent=1)
                values = np.array(results[key])
                cells = [str(labels), family, name, f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"]
                if name == "from scratch":
                    scratch, gain = values, ["", "", ""]
                else:
                    above = values - scratch
                    half = student.ppf(0.975, len(above) - 1) * above.std(ddof=1) / len(above) ** 0.5
                    p = ttest_rel(values, scratch).pvalue
                    gain = [f"{above.mean():+.3f} ± {half:.3f}", f"{(above > 0).sum()} of {len(above)}", f"{p:.2g}"]
                print("| " + " | ".join([*cells, *gain]) + " |", flush=True)


if __name__ == "__main__":
    main()
