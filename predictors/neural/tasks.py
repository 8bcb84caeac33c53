"""Pre-training tasks: what an encoder can learn from unlabelled graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from predictors.features import Standardizer
from predictors.graphs import GraphTable
from predictors.neural.batch import GraphBatch, graph_batch
from predictors.neural.encoders import POSITIONS, Encoder, pooled
from predictors.neural.layers import Linear, PReLU
from predictors.path_features import path_features

RADII = {"nas-bench-101": (1, 2), "nas-bench-201": (1, 3), "darts": (2, 3)}  # (K, R) of CAP, supplement, table 8
OTHER_RADII = (1, 2)
SCORES = {"scaled": 0.1, "released": 0.5}  # score of the context task: dropout of both its networks
MASKED = {"nas-bench-101": 0.75, "darts": 0.05}  # share of operations masked (GMAE-NAS, released settings)
OTHER_MASKED = 0.5
FITTED_ON = 16_384  # graphs from which features are standardised
FARTHEST = 5.0  # standard deviations at which standardised features are cut


class Task(nn.Module):
    """An encoder (a stack of one) with what it takes to train it; called on graphs it gives (loss, figure)."""

    figure: str
    dropout = 0.0

    def __init__(self, pool: GraphTable, parts: tuple[str, ...], wanted: dict[str, Any]):
        super().__init__()
        self.parts, self.wanted, self.operations = parts, wanted, len(pool.vocabulary)
        self.encoder = self._encoder(wanted["layers"])

    def _encoder(self, layers: int) -> Encoder:
        w = self.wanted
        return Encoder(
            w["encoder"],
            1,
            self.operations,
            width=w["width"],
            layers=layers,
            dropout=self.dropout,
            parts=len(self.parts),
        )

    def _batch(self, table: GraphTable, device: torch.device) -> GraphBatch:
        positions = POSITIONS.get(self.wanted["encoder"], 0)
        return graph_batch(table, self.parts, positions=positions, device=device).stacked(1)


class Context(Task):
    """CAP: the centre of a subgraph must recognise the anchors of its own context graph.

    For a random node v: the main encoder sees the nodes within K hops, an auxiliary one of two layers those at 1 to R
    hops; the embedding of v is scored against each anchor (1 to K hops) by a dot product, positive within a graph,
    negative for the centre of the next graph in the batch. Centres are drawn anew every time. Score `scaled` divides
    by the root of the width, with dropout .1; `released` is the published one, with dropout .5.
    Ji, Feng and Sun, CAP: A Context-Aware Neural Predictor for NAS, IJCAI 2024, with its released code.
    """

    figure = "pair accuracy"

    def __init__(self, pool: GraphTable, parts: tuple[str, ...], wanted: dict[str, Any], generator: torch.Generator):
        self.dropout = SCORES[wanted["score"]]
        super().__init__(pool, parts, wanted)
        self.auxiliary = self._encoder(2)
        self.radii = RADII.get(wanted["space"], OTHER_RADII)
        self.factor = wanted["width"] ** -0.5 if wanted["score"] == "scaled" else 1.0

    def forward(self, table: GraphTable, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
        batch = self._batch(table, device)
        central, context, anchors, centre = neighbourhoods(batch, *self.radii, generator)
        chosen = torch.arange(len(centre), device=device)
        centres = self.encoder(_within(batch, central))[0, chosen, centre]
        contexts = self.auxiliary(_within(batch, context))[0]
        positive = torch.matmul(contexts, centres.unsqueeze(2)).squeeze(2) * self.factor
        negative = torch.matmul(contexts, centres.roll(1, 0).unsqueeze(2)).squeeze(2) * self.factor
        count = anchors.sum().clamp(min=1)
        loss = ((F.softplus(-positive) + F.softplus(negative)) * anchors).sum() / count
        accuracy = (((positive > 0).float() + (negative < 0).float()) / 2 * anchors).sum() / count
        return loss, accuracy


def neighbourhoods(
    batch: GraphBatch, inner: int, outer: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(central, context, anchors: float [B, n]; centre: int64 [B]) of a batch [1, B, n] around one random real node
    of each graph: nodes within `inner` undirected hops, at 1 to `outer` hops, and at 1 to `inner` hops."""
    mask, adjacency = batch.mask[0], batch.adjacency[0]
    count = mask.sum(1)
    draw = torch.rand(len(mask), generator=generator).to(mask.device)
    centre = torch.minimum((draw * count).long(), count.long() - 1)
    at = F.one_hot(centre, mask.shape[1]).float()
    links = adjacency + adjacency.transpose(1, 2)
    within = [at]
    for _ in range(max(inner, outer)):
        within.append(((torch.matmul(links, within[-1].unsqueeze(2)).squeeze(2) + within[-1]) > 0).float())
    return within[inner], within[outer] - at, within[inner] - at, centre


