"""AQuaSurF: the next activation function is the one whose neighbours, by shape and by Fisher spectrum, did best.

Bingham and Miikkulainen, Efficient Activation Function Optimization through Surrogate Modeling, NeurIPS 2023 (arXiv
2301.05785). The paper embeds both features with UMAP, unites the two neighbour graphs and regresses in the plane. Here
the neighbour graphs are united without an embedding: distances are shortest paths in the union, each edge in units of
its ends' distance to their nearest neighbours, which is what UMAP lays out. So nothing is lost to two dimensions, no
further package is needed, and results are not the paper's to the digit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse.csgraph import shortest_path
from scipy.spatial.distance import cdist
from sklearn.neighbors import KNeighborsRegressor
from torch import Tensor, nn

from nas.objectives import Objective
from nas.strategies.strategy import Strategy, positive
from search_spaces.common.errors import UserError
from search_spaces.layers.evaluate import evaluate
from search_spaces.layers.graph import LayerGraph
from search_spaces.space import SearchSpace

BASELINES = ("elu", "relu", "selu", "sigmoid", "softplus", "softsign", "silu", "tanh")
SAMPLES = 1000
Spectra = Callable[[Sequence[LayerGraph]], np.ndarray]  # graphs -> [N, bins]


def output_features(graphs: Sequence[LayerGraph]) -> np.ndarray:
    """[N, 1000]: the functions' values at 1,000 normal numbers cut at -5 and 5, in float32 as the paper has them."""
    x = np.clip(np.random.RandomState(0).normal(size=SAMPLES), -5, 5).astype(np.float32)
    points = torch.from_numpy(x).reshape(-1, 1)
    with torch.no_grad():
        return np.stack([evaluate(graph, points).flatten().numpy() for graph in graphs])


def fisher_features(network: nn.Module, images: Tensor, labels: Tensor, *, weights_per_bin: int = 100) -> np.ndarray:
    """The distribution of the log eigenvalues of the network's Fisher matrix, layer by layer: [all bins].

    Block-diagonal and Kronecker-factored (Martens and Grosse 2015, arXiv 1503.05671; convolutions as in arXiv
    1602.01407): per linear layer or convolution A = E[a a^T] of its inputs (patches, and a one for the bias) and G =
    E[g g^T] of the loss's gradient at its outputs, a layer's eigenvalues being all products. Their logarithms, kept
    within -100 and 100, fall into a bin for every `weights_per_bin` weights (at least one), cumulated to 1.
    images [B, C, H, W], labels [B]. Grouped convolutions are left out. The network is left as it was but for its
    running statistics. Errors: UserError for a network without such a layer.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)]
    if not layers:
        raise UserError(type(network).__name__, "a network with linear layers or convolutions")
    seen: dict[nn.Module, list[Tensor]] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[module] = [inputs[0].detach(), output]

    handles = [layer.register_forward_hook(keep) for layer in layers]
    training = network.training
    try:
        network.train()
        loss = nn.functional.cross_entropy(network(images), labels, reduction="sum")
        used = [layer for layer in layers if layer in seen]
        gradients = torch.autograd.grad(loss, [seen[layer][1] for layer in used])
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
    parts = []
    for layer, gradient in zip(used, gradients, strict=True):
        a, g = kronecker_factors(layer, seen[layer][0], gradient)
        logs = np.clip(np.add.outer(_log_eigenvalues(a), _log_eigenvalues(g)).ravel(), -100, 100)
        count, _ = np.histogram(logs, bins=max(1, layer.weight.numel() // weights_per_bin), range=(-100, 100))
        parts.append(np.cumsum(count) / count.sum())
    return np.concatenate(parts)


def kronecker_factors(layer: nn.Module, inputs: Tensor, gradient: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(A, G) of a layer from its inputs and the gradient of the summed loss at its outputs, in float64.

    Of a convolution A sums over positions and G averages over them, as in arXiv 1602.01407, section 3.1.
    """
    samples = len(inputs)
    if isinstance(layer, nn.Conv2d):
        if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            raise UserError(layer.padding_mode, "a convolution padded by a number of zeros")
        patches = nn.functional.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        rows, slopes = patches.transpose(1, 2).flatten(0, 1), gradient.flatten(2).transpose(1, 2).flatten(0, 1)
    else:
        rows, slopes = inputs.flatten(0, -2), gradient.flatten(0, -2)
    rows, slopes = rows.double(), slopes.double()
    if layer.bias is not None:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    return (rows.T @ rows / samples).numpy(), (slopes.T @ slopes / len(slopes)).numpy()


def _log_eigenvalues(matrix: np.ndarray) -> np.ndarray:
    return np.log(np.clip(np.linalg.eigvalsh(matrix), np.exp(-50), np.exp(50)))


