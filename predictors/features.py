"""Feature sets: graphs (and extra columns) as the rows that classical methods learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from predictors.graphs import GraphTable
from predictors.path_features import path_features
from search_spaces.common.names import match


def feature_matrix(table: GraphTable, names: Sequence[str], parts: Sequence[str], nodes: int) -> np.ndarray:
    """float32 [N, F]: the named sets side by side; `parts` and `nodes` are those of the training graphs, so that the
    columns mean the same at prediction. Sets: `graf` (path features), `one-hot` (operation of every node and every
    edge, for graphs of at most `nodes` nodes; larger ones are cut, so use it within one space), `random-projection`
    (`random_projections`)."""
    return np.concatenate([FEATURES[match(name, FEATURES, "a feature set")](table, parts, nodes) for name in names], 1)


def _graf(table: GraphTable, parts: Sequence[str], nodes: int) -> np.ndarray:
    return path_features(table, parts)[0]


def _one_hot(table: GraphTable, parts: Sequence[str], nodes: int) -> np.ndarray:
    wide = table.padded(nodes)
    ops = wide.ops[:, :nodes, None] == np.arange(len(table.vocabulary), dtype=np.int8)
    upper = np.triu_indices(nodes, 1)
    edges = wide.adjacency[:, upper[0], upper[1]]
    return np.concatenate([ops.reshape(len(table), -1), edges], 1).astype(np.float32)


def random_projections(table: GraphTable, *, width: int = 128, steps: int = 3) -> np.ndarray:
    """float32 [N, (steps + 1) * width]: very sparse random projections of the operations within 0 to `steps` edges of
    each node (directions alike, rows of the adjacency divided by their sums), averaged over the nodes.

    After Chen, Sultan, Tian, Chen and Skiena, Fast and Accurate Network Embeddings via Very Sparse Random Projection,
    CIKM 2019 (FastRP). The projection is fixed: the same for every table over one vocabulary.
    """
    rng = np.random.default_rng(0)
    projection = rng.choice(
        np.array([-1, 0, 1], np.float32), (len(table.vocabulary) + 1, width), p=[1 / 6, 2 / 3, 1 / 6]
    )
    projection[-1] = 0  # padding
    states = projection[table.ops]
    both = (table.adjacency | table.adjacency.transpose(0, 2, 1)).astype(np.float32)
    both /= np.maximum(both.sum(2, keepdims=True), 1)
    real = np.maximum(table.mask.sum(1, keepdims=True), 1)
    pooled = []
    for step in range(steps + 1):
        states = both @ states if step else states
        pooled.append((states * table.mask[:, :, None]).sum(1) / real)
    return np.concatenate(pooled, 1)


def _projected(table: GraphTable, parts: Sequence[str], nodes: int) -> np.ndarray:
    return random_projections(table)


FEATURES: dict[str, Callable[[GraphTable, Sequence[str], int], np.ndarray]] = {
    "graf": _graf,
    "one-hot": _one_hot,
    "random-projection": _projected,
}


class Standardizer:
    """Columns to zero mean and unit variance over the rows it was made from; constant ones are dropped (where all
    are, the first stays, as zeros: learners want a column)."""

    def __init__(self, rows: np.ndarray):
        self.mean, deviation = rows.mean(0, dtype=np.float64), rows.std(0, dtype=np.float64)
        self.kept = deviation > 1e-9 * np.maximum(np.abs(self.mean), 1)
        if not self.kept.any():
            self.kept[0], deviation[0] = True, np.inf
        self.mean, self.deviation = self.mean[self.kept], deviation[self.kept]

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """float64 [N, kept columns]."""
        return (rows[:, self.kept] - self.mean) / self.deviation
