"""ParZC: a mixer with Bayesian layers on proxy statistics, the extra columns of the architectures."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from predictors.features import Standardizer, feature_matrix
from predictors.graphs import GraphTable
from predictors.neural.batch import GraphBatch
from predictors.neural.layers import Dropout, Generators, LayerNorm, Linear
from predictors.neural.losses import loss_at
from predictors.neural.members import StackedPredictor, StackSettings, descend, vectors
from predictors.neural.training import on_device, predict
from search_spaces.common.errors import UserError

SPREAD_AT_START = -5.0  # rho of the weights' deviations, softplus(-5) = .0067
log = logging.getLogger("nasforge.predictors")


@dataclass(frozen=True)
class ParzcSettings(StackSettings):
    """StackSettings of ParZC: 150 epochs in batches of 10, weight decay 1e-3, mean squared error, 16 patches of 16,
    4 blocks, dropout .1 (release). Scaled to a CPU by choice: width 64 at rate 1e-3 (theirs is 512 at 1e-4). draws:
    weight draws at prediction (theirs takes one, anew at every call). loss: see `losses.loss_at`."""

    batch: int = 10
    decay: float = 1e-3
    loss: str = "mse"
    patches: int = 16
    patch: int = 16
    width: int = 64
    blocks: int = 4
    dropout: float = 0.1
    draws: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "patches", "patch", "blocks", "draws")
        self.at_least(2, "width")
        loss_at(self.loss, 0)
        self.below_one("dropout")


class BayesianLinear(Linear):
    """Linear whose weights are drawn anew at every call: W = mu + softplus(rho) e, e standard normal.

    Blundell, Cornebise, Kavukcuoglu and Wierstra, Weight Uncertainty in Neural Networks, ICML 2015, section 3.2;
    as in ParZC's release without the prior's term. Member k draws from generator k.
    """

    def __init__(self, stack: int, inputs: int, outputs: int):
        super().__init__(stack, inputs, outputs)
        self.rho = nn.Parameter(torch.full((stack, inputs, outputs), SPREAD_AT_START))
        self.generators: Generators | None = None
        self.noise: Tensor | None = None  # where it is given, the draw of every call

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        noise = self.draw() if self.noise is None else self.noise
        weight = self.weight + F.softplus(self.rho) * noise
        assert self.bias is not None
        return torch.baddbmm(self.bias, rows, weight).view(*x.shape[:-1], -1)

    def draw(self) -> Tensor:
        """Standard normal noise for the weights."""
        if self.generators is None:
            raise RuntimeError("Bayesian layers need generators, or noise that is given")
        noise = torch.empty_like(self.weight)
        for member, generator in zip(noise, self.generators, strict=True):
            member.normal_(generator=generator)
        return noise


class Forward(nn.Module):
    """x + W GELU(V LayerNorm(x)), dropout after each product; the inner width is `factor` times the outer."""

    def __init__(self, stack: int, width: int, factor: float, dropout: float):
        super().__init__()
        inner = int(width * factor)
        self.norm = LayerNorm(stack, width)
        self.inner, self.outer = Linear(stack, width, inner), Linear(stack, inner, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(F.gelu(self.inner(self.norm(x))))
        return x + self.dropout(self.outer(y))


class MixerNetwork(nn.Module):
    """Mixer architecture with Bayesian network (MABN): columns -> linear -> patches -> Bayesian linear -> blocks of two
    Forwards (4 times and half the width) -> LayerNorm -> mean over patches -> Bayesian linear.

    As the release has it, both parts of a block act on the channels: patches meet in the mean alone.
    """

    def __init__(self, stack: int, columns: int, *, patches: int, patch: int, width: int, blocks: int, dropout: float):
        super().__init__()
        self.patches = patches
        self.first = Linear(stack, columns, patches * patch)
        self.embed = BayesianLinear(stack, patch, width)
        self.blocks = nn.Sequential(
            *(Forward(stack, width, factor, dropout) for _ in range(blocks) for factor in (4, 0.5))
        )
        self.norm = LayerNorm(stack, width)
        self.last = BayesianLinear(stack, width, 1)

    def forward(self, batch: GraphBatch) -> Tensor:
        x = self.first(batch.columns).unflatten(2, (self.patches, -1))
        x = self.norm(self.blocks(self.embed(x)))
        return self.last(x.mean(2)).squeeze(2)

    def bayesian(self) -> list[BayesianLinear]:
        """The layers with weights that are drawn."""
        return [self.embed, self.last]


class Parzc(StackedPredictor):
    """ParZC without its graph transformer: learns from the extra columns alone, proxies or their layer-wise statistics,
    on a logarithmic scale with their signs and standardised. The mean over several draws of the weights is predicted,
    with the deviation between them; a fitted predictor always takes the same draws. Without extra columns the path
    features (`graf`) stand in for them, which is not the paper's method and is said in the log.

    Dong and others, ParZC: Parametric Zero-Cost Proxies for Efficient NAS, AAAI 2025.
    """

    kind = "parzc"
    Settings = ParzcSettings

    def _fit(self, table, y, extra, unlabelled, rng) -> None:
        if not extra.shape[1]:
            log.warning("parzc has no proxies to learn from (extra columns) and takes path features in their place")
        elif (extra == extra[0]).all():
            raise UserError(
                f"{extra.shape[1]} extra columns", "at least one proxy that differs between the labelled graphs"
            )
        super()._fit(table, y, extra, unlabelled, rng)

    def _note(self, table: GraphTable, extra: np.ndarray) -> None:
        super()._note(table, signed_logarithm(extra))
        self._nodes = table.nodes
        self._features = None if extra.shape[1] else Standardizer(self._path_features(table))

    def _path_features(self, table: GraphTable) -> np.ndarray:
        return signed_logarithm(feature_matrix(table, ("graf",), self._parts, self._nodes))

    def _standardized(self, extra: np.ndarray) -> np.ndarray:
        return super()._standardized(signed_logarithm(extra))

    def _network(self, stack: int, columns: int) -> nn.Module:
        s = self.settings
        return MixerNetwork(
            stack, columns, patches=s.patches, patch=s.patch, width=s.width, blocks=s.blocks, dropout=s.dropout
        )

    def _tensors(self, table: GraphTable, columns: np.ndarray) -> GraphBatch:
        return vectors(columns if self._features is None else self._features(self._path_features(table)))

    def _raw(self, graphs: GraphBatch) -> np.ndarray:
        """[members * draws, N]."""
        assert self._data is not None
        assert isinstance(self._model, MixerNetwork)
        layers, scores = self._model.bayesian(), []
        for draw in range(self.settings.draws):
            # On the CPU and from the fit's seed: the same weights whatever is predicted, in whatever chunks.
            generator = torch.Generator().manual_seed(self._data[3] + draw)
            for layer in layers:
                layer.noise = torch.randn(layer.weight.shape, generator=generator).to(layer.weight.device)
            scores.append(predict(self._model, self.settings.members, graphs).numpy())
        for layer in layers:
            layer.noise = None
        return np.concatenate(scores)

    def _learn(
        self, model: nn.Module, graphs: GraphBatch, rows: Tensor, pool: Tensor, targets: Tensor, generators: Generators
    ) -> None:
        assert isinstance(model, MixerNetwork)
        for layer in model.bayesian():
            layer.generators = on_device(targets.device, generators)
        loss = loss_at(self.settings.loss, 0)
        descend(
            model,
            lambda batch, wanted: loss(model(batch), wanted),
            graphs,
            rows,
            targets,
            self.settings,
            generators,
            progress=self.progress,
        )


def signed_logarithm(values: np.ndarray) -> np.ndarray:
    """sign(x) log(1 + |x|): proxies range over tens of powers of ten."""
    return np.sign(values) * np.log1p(np.abs(values))
