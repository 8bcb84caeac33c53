"""Learning curves as a Parquet file: one row for each seed and epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from search_spaces.common.errors import UserError
from search_spaces.common.files import atomic_write

COLUMNS = ("seed", "epoch", "step", "learning_rate", "train_loss", "train_acc", "val_loss", "val_acc", "seconds")
WHOLE = ("seed", "epoch", "step")


def write_curves(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write all rows; values that a row lacks are null."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    kinds = {name: pa.int64() if name in WHOLE else pa.float64() for name in COLUMNS}
    table = pa.table({n: pa.array([row.get(n) for row in rows], kind) for n, kind in kinds.items()})
    with atomic_write(path, "wb") as file:
        parquet.write_table(table, file)


def read_curves(path: Path) -> list[dict[str, float]]:
    """The rows that `write_curves` wrote. Errors: UserError if there is no such file or it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, pa.ArrowException):
        raise UserError(str(path), "a file of learning curves that can be read") from None
