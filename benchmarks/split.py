"""Index lists for training and evaluation of predictors on a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from search_spaces.common.errors import UserError


def random_split(rows: int, sizes: Sequence[int], rng: np.random.Generator) -> list[np.ndarray]:
    """Disjoint random index lists of the given sizes out of `rows`, and the rest as the last one.

    Errors: UserError if the sizes do not fit.
    """
    if min(sizes, default=0) < 0 or sum(sizes) > rows:
        raise UserError(list(sizes), f"sizes that add up to at most {rows}")
    order = rng.permutation(rows)
    return np.split(order, np.cumsum(sizes))
