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
    edge, for graphs of at most `nodes` nodes; larger ones are cut, so use it within one space)."""
    return np.concatenate([FEATURES[match(name, FEATURES, "a feature set")](table, parts, nodes) for name in names], 1)


def _graf(table: GraphTable, parts: Sequence[str], nodes: int) -> np.ndarray:
    return path_features(table, parts)[0]


def _one_hot(table: GraphTable, parts: Sequence[str], nodes: int) -> np.ndarray:
    wide = table.padded(nodes)
    ops = wide.ops[:, :nodes, None] == np.arange(len(table.vocabulary), dtype=np.int8)
    upper = np.triu_indices(nodes, 1)
    edges = wide.adjacency[:, upper[0], upper[1]]
    return np.concatenate([ops.reshape(len(table), -1), edges], 1).astype(np.float32)


FEATURES: dict[str, Callable[[GraphTable, Sequence[str], int], np.ndarray]] = {"graf": _graf, "one-hot": _one_hot}


class Standardizer:
    """Columns to zero mean and unit variance over the rows it was made from; constant ones are dropped."""

    def __init__(self, rows: np.ndarray):
        self.mean, deviation = rows.mean(0, dtype=np.float64), rows.std(0, dtype=np.float64)
        self.kept = deviation > 1e-9 * np.maximum(np.abs(self.mean), 1)
        self.mean, self.deviation = self.mean[self.kept], deviation[self.kept]

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """float64 [N, kept columns]."""
        return (rows[:, self.kept] - self.mean) / self.deviation
