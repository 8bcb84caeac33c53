"""Scales at which a recipe runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nas.supernet.recipe import Recipe
from search_spaces.common.names import match


@dataclass(frozen=True)
class Scale:
    """A smaller search. changes: of the recipe; batch_size: at most that, the rate in proportion (Goyal et al. 2017,
    arXiv 1706.02677). epochs: of all stages together; alphas' warm-up and the epochs between decisions keep their
    shares, and alphas move in every step after it, as there are few. size: images are averaged down to it (not digits).
    images: at most so many, for weights and alphas together, half for each.
    """

    name: str
    about: str
    epochs: int | None = None
    batch_size: int | None = None
    size: int | None = None
    images: int | None = None
    changes: Mapping[str, Any] | None = None
    evolution: Mapping[str, Any] | None = None
    shapley: Mapping[str, Any] | None = None


_HALVES = {"weight_images": 0.5, "alpha_images": 0.5, "stem": "cifar", "warmup_epochs": 0.0, "alpha_every": 1}
SCALES: dict[str, Scale] = {
    "full": Scale("full", "the recipe as its authors ran it"),
    "small": Scale(
        "small",
        "8 channels, one cell a stage, images of 16x16, 5,000 of them, 50 epochs",
        epochs=50,
        batch_size=64,
        size=16,
        images=5000,
        changes={"channels": 8, "cells_per_stage": 1, "layers": 3, **_HALVES},
        evolution={"max_macs": None, "recalibration": (10, 128), "evaluation": (5, 200)},
        shapley={"images": 128},
    ),
    "tiny": Scale(
        "tiny",
        "minutes on two cores: 8 channels, one cell a stage, images of 16x16 at most, 1,000 of them, 5 epochs",
        epochs=5,
        batch_size=32,
        size=16,
        images=1000,
        changes={"channels": 8, "cells_per_stage": 1, "layers": 3, **_HALVES, "padding": 1},
        evolution={
            **{"population": 8, "generations": 3, "crossover": 4, "mutation": 3, "parents": 4, "max_macs": None},
            **{"recalibration": (2, 100), "evaluation": (2, 100)},
        },
        shapley={"images": 64, "permutations": 3},
    ),
}


def scaled(found: Recipe, scale: str, *, flip: bool = True) -> Recipe:
    """The recipe at a scale. flip: whether mirrored images keep their class, as those of digits do not.

    Errors: UserError for an unknown scale, with the nearest.
    """
    wanted = SCALES[match(scale, SCALES, "a scale")]
    training = found.training
    changes = dict(wanted.changes or {})
    if training.flip and not flip:
        changes["flip"] = False
    if wanted.epochs is not None:
        share = found.alpha_warmup_epochs / found.epochs
        stages = 1 if found.stages is None else len(found.stages.candidates)
        epochs = max(1, round(wanted.epochs / stages))
        changes |= {"epochs": epochs, "alpha_warmup_epochs": round(share * epochs)}
        if found.projection is not None:
            tuning = found.projection.epochs * wanted.epochs / found.epochs
            changes["projection_epochs"] = max(1, round(tuning))
    if wanted.batch_size is not None and training.batch_size > wanted.batch_size:
        factor = wanted.batch_size / training.batch_size
        changes |= {
            "batch_size": wanted.batch_size,
            "learning_rate": training.learning_rate * factor,
            "final_rate": training.final_rate * factor,
        }
    if found.evolution is not None and wanted.evolution is not None:
        changes |= {f"evolution_{name}": value for name, value in wanted.evolution.items()}
    if found.shapley is not None and wanted.shapley is not None:
        changes |= {f"shapley_{name}": value for name, value in wanted.shapley.items()}
    if wanted.changes is not None:
        changes |= _narrowed(found, changes)
    return found.replaced(changes)


def _narrowed(found: Recipe, scale: Mapping[str, Any]) -> dict[str, Any]:
    """Stages no deeper than the scale; partial channels with the largest k up to the recipe's that divides them."""

    def dividing(k: int) -> int:
        return next(smaller for smaller in range(k, 0, -1) if scale["channels"] % smaller == 0)

    changes: dict[str, Any] = {"partial": dividing(found.partial)}
    stages = found.stages
    if stages is None:
        return changes
    for name in ("layers", "cells_per_stage"):
        if getattr(stages, name) is not None:
            changes[f"stages_{name}"] = tuple(min(value, scale[name]) for value in getattr(stages, name))
    if stages.partial is not None:
        changes["stages_partial"] = tuple(dividing(k) for k in stages.partial)
    return changes
