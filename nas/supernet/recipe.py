"""Recipe: a differentiable search as plain values; its parts are chosen by name, so that recipes can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from nas.supernet.regularizers import DECAYS
from nas.supernet.relaxation import (
    BinaryGates,
    Dirichlet,
    GumbelHard,
    GumbelSoft,
    Relaxation,
    SampledPath,
    Sigmoid,
    Softmax,
    UniformPath,
)
from nas.supernet.settings import (
    NESTED,
    Evolution,
    Freezing,
    Importance,
    Latency,
    Projection,
    Relaxed,
    Shapley,
    Stages,
)
from nas.supernet.weighted import JOINED_CHANNELS
from nas.training.recipe import Recipe as Training
from search_spaces.common.errors import UserError
from search_spaces.common.names import match

RELAXATIONS: dict[str, type] = {
    "softmax": Softmax,
    "sigmoid": Sigmoid,
    "gumbel-soft": GumbelSoft,
    "gumbel-hard": GumbelHard,
    "dirichlet": Dirichlet,
    "uniform-path": UniformPath,
    "sampled-path": SampledPath,
    "binary-gates": BinaryGates,
}
SOLVERS = ("first-order", "second-order", "single-level", "relaxed", "shapley", "weights-only")
REGULARIZERS = ("beta-decay", "zero-one", "entropy")
PERTURBATIONS = ("random", "adversarial")
DISCRETIZATIONS = ("softmax", "sigmoid", "perturbation", "evolution")


@dataclass(frozen=True)
class Recipe:
    """A differentiable search. The defaults are first-order DARTS (Liu et al. 2019; quark0/darts f276dd3, cnn/).

    training: epochs, batch size, rate, schedule, decay, clipping and augmentation of the weights (train_search.py);
    both halves of the data see its batch size and augmentation.
    relaxation: a name in RELAXATIONS; temperature: its (start, end), linear in epochs (model_search.py: softmax).
    partial: k of partial channels, edge_normalisation: both Xu et al. 2020 (PC-DARTS), sections 3.2 and 3.3; 1, False
    in DARTS. solver: `first-order`, `second-order` (architect.py, --unrolled), `single-level` (alpha and weights from
    one training loss), `relaxed` (two copies of the weights, with its factors; RARTS), `shapley` (alphas follow values
    of the candidates, estimated before every epoch), `weights-only` (alphas are not used). strict_fairness: a step of
    the weights sums the gradients of as many paths as there are candidates, in which each occurs once (FairNAS).
    importance: paths and images are drawn by it (PA&DA).
    alpha_first: within an iteration alphas move before the weights (train_search.py).
    alpha_warmup_epochs: epochs in which only the weights move. alpha_every: steps of the weights to one of the alphas
    (ProxylessNAS). latency: the alphas' loss has the latency expected of a network (ProxylessNAS).
    alpha_rate, alpha_betas, alpha_decay: Adam's, with an L2 term (architect.py); alpha_clip: largest norm of its
    gradient, None for any.
    regularizer: a term of alpha's loss, in REGULARIZERS, with regularizer_weight; regularizer_ramp: the weight grows
    from 0 linearly over the epochs. perturbation: of the mixing weights in the weights' steps (SDARTS), with
    perturbation_radius (first epoch, towards the last), linear.
    auxiliary_skip: factor of a skip connection beside every mixture in the first epoch, falling towards 0 in the shape
    auxiliary_skip_decay (`regularizers.DECAYS`; DARTS-); 0 for none. freezing: of operations' weights (OLES).
    early_stop: measure the Hessian's largest eigenvalue every epoch and stop as Robust DARTS does
    (`nas.supernet.hessian.early_stop`). discretization: strengths by softmax or sigmoid, `perturbation` (DARTS-PT, with
    the settings of the projection), or `evolution` among paths. gate_threshold: candidates chosen have strengths above
    it (Fair DARTS). skip_cap: the most skip connections in the architecture, None for any number (P-DARTS); both as in
    `nas.supernet.discretization.Rules`. skip_dropout: probability of dropping an entry behind a skip connection
    (`nas.supernet.skip_dropout`; P-DARTS). stages: supernets one after another (P-DARTS, DrNAS).
    weight_images, alpha_images: shares of the training images (train_search.py, --train_portion .5).
    channels, layers (of the space darts), stem (darts), cells_per_stage (nas-bench-201): the network searched in
    (train_search.py: 16, 8; D-X-Y/AutoDL-Projects: 16, 5). affine: whether normalisations in searched cells have
    weights (operations.py: no). norm_after_pools: BatchNorm without weights after pooling, in darts (model_search.py).
    checkpointed: mixtures compute their activations again in the backward pass instead of keeping them: the same
    search with less memory and more time. joined_channels: on a CPU, convolutions of a mixture with at most so many
    channels are computed as one (own; it changes the rounding, 0 for none).
    source: the paper and code. Errors: UserError for unknown names and values out of range.
    """

    name: str
    source: str
    training: Training = field(default_factory=Training)
    relaxation: str = "softmax"
    temperature: tuple[float, float] | None = None
    partial: int = 1
    edge_normalisation: bool = False
    solver: str = "first-order"
    alpha_first: bool = True
    relaxed: Relaxed | None = None
    strict_fairness: bool = False
    importance: Importance | None = None
    alpha_warmup_epochs: int = 0
    alpha_every: int = 1
    latency: Latency | None = None
    alpha_rate: float = 3e-4
    alpha_betas: tuple[float, float] = (0.5, 0.999)
    alpha_decay: float = 1e-3
    alpha_clip: float | None = None
    regularizer: str | None = None
    regularizer_weight: float = 0.0
    regularizer_ramp: bool = False
    perturbation: str | None = None
    perturbation_radius: tuple[float, float] = (0.03, 0.3)
    auxiliary_skip: float = 0.0
    auxiliary_skip_decay: str = "linear"
    freezing: Freezing | None = None
    shapley: Shapley | None = None
    early_stop: bool = False
    discretization: str = "softmax"
    gate_threshold: float | None = None
    skip_cap: int | None = None
    skip_dropout: float = 0.0
    stages: Stages | None = None
    projection: Projection | None = None
    evolution: Evolution | None = None
    weight_images: float = 0.5
    alpha_images: float = 0.5
    channels: int = 16
    layers: int = 8
    cells_per_stage: int = 5
    stem: str = "cifar"
    affine: bool = False
    norm_after_pools: bool = True
    checkpointed: bool = False
    joined_channels: int = JOINED_CHANNELS

    def __post_init__(self) -> None:
        for name in ("temperature", "alpha_betas", "perturbation_radius"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, list | tuple) or len(value) != 2:
                    raise UserError(value, f"two numbers for {name}")
                object.__setattr__(self, name, tuple(value))
        for name, known, kind in (
            ("relaxation", RELAXATIONS, "a relaxation"),
            ("solver", SOLVERS, "a solver"),
            ("regularizer", REGULARIZERS, "a regulariser"),
            ("perturbation", PERTURBATIONS, "a perturbation"),
            ("discretization", DISCRETIZATIONS, "a discretisation"),
            ("auxiliary_skip_decay", DECAYS, "a decay"),
        ):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, match(str(getattr(self, name)), known, kind))
        for name in ("partial", "alpha_every", "channels", "layers", "cells_per_stage"):
            if getattr(self, name) < 1:
                raise UserError(getattr(self, name), f"a positive number for {name}")
        for name in ("alpha_warmup_epochs", "alpha_decay", "regularizer_weight", "auxiliary_skip"):
            if not getattr(self, name) >= 0:
                raise UserError(getattr(self, name), f"{name} of at least 0")
        if not self.alpha_rate > 0 or (self.alpha_clip is not None and not self.alpha_clip > 0):
            raise UserError(min(self.alpha_rate, self.alpha_clip or 1), "a positive alpha_rate and alpha_clip")
        if not (0 < self.weight_images < 1 and 0 < self.alpha_images < 1 and self.shares <= 1 + 1e-9):
            raise UserError(self.shares, "shares of images for weights and alphas above 0 that sum to at most 1")
        if self.training.epochs is None:
            raise UserError(self.training.steps, "a training in epochs")
        if self.solver == "second-order" and self.training.optimizer != "sgd":
            raise UserError(self.training.optimizer, "sgd, one step of which second-order unrolls", "sgd")
        if (self.discretization == "evolution") != (self.evolution is not None):
            raise UserError(self.discretization, "discretization=evolution and settings of the evolution together")
        if self.discretization == "evolution" and self.solver != "weights-only":
            raise UserError(self.solver, "weights-only with discretization=evolution", "weights-only")
        if self.perturbation is not None and self.solver in ("single-level", "relaxed", "weights-only"):
            raise UserError(self.perturbation, f"no perturbation with the solver {self.solver}")
        if self.early_stop and self.solver == "weights-only":
            raise UserError("early_stop", "alphas, whose Hessian it watches")
        if self.freezing is not None and not (self.solver == "first-order" and self.alpha_first):
            raise UserError(self.solver, "first-order with alphas first, the only way with freezing", "first-order")
        if (self.solver == "shapley") != (self.shapley is not None):
            raise UserError(self.solver, "solver=shapley and its settings together")
        if self.solver == "shapley" and self.edge_normalisation:
            raise UserError("edge_normalisation", "none with the solver shapley: betas would stand still")
        self._check_steps()
        self._check_reading()
        self.make_relaxation()

    def _check_reading(self) -> None:
        """How architectures are read off fits the rest."""
        if (self.discretization == "perturbation") != (self.projection is not None):
            raise UserError(self.discretization, "discretization=perturbation and settings of the projection together")
        if self.gate_threshold is not None and not 0 <= self.gate_threshold < 1:
            raise UserError(self.gate_threshold, "a gate_threshold from 0, below 1")
        if self.skip_cap is not None and self.skip_cap < 0:
            raise UserError(self.skip_cap, "a skip_cap of at least 0")
        if not 0 <= self.skip_dropout < 1:
            raise UserError(self.skip_dropout, "a skip_dropout from 0, below 1")
        if self.stages is not None or self.projection is not None:
            name = "projection" if self.stages is None else "stages"
            if self.early_stop or self.solver == "weights-only":
                given = "early_stop" if self.early_stop else self.solver
                raise UserError(given, f"alphas and no early stop with {name}")

    def _check_steps(self) -> None:
        """What takes steps of its own allows no other."""
        if (self.solver == "relaxed") != (self.relaxed is not None):
            raise UserError(self.solver, "solver=relaxed and its settings together")
        if self.solver == "relaxed" and (self.alpha_warmup_epochs or self.alpha_every > 1 or self.alpha_clip):
            given = [self.alpha_warmup_epochs, self.alpha_every, self.alpha_clip]
            expected = "no alpha_warmup_epochs, alpha_every or alpha_clip with the solver relaxed"
            raise UserError(given, f"{expected}: alphas move in every step")
        if self.strict_fairness and (self.solver, self.relaxation) != ("weights-only", "uniform-path"):
            raise UserError(f"{self.solver}, {self.relaxation}", "weights-only and uniform-path with strict_fairness")
        if self.importance is not None and (self.solver, self.relaxation) != ("weights-only", "sampled-path"):
            raise UserError(f"{self.solver}, {self.relaxation}", "weights-only and sampled-path with importance")
        if self.latency is not None and self.solver in ("relaxed", "weights-only"):
            raise UserError(self.solver, "a solver whose alphas have a loss of their own with latency", "first-order")

    @property
    def shares(self) -> float:
        """The share of the training images that the search uses."""
        return self.weight_images + self.alpha_images

    @property
    def epochs(self) -> int:
        """Passes over the images of the weights."""
        assert self.training.epochs is not None
        return self.training.epochs

    def make_relaxation(self) -> Relaxation:
        """The relaxation with its temperatures. Errors: UserError where those do not belong together."""
        kind = RELAXATIONS[self.relaxation]
        tempered = kind in (GumbelSoft, GumbelHard)
        if tempered != (self.temperature is not None):
            expected = "a temperature (start, end)" if tempered else "no temperature"
            raise UserError(self.temperature, f"{expected} with {self.relaxation}")
        return kind(*(self.temperature or ()))

    def flat(self) -> dict[str, Any]:
        """All settings by name; those of the weights' training stand among them (`epochs`, `learning_rate`, ...)."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("training", *NESTED)}
        for part in NESTED:
            if getattr(self, part) is not None:
                found |= {f"{part}_{k}": v for k, v in vars(getattr(self, part)).items()}
        return found | {k: v for k, v in asdict(self.training).items() if k not in UNUSED}

    def replaced(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with other settings, named as in `flat`. Errors: UserError for an unknown name, with the nearest."""
        own: dict[str, Any] = {}
        training: dict[str, Any] = {}
        nested: dict[str, dict[str, Any]] = {}
        names = {f.name for f in fields(self)}
        known = self.flat()
        for given, value in changes.items():
            name = match(given, known, "a setting of a search")
            part = next((p for p in NESTED if name.startswith(f"{p}_") and name not in names), None)
            if part is not None:
                nested.setdefault(part, {})[name.removeprefix(f"{part}_")] = _typed(name, known[name], value)
            elif name in names:
                own[name] = _typed(name, known[name], value)
            else:
                training[name] = value
        if training:
            own["training"] = self.training.replaced(training)
        own |= {part: replace(getattr(self, part), **values) for part, values in nested.items()}
        return replace(self, **own)

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Recipe:
        """The recipe whose `dataclasses.asdict` this is."""
        parts = {name: found.get(name) and kind(**found[name]) for name, kind in NESTED.items()}
        return Recipe(**{**found, **parts, "training": Training(**found["training"])})


# Settings of a training that a search has no use for.
UNUSED = ("steps", "source", "drop_path", "auxiliary_weight", "ema_decay", "patience", "precision", "kernels")


def diff(first: Recipe, second: Recipe) -> dict[str, tuple[Any, Any]]:
    """{setting: (its value in `first`, in `second`)} where they differ; None for a setting that one does not have."""
    a, b = first.flat(), second.flat()
    names = [name for name in {**a, **b} if name not in ("name", "source")]
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def _typed(name: str, default: Any, value: Any) -> Any:
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(value, type(default)) or (isinstance(default, tuple) and isinstance(value, list))
    if default is not None and value is not None and not fits:
        raise UserError(value, f"{name} as {type(default).__name__}, such as {default!r}")
    return value