def _within(batch: GraphBatch, kept: Tensor) -> GraphBatch:
    """The subgraphs induced on kept nodes, float [B, n]."""
    links = batch.adjacency * kept.unsqueeze(2) * kept.unsqueeze(1)
    return GraphBatch(batch.ops, links, batch.mask * kept, batch.parts, batch.positions, batch.columns)


class MaskedOperations(Task):
    """Predict the operations of nodes whose operation is hidden (the padding's embedding stands in).

    Control after GMAE-NAS (Jing, Xu and Li, Graph Masked Autoencoder Enhanced Predictor for NAS, IJCAI 2022).
    """

    figure = "accuracy"
    ends: Tensor

    def __init__(self, pool: GraphTable, parts: tuple[str, ...], wanted: dict[str, Any], generator: torch.Generator):
        super().__init__(pool, parts, wanted)
        self.share = MASKED.get(wanted["space"], OTHER_MASKED)
        self.decoder = Linear(1, wanted["width"], self.operations)
        ends = [i for i, op in enumerate(pool.vocabulary) if op in ("input", "output")]
        self.register_buffer("ends", torch.tensor(ends))

    def forward(self, table: GraphTable, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
        batch = self._batch(table, device)
        inner = (batch.mask > 0) & ~torch.isin(batch.ops, self.ends)
        hidden = inner & (torch.rand(inner.shape, generator=generator).to(device) < self.share)
        ops = torch.where(hidden, self.operations, batch.ops)
        seen = GraphBatch(ops, batch.adjacency, batch.mask, batch.parts, batch.positions, batch.columns)
        logits, truth = self.decoder(self.encoder(seen))[hidden], batch.ops[hidden]
        if len(truth) == 0:
            return logits.sum() * 0, logits.sum() * 0
        return F.cross_entropy(logits, truth), (logits.argmax(1) == truth).float().mean()


class FeatureDistillation(Task):
    """Predict the standardised path features of a graph from its mean node embedding: what takes a feature method
    dynamic programming over all paths, the encoder then carries from the start."""

    figure = "explained variance"

    def __init__(self, pool: GraphTable, parts: tuple[str, ...], wanted: dict[str, Any], generator: torch.Generator):
        super().__init__(pool, parts, wanted)
        sample = torch.randperm(len(pool), generator=generator)[:FITTED_ON].numpy()
        rows, _ = path_features(pool.take(sample), parts)
        self.standardizer = Standardizer(rows)
        width = wanted["width"]
        outputs = int(self.standardizer.kept.sum())
        self.decoder = nn.Sequential(Linear(1, width, 2 * width), PReLU(1), Linear(1, 2 * width, outputs))

    def forward(self, table: GraphTable, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
        batch = self._batch(table, device)
        features = self.standardizer(path_features(table, self.parts)[0]).clip(-FARTHEST, FARTHEST)
        truth = torch.from_numpy(features.astype(np.float32)).to(device)
        loss = (self.decoder(pooled(self.encoder(batch), batch.mask))[0] - truth).square().mean()
        return loss, 1 - loss


TASKS: dict[str, Any] = {
    "context": Context,
    "masked": MaskedOperations,
    "features": FeatureDistillation,
}
