"""Settings of the parts that only some recipes have, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from search_spaces.common.errors import UserError


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


# Fields of a recipe that hold such settings or None; `Recipe.flat` names their values <field>_<name>.
NESTED: dict[str, type] = {"evolution": Evolution}
