"""Table: measured architectures, queried one or a million at once, with the test split behind one door."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from benchmarks.columns import Column, parse_column
from benchmarks.table_file import MappedTable, map_table
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.registry import load_space
from search_spaces.space import SearchSpace

A = TypeVar("A")
SeedPolicy = int | str  # a seed's number, "mean" or "random"


class TestSplitError(UserError):
    """A test column was asked for where only validation may be seen."""

    __test__ = False  # not a test case for pytest

    def __init__(self, value: object, expected: str = "", suggestion: str | None = None):
        super().__init__(
            value, expected or "a validation or cost column; test values come only from Table.test_values", suggestion
        )


@dataclass(frozen=True)
class TestUse:
    """One use of test values: which, of how many architectures, what for."""

    __test__ = False

    metric: str
    count: int
    purpose: str


class Table(Generic[A]):
    """A memory-mapped table of one benchmark and data set. Rows are sorted by the space's integer code.

    Values belong to architectures: isomorphic cells keep their own rows where the benchmark measured them apart.
    """

    def __init__(self, mapped: MappedTable):
        self.path = mapped.path
        self.about = dict(mapped.about)
        self.id: str = self.about["id"]
        self.space_name: str = self.about["space"]
        self.test_uses: list[TestUse] = []
        self._arrays = mapped.arrays
        self._codes = mapped.arrays["_codes"]
        self._cache: dict[tuple, np.ndarray] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Table:
        """The table in the file at `path`. Errors: UserError."""
        return cls(map_table(Path(path)))

    def __len__(self) -> int:
        return len(self._codes)

    def __repr__(self) -> str:
        return f"Table({self.id!r}, {len(self):,} rows, {len(self.columns)} columns)"

    @cached_property
    def space(self) -> SearchSpace[A]:
        """The space whose architectures the rows measure."""
        return load_space(self.space_name)

    @cached_property
    def columns(self) -> list[Column]:
        """All columns as stored."""
        return [parse_column(name) for name in sorted(self._arrays) if not name.startswith("_")]

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics, without epochs and seeds."""
        return sorted({c.metric for c in self.columns})

    def epochs(self, metric: str) -> list[int]:
        """The training lengths at which `metric` stands in the table, ascending; empty for costs."""
        return sorted({c.epochs for c in self.columns if c.metric == metric and c.epochs is not None})

    @property
    def codes(self) -> np.ndarray:
        """int64 [rows]: the space's integer code of every row, ascending."""
        return self._codes

    # -- rows --------------------------------------------------------------------------------------------------

    def rows_of_codes(self, codes: np.ndarray) -> np.ndarray:
        """int64 [N]: row of each integer code. Errors: UserError for a code without a row."""
        codes = np.asarray(codes, np.int64)
        if self._dense:
            if len(codes) and (codes.min() < 0 or codes.max() >= len(self)):
                bad = codes[(codes < 0) | (codes >= len(self))][0]
                raise UserError(int(bad), f"the code of an architecture in {self.id} (0 to {len(self) - 1})")
            return codes
        rows = np.searchsorted(self._codes, codes)
        rows[rows == len(self)] = 0
        missing = np.flatnonzero(self._codes[rows] != codes)
        if len(missing):
            raise UserError(int(codes[missing[0]]), f"the code of an architecture in {self.id}")
        return rows

    def rows_of(self, archs: Sequence[A]) -> np.ndarray:
        """int64 [N]: row of each architecture. Errors: UserError for one that is not in the table."""
        codes = self.space.codes(archs)
        try:
            return self.rows_of_codes(codes)
        except UserError as error:
            position = int(np.flatnonzero(codes == error.value)[0])
            raise UserError(self.space.encode(archs[position]), f"an architecture in {self.id}") from None

    @cached_property
    def _dense(self) -> bool:
        return len(self) > 0 and self._codes[0] == 0 and self._codes[-1] == len(self) - 1

    def text(self, row: int) -> str:
        """The architecture of a row in the space's notation."""
        begin, end = self._arrays["_arch_offsets"][row : row + 2]
        return self._arrays["_arch_text"][begin:end].tobytes().decode()

    def arch(self, row: int) -> A:
        """The architecture of a row."""
        return self.space.decode(self.text(row))

    # -- values ------------------------------------------------------------------------------------------------

    def column(
        self,
        metric: str,
        *,
        epochs: int | None = None,
        seed: SeedPolicy = "mean",
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """[rows] values of a metric. This is what searches see: test columns raise TestSplitError.

        metric: a metric (`val_acc`) or a full column name (`val_acc_12_seed0`). epochs: training length, default the
        longest. seed: `mean` over the seeds measured, a seed's number, or `random` (one measured seed per row, by
        `rng`). Missing hardware measurements are NaN. Errors: UserError with the nearest column.
        """
        column = self._resolve(metric, epochs)
        if column.split == "test":
            raise TestSplitError(metric)
        return self._values(column, seed, rng)

    def values(self, archs: Sequence[A], metric: str, **policy: Any) -> np.ndarray:
        """[N] values of `metric` for architectures; `policy` as for `column`."""
        return self.column(metric, **policy)[self.rows_of(archs)]

    def test_values(
        self,
        archs: Sequence[A] | None,
        metric: str = "test_acc",
        *,
        purpose: str,
        epochs: int | None = None,
        seed: SeedPolicy = "mean",
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """The one door to test values; every use is recorded in `test_uses`.

        archs: None for all rows. purpose: what the values are for (`report`, `predictor evaluation`, ...).
        """
        column = self._resolve(metric, epochs)
        values = self._values(column, seed, rng)
        self.test_uses.append(TestUse(column.name, len(self) if archs is None else len(archs), purpose))
        return values if archs is None else values[self.rows_of(archs)]

    def has(self, metric: str, epochs: int | None = None) -> bool:
        """Whether the table holds the metric (at that training length)."""
        return any(c.metric == metric and (epochs is None or c.epochs == epochs) for c in self.columns)

    def _resolve(self, metric: str, epochs: int | None) -> Column:
        if metric not in self.metrics:
            parsed = parse_column(metric)
            if parsed.metric not in self.metrics or metric in self.metrics:
                known = self.metrics
                raise UserError(metric, f"a metric of {self.id} ({one_of(known)})", nearest(metric, known))
            if epochs is not None and parsed.epochs not in (None, epochs):
                raise UserError(metric, f"one training length, not {parsed.epochs} and {epochs} epochs")
            wanted = Column(parsed.metric, epochs if epochs is not None else parsed.epochs, parsed.seed)
        else:
            wanted = Column(metric, epochs)
        lengths = self.epochs(wanted.metric)
        if lengths and wanted.epochs is None:
            wanted = Column(wanted.metric, lengths[-1], wanted.seed)
        elif wanted.epochs is not None and wanted.epochs not in lengths:
            at = one_of(map(str, lengths)) if lengths else "no training length: it is no learning curve"
            raise UserError(wanted.epochs, f"epochs of {wanted.metric} in {self.id} ({at})")
        if wanted.seed is not None and wanted.name not in self._arrays:
            raise UserError(metric, f"a seed of {wanted.metric} in {self.id} ({one_of(map(str, self._seeds(wanted)))})")
        return wanted

    def _seeds(self, column: Column) -> list[int]:
        same = (c for c in self.columns if c.metric == column.metric and c.epochs == column.epochs)
        return sorted(c.seed for c in same if c.seed is not None)

    def _values(self, column: Column, seed: SeedPolicy, rng: np.random.Generator | None) -> np.ndarray:
        if column.seed is not None:
            seed = column.seed
        if seed == "random":
            return self._random_seed(column, rng)
        known = (column.metric, column.epochs, seed)
        if known not in self._cache:
            values = self._mean(column) if seed == "mean" else self._one_seed(column, seed)
            values.setflags(write=False)
            self._cache[known] = values
        return self._cache[known]

    def _read(self, column: Column) -> np.ndarray:
        values = self._arrays[column.name]
        if column.hardware:
            values = np.where(values == -1, np.nan, values)
        return values

    def _stacked(self, column: Column) -> np.ndarray:
        return np.stack([self._read(Column(column.metric, column.epochs, k)) for k in self._seeds(column)])

    def _mean(self, column: Column) -> np.ndarray:
        whole = Column(column.metric, column.epochs)
        if whole.name in self._arrays:
            return self._read(whole)
        total, count = np.zeros(len(self)), np.zeros(len(self), np.int64)
        for seed in self._seeds(column):
            values = self._read(Column(column.metric, column.epochs, seed))
            present = ~np.isnan(values)
            np.add(total, values, out=total, where=present)
            count += present
        return np.divide(total, count, out=np.full(len(self), np.nan), where=count > 0)

    def _one_seed(self, column: Column, seed: SeedPolicy) -> np.ndarray:
        wanted = Column(column.metric, column.epochs, seed if isinstance(seed, int) else None)
        if not isinstance(seed, int) or (wanted.name not in self._arrays and self._seeds(column)):
            seeds = self._seeds(column)
            raise UserError(seed, f"a seed policy: mean, random{', ' if seeds else ''}{', '.join(map(str, seeds))}")
        # What is measured once for all seeds (parameters, say) is the same for each.
        return self._read(wanted if wanted.name in self._arrays else Column(column.metric, column.epochs))

    def _random_seed(self, column: Column, rng: np.random.Generator | None) -> np.ndarray:
        if rng is None:
            raise UserError("random", "an rng with the seed policy 'random'")
        if not self._seeds(column):
            return self._mean(column)
        stacked = self._stacked(column)
        present = ~np.isnan(stacked)
        rank = np.floor(rng.random(len(self)) * present.sum(axis=0)).astype(int)
        pick = np.argmax(np.cumsum(present, axis=0) > rank, axis=0)
        return stacked[pick, np.arange(len(self))]
