"""CARL-style: predictions from critical parts that redundant parts of other architectures cannot move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from predictors.graphs import GraphTable, as_table
from predictors.neural.carl_network import TEMPERATURE, CausalNetwork, Causes
from predictors.neural.encoders import Encoder
from predictors.neural.predictor import NeuralPredictor, NeuralSettings
from predictors.neural.training import CHUNK
from search_spaces.common.errors import UserError
from search_spaces.common.names import match
from search_spaces.graph import OpGraph

SPLITS = ("learned", "random")
REDUNDANCIES = ("mean", "reversal")


@dataclass(frozen=True)
class CausalSettings(NeuralSettings):
    """NeuralSettings with a GCN as encoder, and of the split:

    interventions: redundant parts of other graphs with which each critical part must rank the same (0 = none), with
    weight `intervention_weight`, and `invariance_weight` within it for the variance over them. split: learned or
    random (the ablation: noise in training, everything .5 in prediction). redundancy: what redundant parts must not
    tell: `mean`, their own head is drawn to the mean label, or `reversal`, it learns the labels and its gradient is
    turned; with weight `redundancy_weight`. size: the mean critical probability, of nodes and of edges each, that
    `size_weight` draws to.
    """

    encoder: str = "gcn"
    interventions: int = 4
    split: str = "learned"
    intervention_weight: float = 1.0
    invariance_weight: float = 0.1
    redundancy: str = "mean"
    redundancy_weight: float = 0.3
    size: float = 0.6
    size_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        match(self.split, SPLITS, "a split")
        match(self.redundancy, REDUNDANCIES, "what redundant parts are trained on")
        if self.interventions < 0:
            raise UserError(self.interventions, "0 interventions or more")
        if not 0 < self.size < 1:
            raise UserError(self.size, "size between 0 and 1")
        for name in ("intervention_weight", "invariance_weight", "redundancy_weight", "size_weight"):
            if not getattr(self, name) >= 0:
                raise UserError(getattr(self, name), f"{name} of at least 0")


class CausalPredictor(NeuralPredictor):
    """CARL-style: scores the critical part of a graph, trained with other graphs' redundant parts put beside it.

    After Ji, Feng, Fan and Sun, CARL: Causality-guided Architecture Representation Learning for an Interpretable
    Performance Predictor, ICCV 2025. A reconstruction: the paper's text and code were not at hand. Certain, from its
    abstract and from notes about it: a GCN as encoder, representations of nodes h_i and of edges [h_i, h_j], a split
    of both into critical and redundant parts, and interventions that pair each critical part with redundant parts of
    other architectures. Reconstructed after Sui and others, Causal Attention for Interpretable and Generalizable Graph
    Classification (CAL), KDD 2022: soft masks p and 1 - p by two-layer networks with concrete noise, one graph
    convolution for each view, their sum under one head, the invariance and redundancy losses, and all weights. The
    size loss, which keeps p from 1, both directions of messages and the ranking loss are this project's.

    Predicts f(z_c), the head on the critical view alone. `importances` gives p.
    """

    kind = "carl"
    Settings = CausalSettings
    settings: CausalSettings  # type: ignore[assignment]

    def _new_model(self, stack: int, columns: int) -> CausalNetwork:  # type: ignore[override]
        s = self.settings
        encoder = Encoder(
            s.encoder,
            stack,
            len(self.vocabulary),
            width=s.width,
            layers=s.layers,
            dropout=s.dropout,
            parts=len(self._parts),
        )
        causes = Causes(
            s.interventions,
            s.split,
            s.intervention_weight,
            s.invariance_weight,
            s.redundancy,
            s.redundancy_weight,
            s.size,
            s.size_weight,
        )
        return CausalNetwork(stack, encoder, s.width, columns, s.head_dropout, causes)

    @torch.inference_mode()
    def importances(self, graphs: Sequence[OpGraph]) -> tuple[np.ndarray, np.ndarray]:
        """Critical probabilities of nodes [N, n] and edges [N, n, n], mean over the members; 0 where there is none."""
        if self._data is None:
            raise UserError(self.kind, "a predictor that was fitted")
        table = as_table(graphs, self.vocabulary)
        found = [self._split(table.take(np.arange(k, min(k + CHUNK, len(table))))) for k in range(0, len(table), CHUNK)]
        return np.concatenate([nodes for nodes, _ in found]), np.concatenate([edges for _, edges in found])

    def _split(self, table: GraphTable) -> tuple[np.ndarray, np.ndarray]:
        model: CausalNetwork = self._model  # type: ignore[assignment]
        device = next(model.parameters()).device
        batch = self._tensors(table, np.zeros((len(table), 0))).to(device).stacked(self.settings.members)
        scores = model.eval().scores(model.encoder(batch), batch)
        nodes, edges = model.probabilities(scores, batch, TEMPERATURE[1])
        return nodes.mean(0).cpu().numpy(), edges.mean(0).cpu().numpy()
