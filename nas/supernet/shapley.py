"""Shapley values of candidates by Monte Carlo, and alphas that follow them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nas.supernet.edges import EDGE
from nas.supernet.network import Draw, Supernet
from nas.supernet.part import Part
from nas.supernet.recipe import Recipe
from nas.supernet.relaxation import Weights
from nas.supernet.settings import Shapley
from nas.training.batches import Batch
from nas.training.distributed import ALONE, Processes
from nas.training.loop import random_states, training_errors
from nas.training.recalibrate import evaluating
from search_spaces.cells.operations import Zero

if TYPE_CHECKING:
    from nas.supernet.state import SearchState

Game = Callable[[np.ndarray], float]


def contributions(games: Iterable[Game], orders: Iterable[Sequence[int]], *, truncation: float = 0.0) -> np.ndarray:
    """[orders, players]: what each player's leaving takes from the value, in orders in which all leave one by one.

    The mean over random orders is an unbiased estimate of the players' Shapley values, over all orders it is exact.
    games: the value of a coalition, a boolean array [players]; one game for each order (the same, or the same on other
    data). orders: permutations of the players. truncation, if not 0: once the value is below this share of the whole
    coalition's, those still there count as taking nothing. Castro et al. 2009 (Computers & Operations Research 36);
    truncation: Ghorbani and Zou 2019 (arXiv 1904.02868).
    """
    rows = []
    for game, order in zip(games, orders):
        row, coalition = np.zeros(len(order)), np.ones(len(order), bool)
        whole = before = game(coalition)
        for player in order:
            coalition[player] = False
            value = game(coalition)
            row[player] = before - value
            before = value
            if truncation and value < truncation * whole:
                break
        rows.append(row)
    return np.array(rows)


def accuracy_game(
    supernet: Supernet, players: Sequence[tuple[str, int]], batch: Batch, processes: Processes = ALONE
) -> Game:
    """The accuracy in percent on a batch of the supernet with the players (label, candidate) of a coalition alone.

    The other players' candidates do not run and the mixing weights of the rest stay as they are. Normalisations use
    the batch's statistics; to be called where gradients are off and buffers are put back. processes: each has a part
    of the batch, and the accuracy is that on all of them.
    """
    draw = supernet.draw()

    def game(coalition: np.ndarray) -> float:
        absent: dict[str, list[int]] = {}
        for (label, candidate), present in zip(players, coalition):
            if not present:
                absent.setdefault(label, []).append(candidate)
        weights = {label: _without(found, absent.get(label, [])) for label, found in draw.weights.items()}
        outputs = supernet(batch.images, draw=Draw(weights, draw.scales))
        right = (outputs.argmax(1) == batch.labels).double()
        sums = processes.total(torch.stack([right.sum(), right.new_tensor(float(len(right)))]))
        return 100 * float(sums[0] / sums[1])

    return game


class ShapleyAlphas(Part):
    """Before every epoch after the warm-up, alphas move along averages of standardised Shapley values.

    Xiao et al., Shapley-NAS, CVPR 2022, as in train_search.py of ccbc396. The players are all candidates of all labels
    but `none`, which adds nothing; a candidate leaves all cells at once. Z-scores are taken over a table of alphas: all
    edges of one kind of cell, without `none`, whose alphas stand still (the authors search without it).
    """

    def __init__(self, supernet: Supernet, settings: Shapley):
        self.settings = settings
        self.players = [
            (label, index)
            for label in supernet.labels
            for index, candidate in enumerate(supernet._mixed[label][0].candidates)
            if not isinstance(candidate, Zero)
        ]
        self.average = torch.zeros(len(self.players), dtype=torch.float64)
        self.evaluations = 0

    def begin_epoch(self, state: SearchState, recipe: Recipe) -> None:
        if state.epoch < recipe.alpha_warmup_epochs or state.step % state.batches.steps_per_epoch:
            return
        scores = standardised(self._values(state, recipe), [label for label, _ in self.players])
        self.average = self.settings.momentum * self.average + (1 - self.settings.momentum) * scores
        alphas = state.supernet.alphas
        with torch.no_grad():
            for (label, index), average in zip(self.players, self.average.tolist()):
                alphas[label][index] += self.settings.step * average

    def row(self) -> dict[str, Any]:
        return {"shapley_evaluations": self.evaluations}

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.clone(), "evaluations": self.evaluations}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        self.average, self.evaluations = content["average"], content["evaluations"]

    def _values(self, state: SearchState, recipe: Recipe) -> Tensor:
        """The estimated values of the players."""
        supernet, settings = state.supernet, self.settings
        games = (self._game(state, index) for index in range(settings.permutations))
        orders = (torch.randperm(len(self.players), generator=supernet.generator).tolist() for _ in itertools.count())
        with (
            torch.no_grad(),
            evaluating(supernet, batch_statistics=True),
            random_states(state.random, state.device),
            training_errors(recipe.training.batch_size),
        ):
            found = contributions(games, orders, truncation=settings.truncation)
        return torch.from_numpy(found.mean(0) - settings.deviations * found.std(0))

    def _game(self, state: SearchState, index: int) -> Game:
        """The game on the `index`-th group of the alphas' batches from this step on."""
        batches, count = state.alpha_batches, min(self.settings.images, len(state.alpha_batches.images))
        each = -(-count // batches.batch_size) + 1  # one more, as an epoch's last batch may be smaller
        found = [batches.batch(state.step + index * each + place) for place in range(each)]
        own = -(-count // state.processes.world)
        images, labels, targets = (torch.cat(parts)[:own].to(state.device) for parts in zip(*found))
        game = accuracy_game(state.supernet, self.players, Batch(images, labels, targets), state.processes)

        def counted(coalition: np.ndarray) -> float:
            self.evaluations += 1
            return game(coalition)

        return counted


def standardised(values: Tensor, labels: Sequence[str]) -> Tensor:
    """Z-scores of the values of each table: all edges of one kind of cell, or all labels that name no edges.

    labels: of each value. A table of equal values has scores of 0.
    """
    edges = [EDGE.fullmatch(label) for label in labels]
    kinds = [edge[1] if edge else "" for edge in edges]
    scores = torch.zeros_like(values)
    for kind in set(kinds):
        table = torch.tensor([k == kind for k in kinds])
        deviation = values[table].std() if table.sum() > 1 else values.new_zeros(())
        if deviation > 0:
            scores[table] = (values[table] - values[table].mean()) / deviation
    return scores


def _without(weights: Weights, absent: Sequence[int]) -> Weights:
    """The same weights with those of the `absent` candidates 0; these do not run while others do."""
    if not absent:
        return weights
    values = weights.values.detach().clone()
    values[list(absent)] = 0
    running = range(len(values)) if weights.active is None else weights.active
    # Where all are absent one runs, times 0, for the shape of the output.
    return Weights(values, tuple(k for k in running if k not in absent) or tuple(running)[:1])
