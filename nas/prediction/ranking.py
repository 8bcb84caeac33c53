"""A trained predictor at work: training on a benchmark, and ranking what was not measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.table import Table
from nas.prediction.tables import Labelled, graphs_of, labels_and_targets
from nas.prediction.transfer import AnyPredictor, load_saved, warm_start
from predictors.base import LearnedPredictor, read_header
from predictors.evaluation import Split, make_splits, rank_quality, read_size
from predictors.graphs import GraphTable, as_table
from predictors.registry import make_predictor
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space, space_text
from search_spaces.space import SearchSpace

MOST_ENUMERATED = 50_000
SAMPLE = 10_000
CHUNK = 8192
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Trained:
    """A fitted predictor, what it learned from, and how it ranks the benchmark."""

    predictor: AnyPredictor
    known: Labelled
    size: int
    quality: Mapping[str, float]


def train_on(
    table: Table,
    name: str,
    size: str | int | None = None,
    *,
    seed: int = 0,
    labels: str | None = None,
    target: str | None = None,
    settings: Mapping[str, Any] | None = None,
    warm_from: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Trained:
    """A predictor fitted to `size` random rows of a benchmark (None: all), and its statistics over the others.

    The rows are those of the protocol nasforge with this seed. warm_from: see `warm_start`. Errors: UserError.
    """

    def plain() -> LearnedPredictor:
        return make_predictor(name, space_text(table.space), table.space.vocabulary, **(settings or {}))

    predictor = plain() if warm_from is None else warm_start(warm_from, plain, name, settings)()
    known = labels_and_targets(table, labels, target)
    count = read_size("100%" if size is None else size, len(known.rows))
    graphs = graphs_of(table, progress)
    if len(known.rows) < len(graphs):
        graphs = graphs.take(known.rows)
    split: Split = make_splits("nasforge", len(graphs), [count], [seed])[0]
    rng = np.random.default_rng((seed, count))
    predictor.fit(graphs.take(split.train), known.labels[split.train], unlabelled=graphs, rng=rng)
    return Trained(predictor, known, count, rank_quality(predictor.predict(graphs), known.targets, split))


@dataclass(frozen=True)
class Ranked:
    """One architecture, its prediction and the standard deviation (NaN where the predictor has none)."""

    arch: str
    score: float
    std: float


@dataclass(frozen=True)
class Ranking:
    """The best of `count` candidates, best first. candidates: what they are, for people."""

    space: str
    predictor: str
    count: int
    candidates: str
    best: tuple[Ranked, ...]


def load_for(folder: str | os.PathLike[str], space: SearchSpace) -> AnyPredictor:
    """The predictor saved in `folder`. Errors: UserError for none, and for one of another space."""
    predictor = load_saved(folder)
    if predictor.space_name != space_text(space):
        hint = f"a predictor of {space_text(space)}; this one was trained on {predictor.space_name}"
        raise UserError(str(folder), hint, f"--space {predictor.space_name}")
    return predictor


def rank_space(
    folder: str | os.PathLike[str],
    space: SearchSpace | None = None,
    *,
    top: int = 20,
    sample: int | None = None,
    rng: np.random.Generator,
    progress: Progress | None = None,
) -> Ranking:
    """The best of a space by a saved predictor.

    space: default that of the predictor. sample: random architectures that are ranked; default the whole space up to
    50,000, else 10,000. Of one key only the first counts. Errors: UserError.
    """
    if space is None:
        space = load_space(read_header(folder)["space"])
    predictor = load_for(folder, space)
    for option, value in (("--top", top), ("--sample", sample)):
        if value is not None and (isinstance(value, bool) or value < 1):
            raise UserError(value, f"a number from 1 for {option}")
    archs, what = _candidates(space, sample, rng)
    first: dict[str, Any] = {}
    for arch in archs:
        first.setdefault(space.key(arch), arch)
    found = list(first.values())
    mean, deviation = predict_archs(predictor, space, found, progress)
    order = np.argsort(-mean, kind="stable")[:top].tolist()
    best = tuple(Ranked(space.encode(found[k]), float(mean[k]), float(deviation[k])) for k in order)
    return Ranking(space_text(space), predictor.kind, len(found), what, best)


def predict_archs(
    predictor: AnyPredictor, space: SearchSpace, archs: Sequence[Any], progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """([N] predictions, [N] standard deviations), graphs made a part at a time."""
    mean, deviation = np.empty(len(archs)), np.empty(len(archs))
    for start in range(0, len(archs), CHUNK):
        rows = slice(start, start + CHUNK)
        mean[rows], deviation[rows] = predictor.predict(_graphs(space, archs[rows]), return_std=True)
        if progress is not None:
            progress(min(start + CHUNK, len(archs)), len(archs))
    return mean, deviation


def _graphs(space: SearchSpace, archs: Sequence[Any]) -> GraphTable:
    return as_table([space.graph(arch) for arch in archs], space.vocabulary)


def _candidates(space: SearchSpace, sample: int | None, rng: np.random.Generator) -> tuple[Iterable[Any], str]:
    try:
        size = len(space)
    except (UserError, OverflowError, TypeError):
        size = MOST_ENUMERATED + 1
    if sample is None and size <= MOST_ENUMERATED:
        return space, f"all of {space.name}"
    count = SAMPLE if sample is None else sample
    return (space.sample(rng) for _ in range(count)), f"{count:,} random draws of {space.name}"
