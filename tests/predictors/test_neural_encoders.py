"""Encoders against torch-geometric with the same weights, against explicit loops, and their invariances."""

import numpy as np
import pytest
import torch
from torch import nn

from predictors.graphs import as_table
from predictors.neural.batch import GraphBatch, graph_batch, laplacian_positions
from predictors.neural.encoders import BLOCKS, POSITIONS, Encoder, pooled
from predictors.neural.layers import initialize
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

STACK = 2


def sampled(name, count, rng):
    space = load_space(name)
    return as_table([space.graph(space.sample(rng)) for _ in range(count)], space.vocabulary)


def make(kind, table, **more):
    encoder = Encoder(kind, STACK, len(table.vocabulary), width=16, parts=len(table.part_names), **more)
    initialize(encoder, [torch.Generator().manual_seed(k) for k in range(STACK)])
    for parameter in encoder.parameters():  # norms too, so that a forgotten one shows
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return encoder.eval()


def batch_of(table, kind):
    return graph_batch(table, table.part_names, positions=POSITIONS.get(kind, 0)).stacked(STACK)


@pytest.mark.parametrize("kind", ["gin", "gin-directed"])
def test_gin_is_torch_geometrics(kind, rng):
    from torch_geometric.nn import GINConv

    table = sampled("nas-bench-101", 12, rng)
    encoder = make(kind, table)
    for layer in encoder.layers:
        layer.norm.mean.normal_()
        layer.norm.variance.uniform_(0.5, 2)
    found = encoder(batch_of(table, kind))
    for row, graph in enumerate(table):
        data = graph.to_pyg(table.vocabulary)
        edges = data.edge_index if kind == "gin-directed" else torch.cat([data.edge_index, data.edge_index.flip(0)], 1)
        for k in range(STACK):
            x = encoder.embedding.weight[k][data.x]
            for layer in encoder.layers:
                inner, outer, norm = nn.Linear(16, 32), nn.Linear(32, 16, bias=False), nn.BatchNorm1d(16).eval()
                convolution = GINConv(nn.Sequential(inner, nn.ReLU(), outer))  # draws its weights anew
                inner.weight.data, inner.bias.data = layer.inner.weight[k].T, layer.inner.bias[k, 0]
                outer.weight.data = layer.outer.weight[k].T
                norm.weight.data, norm.bias.data = layer.norm.weight[k, 0, 0], layer.norm.bias[k, 0, 0]
                norm.running_mean, norm.running_var = layer.norm.mean[k, 0, 0], layer.norm.variance[k, 0, 0]
                x = norm(convolution(x, edges))
                x = x if layer.last else torch.relu(x)
            torch.testing.assert_close(found[k, row, : len(graph)], x, rtol=1e-4, atol=1e-4)


def test_two_directions_are_two_sums_of_torch_geometric(rng):
    from torch_geometric.nn import SimpleConv

    table = sampled("nas-bench-201", 6, rng)
    encoder = make("two-direction", table)
    found = encoder(batch_of(table, "two-direction"))
    add = SimpleConv("add")

    def norm(module, x, k):
        return nn.functional.layer_norm(x, (16,), module.weight[k], module.bias[k])

    for row, graph in enumerate(table):
        data = graph.to_pyg(table.vocabulary)
        for k in range(STACK):
            x = encoder.embedding.weight[k][data.x]
            for layer in encoder.layers:
                y = norm(layer.norm, x, k)
                own, into, out = layer.inner.weight[k].split(16)
                mixed = y @ own + add(y, data.edge_index) @ into + add(y, data.edge_index.flip(0)) @ out
                mixed = torch.relu(mixed + layer.inner.bias[k, 0])
                x = x + mixed @ layer.outer.weight[k] + layer.outer.bias[k, 0]
            torch.testing.assert_close(found[k, row], norm(encoder.final, x, k), rtol=1e-4, atol=1e-4)


