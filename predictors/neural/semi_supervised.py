"""SemiNAS: an encoder-decoder whose predictor labels further graphs, and then learns from these too."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from predictors.graphs import MOST_NODES, GraphTable, concatenate
from predictors.neural.batch import GraphBatch
from predictors.neural.layers import Dropout, Embedding, Generators, Linear
from predictors.neural.members import StackedPredictor, StackSettings, descend
from search_spaces.common.errors import UserError

HALF = math.sqrt(0.5)


@dataclass(frozen=True)
class SemiSupervisedSettings(StackSettings):
    """StackSettings of SemiNAS: one layer of width 64, an inner width of 16 in the predictor, dropout .1, batches of
    100, rate 1e-3, weight decay 1e-4, .8 of the squared error and .2 of the reconstruction (release for NAS-Bench-101).
    Scaled to a CPU by choice: after `pretrain_steps` steps on the labelled graphs, 500 (theirs: 1,000 epochs), the
    predictor labels `synthetic` graphs of the pool, 1,000 (10,000); then `epochs` passes over both, 30 (500). Labelled
    graphs are repeated until they are as many as the synthetic ones, the release's rule where no ratio is set."""

    epochs: int = 30
    batch: int = 100
    decay: float = 1e-4
    pretrain_steps: int = 500
    synthetic: int = 1000
    width: int = 64
    inner: int = 16
    dropout: float = 0.1
    trade_off: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "pretrain_steps", "synthetic", "width", "inner")
        self.below_one("dropout")
        if not 0 < self.trade_off <= 1:
            raise UserError(self.trade_off, "a trade_off above 0, at most 1")


class Tokens(nn.Module):
    """A graph as a sequence, one step per node: its operation (and part) and the nodes that flow into it."""

    def __init__(self, stack: int, operations: int, parts: int, width: int):
        super().__init__()
        self.operation = Embedding(stack, operations, width)
        self.part = Embedding(stack, parts, width) if parts > 1 else None
        self.inputs = Linear(stack, MOST_NODES, width, bias=False)

    def forward(self, batch: GraphBatch) -> Tensor:
        into = batch.adjacency.transpose(2, 3)
        x = self.operation(batch.ops) + self.inputs(F.pad(into, (0, MOST_NODES - into.shape[3])))
        if self.part is not None and batch.parts is not None:
            x = x + self.part(batch.parts)
        return x


class Recurrent(nn.Module):
    """Long short-term memory (Hochreiter and Schmidhuber 1997, with forget gates) of x [S, B, n, d]: the states of all
    steps. backward: from the last step to the first; where mask is 0 the state is then 0 (padding stands at the end,
    so that forward it comes too late to matter)."""

    def __init__(self, stack: int, width: int, *, backward: bool = False):
        super().__init__()
        self.given = Linear(stack, width, 4 * width)
        self.kept = Linear(stack, width, 4 * width, bias=False)
        self.backward = backward

    def forward(self, x: Tensor, mask: Tensor, start: Tensor | None = None) -> Tensor:
        width = x.shape[3]
        steps = list(zip(self.given(x).unbind(2), mask.unsqueeze(3).unbind(2), strict=True))
        state = memory = x.new_zeros(x[:, :, 0].shape) if start is None else start
        states = []
        for given, there in reversed(steps) if self.backward else steps:
            gates, new = (given + self.kept(state)).split((3 * width, width), 2)
            into, forget, out = gates.sigmoid().chunk(3, 2)
            memory = forget * memory + into * new.tanh()
            state = out * memory.tanh()
            if self.backward:
                memory, state = memory * there, state * there
            states.append(state)
        return torch.stack(states[::-1] if self.backward else states, 2)


