"""CausalNetwork: a graph split into a critical and a redundant view, and the losses that keep them apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from predictors.neural.batch import GraphBatch
from predictors.neural.encoders import Encoder, GraphConvolutionBlock, pooled
from predictors.neural.layers import Dropout, Linear
from predictors.neural.losses import Loss

TEMPERATURE = (1.0, 0.5)  # of the split, at the begin and the end of training


@dataclass(frozen=True)
class Causes:
    """What the losses of CARL weigh; see `CausalSettings`."""

    interventions: int
    split: str
    intervention_weight: float
    invariance_weight: float
    redundancy: str
    redundancy_weight: float
    size: float
    size_weight: float


class Reversal(torch.autograd.Function):
    """The identity with the gradient's sign turned (Ganin and Lempitsky, ICML 2015)."""

    @staticmethod
    def forward(context, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(context, *gradients: Tensor) -> Tensor:
        return -gradients[0]


class EdgeScore(nn.Module):
    """Two linear layers on [h_i, h_j] of every edge: h [S, B, n, d], adjacency [S, B, n, n] -> [S, B, n, n], 0 where
    there is no edge."""

    def __init__(self, stack: int, width: int):
        super().__init__()
        self.source = Linear(stack, width, width)  # the halves of one layer on the concatenation
        self.target = Linear(stack, width, width, bias=False)
        self.out = Linear(stack, width, 1)

    def forward(self, h: Tensor, adjacency: Tensor) -> Tensor:
        nodes = adjacency.shape[-1]
        present = (adjacency > 0).flatten(2)
        most = max(int(present.sum(2).max()), 1)
        # Only the places of edges are computed: dense pairs of 30 nodes would be twenty times as many.
        places = present.to(torch.int8).argsort(dim=2, descending=True, stable=True)[:, :, :most]
        inner = _at(self.source(h), places // nodes) + _at(self.target(h), places % nodes)
        score = self.out(torch.relu(inner)).squeeze(3)
        return torch.zeros_like(adjacency).flatten(2).scatter(2, places, score).view_as(adjacency) * (adjacency > 0)


def _at(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index.unsqueeze(3).expand(-1, -1, -1, x.shape[3]))


class CausalNetwork(nn.Module):
    """Encoder, split into critical and redundant parts, one graph convolution for each view, one head; [S, B]."""

    def __init__(self, stack: int, encoder: Encoder, width: int, columns: int, dropout: float, causes: Causes):
        super().__init__()
        self.encoder, self.causes = encoder, causes
        self.node_score = nn.Sequential(Linear(stack, width, width), nn.ReLU(), Linear(stack, width, 1))
        self.edge_score = EdgeScore(stack, width)
        self.critical = GraphConvolutionBlock(stack, width, 0.0, True)
        self.redundant = GraphConvolutionBlock(stack, width, 0.0, True)
        self.dropout = Dropout(dropout)
        self.head = nn.Sequential(
            Linear(stack, width + columns, width, init="xavier"), nn.ReLU(), Linear(stack, width, 1, init="xavier")
        )
        self.redundant_head = nn.Sequential(
            Linear(stack, width, width, init="xavier"), nn.ReLU(), Linear(stack, width, 1, init="xavier")
        )

    def forward(self, batch: GraphBatch) -> Tensor:
        h = self.encoder(batch)
        nodes, edges = self.probabilities(self.scores(h, batch), batch, TEMPERATURE[1])
        return self.score(self.view(self.critical, h, batch, nodes, edges), batch.columns)

    def scores(self, h: Tensor, batch: GraphBatch) -> tuple[Tensor, Tensor]:
        """How critical nodes [S, B, n] and edges [S, B, n, n] are, as log-odds; 0 with the split `random`."""
        if self.causes.split == "random":
            return torch.zeros_like(batch.mask), torch.zeros_like(batch.adjacency)
        return self.node_score(h).squeeze(3), self.edge_score(h, batch.adjacency)

    def probabilities(
        self, scores: tuple[Tensor, Tensor], batch: GraphBatch, temperature: float, noise: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Critical probabilities of nodes and edges, 0 where there is neither.

        noise: of the concrete distribution (Maddison, Mnih and Teh, ICLR 2017), from the members' generators.
        """
        nodes, edges = scores
        if noise:
            nodes, edges = nodes + self._logistic(nodes), edges + self._logistic(edges)
        return (
            torch.sigmoid(nodes / temperature) * batch.mask,
            torch.sigmoid(edges / temperature) * batch.adjacency,
        )

    def _logistic(self, like: Tensor) -> Tensor:
        if self.dropout.generators is None:
            raise RuntimeError("the noise of training needs generators: call use_generators first")
        drawn = torch.empty_like(like)
        for member, generator in zip(drawn, self.dropout.generators, strict=True):
            member.uniform_(1e-6, 1 - 1e-6, generator=generator)
        return torch.logit(drawn)

    def view(self, block: nn.Module, h: Tensor, batch: GraphBatch, nodes: Tensor, edges: Tensor) -> Tensor:
        """[S, B, d]: the graph with its nodes and edges weighted, after one graph convolution, mean over real nodes."""
        return pooled(block(h * nodes.unsqueeze(3), edges, batch.mask), batch.mask)

    def score(self, z: Tensor, columns: Tensor) -> Tensor:
        """f(z): [S, B, d] -> [S, B]."""
        if columns.shape[-1]:
            z = torch.cat([z, columns.expand(*z.shape[:2], -1)], 2)
        return self.head(self.dropout(z)).squeeze(2)

    def intervened(self, critical: Tensor, redundant: Tensor, columns: Tensor, count: int) -> Tensor:
        """[S, m, B]: f of each critical part with the redundant parts of m = min(count, B - 1) other graphs.

        They are those 1 to m places before it in the batch: batches come in random order.
        """
        mixed = [critical + redundant.roll(place, 1) for place in range(1, min(count, critical.shape[1] - 1) + 1)]
        beside = columns.expand(*critical.shape[:2], -1).repeat(1, len(mixed), 1)
        return self.score(torch.cat(mixed, 1), beside).unflatten(1, (len(mixed), -1))

    def objective(self, batch: GraphBatch, targets: Tensor, loss: Loss, share: float) -> Tensor:
        """[S]: the weighted sum of all losses, after `share` of the training."""
        c = self.causes
        h = self.encoder(batch)
        temperature = TEMPERATURE[0] + (TEMPERATURE[1] - TEMPERATURE[0]) * share
        scores = self.scores(h, batch)
        nodes, edges = self.probabilities(scores, batch, temperature, noise=True)
        critical = self.view(self.critical, h, batch, nodes, edges)
        value = loss(self.score(critical, batch.columns), targets)
        redundant = self.view(self.redundant, h, batch, batch.mask - nodes, batch.adjacency - edges)
        if c.interventions and targets.shape[1] > 1:
            mixed = self.intervened(critical, redundant, batch.columns, c.interventions)
            count = mixed.shape[1]
            ranked = loss(mixed.flatten(0, 1), targets.repeat_interleave(count, 0)).view(-1, count).mean(1)
            moved = mixed.var(1, unbiased=False).mean(1)
            value = value + c.intervention_weight * (ranked + c.invariance_weight * moved)
        if c.redundancy_weight:
            if c.redundancy == "reversal":
                guess = self.redundant_head(Reversal.apply(redundant)).squeeze(2)
                told = (guess - targets).square().mean(1)
            else:
                guess = self.redundant_head(redundant).squeeze(2)
                told = (guess - targets.mean(1, keepdim=True)).square().mean(1)
            value = value + c.redundancy_weight * told
        return value + c.size_weight * self._excess(self.probabilities(scores, batch, temperature), batch)

    def _excess(self, found: tuple[Tensor, Tensor], batch: GraphBatch) -> Tensor:
        """[S]: how far the mean probabilities are from `size`, each kind on its own: together, all nodes and no edge
        would do. Without noise, which draws means to a half."""
        nodes = found[0].sum((1, 2)) / batch.mask.sum((1, 2))
        edges = found[1].sum((1, 2, 3)) / batch.adjacency.sum((1, 2, 3)).clamp(min=1)
        return (nodes - self.causes.size).abs() + (edges - self.causes.size).abs()
