"""The network of NAS-Bench-Graph: an optional linear map, four computing nodes, one or two linear maps.

Qin, Zhang, Wang, Zhang and Zhu, NAS-Bench-Graph, NeurIPS 2022 (Datasets and Benchmarks), and the authors' training
code, with the convolutions of torch_geometric.
"""

from __future__ import annotations

import torch
from torch import nn

from search_spaces.space import LayerFactory

# The authors' training code has 4 heads of hidden / 4 channels, a comment in their package says 2; counts agree.
GAT_HEADS = 4


class GraphNetwork(nn.Module):
    """Four nodes of dropout(act(norm(x))) and an operation, their leaves concatenated, one or two linear maps.

    On raw input features a node applies its operation alone; its unused normalisation is there because the
    benchmark's counts include it. Normalisations see the graph as one image whose nodes are the positions.
    """

    def __init__(
        self,
        links: tuple[int, ...],
        ops: tuple[str, ...],
        *,
        in_features: int,
        num_classes: int,
        hidden: int,
        pre_layers: int,
        post_layers: int,
        norm: LayerFactory,
        act: LayerFactory,
        dropout: float,
    ):
        super().__init__()
        self.links = links
        self.leaves = [node for node in range(1, 5) if node not in links]
        self.stem = nn.Linear(in_features, hidden) if pre_layers else nn.Identity()
        raw = [not pre_layers]
        self.nodes = nn.ModuleList()
        for link, op in zip(links, ops, strict=True):
            inputs = in_features if raw[link] else hidden
            self.nodes.append(Node(op, inputs, hidden, raw[link], norm, act, dropout))
            raw.append(raw[link] and op == "skip")
        self.dropout = nn.Dropout(dropout)
        self.act = act(len(self.leaves) * hidden)
        merged = len(self.leaves) * hidden
        self.merge = nn.Linear(merged, hidden) if post_layers else nn.Identity()
        self.classifier = nn.Linear(hidden if post_layers else merged, num_classes)

    def stages(self) -> list[str]:
        """The names of the computing nodes, in order."""
        return [f"nodes.{i}" for i in range(len(self.nodes))]

    def forward_features(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        """Node features [nodes, width] before the classifier."""
        outputs = [self.stem(self.dropout(x))]
        for link, node in zip(self.links, self.nodes, strict=True):
            outputs.append(node(outputs[link], edge_index))
        return self.merge(_as_image(self.act, torch.cat([outputs[leaf] for leaf in self.leaves], 1)))

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.forward_features(x, edge_index))


class Node(nn.Module):
    """One computing node; `raw` inputs pass neither normalisation nor activation."""

    def __init__(
        self, op: str, inputs: int, hidden: int, raw: bool, norm: LayerFactory, act: LayerFactory, dropout: float
    ):
        super().__init__()
        self.raw = raw
        self.norm, self.act, self.dropout = norm(hidden), act(hidden), nn.Dropout(dropout)
        self.operation = _operation(op, inputs, hidden, act)
        self.on_edges = op not in ("fc", "skip")

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        if not self.raw:
            x = self.dropout(_as_image(self.act, _as_image(self.norm, x)))
        return self.operation(x, edge_index) if self.on_edges else self.operation(x)


def _as_image(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Apply a layer of images to [nodes, channels] seen as [1, channels, nodes, 1]."""
    # Contiguous, because on others torch 2.13's BatchNorm2d gives wrong gradients in training on a CPU.
    return layer(x.t().contiguous()[None, :, :, None])[0, :, :, 0].t()


class StackActivation(nn.Module):
    """An activation inside ARMA's convolution, which calls it with [1, nodes, channels]."""

    def __init__(self, act: nn.Module):
        super().__init__()
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _as_image(self.act, x[0])[None]


def _operation(op: str, inputs: int, outputs: int, act: LayerFactory) -> nn.Module:
    if op == "skip":
        return nn.Identity()
    if op == "fc":
        return nn.Linear(inputs, outputs)
    from torch_geometric import nn as pyg

    if op == "gat":
        return pyg.GATConv(inputs, outputs // GAT_HEADS, GAT_HEADS)
    if op == "gin":
        return pyg.GINConv(nn.Linear(inputs, outputs))
    if op == "cheb":
        return pyg.ChebConv(inputs, outputs, K=2)
    if op == "arma":
        return pyg.ARMAConv(inputs, outputs, act=StackActivation(act(outputs)))
    kinds = {"gcn": pyg.GCNConv, "sage": pyg.SAGEConv, "graph": pyg.GraphConv}
    return kinds[op](inputs, outputs)
