"""What a differentiable search searches, on what and how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nas.supernet.building import search_data
from nas.supernet.recipe import Recipe
from nas.training.data import Dataset, load_data


@dataclass(frozen=True)
class SearchTask:
    """What is searched, on what and how, as plain values.

    space: as in `load_space`. data, root, size, skip_broken: as in `load_data`. images: at most so many for weights
    and alphas together, None for the recipe's share of all. split_seed: of the halves. curvature: log the largest
    eigenvalue of the Hessian every epoch (recipes with early stop do anyway).
    """

    recipe: Recipe
    space: str = "nas-bench-201"
    data: str = "digits"
    root: str | None = None
    size: int | None = None
    images: int | None = None
    split_seed: int = 0
    skip_broken: bool = False
    curvature: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain values; `SearchTask.from_json` inverts it."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> SearchTask:
        """The task that `as_json` wrote."""
        return SearchTask(**{**found, "recipe": Recipe.from_json(found["recipe"])})

    def differences(self, other: SearchTask) -> list[str]:
        """`name: ours instead of theirs` for everything that differs."""
        ours, theirs = self._flat(), other._flat()
        names = dict.fromkeys((*ours, *theirs))
        return [f"{n}: {ours.get(n)!r} instead of {theirs.get(n)!r}" for n in names if ours.get(n) != theirs.get(n)]

    def _flat(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k != "recipe"}
        return {**own, "recipe": self.recipe.name, **{k: v for k, v in self.recipe.flat().items() if k != "name"}}

    def open_data(self) -> Dataset:
        """Images for the weights (`train`) and the alphas (`val`); validation images of the data set are not used.

        Errors: UserError.
        """
        found = load_data(self.data, root=self.root, size=self.size, val_share=0.0, skip_broken=self.skip_broken)
        return search_data(found, self.recipe, images=self.images, seed=self.split_seed)
