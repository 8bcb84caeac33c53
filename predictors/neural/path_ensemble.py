"""BANANAS' predictor: an ensemble of narrow, deep networks on the path encoding."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from predictors.graphs import GraphTable
from predictors.neural.batch import GraphBatch
from predictors.neural.layers import Generators, Linear
from predictors.neural.members import StackedPredictor, StackSettings, descend, vectors
from predictors.path_encoding import path_encoding
from search_spaces.common.errors import UserError


@dataclass(frozen=True)
class PathEnsembleSettings(StackSettings):
    """StackSettings of BANANAS: 5 networks of 10 hidden layers of 20 units, 150 epochs in batches of 32 at rate .01
    (naszilla, parameters `standard`; NASLib has 3 networks of 20 layers, 500 epochs at rate .001). layers, width: the
    hidden ones. longest: operations on the longest path with a column; 3 gives NAS-Bench-101 the 40 columns of
    naszilla and NAS-Bench-201 all of its paths."""

    members: int = 5
    rate: float = 0.01
    layers: int = 10
    width: int = 20
    longest: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "layers", "width", "longest")


class PathNetwork(nn.Module):
    """Columns -> `layers` times (linear, ReLU) -> linear; Glorot-uniform weights and biases of zero."""

    def __init__(self, stack: int, columns: int, width: int, layers: int):
        super().__init__()
        sizes = [columns] + [width] * layers
        self.hidden = nn.ModuleList(Linear(stack, a, b, init="xavier") for a, b in itertools.pairwise(sizes))
        self.last = Linear(stack, width, 1, init="xavier")

    def forward(self, batch: GraphBatch) -> Tensor:
        x = batch.columns
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return self.last(x).squeeze(2)


class PathEnsemble(StackedPredictor):
    """Ensemble of networks on the truncated path encoding (and the extra columns), mean absolute error.

    White, Neiswanger and Savani, BANANAS, AAAI 2021, section 4. Departures from naszilla: targets are scaled instead
    of raw errors, dead paths have no columns, and the rate falls along a cosine.
    """

    kind = "path-mlp"
    Settings = PathEnsembleSettings

    def _fit(self, table, y, extra, unlabelled, rng) -> None:
        found = path_encoding(table, self.settings.longest, tuple(sorted(table.part_names)))
        if not extra.shape[1] and (found == found[0]).all():
            raise UserError(
                f"longest={self.settings.longest}", "a longest path with which the labelled graphs differ: raise it"
            )
        super()._fit(table, y, extra, unlabelled, rng)

    def _network(self, stack: int, columns: int) -> nn.Module:
        return PathNetwork(stack, columns, self.settings.width, self.settings.layers)

    def _tensors(self, table: GraphTable, columns: np.ndarray) -> GraphBatch:
        return vectors(np.concatenate([path_encoding(table, self.settings.longest, self._parts), columns], 1))

    def _learn(
        self, model: nn.Module, graphs: GraphBatch, rows: Tensor, pool: Tensor, targets: Tensor, generators: Generators
    ) -> None:
        descend(
            model,
            lambda batch, wanted: (model(batch) - wanted).abs().mean(1),
            graphs,
            rows,
            targets,
            self.settings,
            generators,
            progress=self.progress,
        )
