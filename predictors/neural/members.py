"""StackedPredictor: base of the predictors whose small networks train as one stack, on objectives of their own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from predictors.base import LearnedPredictor
from predictors.features import Standardizer
from predictors.graphs import GraphTable
from predictors.labels import Target, scaled
from predictors.neural.batch import GraphBatch, graph_batch
from predictors.neural.layers import Generators, initialize, use_generators
from predictors.neural.training import DEVICES, PREDICTED_AT_ONCE, Progress, device_of, on_device, predict
from search_spaces.common.errors import UserError
from search_spaces.common.names import match
from search_spaces.graph import OpGraph

Objective = Callable[[GraphBatch, Tensor], Tensor]  # a batch [S, B] and its targets [S, B] -> [S]


@dataclass(frozen=True)
class StackSettings:
    """members: networks trained together, whose mean is predicted (from two on with a standard deviation). target: see
    `scaled`. epochs, batch: passes and labelled graphs per step; rate, decay: of AdamW, the rate along a cosine to 0.
    device: auto (a GPU where there is one), cpu or cuda."""

    members: int = 1
    target: Target = "normal-score"
    epochs: int = 150
    batch: int = 32
    rate: float = 1e-3
    decay: float = 0.0
    device: str = "auto"

    def __post_init__(self) -> None:
        match(self.device, DEVICES, "a device")
        self.at_least(1, "members", "epochs")
        self.at_least(2, "batch")

    def at_least(self, least: int, *names: str) -> None:
        """Errors: UserError for a setting below `least`."""
        for name in names:
            if getattr(self, name) < least:
                raise UserError(getattr(self, name), f"{name} of at least {least}")

    def below_one(self, *names: str) -> None:
        """Errors: UserError for a setting below 0, or of 1 or more."""
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise UserError(getattr(self, name), f"{name} from 0 to below 1")


@dataclass(frozen=True, eq=False)
class Problem:
    """What one fit was given: graphs (the labelled first, then those of the pool), targets [N], one seed a member."""

    graphs: GraphBatch
    targets: np.ndarray
    seeds: list[int]


class StackedPredictor(LearnedPredictor[Any]):
    """A subclass gives its network, the form of its inputs and how the stack learns. Weights are saved.

    progress: set to a function (epochs done, epochs) to follow the training.
    """

    progress: Progress | None = None
    _model: nn.Module
    _problem: Problem | None = None
    _waits: bool = False  # fit_many trains what its fits only prepare

    def _network(self, stack: int, columns: int) -> nn.Module:
        """`stack` networks: GraphBatch [S, B] with so many columns -> [S, B]."""
        raise NotImplementedError

    def _tensors(self, table: GraphTable, columns: np.ndarray) -> GraphBatch:
        """The inputs of the network: the graphs, unless a subclass sees something else of them; `columns` are the extra
        ones, standardised."""
        return graph_batch(table, self._parts, columns=columns)

    def _learn(
        self, model: nn.Module, graphs: GraphBatch, rows: Tensor, pool: Tensor, targets: Tensor, generators: Generators
    ) -> None:
        """Train member k on the graphs at rows[k] with targets[k] ([S, N]); pool [S, M]: rows without labels."""
        raise NotImplementedError

    def _note(self, table: GraphTable, extra: np.ndarray) -> None:
        """Keep what inputs depend on in the labelled graphs; called before a fit and after loading."""
        self._parts = tuple(sorted(table.part_names))
        self._standardizer = Standardizer(extra) if extra.shape[1] else None

    def _pool(self, unlabelled: GraphTable | None, rng: np.random.Generator) -> GraphTable | None:
        """The unlabelled graphs that the fit makes use of."""
        return None

    def fit_many(
        self,
        problems: Sequence[
            tuple[Sequence[OpGraph], np.ndarray, Mapping[str, np.ndarray] | None, Sequence[OpGraph] | None]
        ],
        rngs: Sequence[np.random.Generator],
    ) -> list[Self]:
        """New predictors of this one's settings, one fitted to each problem (graphs, y, extra, unlabelled).

        Problems of one size are trained in one stack; each result equals its own `fit` up to rounding.
        """
        fitted = [type(self)(self.space_name, self.vocabulary, self.settings) for _ in problems]
        for predictor, (graphs, y, extra, unlabelled), rng in zip(fitted, problems, rngs, strict=True):
            predictor._waits, predictor.progress = True, self.progress
            predictor.fit(graphs, y, extra=extra, unlabelled=unlabelled, rng=rng)
            predictor._waits = False
        groups: dict[tuple, list[Self]] = {}
        for predictor in fitted:
            groups.setdefault(predictor._shape(), []).append(predictor)
        for group in groups.values():
            _fit_together(group)
        return fitted

    def _fit(self, table, y, extra, unlabelled, rng) -> None:
        self._note(table, extra)
        seeds = [int(seed) for seed in rng.integers(2**63, size=self.settings.members)]
        graphs = self._tensors(table, self._standardized(extra))
        pool = self._pool(unlabelled, rng)
        if pool is not None:
            nodes = max(pool.nodes, table.nodes)
            graphs = self._tensors(table.padded(nodes), self._standardized(extra))
            empty = np.zeros((len(pool), graphs.columns.shape[1]))
            graphs = join([graphs, self._tensors(pool.padded(nodes), empty)])
        self._problem = Problem(graphs, scaled(y, self.settings.target), seeds)
        if not self._waits:
            _fit_together([self])

    def _standardized(self, extra: np.ndarray) -> np.ndarray:
        return np.zeros((len(extra), 0)) if self._standardizer is None else self._standardizer(extra)

    def _shape(self) -> tuple:
        assert self._problem is not None
        graphs = self._problem.graphs
        return len(self._problem.targets), tuple(graphs.ops.shape), tuple(graphs.columns.shape), self._parts

    def _scores(self, table: GraphTable, columns: np.ndarray) -> np.ndarray:
        """float64 [members, N], as the networks give them."""
        parts = []
        for start in range(0, len(table), PREDICTED_AT_ONCE):
            rows = np.arange(start, min(start + PREDICTED_AT_ONCE, len(table)))
            parts.append(self._raw(self._tensors(table.take(rows), columns[rows])))
        return np.concatenate(parts, 1).astype(np.float64)

    def _raw(self, graphs: GraphBatch) -> np.ndarray:
        return predict(self._model, self.settings.members, graphs).numpy()

    def _finish(self, model: nn.Module) -> None:
        """Take a trained model; members are put on one scale by their scores of the labelled graphs."""
        assert self._data is not None
        self._model, self._problem = model, None
        scores = self._scores(self._data[0], self._standardized(self._data[2]))
        self._center, self._scale = scores.mean(1), np.maximum(scores.std(1), 1e-12)

    def _predict(self, table, extra, std) -> tuple[np.ndarray, np.ndarray]:
        scores = self._scores(table, self._standardized(extra))
        scores = (scores - self._center[:, None]) / self._scale[:, None]
        spread = scores.std(0, ddof=1) if len(scores) > 1 else np.full(scores.shape[1], np.nan)
        return scores.mean(0), spread

    def _state(self) -> dict[str, np.ndarray]:
        state = {f"model.{name}": value.cpu().numpy() for name, value in self._model.state_dict().items()}
        return state | {"center": self._center, "scale": self._scale}

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        assert self._data is not None
        table, _, extra, _ = self._data
        self._note(table, extra)
        self._center, self._scale = state["center"], state["scale"]
        columns = self._tensors(table.take(np.arange(1)), self._standardized(extra[:1])).columns.shape[1]
        model = self._network(self.settings.members, columns)
        model.load_state_dict({k[6:]: torch.from_numpy(v) for k, v in state.items() if k.startswith("model.")})
        self._model = model.to(device_of(self.settings.device)).requires_grad_(False)


def vectors(columns: np.ndarray) -> GraphBatch:
    """Rows [N, F] as a GraphBatch without nodes, for networks that see vectors alone."""
    rows = len(columns)
    empty = torch.zeros(rows, 0)
    values = torch.from_numpy(np.ascontiguousarray(columns, np.float32))
    return GraphBatch(empty.long(), torch.zeros(rows, 0, 0), empty, None, None, values)


def join(batches: Sequence[GraphBatch]) -> GraphBatch:
    """One batch of the graphs of several with the same shapes."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(GraphBatch):
        each = [getattr(batch, field.name) for batch in batches]
        fields[field.name] = None if each[0] is None else torch.cat(each)
    return GraphBatch(**fields)


