"""compare_layers: layers side by side in the same anchors, trained alike over several seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from nas.layers.cost import activation_bytes, step_milliseconds
from nas.layers.evaluator import LayerEvaluator
from nas.training.loop import train
from search_spaces.layers.graph import LayerGraph


@dataclass(frozen=True)
class LayerScore:
    """A layer in an anchor. val_acc: mean over seeds in percent, NaN if every training broke down; standard_error:
    None for one seed. broke_down: seeds whose loss was not finite, left out of the mean. latency_ms: a training step
    of one batch. activation_bytes: kept for its backward pass."""

    name: str
    anchor: str
    val_acc: float
    standard_error: float | None
    broke_down: int
    latency_ms: float
    activation_bytes: int

    def as_json(self) -> dict[str, object]:
        """The fields as a dictionary."""
        return asdict(self)


def compare_layers(
    layers: Mapping[str, LayerGraph],
    evaluator: LayerEvaluator,
    *,
    seeds: int = 5,
    progress: Callable[[int, int | None], None] | None = None,
) -> list[LayerScore]:
    """Train every layer in every anchor of `evaluator`, seeds from its `train_seed` on; no filters, no early end."""
    data = evaluator.dataset()
    batch = evaluator.recipe.batch_size
    images, labels = data.normalize(data.train.images[:batch]), data.train.labels[:batch]
    scores = []
    done, total = 0, len(layers) * len(evaluator.anchors) * seeds
    for name, graph in layers.items():
        for anchor in evaluator.anchors:
            accuracies = []
            for seed in range(evaluator.train_seed, evaluator.train_seed + seeds):
                found = train(evaluator.network(graph, anchor, seed=seed), data, evaluator.recipe, seed=seed)
                if not found.failed:
                    accuracies.append(found.metrics["val_acc"])
                done += 1
                if progress is not None:
                    progress(done, total)
            network = evaluator.network(graph, anchor)
            scores.append(
                LayerScore(
                    name,
                    anchor,
                    statistics.mean(accuracies) if accuracies else float("nan"),
                    statistics.stdev(accuracies) / len(accuracies) ** 0.5 if len(accuracies) > 1 else None,
                    seeds - len(accuracies),
                    step_milliseconds(network, images, labels),
                    activation_bytes(network, images),
                )
            )
    return scores
