"""NeuralPredictor: encoders with a scoring head, trained as a stack of members, from scratch or pre-trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from predictors.base import LearnedPredictor
from predictors.features import Standardizer
from predictors.graphs import GraphTable, concatenate
from predictors.labels import Target, scaled
from predictors.neural import pretraining
from predictors.neural.batch import GraphBatch, graph_batch
from predictors.neural.encoders import BLOCKS, POSITIONS, Encoder, pooled
from predictors.neural.layers import Dropout, LayerNorm, Linear, PReLU, initialize
from predictors.neural.losses import loss_at
from predictors.neural.tasks import SCORES, TASKS
from predictors.neural.training import (
    DEVICES,
    PREDICTED_AT_ONCE,
    Progress,
    Schedule,
    device_of,
    predict,
    train,
)
from search_spaces.common.errors import UserError
from search_spaces.common.names import match
from search_spaces.graph import OpGraph

MODES = ("scratch", "frozen", "partial", "full")


@dataclass(frozen=True)
class NeuralSettings:
    """Settings of a neural predictor.

    members: seeds trained together, whose mean is predicted (from two on with a standard deviation). encoder: gin,
    gin-directed, two-direction, nn-former or graph-transformer, of `width` and `layers`; dropout: in its blocks;
    head_dropout: before the head. loss: mse, bpr, hinge, listmle, mape, warp, diffkendall or `first>second`, which
    changes after the share `warm_up` of the epochs; target: see `scaled`. batch: labelled graphs per step, None =
    max(`least_batch`, n / 16). rate, decay: of AdamW, along a cosine to 0. early_stop, patience, average: see
    `Schedule`. device: auto (a GPU where there is one), cpu or cuda.

    mode: scratch (no pre-training), frozen (only the head learns), partial (embedding and first block stay), full.
    pretraining: context, masked or features (see `predictors.neural.pretraining`) on the unlabelled graphs given to
    `fit`, for at most `pretrain_steps` steps of `pretrain_batch` graphs, with `pretrain_seed`; score: scaled or
    released (of context). pretrained: a file of pre-trained weights to use in place of that.
    """

    members: int = 1
    encoder: str = "two-direction"
    width: int = 128
    layers: int = 3
    dropout: float = 0.0
    head_dropout: float = 0.15
    loss: str = "bpr"
    warm_up: float = 0.5
    target: Target = "normal-score"
    epochs: int = 200
    batch: int | None = None
    least_batch: int = 10
    rate: float = 1e-3
    decay: float = 1e-3
    early_stop: float = 0.0
    patience: int = 30
    average: float = 0.0
    device: str = "auto"
    mode: str = "scratch"
    pretraining: str = "context"
    score: str = "scaled"
    pretrain_steps: int = 2000
    pretrain_batch: int = 1024
    pretrain_seed: int = 0
    pretrained: str | None = None

    def __post_init__(self) -> None:
        match(self.encoder, BLOCKS, "an encoder")
        match(self.mode, MODES, "a mode of fine-tuning")
        match(self.pretraining, TASKS, "a pre-training task")
        match(self.score, SCORES, "a score of context pre-training")
        match(self.device, DEVICES, "a device")
        loss_at(self.loss, 0)
        for name, least in (("members", 1), ("width", 4), ("layers", 1), ("epochs", 1), ("pretrain_steps", 1)):
            if getattr(self, name) < least:
                raise UserError(getattr(self, name), f"{name} of at least {least}")
        if self.batch is not None and self.batch < 2:
            raise UserError(self.batch, "a batch of at least 2 graphs")
        for name in ("dropout", "head_dropout", "early_stop", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(getattr(self, name), f"{name} from 0 to below 1")


class Network(nn.Module):
    """Encoder, mean over real nodes, and CAP's head: dropout, twice (linear, LayerNorm, PReLU), linear; [S, B]."""

    def __init__(self, stack: int, encoder: Encoder, width: int, columns: int, dropout: float):
        super().__init__()
        self.encoder = encoder
        self.dropout = Dropout(dropout)
        self.head = nn.Sequential(
            Linear(stack, width + columns, width, init="xavier"),
            LayerNorm(stack, width),
            PReLU(stack),
            Linear(stack, width, width, init="xavier"),
            LayerNorm(stack, width),
            PReLU(stack),
            Linear(stack, width, 1, init="xavier"),
        )

    def forward(self, batch: GraphBatch) -> Tensor:
        graph = pooled(self.encoder(batch), batch.mask)
        if batch.columns.shape[-1]:
            graph = torch.cat([graph, batch.columns.expand(*graph.shape[:2], -1)], 2)
        return self.head(self.dropout(graph)).squeeze(2)


