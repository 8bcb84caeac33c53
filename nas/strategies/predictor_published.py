"""Published predictor-guided searches, as settings of PredictorGuided; any predictor may stand in any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from nas.objectives import Objective
from nas.strategies.predictor_guided import DEFAULT_PREDICTOR, PredictorChoice, PredictorGuided
from search_spaces.space import SearchSpace

A = TypeVar("A")


class Bananas(PredictorGuided[A]):
    """Mutations of the best, chosen by independent Thompson sampling (White, Neiswanger and Savani, BANANAS, AAAI
    2021, algorithm 1).

    10 random architectures, then 10 per round among mutations of the best, as in the authors' naszilla. predictor
    (path-mlp): theirs, an ensemble of networks on path encodings; another one must know how sure it is.
    """

    name = "bananas"

    def __init__(
        self,
        space: SearchSpace[A],
        objectives: Sequence[Objective],
        rng: np.random.Generator,
        *,
        predictor: PredictorChoice = "path-mlp",
        settings: Mapping[str, Any] | None = None,
        initial: int = 10,
        batch: int = 10,
        count: int = 100,
        population: int = 10,
    ):
        super().__init__(
            space, objectives, rng, predictor=predictor, settings=settings, initial=initial, batch=batch,
            acquisition="its", candidates="mutations", count=count, generations=1, population=population,
        )  # fmt: skip


class Npenas(PredictorGuided[A]):
    """Evolution whose children a predictor chooses (Wei, Niu, Tang, Wang, Hu and Liang, NPENAS, 2020, algorithm 1).

    10 random architectures; each round the 10 best are mutated into 100 children, of which the 10 with the highest
    prediction are measured. Theirs is a graph isomorphism network; here it is `predictor`.
    """

    name = "npenas"

    def __init__(
        self,
        space: SearchSpace[A],
        objectives: Sequence[Objective],
        rng: np.random.Generator,
        *,
        predictor: PredictorChoice = DEFAULT_PREDICTOR,
        settings: Mapping[str, Any] | None = None,
        initial: int = 10,
        batch: int = 10,
        count: int = 100,
        population: int = 10,
    ):
        super().__init__(
            space, objectives, rng, predictor=predictor, settings=settings, initial=initial, batch=batch,
            acquisition="mean", candidates="mutations", count=count, generations=1, population=population,
        )  # fmt: skip


class BrpNas(PredictorGuided[A]):
    """Half of every round is what the predictor ranks best in the space, half is drawn at random (Dudziak et al.,
    BRP-NAS, NeurIPS 2020, section 4).

    random_share (.5) is the paper's alpha. Theirs is a classifier of pairs; here it is `predictor`. Spaces of more than
    50,000 are not enumerated: mutations of the best stand in for the top of the space.
    """

    name = "brp-nas"

    def __init__(
        self,
        space: SearchSpace[A],
        objectives: Sequence[Objective],
        rng: np.random.Generator,
        *,
        predictor: PredictorChoice = DEFAULT_PREDICTOR,
        settings: Mapping[str, Any] | None = None,
        initial: int = 20,
        batch: int = 10,
        random_share: float = 0.5,
    ):
        super().__init__(
            space, objectives, rng, predictor=predictor, settings=settings, initial=initial, batch=batch,
            acquisition="mean", random_share=random_share,
        )  # fmt: skip


class WeakNas(PredictorGuided[A]):
    """Every round draws from the best that the present predictor names, so that weak predictors in turn narrow the
    space (Wu et al., Stronger NAS with Weaker Predictors, NeurIPS 2021, algorithm 1).

    10 random architectures, 10 per round drawn evenly from the best 100 by prediction (`among`), as in the authors'
    code for NAS-Bench-201. Theirs is a perceptron on one-hot operations; here it is `predictor`.
    """

    name = "weak-nas"

    def __init__(
        self,
        space: SearchSpace[A],
        objectives: Sequence[Objective],
        rng: np.random.Generator,
        *,
        predictor: PredictorChoice = DEFAULT_PREDICTOR,
        settings: Mapping[str, Any] | None = None,
        initial: int = 10,
        batch: int = 10,
        among: int = 100,
    ):
        super().__init__(
            space, objectives, rng, predictor=predictor, settings=settings, initial=initial, batch=batch,
            acquisition="mean", among=among,
        )  # fmt: skip
