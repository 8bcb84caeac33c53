"""BRP-NAS: a graph convolution network that says which of two architectures is the better one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit
from torch import Tensor, nn

from predictors.neural.batch import GraphBatch
from predictors.neural.layers import Dropout, Embedding, Generators, LayerNorm, Linear
from predictors.neural.members import StackedPredictor, StackSettings, descend
from predictors.neural.training import predict
from search_spaces.common.names import match

ANSWERS = ("soft", "hard")
CHUNK = 4096  # graphs at a time against all labelled ones


@dataclass(frozen=True)
class PairClassifierSettings(StackSettings):
    """StackSettings of BRP-NAS: 4 layers, dropout .2, AdamW with weight decay 5e-4 along a cosine (configuration of the
    release for NAS-Bench-201). Scaled to a CPU by choice: width 128 (theirs is 600); a step takes all ordered pairs of
    16 graphs, each encoded once (theirs takes 64 of all pairs), so that an epoch grows with n instead of n^2, and as it
    has far fewer steps there are 600 epochs at rate 1e-3 (250 at 3.5e-4). answers: soft (the probability that the
    softmax of the two targets gives) or hard (0, 1, a tie 1/2)."""

    epochs: int = 600
    batch: int = 16
    rate: float = 1e-3
    decay: float = 5e-4
    width: int = 128
    layers: int = 4
    dropout: float = 0.2
    answers: str = "soft"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "width", "layers")
        match(self.answers, ANSWERS, "a kind of answers")
        self.below_one("dropout")


class PairNetwork(nn.Module):
    """Graphs -> [S, B, 2]: (u, v), where u_i + v_j is the logit of "i is better than j".

    Layers: relu(LayerNorm(A X W + b)), A = the edges against the flow, self loops, and a further node that gathers from
    all; its state (with the extra columns) is the graph's. The released linear layer from two states to two logits with
    log-softmax is the same function: only the difference of its logits counts.
    """

    def __init__(
        self, stack: int, operations: int, columns: int, *, width: int, layers: int, dropout: float, parts: int = 1
    ):
        super().__init__()
        self.embedding = Embedding(stack, operations + 1, width)  # of padding and the further node too; W of layer 1
        self.part_embedding = Embedding(stack, parts, width) if parts > 1 else None
        self.bias = nn.Parameter(torch.zeros(stack, 1, 1, width))
        self.weights = nn.ModuleList(Linear(stack, width, width) for _ in range(layers - 1))
        self.norms = nn.ModuleList(LayerNorm(stack, width) for _ in range(layers))
        self.dropout = Dropout(dropout)
        self.last = Linear(stack, width + columns, 2)

    def forward(self, batch: GraphBatch) -> Tensor:
        further = self.embedding.weight.shape[1] - 1
        first = self.embedding(F.pad(batch.ops, (1, 0), value=further))
        if self.part_embedding is not None and batch.parts is not None:
            first = first + self.part_embedding(
                F.pad(batch.parts, (1, 0), value=self.part_embedding.weight.shape[1] - 1)
            )
        links = F.pad(batch.adjacency + torch.diag_embed(batch.mask), (1, 0, 1, 0))
        links[..., 0, 1:] = batch.mask
        links[..., 0, 0] = 1  # row i gathers: from what i feeds, and itself
        x = self.dropout(torch.relu(self.norms[0](torch.matmul(links, first) + self.bias)))
        for weight, norm in zip(self.weights, list(self.norms)[1:], strict=True):
            x = self.dropout(torch.relu(norm(weight(torch.matmul(links, x)))))
        state = x[..., 0, :]
        if batch.columns.shape[-1]:
            state = torch.cat([state, batch.columns.expand(*state.shape[:2], -1)], 2)
        return self.last(state)


def pair_loss(scores: Tensor, targets: Tensor, answers: str) -> Tensor:
    """Cross entropy [S] of scores [S, B, 2] over all ordered pairs of two graphs, targets [S, B]."""
    logits = scores[..., :1] + scores[..., 1:].transpose(1, 2)
    difference = targets.unsqueeze(2) - targets.unsqueeze(1)
    truth = torch.sigmoid(difference) if answers == "soft" else (difference.sign() + 1) / 2
    count = targets.shape[1]
    other = 1 - torch.eye(count, device=targets.device)
    each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return (each * other).sum((1, 2)) / max(count * (count - 1), 1)


def wins(scores: np.ndarray, rivals: np.ndarray) -> np.ndarray:
    """float64 [N]: expected share of the rivals [T, 2] that each graph [N, 2] beats, asked in both orders."""
    parts = []
    for start in range(0, len(scores), CHUNK):
        u, v = scores[start : start + CHUNK, :1].astype(np.float64), scores[start : start + CHUNK, 1:]
        first, second = expit(u + rivals[:, 1]), expit(rivals[:, 0] + v)
        parts.append((1 + first.mean(1) - second.mean(1)) / 2)
    return np.concatenate(parts)


class PairClassifier(StackedPredictor):
    """Binary relation predictor; graphs are ranked by the share of the labelled graphs that they are said to beat.

    Dudziak, Chau, Abdelfattah, Lee, Kim and Lane, BRP-NAS: Prediction-based NAS using GCNs, NeurIPS 2020, section 4.
    The release sorts by comparisons; those against a fixed set give scores that need no sorting of the space. It also
    takes `none` and `skip_connect` out of the graphs of NAS-Bench-201, which here stay nodes.
    """

    kind = "brp-nas"
    Settings = PairClassifierSettings

    def _network(self, stack: int, columns: int) -> nn.Module:
        s = self.settings
        return PairNetwork(
            stack,
            len(self.vocabulary),
            columns,
            width=s.width,
            layers=s.layers,
            dropout=s.dropout,
            parts=len(self._parts),
        )

    def _raw(self, graphs: GraphBatch) -> np.ndarray:
        assert self._data is not None
        labelled = self._tensors(self._data[0], self._standardized(self._data[2]))
        rivals = predict(self._model, self.settings.members, labelled).numpy()
        scores = predict(self._model, self.settings.members, graphs).numpy()
        return np.stack([wins(own, others) for own, others in zip(scores, rivals, strict=True)])

    def _learn(
        self, model: nn.Module, graphs: GraphBatch, rows: Tensor, pool: Tensor, targets: Tensor, generators: Generators
    ) -> None:
        def objective(batch: GraphBatch, wanted: Tensor) -> Tensor:
            return pair_loss(model(batch), wanted, self.settings.answers)

        descend(model, objective, graphs, rows, targets, self.settings, generators, progress=self.progress)
