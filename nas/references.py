"""`RUN`, `RUN:best`, `RUN:17`: what stands in a run folder, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.evaluators import make_evaluator
from nas.objectives import parse_objectives
from nas.result import SearchResult
from nas.run import Run, TrialRecord
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space
from search_spaces.space import SearchSpace


@dataclass(frozen=True)
class FoundArchitecture:
    """An architecture of a run."""

    run: Run
    space: SearchSpace
    record: TrialRecord

    @property
    def training(self) -> Mapping[str, Any]:
        """The settings of the training that measured it (fields of `Task`), empty for a search in a table."""
        return self.run.settings.get("task") or self.run.settings.get("training") or {}

    @property
    def network(self) -> dict[str, Any]:
        """The scale of the network that was measured: keywords of `space.build`."""
        return dict(self.training.get("network", {}))


def load_result(path: str | Path) -> SearchResult:
    """A run folder as the SearchResult that its search returned. Errors: UserError."""
    run = Run.open(path)
    if run.settings.get("kind") == "layers":
        from nas.layers.search import space_from

        return SearchResult(run.settings, run.trials(), space_from(run.settings), run)
    if run.settings.get("kind") not in ("search", "supernet"):
        raise UserError(str(path), f"a search; this run is a {run.settings.get('kind')}")
    objectives = parse_objectives(run.settings["objectives"])
    evaluator = None
    if run.settings["evaluator"].startswith("table:"):
        evaluator = make_evaluator(run.settings["evaluator"], objectives, run.settings["label"])
    return SearchResult(run.settings, run.trials(), load_space(run.settings["space"]), run, evaluator)


def find_architecture(reference: str) -> FoundArchitecture:
    """The trial that `RUN`, `RUN:best` or `RUN:<id>` names; `RUN` alone is its best. Errors: UserError."""
    folder, colon, which = reference.rpartition(":")
    if not colon or Run.exists(reference):
        folder, which = reference, "best"
    if Run.open(folder).settings.get("kind") == "training":
        return _trained(Run.open(folder), which)
    result = load_result(folder)
    assert result.run is not None
    if which == "best":
        if not any(r.status == "done" for r in result.records):
            raise UserError(reference, "a run with a finished trial")
        return FoundArchitecture(result.run, result.space, result.best)
    if not which.isdigit():
        raise UserError(which, "best or a trial's number after the run's folder", "best")
    return FoundArchitecture(result.run, result.space, result.run.trial(int(which)))


def _trained(run: Run, which: str) -> FoundArchitecture:
    from nas.training.trained import best_record

    space = run.settings["task"]["space"]
    if space is None:
        raise UserError(str(run.path), "a training of a space's architecture; this one trained a factory's model")
    record = best_record(run) if which == "best" else run.trial(int(which))
    return FoundArchitecture(run, load_space(space), record)
