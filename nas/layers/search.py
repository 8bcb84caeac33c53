"""search_layers: the one loop of the house over layers, with the funnel before it and training behind it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from nas.budget import Budget
from nas.layers.activation_search import ActivationEvaluator, FilteredActivations
from nas.layers.aquasurf import AQuaSurF, fisher_features
from nas.layers.evaluator import MEASURES, LayerEvaluator
from nas.layers.funnel import FilteredLayers
from nas.loop import search
from nas.objectives import parse_objectives
from nas.result import SearchResult
from nas.run import Run
from nas.training.recipe import Recipe
from search_spaces.common.errors import UserError
from search_spaces.common.files import atomic_write
from search_spaces.layers.graph import LayerGraph

FUNNEL_FILE = "funnel.json"
FISHER_BATCH = 64


def search_layers(
    space: FilteredLayers | FilteredActivations,
    evaluator: LayerEvaluator,
    strategy: str = "regularized-evolution",
    *,
    budget: int | Budget,
    objectives: str = "val_acc",
    seed: int = 0,
    workers: int = 1,
    out: str | Path | None = None,
    strategy_settings: Mapping[str, Any] | None = None,
    describe: Mapping[str, Any] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> SearchResult:
    """Search for a layer or an activation function; with `out` the run is kept, resumed by the same call, and
    `funnel.json` counts rejections.

    strategy: of `nas.strategies`; for activation functions also `aquasurf`, which compares them by their outputs and
    by the Fisher spectra of the first anchor at initialisation.
    budget: trials, that is layers that reach training, or a Budget whose simulated seconds are training steps.
    objectives: metrics of the evaluator; `latency_ms` and `activation_bytes` are measured when they are named.
    Errors: UserError.
    """
    chosen = _aquasurf(space, evaluator) if strategy == AQuaSurF.name else strategy
    names = {o.name for o in parse_objectives(objectives)}
    measured = tuple(m for m in MEASURES if m in names or m in evaluator.measure)
    evaluator = replace(evaluator, measure=measured)
    known = {"val_acc", *measured, *(f"{a}_{m}" for a in evaluator.anchors for m in ("val_acc", "train_loss"))}
    for name in sorted(names - known):
        raise UserError(name, f"a metric of a layer search ({', '.join((*sorted(known), *MEASURES))})")
    evaluator.dataset()  # refuses data that do not fit before anything is written
    about = {"kind": "layers", "layer_space": {**space.settings, "first": space.first}}
    about |= {"layer_evaluator": asdict(evaluator), "evaluator": f"layers on {evaluator.data}", "space": "layers"}
    try:
        return search(
            space,
            evaluator,
            chosen,
            budget=budget,
            objectives=objectives,
            seed=seed,
            workers=workers,
            out=out,
            strategy_settings=strategy_settings,
            describe={**about, **(describe or {})},
            progress=progress,
        )
    finally:
        if out is not None and Run.exists(out):
            with atomic_write(Path(out) / FUNNEL_FILE) as file:
                json.dump(dict(space.counts), file)


def _aquasurf(space: Any, evaluator: LayerEvaluator) -> Callable[..., AQuaSurF]:
    """The strategy with the evaluator's first anchor for its spectra."""
    if not isinstance(space, FilteredActivations):
        raise UserError(AQuaSurF.name, "a strategy for layers; aquasurf is for activation functions (--ops pangaea)")

    def spectra(graphs: Sequence[LayerGraph]) -> np.ndarray:
        data = evaluator.dataset()
        images, labels = data.normalize(data.train.images[:FISHER_BATCH]), data.train.labels[:FISHER_BATCH]
        anchor = evaluator.anchors[0]
        return np.stack([fisher_features(evaluator.network(graph, anchor), images, labels) for graph in graphs])

    def aquasurf(*arguments: Any, **settings: Any) -> AQuaSurF:
        return AQuaSurF(*arguments, **{"spectra": spectra, **settings})

    return aquasurf


def space_from(settings: Mapping[str, Any]) -> FilteredLayers | FilteredActivations:
    """The space of a layer run's settings."""
    about = settings["layer_space"]
    return FilteredLayers(**about) if "nodes" in about else FilteredActivations(**about)


def evaluator_from(settings: Mapping[str, Any]) -> LayerEvaluator:
    """The evaluator of a layer run's settings."""
    known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings["layer_evaluator"].items()}
    made = ActivationEvaluator if "norm" in known else LayerEvaluator
    return made(**{**known, "recipe": Recipe(**known["recipe"])})


def funnel_counts(result: SearchResult) -> dict[str, Any]:
    """{"drawn", "rejected": {reason: n}, "trained"}: proposals from the funnel file, trainings from the trials."""
    counts: Counter[str] = Counter()
    if result.run is not None and (result.run.path / FUNNEL_FILE).exists():
        counts.update(json.loads((result.run.path / FUNNEL_FILE).read_text()))
    elif isinstance(result.space, FilteredLayers | FilteredActivations):
        counts.update(result.space.counts)
    drawn = counts.pop("drawn", 0)
    for record in result.records:
        if record.status == "failed":
            counts[(record.error or "").removeprefix("rejected: ")] += 1
    trained = sum(r.status == "done" for r in result.records)
    return {"drawn": drawn, "rejected": dict(counts.most_common()), "trained": trained}
