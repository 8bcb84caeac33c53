"""What the passes leave behind for the proxies, and the bookkeeping of a probe."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from zero_cost.errors import NoValue, UserError
from zero_cost.network import Network
from zero_cost.static import StaticCosts

if TYPE_CHECKING:
    from zero_cost.layers import TransformerLayers
    from zero_cost.passes.sequences import Attention

logger = logging.getLogger("nasforge.zero_cost")
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Named = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Codes:
    """Signs of ReLU inputs on the first batch, reduced while they pass by.

    agreements: per ReLU call, [B, B] float64 numbers of units on whose side of zero two samples agree. units: how many
    there are per ReLU call.
    live: per ReLU call, whether a backward pass from the logits reaches it (all False without a graph).
    patterns: int32, the signs of each unit of a feature map over the first `pattern_samples` samples, as bits.
    """

    agreements: list[torch.Tensor]
    units: list[int]
    live: list[bool]
    patterns: torch.Tensor
    pattern_samples: int

    def agreement(self, live_only: bool = False) -> torch.Tensor:
        """[B, B] float64, summed over the ReLU calls."""
        chosen = [k for k, alive in zip(self.agreements, self.live, strict=True) if alive or not live_only]
        if not chosen:
            raise NoValue("no ReLU is called on the way to the output" if live_only else "the model calls no ReLU")
        return torch.stack(chosen).sum(0)


@dataclass(frozen=True)
class ChannelSaliency:
    """Of one convolution or linear layer: f_c per output channel, and how many weights a channel has."""

    values: torch.Tensor
    weights_per_channel: int


@dataclass(frozen=True)
class Synflow:
    """abs(W_l) and dR/dW_l in float64, for R = sum of the outputs on ones, without normalisation."""

    weights: list[torch.Tensor]
    gradients: list[torch.Tensor]


@dataclass(frozen=True)
class Zen:
    """Per repeat: mean over the batch of the summed absolute change of the features, and each BatchNorm's mean
    running variance."""

    differences: list[float]
    variances: list[list[float]]


@dataclass(frozen=True)
class Stages:
    """AZ-NAS on N(0, 1) inputs: eigenvalues of each stage's channel covariance (the input of the first stage first),
    and per stage the largest singular value of the cotangents' correlation, None where the stage is the identity."""

    eigenvalues: list[torch.Tensor]
    singular_values: list[float | None]


class Captured:
    """What the passes captured; a field is there if a requested proxy needs it and its pass succeeded.

    params: trainable scalars. weights, gradients, second_order: {name of W_l: tensor}, W_l, g_l = dL/dW_l and (H g)_l
    on the first batch.
    batch_gradients: one dict like `gradients` per batch. logits: of the first batch; jacobian: [B, D], the gradient of
    the summed logits to the input (to the embeddings for integer inputs). features: per leaf module call the feature
    map of sample 0 as [C, positions]. fisher: per layer. sign_sums: per weight, sum over its entries of
    abs(sum over samples of sign(g)). ntk: [n, n] float64. synflow_forward: log R. labels: None where there are none.
    curve: per point of a circle of inputs, [points, outputs] first and second derivatives of the logits by the angle.
    inputs: of the first batch. layers, attention: see `TransformerLayers`, `Attention`. output_gradients,
    absolute_gradients: {name of W_l: gradient of the summed outputs}, as it is, and at absolute weights for an input of
    ones. hidden: per recurrent layer its states [..., H] in order. hidden_gradients: gradients of half the squared norm
    of the outputs, by name of W_l, and (state, gradient) pairs. sign_agreement: [B, B] units of all activation
    functions with inputs of one sign.
    """

    params: int
    static: StaticCosts
    weights: Named
    codes: Codes
    features: list[torch.Tensor]
    logits: torch.Tensor
    gradients: Named
    second_order: Named
    batch_gradients: list[Named]
    jacobian: torch.Tensor
    fisher: list[ChannelSaliency]
    sign_sums: dict[str, float]
    ntk: torch.Tensor
    synflow: Synflow
    synflow_forward: float
    zen: Zen
    stages: Stages
    curve: tuple[torch.Tensor, torch.Tensor]
    layers: TransformerLayers
    attention: Attention
    output_gradients: Named
    absolute_gradients: Named
    hidden: list[list[torch.Tensor]]
    hidden_gradients: tuple[Named, list[tuple[torch.Tensor, torch.Tensor]]]
    sign_agreement: torch.Tensor
    inputs: torch.Tensor
    labels: torch.Tensor | None
    samples: int
    regularisation: tuple[float, float] | None


@dataclass
class Probe:
    """One scoring: what is wanted, what was captured, what failed and why, and how long each step took."""

    network: Network
    batches: list[tuple[torch.Tensor, torch.Tensor | None]]
    wanted: frozenset[str]
    loss: Loss | None = None
    few: int = 16  # samples of the first batch that per-sample and pattern-counting passes read
    repeats: int = 1
    stage_names: Sequence[str] = ()
    captured: Captured = field(default_factory=Captured)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def wants(self, *names: str) -> bool:
        """Whether any of the fields is wanted and has not failed."""
        return any(name in self.wanted and name not in self.failed for name in names)

    @contextlib.contextmanager
    def step(self, title: str, *names: str) -> Iterator[None]:
        """Times a step; if the model cannot do it, the fields `names` have failed for a reason. Only bad arguments
        (UserError) leave it."""
        begin = time.perf_counter()
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # whatever a user's model raises
            logger.debug("%s failed", title, exc_info=True)
            for name in names:
                self.failed.setdefault(name, self._reason(title, error))
        finally:
            self.seconds[title] = self.seconds.get(title, 0.0) + time.perf_counter() - begin

    def _reason(self, title: str, error: Exception) -> str:
        if isinstance(error, NoValue):
            return str(error)
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, torch.OutOfMemoryError):
            return f"{title}: out of memory with {len(self.batches[0][0])} samples, score with a smaller batch"
        return f"{title}: {type(error).__name__}: {text[:200]}"

    def loss_of(self, logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """The mean loss; NoValue without labels, UserError for labels that name no class."""
        if labels is None:
            raise NoValue("needs labels")
        if self.loss is not None:
            return self.loss(logits, labels)
        return cross_entropy(logits, labels)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy; classes are the last dimension where labels have the shape of the others (tokens), else the
    second (images, pixels). Labels -100 are ignored. Errors: UserError for other labels outside the classes."""
    tokens = labels.shape == logits.shape[:-1]
    if not labels.is_floating_point():
        classes = logits.shape[-1 if tokens else 1]
        wrong = labels[((labels < 0) & (labels != -100)) | (labels >= classes)]
        if wrong.numel():
            raise UserError(int(wrong.flatten()[0]), f"labels from 0 to {classes - 1}, the classes of the model")
    if tokens:
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    return F.cross_entropy(logits, labels)
