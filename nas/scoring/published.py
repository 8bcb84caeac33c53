"""Scores that somebody else computed: a Parquet file with a column `arch` and a column for every proxy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nas.scoring.many import ScoreTable
from search_spaces.common.errors import UserError
from search_spaces.common.names import canonical
from search_spaces.space import SearchSpace

NO_VALUE = -1e7  # NAS-Bench-Suite-Zero writes -1e8 where a proxy was not finite
RENAMED = {"flops": "macs"}  # what it calls flops are multiply-adds, in millions


def read_scores(path: str | Path, space: SearchSpace) -> ScoreTable:
    """The scores in a Parquet file; names with hyphens. Errors: UserError for a file that is no such table.

    The tables of NAS-Bench-Suite-Zero (Krishnakumar et al., NeurIPS 2022) have this form; `flops` becomes `macs`.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        columns = parquet.read_table(path).to_pydict()
    except (OSError, arrow.ArrowException) as error:
        raise UserError(str(path), f"a Parquet file of scores ({error})") from None
    if "arch" not in columns:
        raise UserError(str(path), f"a column `arch` beside {', '.join(list(columns)[:8])}")
    archs = tuple(space.encode(space.decode(text)) for text in columns.pop("arch"))
    found = {}
    for name, values in columns.items():
        try:
            array = np.asarray(values, np.float64)
        except (TypeError, ValueError):
            continue  # a remark or the like
        name = RENAMED.get(canonical(name), canonical(name))
        found[name] = np.where(np.isfinite(array) & (array > NO_VALUE), array, np.nan)
    if not found:
        raise UserError(str(path), "a column of numbers beside `arch`")
    return ScoreTable(archs, tuple(found), (0,), np.stack(list(found.values()), 1)[:, :, None])
