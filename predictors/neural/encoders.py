"""Encoders: stacked networks from graphs to node embeddings, dense and masked; both cells of an architecture in one.

All take a GraphBatch [S, B, n] and give [S, B, n, width]; padding neither sends messages nor is sent any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from predictors.neural.batch import GraphBatch
from predictors.neural.layers import Dropout, Embedding, LayerNorm, Linear, MaskedBatchNorm
from search_spaces.common.names import match

HEADS = 4


class Encoder(nn.Module):
    """Embedding of operations (and of parts, where there are several; and of positions), blocks, final norm."""

    def __init__(
        self,
        kind: str,
        stack: int,
        operations: int,
        *,
        width: int = 128,
        layers: int = 3,
        dropout: float = 0.0,
        parts: int = 1,
    ):
        super().__init__()
        block, final = BLOCKS[match(kind, BLOCKS, "an encoder")]
        self.embedding = Embedding(stack, operations, width)
        self.part_embedding = Embedding(stack, parts, width) if parts > 1 else None
        places = POSITIONS.get(kind, 0)
        self.place = Linear(stack, places, width) if places else None
        self.layers = nn.ModuleList(block(stack, width, dropout, i == layers - 1) for i in range(layers))
        self.final = LayerNorm(stack, width) if final else nn.Identity()

    def forward(self, batch: GraphBatch) -> Tensor:
        layers = list(self.layers)
        plain = self.part_embedding is None and self.place is None
        if plain and hasattr(layers[0], "from_operations"):
            # The first block sees a handful of distinct rows: they go through its weights once.
            first: Any = layers.pop(0)
            x = first.from_operations(self.embedding, batch.ops, batch.adjacency, batch.mask)
        else:
            x = self.embedding(batch.ops)
            if self.part_embedding is not None:
                x = x + self.part_embedding(batch.parts)
            if self.place is not None:
                x = x + self.place(batch.positions)
        for layer in layers:
            x = layer(x, batch.adjacency, batch.mask)
        return self.final(x)

    def first_layers(self) -> list[nn.Module]:
        """What partial fine-tuning keeps as it was pre-trained: the embeddings and the first block."""
        first = [self.embedding, self.part_embedding, self.place, self.layers[0]]
        return [module for module in first if module is not None]


def one_hot(ops: Tensor, embedding: Embedding) -> Tensor:
    """ops int64 [...] as float [..., rows of the embedding]."""
    rows = torch.eye(embedding.weight.shape[1], dtype=embedding.weight.dtype, device=ops.device)
    return F.embedding(ops, rows)


def pooled(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [S, B, n, d] over real nodes: [S, B, d]."""
    return torch.matmul(mask.unsqueeze(2), x).squeeze(2) / mask.sum(2, keepdim=True).clamp(min=1)


class IsomorphismBlock(nn.Module):
    """h' = MLP(sum over neighbours and itself), batch norm over real nodes, ReLU except after the last block.

    Xu, Hu, Leskovec and Jegelka, How Powerful are Graph Neural Networks?, ICLR 2019, equation 4.1 with eps 0; the MLP
    is width - 2 width - width. directed: messages along the edges only, else both ways.
    """

    directed = False

    def __init__(self, stack: int, width: int, dropout: float, last: bool):
        super().__init__()
        self.inner = Linear(stack, width, 2 * width)
        # No bias: the norm takes any off, and an optimiser that divides by the gradient would let it drift.
        self.outer = Linear(stack, 2 * width, width, bias=False)
        self.norm = MaskedBatchNorm(stack, width)
        self.dropout = Dropout(dropout)
        self.last = last

    def forward(self, x: Tensor, adjacency: Tensor, mask: Tensor) -> Tensor:
        return self._rest(self.inner(torch.matmul(self._links(adjacency), x)), mask)

    def from_operations(self, embedding: Embedding, ops: Tensor, adjacency: Tensor, mask: Tensor) -> Tensor:
        """`forward` of embedded operations."""
        counts = torch.matmul(self._links(adjacency), one_hot(ops, embedding))
        return self._rest(self.inner.of_sums(counts, embedding.weight), mask)

    def _links(self, adjacency: Tensor) -> Tensor:
        into = adjacency.transpose(2, 3)
        # Edges between two nodes count once, whichever way they run.
        links = into if self.directed else torch.maximum(adjacency, into)
        return links + torch.eye(links.shape[-1], dtype=links.dtype, device=links.device)

    def _rest(self, inner: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.outer(torch.relu_(inner)), mask)
        return self.dropout(x if self.last else torch.relu_(x))


class DirectedIsomorphismBlock(IsomorphismBlock):
    """IsomorphismBlock whose messages follow the flow of data only."""

    directed = True


class GraphConvolutionBlock(nn.Module):
    """h' = (relu(A h V) + relu(B h W)) / 2: A takes the mean over a node and its predecessors, B over its successors.

    Graph convolution (Kipf and Welling, ICLR 2017) in both directions, as in Wen and others, Neural Predictor for
    Neural Architecture Search, ECCV 2020. Edges may have weights. Without biases: zeros stay zeros.
    """

    def __init__(self, stack: int, width: int, dropout: float, last: bool):
        super().__init__()
        self.before = Linear(stack, width, width, bias=False, init="xavier")
        self.after = Linear(stack, width, width, bias=False, init="xavier")
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, adjacency: Tensor, mask: Tensor) -> Tensor:
        into = adjacency.transpose(2, 3)
        before = (x + torch.matmul(into, x)) / (1 + into.sum(3, keepdim=True))
        after = (x + torch.matmul(adjacency, x)) / (1 + adjacency.sum(3, keepdim=True))
        return self.dropout((torch.relu(self.before(before)) + torch.relu(self.after(after))) / 2)


