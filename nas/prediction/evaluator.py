"""PredictorEvaluator: what an architecture is worth by a saved predictor."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.prediction.ranking import load_for
from nas.prediction.transfer import AnyPredictor
from predictors.base import read_header
from predictors.graphs import as_table
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space
from search_spaces.space import SearchSpace

METRIC = "predicted_score"


@dataclass(frozen=True)
class PredictorEvaluator:
    """Predicts instead of measuring: the metric `predicted_score`, higher is better, on the predictor's own scale.

    folder: a predictor saved by `nas predict train`. space: the one to search (default: the predictor's).
    Errors: UserError for no predictor, one of another space, one that needs extra columns, or a fidelity.
    """

    folder: str
    space: str = ""

    def __post_init__(self) -> None:
        header = read_header(self.folder)
        if not self.space:
            object.__setattr__(self, "space", header["space"])
        if header["extra"]:
            needed = ", ".join(header["extra"])
            raise UserError(self.folder, f"a predictor of graphs alone; this one needs the columns {needed}")
        load_for(self.folder, load_space(self.space))

    def metrics(self) -> tuple[str, ...]:
        """The name of the metric."""
        return (METRIC,)

    def evaluate(self, arch: Any, fidelity: int | None = None, *, seed: int) -> dict[str, float]:
        """The prediction for one architecture."""
        if fidelity is not None:
            raise UserError(fidelity, "no fidelity: nothing is trained")
        stamp = os.stat(Path(self.folder) / "predictor.json").st_mtime_ns
        predictor, space = _load(self.folder, self.space, stamp)
        graph = as_table([space.graph(arch)], space.vocabulary)
        return {METRIC: float(predictor.predict(graph)[0])}


@functools.lru_cache(maxsize=4)
def _load(folder: str, space: str, stamp: int) -> tuple[AnyPredictor, SearchSpace]:
    """Once per process; a predictor that was trained anew is loaded anew."""
    found = load_space(space)
    return load_for(folder, found), found
