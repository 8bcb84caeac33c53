"""Transfer: what another run or data set has taught stands below what the labels at hand teach."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from nas.run import Run
from predictors.base import LearnedPredictor, read_header
from predictors.graphs import as_table
from predictors.labels import checked_labels, scaled, without_duplicates
from predictors.registry import load_predictor, make_predictor
from search_spaces.common.errors import UserError
from search_spaces.common.files import atomic_write
from search_spaces.graph import OpGraph
from search_spaces.registry import space_text
from search_spaces.space import SearchSpace

KIND = "warm-started"
NUMBERS = ("slope", "gain", "centre")
FOLDS = 5
SHRINK = 5.0  # labels of variance one against which the gain has to hold


class WarmStarted:
    """A Predictor that learns what a source predictor, fitted on another run or data set, leaves open.

    prediction = slope * source + gain * correction, on normal scores of the labels: slope by least squares, the
    correction by a predictor fitted to the residuals, gain by regression of the residuals on its predictions in 5-fold
    cross-validation (no less than 0, shrunk), so that with a few labels it stays near the source and a correction that
    does not hold on unseen labels counts for nothing. A process with the source as mean function, after Rasmussen and
    Williams, Gaussian Processes for Machine Learning, 2006, section 2.7, with any predictor in the place of the
    process. The source is fixed; scale and unit of its labels do not matter.
    """

    def __init__(self, source: LearnedPredictor, make: Callable[[], LearnedPredictor]):
        self._make = make
        self.source, self.correction = source, make()
        self.space_name, self.vocabulary = self.correction.space_name, self.correction.vocabulary
        self.extra_names: tuple[str, ...] = ()
        self.slope, self.gain, self.centre = 0.0, 0.0, 0.0
        if source.extra_names:
            needed = ", ".join(source.extra_names)
            raise UserError(source.kind, f"a source of graphs alone; this one needs the columns {needed}")
        unknown = [op for op in self.vocabulary if op not in source.vocabulary]
        if unknown:
            raise UserError(source.space_name, f"a source that knows the operations {', '.join(unknown)}")

    @property
    def kind(self) -> str:
        """For people: the predictor and where it started."""
        return f"{self.correction.kind}, warm from {self.source.kind}"

    @property
    def needs_unlabelled(self) -> bool:
        """Whether `fit` must be given unlabelled graphs."""
        return self.correction.needs_unlabelled

    def fit(
        self,
        graphs: Sequence[OpGraph],
        y: np.ndarray,
        *,
        extra: Mapping[str, np.ndarray] | None = None,
        unlabelled: Sequence[OpGraph] | None = None,
        rng: np.random.Generator,
    ) -> Self:
        """See `Predictor.fit`; costs six fits of the correcting predictor. Errors: UserError."""
        if extra:
            raise UserError(sorted(extra), "no extra columns beside a source")
        table = as_table(graphs, self.vocabulary)
        table, labels, _ = without_duplicates(table, checked_labels(y, len(table)), np.zeros((len(table), 0)))
        score, known = scaled(labels, "normal-score"), self.source.predict(table)
        self.centre = float(known.mean())
        known = known - self.centre
        self.slope = float(known @ score / max(known @ known, 1e-12))
        left = score - score.mean() - self.slope * known
        fold = rng.permutation(len(table)) % min(FOLDS, len(table))
        unseen = np.zeros(len(table))
        for k in range(int(fold.max()) + 1):
            rows = fold != k
            if rows.sum() > 2 and np.ptp(left[rows]) > 0:
                part = self._make().fit(table.take(rows), left[rows], unlabelled=unlabelled, rng=rng)
                unseen[~rows] = part.predict(table.take(~rows))
        self.gain = max(0.0, float(left @ unseen / max(unseen @ unseen + SHRINK * left.var(), 1e-12)))
        if np.ptp(left) == 0:  # the source says it all
            left, self.gain = score, 0.0
        self.correction = self._make().fit(table, left, unlabelled=unlabelled, rng=rng)
        return self

    def predict(
        self,
        graphs: Sequence[OpGraph],
        *,
        extra: Mapping[str, np.ndarray] | None = None,
        return_std: bool = False,
    ) -> Any:
        """[N] predictions; with `return_std` also the standard deviations of the correction, on the same scale."""
        table = as_table(graphs, self.vocabulary)
        start = self.slope * (self.source.predict(table) - self.centre)
        if not return_std:
            return start + self.gain * self.correction.predict(table)
        mean, deviation = self.correction.predict(table, return_std=True)
        return start + self.gain * mean, max(self.gain, 1e-3) * deviation

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write both predictors as `source/` and `correction/`, and `predictor.json`. Errors: UserError."""
        target = Path(folder)
        self.source.save(target / "source")
        self.correction.save(target / "correction")
        numbers = {name: getattr(self, name) for name in NUMBERS}
        header = {**read_header(target / "correction"), "kind": KIND, "settings": numbers}
        with atomic_write(target / "predictor.json") as file:
            json.dump(header, file, indent=1)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """The predictor that `save` wrote. Errors: UserError."""
        header = read_header(folder)
        if header["kind"] != KIND:
            raise UserError(header["kind"], f"a saved predictor of kind {KIND}")
        correction = load_predictor(Path(folder) / "correction")
        again = type(correction)
        found = cls(
            load_predictor(Path(folder) / "source"),
            lambda: again(correction.space_name, correction.vocabulary, correction.settings),
        )
        found.correction = correction
        for name in NUMBERS:
            setattr(found, name, float(header["settings"][name]))
        return found