def descend(
    model: nn.Module,
    objective: Objective,
    graphs: GraphBatch,
    rows: Tensor,
    targets: Tensor,
    settings: StackSettings,
    generators: Generators,
    *,
    epochs: int | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
) -> None:
    """AdamW on the members' objectives over batches of their own, drawn from their own generators (on the CPU)."""
    epochs, batch = epochs or settings.epochs, batch or settings.batch
    use_generators(model, on_device(targets.device, generators))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=settings.decay, fused=True)
    members = torch.arange(len(generators), device=targets.device)[:, None]
    steps = max(1, round(rows.shape[1] / batch))
    model.train()
    for epoch in range(epochs):
        order = torch.stack([torch.randperm(rows.shape[1], generator=generator) for generator in generators])
        for step, part in enumerate(order.to(targets.device).tensor_split(steps, 1)):
            share = (epoch + step / steps) / epochs
            optimizer.param_groups[0]["lr"] = settings.rate * (1 + math.cos(math.pi * share)) / 2
            optimizer.zero_grad(set_to_none=True)
            objective(graphs.rows(rows[members, part]), targets[members, part]).sum().backward()
            optimizer.step()
        if progress is not None:
            progress(epoch + 1, epochs)
    model.eval()


def _fit_together(predictors: Sequence[Any]) -> None:
    """Train predictors of one shape as one stack and give each its members."""
    first = predictors[0]
    members, device = first.settings.members, device_of(first.settings.device)
    problems: list[Problem] = [predictor._problem for predictor in predictors]
    labelled, size = len(problems[0].targets), len(problems[0].graphs)
    generators = [torch.Generator().manual_seed(seed) for problem in problems for seed in problem.seeds]
    graphs = join([problem.graphs for problem in problems]).to(device)
    columns = graphs.columns.shape[1]
    model = first._network(len(generators), columns)
    initialize(model, generators)
    model.to(device)
    starts = torch.arange(len(problems)).repeat_interleave(members)[:, None] * size
    rows = (starts + torch.arange(labelled)).to(device)
    pool = (starts + torch.arange(labelled, size)).to(device)
    targets = torch.from_numpy(np.stack([problem.targets for problem in problems]).repeat(members, 0)).float()
    first._learn(model, graphs, rows, pool, targets.to(device), generators)
    for i, predictor in enumerate(predictors):
        own = first._network(members, columns)
        part = slice(i * members, (i + 1) * members)
        own.load_state_dict({name: value[part] for name, value in model.state_dict().items()})
        predictor._finish(own.to(device).requires_grad_(False))