class EncoderDecoder(nn.Module):
    """Graphs -> scores [S, B]; `reconstruct` gives the graph back from its embedding.

    Encoder: tokens, LSTM in both directions, linear, residual, unit length; the mean over the nodes, at unit length, is
    the embedding e. Predictor: e and an MLP of e (and of the extra columns) added, linear. Decoder: LSTM from e over
    the tokens of the nodes before, attention to the encoder's nodes, and for the node to come logits of its operation
    and of every edge into it.
    """

    def __init__(
        self, stack: int, operations: int, columns: int, *, width: int, inner: int, dropout: float, parts: int = 1
    ):
        super().__init__()
        self.dropout = Dropout(dropout)
        self.tokens = Tokens(stack, operations, parts, width)
        self.ahead, self.back = Recurrent(stack, width), Recurrent(stack, width, backward=True)
        self.both = Linear(stack, 2 * width, width)
        self.inner, self.outer = Linear(stack, width + columns, inner), Linear(stack, inner, width)
        self.last = Linear(stack, width, 1)
        self.decoded_tokens = Tokens(stack, operations, parts, width)
        self.decoder = Recurrent(stack, width)
        self.query = Linear(stack, width, width, bias=False)
        self.mix = Linear(stack, 2 * width, width, bias=False)
        self.operation = Linear(stack, width, operations)
        self.edges = Linear(stack, width, MOST_NODES)

    def forward(self, batch: GraphBatch) -> Tensor:
        return self.score(self.encode(batch)[1], batch.columns)

    def encode(self, batch: GraphBatch) -> tuple[Tensor, Tensor]:
        """Embeddings of the nodes [S, B, n, d] and of the graphs [S, B, d]."""
        x = self.dropout(self.tokens(batch))
        both = torch.cat([self.ahead(x, batch.mask), self.back(x, batch.mask)], 3)
        nodes = F.normalize(x + self.both(both), dim=3) * batch.mask.unsqueeze(3)
        return nodes, F.normalize(nodes.sum(2), dim=2)

    def score(self, graph: Tensor, columns: Tensor) -> Tensor:
        """[S, B] from embeddings of graphs."""
        x = torch.cat([graph, columns.expand(*graph.shape[:2], -1)], 2)
        x = self.dropout(torch.relu(self.outer(self.dropout(torch.relu(self.inner(x))))))
        return self.last((graph + x) * HALF).squeeze(2)

    def reconstruct(self, batch: GraphBatch, nodes: Tensor, graph: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the operation of every node after the first [S, B, n - 1, operations] and of the edges into it
        [S, B, n - 1, n], each from the nodes before it."""
        x = self.dropout(self.decoded_tokens(batch))[:, :, :-1]
        x = (x + self.decoder(x, batch.mask[:, :, 1:], graph)) * HALF
        weight = torch.matmul(self.query(x), nodes.transpose(2, 3))
        weight = weight.masked_fill(batch.mask.unsqueeze(2) == 0, -1e9).softmax(3)
        x = (x + torch.tanh(self.mix(torch.cat([torch.matmul(weight, nodes), x], 3)))) * HALF
        return self.operation(x), self.edges(x)[..., : batch.ops.shape[2]]


def reconstruction_loss(operations: Tensor, edges: Tensor, batch: GraphBatch) -> Tensor:
    """Mean cross entropy [S] of what `reconstruct` gives, over every operation after the first and every pair of real
    nodes."""
    real = batch.mask[:, :, 1:]
    nodes = batch.ops.shape[2]
    before = torch.ones(nodes - 1, nodes, device=real.device).tril() * real.unsqueeze(3)
    wanted = batch.ops[:, :, 1:].clamp(max=operations.shape[3] - 1)  # padding, which does not count
    named = F.cross_entropy(operations.movedim(3, 1), wanted, reduction="none")
    drawn = F.binary_cross_entropy_with_logits(edges, batch.adjacency.transpose(2, 3)[:, :, 1:], reduction="none")
    total = (named * real).sum((1, 2)) + (drawn * before).sum((1, 2, 3))
    return total / (real.sum((1, 2)) + before.sum((1, 2, 3))).clamp(min=1)


class SemiSupervised(StackedPredictor):
    """SemiNAS: learns the labelled graphs, labels further ones drawn from the unlabelled graphs given to `fit`, and
    learns both together; all the while its decoder learns to give the graph back.

    Luo, Tan, Wang, Qin, Chen and Liu, Semi-Supervised Neural Architecture Search, NeurIPS 2020, section 3. Departures
    from the release: a step per node where that has one per edge and operation, AdamW with the rate along a cosine, no
    clipping of gradients, and no search by gradients in the embedding. Extra columns join the predictor's MLP; those of
    unlabelled graphs are unknown and stand at their mean.
    """

    kind = "semi-nas"
    Settings = SemiSupervisedSettings

    @property
    def needs_unlabelled(self) -> bool:
        """Draws the synthetic graphs from them."""
        return True

    def _pool(self, unlabelled: GraphTable | None, rng: np.random.Generator) -> GraphTable:
        assert self._data is not None
        labelled = self._data[0]
        if unlabelled is not None:
            identity = concatenate([labelled, unlabelled]).identities()
            identity, known = identity[len(labelled) :], identity[: len(labelled)]
            first = np.unique(identity, return_index=True)[1]
            new = np.sort(first[~np.isin(identity[first], known)])
            if len(new):
                return unlabelled.take(rng.permutation(new)[: self.settings.synthetic])
        given = "no unlabelled graphs" if unlabelled is None else f"{len(unlabelled)} graphs that are all labelled"
        raise UserError(given, "further graphs of the space to label (`unlabelled=` of fit)", "two-direction")

    def _network(self, stack: int, columns: int) -> nn.Module:
        s = self.settings
        return EncoderDecoder(
            stack,
            len(self.vocabulary),
            columns,
            width=s.width,
            inner=s.inner,
            dropout=s.dropout,
            parts=len(self._parts),
        )

    def _learn(
        self, model: nn.Module, graphs: GraphBatch, rows: Tensor, pool: Tensor, targets: Tensor, generators: Generators
    ) -> None:
        assert isinstance(model, EncoderDecoder)
        s = self.settings

        def objective(batch: GraphBatch, wanted: Tensor) -> Tensor:
            nodes, graph = model.encode(batch)
            error = (model.score(graph, batch.columns) - wanted).square().mean(1)
            lost = reconstruction_loss(*model.reconstruct(batch, nodes, graph), batch)
            return s.trade_off * error + (1 - s.trade_off) * lost

        first = math.ceil(s.pretrain_steps / max(1, round(rows.shape[1] / s.batch)))  # epochs

        def progress(before: int):
            return lambda done, _: self.progress and self.progress(before + done, first + s.epochs)

        descend(model, objective, graphs, rows, targets, s, generators, epochs=first, progress=progress(0))
        with torch.no_grad():
            labels = torch.cat([model(graphs.rows(part)) for part in pool.split(1000, 1)], 1)
        repeats = math.ceil(pool.shape[1] / rows.shape[1])
        rows = torch.cat([rows.repeat(1, repeats), pool], 1)
        targets = torch.cat([targets.repeat(1, repeats), labels], 1)
        descend(model, objective, graphs, rows, targets, s, generators, progress=progress(first))
