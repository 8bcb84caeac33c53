"""Successive halving: many architectures trained a little, the best of them further."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from nas.objectives import Objective
from nas.strategies.strategy import Strategy, positive
from search_spaces.common.errors import UserError
from search_spaces.space import SearchSpace

A = TypeVar("A")


@dataclass(eq=False, slots=True)
class Bracket:
    """Architectures on their way up the rungs `fidelities`, all on the same rung.

    queue: what to ask next on this rung, the trial to promote or None for a fresh architecture.
    """

    fidelities: tuple[int, ...]
    queue: deque[int | None]
    rung: int = 0
    waiting: set[int] = field(default_factory=set)
    told: list[int] = field(default_factory=list)


class SuccessiveHalving(Strategy[A]):
    """The best 1/eta of every rung go on to the next (Jamieson and Talwalkar, AISTATS 2016).

    fidelities (12, 200): the rungs, ascending: fidelities that the evaluator knows (12 and 200 epochs are those of
    NAS-Bench-201). configurations (27): fresh random architectures on the lowest rung. eta (3, as in Li et al. 2018):
    of n on a rung floor(n / eta) go on, at least one. Failed trials never do.

    Scores are compared within a rung only. A promoted trial has the trial on the rung below as its `parent`, so that
    training can be continued. When a bracket is through, or waits for trials in flight, the next one is opened; so it
    waits only when the space is exhausted. An architecture enters once, whatever the fidelity.
    """

    name = "successive-halving"

    def __init__(
        self,
        space: SearchSpace[A],
        objectives: Sequence[Objective],
        rng: np.random.Generator,
        *,
        fidelities: Sequence[int] = (12, 200),
        configurations: int = 27,
        eta: int = 3,
    ):
        super().__init__(space, objectives, rng)
        self.fidelities = ascending("fidelities", fidelities)
        self.configurations = positive("configurations", configurations)
        self.eta = positive("eta", eta, least=2)
        self.brackets: list[Bracket] = []  # those under way, oldest first
        self._exhausted = False

    def _next_bracket(self) -> Bracket:
        return Bracket(self.fidelities, deque([None] * self.configurations))

    def _propose(self) -> tuple[A, int | None, int | None] | None:
        while True:
            bracket = next((b for b in self.brackets if b.queue), None)
            if bracket is None:
                if self._exhausted:
                    if self.brackets:
                        return None
                    raise StopIteration
                bracket = self._next_bracket()
                self.brackets.append(bracket)
            parent = bracket.queue.popleft()
            if parent is not None:
                arch = self.trials[parent].arch
            else:
                try:
                    arch = self._unseen(lambda: self.space.sample(self.rng))
                except StopIteration:  # the bracket goes on with what it has
                    self._exhausted = True
                    bracket.queue.clear()
                    self._promote(bracket)
                    continue
            bracket.waiting.add(len(self.trials))
            return arch, bracket.fidelities[bracket.rung], parent

    def _observe(self, trial, metrics) -> None:
        bracket = next(b for b in self.brackets if trial.id in b.waiting)
        bracket.waiting.remove(trial.id)
        bracket.told.append(trial.id)
        self._promote(bracket)

    def _promote(self, bracket: Bracket) -> None:
        """Once a rung is complete: its best to the next rung, or the end of the bracket."""
        if bracket.queue or bracket.waiting:
            return
        # Ties go to the earlier trial, whatever the order of the tells.
        ranked = sorted((i for i in sorted(bracket.told) if self.metrics[i] is not None), key=self.score, reverse=True)
        kept = max(1, len(bracket.told) // self.eta)
        bracket.rung, bracket.told = bracket.rung + 1, []
        if bracket.rung < len(bracket.fidelities) and ranked:
            bracket.queue.extend(ranked[:kept])
        else:
            self.brackets.remove(bracket)


def ascending(name: str, values: Any) -> tuple[int, ...]:
    """`values` as a tuple of ascending positive ints. Errors: UserError naming the setting."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise UserError(values, f"at least one whole number for {name}, such as (12, 200)")
    found = tuple(positive(name, value) for value in values)
    if any(a >= b for a, b in itertools.pairwise(found)):
        raise UserError(values, f"ascending numbers for {name}", str(tuple(sorted(set(found)))))
    return found