AnyPredictor = LearnedPredictor | WarmStarted


def load_saved(folder: str | os.PathLike[str]) -> AnyPredictor:
    """The predictor in `folder`, warm-started or not. Errors: UserError."""
    return WarmStarted.load(folder) if read_header(folder)["kind"] == KIND else load_predictor(folder)


def warm_start(
    reference: str | os.PathLike[str],
    make: Callable[[], LearnedPredictor],
    name: str = "gp-graf",
    settings: Mapping[str, Any] | None = None,
) -> Callable[[], WarmStarted]:
    """A function that makes unfitted predictors which start from `reference` and correct it by what `make` makes.

    reference: the folder of a predictor (`nas predict train`, of another data set, say), which is taken as it is; or
    that of a search, whose finished trials teach a predictor `name` their primary objective. Errors: UserError.
    """
    source = _source(Path(reference), name, settings or {})
    return lambda: WarmStarted(source, make)


def _source(path: Path, name: str, settings: Mapping[str, Any]) -> LearnedPredictor:
    if (path / "predictor.json").exists():
        found = load_saved(path)
        if isinstance(found, WarmStarted):
            raise UserError(str(path), "a source that was not warm-started itself", str(path / "source"))
        return found
    if not Run.exists(path):
        raise UserError(str(path), "the folder of a search or of a predictor (`nas predict train`)")
    from nas.objectives import parse_objectives
    from nas.references import load_result

    result = load_result(path)
    objective = parse_objectives(result.settings["objectives"])[0]
    done = [r for r in result.records if r.status == "done" and r.metrics and objective.name in r.metrics]
    longest = max((r.fidelity for r in done if r.fidelity is not None), default=None)
    done = [r for r in done if r.fidelity == longest]
    space: SearchSpace = result.space
    if len(done) < 3:
        raise UserError(str(path), f"a search with at least 3 finished trials; it has {len(done)}")
    sign = 1.0 if objective.maximize else -1.0
    labels = np.array([sign * r.metrics[objective.name] for r in done if r.metrics])
    graphs = as_table([space.graph(space.decode(r.arch)) for r in done], space.vocabulary)
    predictor = make_predictor(name, space_text(space), space.vocabulary, **settings)
    return predictor.fit(graphs, labels, unlabelled=graphs, rng=np.random.default_rng(0))
