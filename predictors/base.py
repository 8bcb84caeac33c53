"""LearnedPredictor: what all predictors share, from checking to saving."""

from __future__ import annotations

import abc
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np

from predictors.graphs import GraphTable, as_table
from predictors.labels import checked_labels, without_duplicates
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.files import atomic_write
from search_spaces.common.names import nearest
from search_spaces.graph import OpGraph

FORMAT = 1
S = TypeVar("S")


class LearnedPredictor(abc.ABC, Generic[S]):
    """A Predictor (see `predictors.predictor`) whose subclass learns from a GraphTable.

    A subclass names its frozen dataclass of settings in `Settings` and implements `_fit` and `_predict`; saving keeps
    the training data and refits at load, which a subclass with weights replaces by `_state` and `_restore`.
    """

    kind: ClassVar[str]  # the name under which the registry makes it
    Settings: ClassVar[type]

    def __init__(self, space_name: str, vocabulary: Sequence[str], settings: S | None = None):
        self.space_name = space_name
        self.vocabulary = tuple(vocabulary)
        self.settings: S = self.Settings() if settings is None else settings
        self.extra_names: tuple[str, ...] = ()
        self._data: tuple[GraphTable, np.ndarray, np.ndarray, int] | None = None  # graphs, labels, extra, seed

    def fit(
        self,
        graphs: Sequence[OpGraph],
        y: np.ndarray,
        *,
        extra: Mapping[str, np.ndarray] | None = None,
        unlabelled: Sequence[OpGraph] | None = None,
        rng: np.random.Generator,
    ) -> Self:
        """Learn from labels `y` [N], higher is better; see `Predictor.fit`. Repeated graphs count once, with the mean
        of their labels. Everything random follows from one number drawn from `rng`."""
        table = as_table(graphs, self.vocabulary)
        labels = checked_labels(y, len(table))
        self.extra_names = tuple(extra or ())
        table, labels, columns = without_duplicates(table, labels, self._columns(extra, len(table)))
        more = None if unlabelled is None or len(unlabelled) == 0 else as_table(unlabelled, self.vocabulary)
        seed = int(rng.integers(2**63))
        self._data = (table, labels, columns, seed)
        self._fit(table, labels, columns, more, np.random.default_rng(seed))
        return self

    def predict(
        self,
        graphs: Sequence[OpGraph],
        *,
        extra: Mapping[str, np.ndarray] | None = None,
        return_std: bool = False,
    ) -> Any:
        """[N] predictions on a scale of the predictor's own (only the order has a meaning), with `return_std` also [N]
        standard deviations on that scale, NaN where the method has none."""
        if self._data is None:
            raise UserError(self.kind, "a predictor that was fitted")
        table = as_table(graphs, self.vocabulary)
        missing = [name for name in self.extra_names if name not in (extra or {})]
        if missing:
            raise UserError(
                sorted(extra or {}), f"the extra columns it was fitted with ({', '.join(self.extra_names)})"
            )
        named = {name: (extra or {})[name] for name in self.extra_names}
        mean, std = self._predict(table, self._columns(named, len(table), self._data[2]), return_std)
        return (mean, std) if return_std else mean

    @property
    def needs_unlabelled(self) -> bool:
        """Whether `fit` must be given unlabelled graphs."""
        return False

    @abc.abstractmethod
    def _fit(
        self,
        table: GraphTable,
        y: np.ndarray,
        extra: np.ndarray,
        unlabelled: GraphTable | None,
        rng: np.random.Generator,
    ) -> None:
        """Learn; y [N] as measured, extra [N, E]."""

    @abc.abstractmethod
    def _predict(self, table: GraphTable, extra: np.ndarray, std: bool) -> tuple[np.ndarray, np.ndarray]:
        """([N], [N]); the second is read only where `std`, NaN where there is none."""

    def _columns(
        self, extra: Mapping[str, np.ndarray] | None, count: int, fitted: np.ndarray | None = None
    ) -> np.ndarray:
        """float64 [count, E]; what is not finite becomes the column's lowest finite value among the labelled graphs
        (`fitted`, when predicting: a prediction must not depend on the others asked for)."""
        columns = []
        for place, (name, values) in enumerate((extra or {}).items()):
            column = np.asarray(values, np.float64)
            if column.shape != (count,):
                raise UserError(column.shape, f"one value of {name!r} for each of the {count} graphs")
            finite = np.isfinite(column)
            known = column[finite] if fitted is None else fitted[:, place]
            columns.append(np.where(finite, column, known.min() if len(known) else 0.0))
        return np.stack(columns, 1) if columns else np.zeros((count, 0))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `predictor.json` and `predictor.safetensors`. Errors: UserError when nothing was fitted."""
        if self._data is None:
            raise UserError(self.kind, "a predictor that was fitted")
        from safetensors.numpy import save

        target = Path(folder)
        header = {
            "format": FORMAT,
            "kind": self.kind,
            "space": self.space_name,
            "vocabulary": self.vocabulary,
            "extra": self.extra_names,
            "part_names": self._data[0].part_names,
            "seed": self._data[3],
            "settings": dataclasses.asdict(self.settings),  # type: ignore[call-overload]
        }
        with atomic_write(target / "predictor.safetensors", "wb") as file:
            file.write(save({name: np.ascontiguousarray(value) for name, value in self._all_arrays().items()}))
        with atomic_write(target / "predictor.json") as file:
            json.dump(header, file, indent=1)

    def _all_arrays(self) -> dict[str, np.ndarray]:
        assert self._data is not None
        table, y, extra, _ = self._data
        data = {"ops": table.ops, "adjacency": table.adjacency, "mask": table.mask, "parts": table.parts}
        return {f"data.{name}": array for name, array in (data | {"y": y, "extra": extra}).items()} | self._state()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """The predictor that `save` wrote. Errors: UserError for another kind, a newer format or a broken file."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        header = read_header(folder)
        if header["kind"] != cls.kind:
            raise UserError(header["kind"], f"a saved predictor of kind {cls.kind}")
        predictor = cls(header["space"], tuple(header["vocabulary"]), settings_of(cls.Settings, header["settings"]))
        predictor.extra_names = tuple(header["extra"])
        path = Path(folder) / "predictor.safetensors"
        try:
            arrays = load_file(path)
        except (FileNotFoundError, SafetensorError):
            raise UserError(str(path), "the arrays that saving a predictor writes") from None
        ops, adjacency, mask, parts = (arrays.pop(f"data.{name}") for name in ("ops", "adjacency", "mask", "parts"))
        table = GraphTable(predictor.vocabulary, ops, adjacency, mask, parts, tuple(header["part_names"]))
        predictor._data = (table, arrays.pop("data.y"), arrays.pop("data.extra"), int(header["seed"]))
        predictor._restore(arrays)
        return predictor

    def _state(self) -> dict[str, np.ndarray]:
        """Arrays besides the training data that `_restore` needs; none when it refits."""
        return {}

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        """Become what was saved; `_data` is there. Refits with the same seed unless replaced."""
        assert self._data is not None
        table, y, extra, seed = self._data
        self._fit(table, y, extra, None, np.random.default_rng(seed))


def read_header(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON half of a saved predictor. Errors: UserError when there is none, or it is newer than this version."""
    path = Path(folder) / "predictor.json"
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        written = int(header["format"])
        missing = {"kind", "space", "vocabulary", "extra", "part_names", "seed", "settings"} - set(header)
    except FileNotFoundError:
        raise UserError(str(folder), "a folder with a saved predictor (predictor.json)") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(str(path), "the header that saving a predictor writes") from None
    if written > FORMAT:
        raise UserError(written, f"a saved predictor of format {FORMAT} or older; a newer nasforge wrote this one")
    if missing:
        raise UserError(str(path), "the header that saving a predictor writes")
    return header


def settings_of(kind: type[S], given: Mapping[str, Any]) -> S:
    """The settings dataclass with `given` in place of its defaults; lists become tuples.

    Errors: UserError for an unknown setting, with the nearest one.
    """
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise UserError(name, f"a setting of the predictor ({one_of(known)})", nearest(name, known))
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})
