"""SearchResult: what a search left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nas.analysis import feasible_trials, summarise
from nas.evaluators import Evaluator, TableEvaluator
from nas.objectives import parse_objectives
from nas.run import Run, TrialRecord
from search_spaces.common.errors import UserError
from search_spaces.space import SearchSpace

if TYPE_CHECKING:
    from nas.analysis import Summary


@dataclass(frozen=True)
class SearchResult:
    """What a search left: its settings and its trials. `space` decodes their architectures."""

    settings: Mapping[str, Any]
    records: Sequence[TrialRecord]
    space: SearchSpace
    run: Run | None = None
    evaluator: Evaluator | None = None

    @cached_property
    def best(self) -> TrialRecord:
        """The trial with the best primary objective among those of the highest fidelity that keep the bounds.

        Errors: UserError if there is none.
        """
        ranked = feasible_trials(parse_objectives(self.settings["objectives"]), self.records)
        if ranked:
            return next(r for r in self.records if r.id == ranked[0].id)
        failed = [r for r in self.records if r.status == "failed"]
        last = f", the last with: {failed[-1].error}" if failed else ""
        raise UserError(
            self.settings["objectives"],
            f"a trial that succeeded and kept the bounds; {len(failed)} of {len(self.records)} failed{last}",
        )

    @property
    def best_arch(self) -> Any:
        """The architecture of `best`."""
        return self.space.decode(self.best.arch)

    def build(self, **network: Any) -> Any:
        """The best architecture as a plain PyTorch module; `network` goes to `space.build`."""
        return self.space.build(self.best_arch, **network)

    def summary(self) -> Summary:
        """Best, regret and front, against the whole table where the evaluator is one."""
        table = self.evaluator.table if isinstance(self.evaluator, TableEvaluator) else None
        return summarise(self.settings, self.records, table)