def union_distances(distances: Sequence[np.ndarray], neighbours: int = 15) -> np.ndarray:
    """[N, N]: shortest paths over the union of the neighbour graphs of several distance matrices.

    Every function is joined to its `neighbours` nearest ones in each matrix; an edge has its distance beyond that to
    the nearest neighbour, over the mean distance of the neighbours (UMAP's local connectivity), averaged over both
    ends; an edge of several graphs has its least length. Parts that are not connected are infinitely far.
    """
    count = len(distances[0])
    edges = np.full((count, count), np.inf)
    for matrix in distances:
        others = matrix.astype(float)
        np.fill_diagonal(others, np.inf)
        k = min(neighbours, count - 1)
        near = np.argsort(others, axis=1, kind="stable")[:, :k]
        rows = np.arange(count)[:, None]
        found = others[rows, near]
        scale = np.maximum((found - found[:, :1]).mean(1, keepdims=True), 1e-12 * (1 + found[:, :1]))
        local = np.full((count, count), np.inf)
        local[rows, near] = (found - found[:, :1]) / scale + 1e-6  # equal functions stay joined
        both = np.where(np.isinf(local), local.T, np.where(np.isinf(local.T), local, (local + local.T) / 2))
        edges = np.minimum(edges, both)
    return shortest_path(np.where(np.isinf(edges), 0, edges), directed=False)


class AQuaSurF(Strategy[LayerGraph]):
    """Nearest-neighbour regression over activation functions; each time the best prediction is asked.

    The first `begin` (8) functions are the space's first samples, the baselines of a FilteredActivations. pool (400):
    how many functions are drawn and described in all. regress (3): neighbours of a prediction. neighbours (15): of the
    graphs of `union_distances`. spectra: a second description of functions beside their outputs, [N, bins], compared
    by the sum of absolute differences, such as `fisher_features` in an anchor at initialisation; None for outputs
    alone (then distances are plain Euclidean ones). A failed trial counts as the worst score so far. It never waits.
    Only for spaces of activation functions.
    """

    name = "aquasurf"

    def __init__(
        self,
        space: SearchSpace[LayerGraph],
        objectives: Sequence[Objective],
        rng: np.random.Generator,
        *,
        begin: int = 8,
        pool: int = 400,
        regress: int = 3,
        neighbours: int = 15,
        spectra: Spectra | None = None,
    ):
        super().__init__(space, objectives, rng)
        self.begin, self.regress = positive("begin", begin), positive("regress", regress)
        self.neighbours, self.spectra = positive("neighbours", neighbours), spectra
        if pool < begin:
            raise UserError(pool, f"a pool of at least the {begin} first functions")
        self.pool_size = pool
        self.pool: list[LayerGraph] = []
        self._distances: np.ndarray | None = None
        self._places: dict[int, int] = {}  # trial -> place in the pool

    def _propose(self) -> tuple[LayerGraph, int | None, int | None]:
        if not self.pool:
            self._draw()
        left = [i for i in range(len(self.pool)) if i not in self._places.values()]
        while left:
            at = left[0] if len(self._places) < self.begin else self._best(left)
            self._places[len(self.trials)] = at
            if self._take(self.pool[at]):
                return self.pool[at], None, None
            left.remove(at)
        raise StopIteration

    def _draw(self) -> None:
        keys: dict[str, LayerGraph] = {}
        for _ in range(20 * self.pool_size):
            arch = self.space.sample(self.rng)
            keys.setdefault(self.space.key(arch), arch)
            if len(keys) == self.pool_size:
                break
        self.pool = list(keys.values())
        outputs = cdist(*[output_features(self.pool)] * 2)
        if self.spectra is None:
            self._distances = outputs
        else:
            spectra = cdist(*[self.spectra(self.pool)] * 2, metric="cityblock")
            self._distances = union_distances([outputs, spectra], self.neighbours)

    def predictions(self, places: Sequence[int]) -> np.ndarray:
        """The predicted scores of functions of the pool. Errors: UserError before a trial was told."""
        assert self._distances is not None
        told = [(self._places[id], self.score(id)) for id in self.metrics]
        finite = [score[1] for _, score in told if np.isfinite(score[1])]
        if not finite:
            raise UserError(len(told), "at least one trial that did not fail")
        known = [at for at, _ in told]
        scores = [score[1] if np.isfinite(score[1]) else min(finite) for _, score in told]
        far = np.where(np.isfinite(self._distances), self._distances, 1e12)
        model = KNeighborsRegressor(min(self.regress, len(known)), metric="precomputed")
        model.fit(far[np.ix_(known, known)], scores)
        return model.predict(far[np.ix_(list(places), known)])

    def _best(self, left: list[int]) -> int:
        if not any(metrics is not None for metrics in self.metrics.values()):
            return left[0]
        return left[int(np.argmax(self.predictions(left)))]