class _Problem:
    """What one fit was given, until it is trained."""

    def __init__(self, table: GraphTable, y: np.ndarray, columns: np.ndarray, rng: np.random.Generator, members: int):
        self.table, self.y, self.columns = table, y, columns
        self.seeds = [int(seed) for seed in rng.integers(2**63, size=members)]


class NeuralPredictor(LearnedPredictor[NeuralSettings]):
    """A stack of `members` graph networks; subclasses only name their settings. Weights are saved, not refitted.

    progress: set to a function (epochs done, epochs) to follow the training.
    """

    Settings = NeuralSettings
    progress: Progress | None = None
    pretrained: pretraining.Pretrained | None = None  # what the last fit began with
    _model: Network
    _parts: tuple[str, ...]
    _problem: _Problem | None = None
    _waits: bool = False  # fit_many trains what its fits only prepare

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
            _train_together(group)
        return fitted

    def _fit(self, table, y, extra, unlabelled, rng) -> None:
        settings = self.settings
        self.pretrained = None
        parts = tuple(sorted(table.part_names))
        if settings.mode != "scratch":
            self.pretrained = pretraining.pretrained_encoder(
                self.space_name, self.vocabulary, unlabelled, settings, device_of(self.settings.device), self.progress
            )
            parts = self.pretrained.parts
        self._parts = parts
        self._standardizer = Standardizer(extra) if extra.shape[1] else None
        self._problem = _Problem(table, y, self._standardized(extra), rng, settings.members)
        if not self._waits:
            _train_together([self])

    @property
    def needs_unlabelled(self) -> bool:
        """Pre-trains in `fit`, on graphs that the caller has to give."""
        return self.settings.mode != "scratch" and self.settings.pretrained is None

    def _standardized(self, extra: np.ndarray) -> np.ndarray:
        return np.zeros((len(extra), 0)) if self._standardizer is None else self._standardizer(extra)

    def _shape(self) -> tuple:
        assert self._problem is not None
        pretrained = None if self.pretrained is None else json.dumps(self.pretrained.about)
        return (
            self._problem.table.ops.shape,
            self._problem.table.part_names,
            self._problem.columns.shape,
            self._parts,
            pretrained,
        )

    def _new_model(self, stack: int, columns: int) -> Network:
        s = self.settings
        encoder = Encoder(
            s.encoder,
            stack,
            len(self.vocabulary),
            width=s.width,
            layers=s.layers,
            dropout=s.dropout,
            parts=len(self._parts),
        )
        return Network(stack, encoder, s.width, columns, s.head_dropout)

    def _tensors(self, table: GraphTable, columns: np.ndarray) -> GraphBatch:
        return graph_batch(table, self._parts, positions=POSITIONS.get(self.settings.encoder, 0), columns=columns)

    def _member_predictions(self, table: GraphTable, columns: np.ndarray) -> np.ndarray:
        """float64 [members, N], as the networks give them."""
        parts = []
        for start in range(0, len(table), PREDICTED_AT_ONCE):
            rows = np.arange(start, min(start + PREDICTED_AT_ONCE, len(table)))
            graphs = self._tensors(table.take(rows), columns[rows])
            parts.append(predict(self._model, self.settings.members, graphs).numpy())
        return np.concatenate(parts, 1).astype(np.float64)

    def _finish(self, model: Network, problem: _Problem) -> None:
        """Take a trained model; members are put on one scale by their scores of the labelled graphs."""
        self._model, self._problem = model, None
        scores = self._member_predictions(problem.table, problem.columns)
        self._center, self._scale = scores.mean(1), np.maximum(scores.std(1), 1e-12)

    def _predict(self, table, extra, std) -> tuple[np.ndarray, np.ndarray]:
        scores = self._member_predictions(table, self._standardized(extra))
        scores = (scores - self._center[:, None]) / self._scale[:, None]
        spread = scores.std(0, ddof=1) if len(scores) > 1 else np.full(scores.shape[1], np.nan)
        return scores.mean(0), spread

    def _state(self) -> dict[str, np.ndarray]:
        state = {f"model.{name}": value.cpu().numpy() for name, value in self._model.state_dict().items()}
        state["parts"] = np.frombuffer(json.dumps(self._parts).encode(), np.uint8)
        state["center"], state["scale"] = self._center, self._scale
        return state

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        assert self._data is not None
        extra = self._data[2]
        self._standardizer = Standardizer(extra) if extra.shape[1] else None
        self._parts = tuple(json.loads(state["parts"].tobytes()))
        self._center, self._scale = state["center"], state["scale"]
        columns = self._standardized(extra).shape[1]
        model = self._new_model(self.settings.members, columns)
        weights = {name[6:]: torch.from_numpy(v) for name, v in state.items() if name.startswith("model.")}
        model.load_state_dict(weights)
        self._model = model.to(device_of(self.settings.device))


