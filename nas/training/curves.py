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


def write_tensorboard(folder: Path) -> None:
    """The curves of a run as event files in `<run>/tensorboard`, a log for each seed. Errors: UserError without it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard", "the package tensorboard (pip install tensorboard)") from None
    rows = read_curves(folder / "curves.parquet")
    for seed in sorted({row["seed"] for row in rows}):
        with SummaryWriter(str(folder / "tensorboard" / f"seed-{seed}")) as writer:
            for row in rows:
                if row["seed"] == seed:
                    for name, value in row.items():
                        if name not in WHOLE and value is not None:
                            writer.add_scalar(name, value, row["epoch"])
