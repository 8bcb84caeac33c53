"""Predictor: what learns the quality of architectures from a few measured ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, Self, overload, runtime_checkable

import numpy as np

from search_spaces.graph import OpGraph


@runtime_checkable
class Predictor(Protocol):
    """Ranks architectures, given as OpGraphs over one vocabulary; a higher prediction is a better architecture.

    Labels that are better when smaller are flipped by the caller. A predictor is bound to `space_name` and
    `vocabulary` when it is made, and refuses operations outside it (UserError).
    """

    space_name: str
    vocabulary: tuple[str, ...]

    def fit(
        self,
        graphs: Sequence[OpGraph],
        y: np.ndarray,
        *,
        extra: Mapping[str, np.ndarray] | None = None,
        unlabelled: Sequence[OpGraph] | None = None,
        rng: np.random.Generator,
    ) -> Self:
        """Learn from labels `y` [N]; `extra` columns [N] (proxies, say) stand beside the graphs.

        unlabelled: further graphs of the space for pre-training. The same rng state gives the same predictor.
        Errors: UserError for labels that are not finite (with their positions) or fewer than three.
        """
        ...

    @overload
    def predict(
        self,
        graphs: Sequence[OpGraph],
        *,
        extra: Mapping[str, np.ndarray] | None = None,
        return_std: Literal[False] = False,
    ) -> np.ndarray: ...
    @overload
    def predict(
        self,
        graphs: Sequence[OpGraph],
        *,
        extra: Mapping[str, np.ndarray] | None = None,
        return_std: Literal[True],
    ) -> tuple[np.ndarray, np.ndarray]: ...
    def predict(self, graphs, *, extra=None, return_std=False):
        """[N] predictions, with `return_std` also [N] standard deviations (NaN where the method has none)."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the predictor as safetensors and JSON with an integer `format`; never a pickle."""
        ...

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """The predictor that `save` wrote. Errors: UserError for another kind or a newer format."""
        ...
