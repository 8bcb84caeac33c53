"""Settings of the parts that only some recipes have, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from search_spaces.common.errors import UserError
from search_spaces.common.names import match


@dataclass(frozen=True)
class Evolution:
    """The search among the paths of a trained supernet (Guo et al., SPOS, ECCV 2020; megvii, 36eed6c).

    Every generation is `population` architectures: `crossover` children of two of the `parents` best so far,
    `mutation` of one, the rest random. mutation_probability: of every choice of a tuple (other spaces: one change).
    max_macs: multiply-adds of the network of the search, None for any. recalibration: (batches, images in each) that
    BatchNorm's statistics are averaged over for every architecture; evaluation: (batches, images) it is measured on.
    """

    population: int = 50
    generations: int = 20
    crossover: int = 25
    mutation: int = 25
    parents: int = 10
    mutation_probability: float = 0.1
    max_macs: int | None = 330_000_000
    recalibration: tuple[int, int] = (200, 128)
    evaluation: tuple[int, int] = (40, 200)

    def __post_init__(self) -> None:
        for name in ("recalibration", "evaluation"):  # from JSON they come as lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        counts = (self.population, self.generations, self.parents, *self.recalibration, *self.evaluation)
        if min(counts) < 1 or min(self.crossover, self.mutation) < 0:
            raise UserError(min(*counts, self.crossover, self.mutation), "positive numbers for the evolution")
        if self.crossover + self.mutation > self.population:
            raise UserError(self.crossover + self.mutation, f"children, at most the population of {self.population}")


@dataclass(frozen=True)
class Freezing:
    """Operations whose weights stand still once they overfit (Jiang et al., OLES, NeurIPS 2023).

    steps: so many similarities between an operation's gradients of the training and of the validation loss are
    averaged; where the mean is below `threshold`, the weights of that operation are frozen.
    """

    steps: int = 20
    threshold: float = 0.4

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(self.steps, "at least one step to average over")
        if not -1 <= self.threshold <= 1:
            raise UserError(self.threshold, "a cosine, from -1 to 1, as the threshold")


@dataclass(frozen=True)
class Shapley:
    """Alphas that follow Shapley values (Xiao et al., Shapley-NAS, CVPR 2022; Euphoria16/Shapley-NAS ccbc396).

    Before every epoch the value of each candidate is estimated from `permutations`, each on as many as `images` of the
    alphas and given up once the accuracy is below `truncation` times that of the full supernet: the mean over
    permutations, less `deviations` times their standard deviation. Z-scores of the values are averaged with `momentum`
    over the epochs, and alphas move by `step` times that average.
    """

    permutations: int = 10
    images: int = 1024
    truncation: float = 0.5
    deviations: float = 1.0
    momentum: float = 0.8
    step: float = 0.1

    def __post_init__(self) -> None:
        if min(self.permutations, self.images) < 1:
            raise UserError(min(self.permutations, self.images), "at least one permutation and image")
        if not (0 <= self.truncation <= 1 and 0 <= self.momentum < 1):
            raise UserError((self.truncation, self.momentum), "truncation and momentum from 0, momentum below 1")
        if not (self.step > 0 and self.deviations >= 0):
            raise UserError((self.step, self.deviations), "a positive step, and deviations of at least 0")


@dataclass(frozen=True)
class Relaxed:
    """The factors of RARTS (Xue, Qi and Xin 2022, arXiv 2008.03901; `nas.supernet.bilevel.relaxed_step`).

    train_weight: of the training loss beside the validation loss; coupling: of the squared distance of both copies of
    the weights. At 1 a copy's step is as long as in DARTS.
    """

    train_weight: float = 1.0
    coupling: float = 1.0

    def __post_init__(self) -> None:
        if not (self.train_weight > 0 and self.coupling > 0):
            raise UserError(min(self.train_weight, self.coupling), "a positive train_weight and coupling")


@dataclass(frozen=True)
class Latency:
    """The expected latency in the alphas' loss (Cai et al., ProxylessNAS, ICLR 2019; bf58b5c, search/nas_manager.py).

    form: `mul-log`, cross-entropy * alpha * (log latency / log reference) ** beta with both in microseconds, or
    `add-linear`, cross-entropy + weight * (latency - reference) / reference. reference_ms: None for the latency that
    uniform probabilities give. file: a table as `nas.supernet.latency` writes it, None to measure one when a search
    begins: the median of `repeats` passes of `images` images.
    """

    form: str = "mul-log"
    alpha: float = 0.2
    beta: float = 0.3
    weight: float = 0.1
    reference_ms: float | None = None
    file: str | None = None
    images: int = 1
    repeats: int = 20

    def __post_init__(self) -> None:
        object.__setattr__(self, "form", match(str(self.form), LATENCY_FORMS, "a form of the loss"))
        if min(self.images, self.repeats) < 1:
            raise UserError(min(self.images, self.repeats), "at least one image and one repeat to measure latency")
        if not (self.alpha > 0 and self.beta >= 0 and self.weight >= 0):
            raise UserError((self.alpha, self.beta, self.weight), "alpha above 0, beta and weight of at least 0")
        if self.reference_ms is not None and not self.reference_ms > 0.001:
            raise UserError(self.reference_ms, "a reference latency in milliseconds, above 0.001")


LATENCY_FORMS = ("mul-log", "add-linear")


@dataclass(frozen=True)
class Importance:
    """Paths and images drawn by importance (Lu et al., PA&DA, CVPR 2023; ShunLu91/PA-DA 9060c3a, nasbench201/).

    paths: candidates are drawn by their share of the gradient norms of the epoch before; shared: labels with the same
    kinds of candidates have common probabilities, as the authors' edges do. images: likewise by the norms of
    softmax - one-hot. Both are mixed with uniform ones, whose weight falls from 1 to 0 linearly over the epochs.
    """

    paths: bool = True
    images: bool = True
    shared: bool = True


@dataclass(frozen=True)
class Stages:
    """Supernets one after another that lose candidates and may grow (P-DARTS; DrNAS with progressive learning).

    candidates: how many a label has in each stage, of one that begins with as many as the first says; labels with
    other numbers keep the same shares, rounded up. Between stages the largest alphas of every label stay.
    layers (of the space darts), cells_per_stage (nas-bench-201), partial, skip_dropout: those of every stage in place
    of the recipe's; None: the recipe's in all. inherit: weights and alphas of a stage go on in the next, into the
    leading channels where partial channels widen (`nas.supernet.stages.inherit`); else both are new.
    A recipe's epochs, alphas' warm-up and schedules are those of each stage.
    """

    candidates: tuple[int, ...]
    layers: tuple[int, ...] | None = None
    cells_per_stage: tuple[int, ...] | None = None
    partial: tuple[int, ...] | None = None
    skip_dropout: tuple[float, ...] | None = None
    inherit: bool = False

    def __post_init__(self) -> None:
        count = len(self.candidates)
        for name in ("candidates", "layers", "cells_per_stage", "partial", "skip_dropout"):
            value = getattr(self, name)
            if value is None:
                continue
            object.__setattr__(self, name, tuple(value))  # from JSON they come as lists
            if len(value) != count:
                raise UserError(list(value), f"{count} numbers for {name}, one for every stage")
            if name != "skip_dropout" and min(value, default=0) < 1:
                raise UserError(list(value), f"positive numbers for {name}, at least one")
        if list(self.candidates) != sorted(self.candidates, reverse=True):
            raise UserError(list(self.candidates), "candidates that become fewer from stage to stage")
        if self.inherit and any(len(set(value or ())) > 1 for value in (self.layers, self.cells_per_stage)):
            raise UserError("inherit", "one depth in all stages, in which the same weights go on")


@dataclass(frozen=True)
class Projection:
    """How DARTS-PT decides (Wang et al., ICLR 2021; ruocwang/darts-pt 4ec3149): see `nas.supernet.projection`.

    epochs: of training the weights between two decisions, at `rate` times the learning rate. fixed_alphas: alphas stay
    uniform in the whole search, so that only perturbation decides (the authors' `blank`).
    """

    epochs: int = 5
    rate: float = 0.1
    fixed_alphas: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise UserError(self.epochs, "epochs between two decisions, 0 or more")
        if not 0 < self.rate <= 1:
            raise UserError(self.rate, "a factor of the learning rate above 0, at most 1")


# Fields of a recipe that hold such settings or None; `Recipe.flat` names their values <field>_<name>.
NESTED: dict[str, type] = {
    "evolution": Evolution,
    "freezing": Freezing,
    "shapley": Shapley,
    "relaxed": Relaxed,
    "latency": Latency,
    "importance": Importance,
    "stages": Stages,
    "projection": Projection,
}