def _both_ways(x: Tensor, adjacency: Tensor) -> Tensor:
    """[x, sum over predecessors, sum over successors]."""
    before, after = torch.matmul(adjacency.transpose(2, 3), x), torch.matmul(adjacency, x)
    return torch.cat([x, before, after], 3)


class TwoDirectionBlock(nn.Module):
    """h' = h + W relu(V [x, sum from predecessors, sum from successors]), x = LayerNorm(h): each direction has weights
    of its own, norms stand before the weights, and a residual passes by."""

    def __init__(self, stack: int, width: int, dropout: float, last: bool):
        super().__init__()
        self.norm = LayerNorm(stack, width)
        self.inner = Linear(stack, 3 * width, width)
        self.outer = Linear(stack, width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, adjacency: Tensor, mask: Tensor) -> Tensor:
        return self._rest(x, self.inner(_both_ways(self.norm(x), adjacency)))

    def from_operations(self, embedding: Embedding, ops: Tensor, adjacency: Tensor, mask: Tensor) -> Tensor:
        """`forward` of embedded operations."""
        rows = self.norm(embedding.weight)
        return self._rest(embedding(ops), self.inner.of_sums(_both_ways(one_hot(ops, embedding), adjacency), rows))

    def _rest(self, x: Tensor, inner: Tensor) -> Tensor:
        return x + self.dropout(self.outer(torch.relu_(inner)))


class NeighbourAttention(nn.Module):
    """Attention of x [S, B, n, d] with one mask per head: allowed bool [S, B, heads, n, n] (or heads of 1)."""

    def __init__(self, stack: int, width: int):
        super().__init__()
        self.into = Linear(stack, width, 3 * width)
        self.out = Linear(stack, width, width)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        query, key, value = self.into(x).unflatten(3, (3, HEADS, -1)).permute(3, 0, 1, 4, 2, 5)
        score = torch.matmul(query, key.transpose(3, 4)) / query.shape[-1] ** 0.5
        weight = score.masked_fill(~allowed, -1e9).softmax(4)  # finite, so that rows of padding stay finite
        return self.out(torch.matmul(weight, value).transpose(2, 3).flatten(3))


class NeighbourFormerBlock(nn.Module):
    """Attention to predecessors, successors and siblings of both kinds, and a feed-forward part that also takes
    messages both ways; heads are masked by I + A, I + A^T, I + A A^T, I + A^T A.

    After NN-Former (Xu and others, CVPR 2025): heads and bidirectional feed-forward part; the norms stand before.
    """

    def __init__(self, stack: int, width: int, dropout: float, last: bool):
        super().__init__()
        self.norm, self.norm_forward = LayerNorm(stack, width), LayerNorm(stack, width)
        self.attention = NeighbourAttention(stack, width)
        self.inner = Linear(stack, width, 2 * width)
        self.before = Linear(stack, width, width, bias=False)
        self.after = Linear(stack, width, width, bias=False)
        self.outer = Linear(stack, 2 * width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, adjacency: Tensor, mask: Tensor) -> Tensor:
        into = adjacency.transpose(2, 3)
        eye = torch.eye(into.shape[-1], dtype=torch.bool, device=into.device)
        heads = (adjacency, into, torch.matmul(adjacency, into), torch.matmul(into, adjacency))
        allowed = torch.stack([head > 0 for head in heads], 2) | eye
        x = x + self.dropout(self.attention(self.norm(x), allowed))
        y = self.norm_forward(x)
        messages = torch.cat([torch.matmul(into, self.before(y)), torch.matmul(adjacency, self.after(y))], 3)
        return x + self.dropout(self.outer(torch.relu(self.inner(y) + messages)))


class TransformerBlock(nn.Module):
    """Pre-norm attention of every real node to every other, then a feed-forward part; the edges come in through the
    Laplacian positions alone (Dwivedi and Bresson 2021, full attention)."""

    def __init__(self, stack: int, width: int, dropout: float, last: bool):
        super().__init__()
        self.norm, self.norm_forward = LayerNorm(stack, width), LayerNorm(stack, width)
        self.attention = NeighbourAttention(stack, width)
        self.inner, self.outer = Linear(stack, width, 2 * width), Linear(stack, 2 * width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, adjacency: Tensor, mask: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm(x), (mask > 0)[:, :, None, None, :]))
        return x + self.dropout(self.outer(torch.relu(self.inner(self.norm_forward(x)))))


# name: (block, whether a LayerNorm stands at the end)
BLOCKS: dict[str, tuple[Callable[..., nn.Module], bool]] = {
    "gin": (IsomorphismBlock, False),
    "gin-directed": (DirectedIsomorphismBlock, False),
    "gcn": (GraphConvolutionBlock, True),
    "two-direction": (TwoDirectionBlock, True),
    "nn-former": (NeighbourFormerBlock, True),
    "graph-transformer": (TransformerBlock, True),
}
POSITIONS = {"graph-transformer": 6}  # Laplacian positions that an encoder reads