def _train_together(predictors: Sequence[Any]) -> None:
    """Train predictors of one shape as one stack and give each its members."""
    first = predictors[0]
    settings, device = first.settings, device_of(first.settings.device)
    problems: list[_Problem] = [predictor._problem for predictor in predictors]
    size = len(problems[0].y)
    generators = [torch.Generator().manual_seed(seed) for problem in problems for seed in problem.seeds]
    model = first._new_model(len(generators), problems[0].columns.shape[1])
    initialize(model, generators)
    frozen: list[nn.Module] = []
    if first.pretrained is not None:
        first.pretrained.into(model.encoder)
        frozen = {"frozen": [model.encoder], "partial": model.encoder.first_layers(), "full": []}[settings.mode]
    table = problems[0].table if len(problems) == 1 else concatenate([problem.table for problem in problems])
    graphs = first._tensors(table, np.concatenate([problem.columns for problem in problems])).to(device)
    starts = [i * size for i in range(len(problems)) for _ in range(settings.members)]
    rows = torch.tensor(starts)[:, None] + torch.arange(size)
    y = np.stack([scaled(problem.y, settings.target) for problem in problems])
    targets = torch.from_numpy(y.repeat(settings.members, 0).astype(np.float32))
    schedule = Schedule(
        settings.loss,
        settings.epochs,
        min(settings.batch or max(settings.least_batch, size // 16), size),
        settings.rate,
        settings.decay,
        settings.warm_up,
        settings.early_stop,
        settings.patience,
        settings.average,
    )
    train(
        model.to(device),
        graphs,
        rows.to(device),
        targets.to(device),
        schedule,
        generators,
        frozen=frozen,
        progress=first.progress,
    )
    for i, (predictor, problem) in enumerate(zip(predictors, problems, strict=True)):
        part = slice(i * settings.members, (i + 1) * settings.members)
        own = predictor._new_model(settings.members, problem.columns.shape[1])
        own.load_state_dict({name: value[part] for name, value in model.state_dict().items()})
        predictor._finish(own.to(device).requires_grad_(False), problem)