def test_nn_former_attends_to_neighbours_and_siblings_only(rng):
    """The first block's attention with explicit loops over heads and allowed pairs."""
    table = sampled("nas-bench-101", 5, rng)
    encoder = make("nn-former", table, layers=1)
    attention = encoder.layers[0].attention
    batch = batch_of(table, "nn-former")
    x = torch.randn(STACK, len(table), table.nodes, 16)
    adjacency = batch.adjacency
    into = adjacency.transpose(2, 3)
    masks = [adjacency, into, adjacency @ into, into @ adjacency]
    allowed = torch.stack([m > 0 for m in masks], 2) | torch.eye(table.nodes, dtype=torch.bool)
    found = attention(x, allowed)
    links = table.adjacency
    for k in range(STACK):
        for row in range(len(table)):
            query, key, value = (x[k, row] @ attention.into.weight[k] + attention.into.bias[k, 0]).split(16, 1)
            heads = []
            for head in range(4):
                part = slice(4 * head, 4 * head + 4)
                result = torch.zeros(table.nodes, 4)
                for i in range(table.nodes):
                    near = [
                        j
                        for j in range(table.nodes)
                        if i == j
                        or (head == 0 and links[row, i, j])
                        or (head == 1 and links[row, j, i])
                        or (head == 2 and (links[row, i] & links[row, j]).any())
                        or (head == 3 and (links[row, :, i] & links[row, :, j]).any())
                    ]
                    weight = torch.softmax(torch.stack([query[i, part] @ key[j, part] / 2 for j in near]), 0)
                    result[i] = sum(w * value[j, part] for w, j in zip(weight, near, strict=True))
                heads.append(result)
            expected = torch.cat(heads, 1) @ attention.out.weight[k] + attention.out.bias[k, 0]
            torch.testing.assert_close(found[k, row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("space", ["nas-bench-101", "darts"])
def test_padding_changes_nothing_and_members_are_apart(kind, space, rng):
    table = sampled(space, 6, rng)
    encoder = make(kind, table)
    found = encoder(batch_of(table, kind))
    wide = encoder(batch_of(table.padded(table.nodes + 3), kind))
    real = torch.from_numpy(table.mask)
    torch.testing.assert_close(wide[:, :, : table.nodes][:, real], found[:, real], rtol=1e-4, atol=1e-4)
    changed = make(kind, table)
    for parameter in changed.parameters():
        parameter.data[0] += 1.0
    again = changed(batch_of(table, kind))
    assert torch.equal(again[1], found[1])
    assert not torch.allclose(again[0], found[0])


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind != "graph-transformer"])
def test_numbering_of_the_nodes_does_not_matter(kind, rng):
    """Nodes permuted (out of topological order too) give permuted embeddings: nothing but edges carries the order."""
    table = sampled("nas-bench-101", 4, rng)
    encoder, batch = make(kind, table), batch_of(table, kind)
    order = torch.from_numpy(rng.permutation(table.nodes))
    shuffled = GraphBatch(
        batch.ops[:, :, order],
        batch.adjacency[:, :, order][..., order],
        batch.mask[:, :, order],
        None,
        None,
        batch.columns,
    )
    found, again = encoder(batch), encoder(shuffled)
    real = batch.mask[:, :, order] > 0
    torch.testing.assert_close(again[real], found[:, :, order][real], rtol=1e-4, atol=1e-4)


def test_directions_matter_where_they_should(rng):
    """Reversed edges give another embedding, except to the undirected GIN."""
    table = sampled("nas-bench-101", 6, rng)
    for kind in ("gin", "gin-directed", "two-direction", "nn-former"):
        encoder, batch = make(kind, table), batch_of(table, kind)
        backward = GraphBatch(batch.ops, batch.adjacency.transpose(2, 3), batch.mask, None, None, batch.columns)
        same = torch.allclose(encoder(batch)[batch.mask > 0], encoder(backward)[batch.mask > 0], atol=1e-4)
        assert same == (kind == "gin")


def test_mean_over_real_nodes(rng):
    x, mask = torch.randn(2, 5, 4, 3), (torch.rand(2, 5, 4) < 0.6).float()
    mask[:, :, 0] = 1
    found = pooled(x, mask)
    for k in range(2):
        for row in range(5):
            torch.testing.assert_close(found[k, row], x[k, row][mask[k, row] > 0].mean(0))


def test_laplacian_positions_are_eigenvectors(rng):
    from torch_geometric.utils import get_laplacian, to_dense_adj, to_undirected

    table = sampled("nas-bench-101", 8, rng)
    found = laplacian_positions(table.adjacency, table.mask, 6)
    for row, graph in enumerate(table):
        n = len(graph)
        edges = to_undirected(graph.to_pyg(table.vocabulary).edge_index)
        laplacian = to_dense_adj(
            *(lambda e: (e[0], None, e[1]))(get_laplacian(edges, normalization="sym", num_nodes=n))
        )[0]
        values = np.linalg.eigvalsh(laplacian.numpy())
        for column in range(min(6, n - 1)):
            vector = found[row, :n, column]
            assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
            np.testing.assert_allclose(laplacian.numpy() @ vector, values[column + 1] * vector, atol=1e-5)
        assert not found[row, n:].any()
        assert not found[row, :, n - 1 :].any()


def test_parts_are_told_apart_and_unknown_ones_refused(rng):
    table = sampled("darts", 4, rng)
    assert len(table.part_names) > 1
    batch = graph_batch(table, tuple(reversed(table.part_names)))
    for row, graph in enumerate(table):
        names = [tuple(reversed(table.part_names))[i] for i in batch.parts[row, : len(graph)]]
        assert tuple(names) == graph.parts
    with pytest.raises(UserError, match="normal"):
        graph_batch(table, ("both", "elsewhere"))
