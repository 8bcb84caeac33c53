"""Names of table columns: `<metric>[_<epochs>][_seed<k>]`, the split as the metric's prefix, the unit as its ending."""

from __future__ import annotations

import re
from dataclasses import dataclass

from search_spaces.common.errors import UserError

_PATTERN = re.compile(r"(?P<metric>[a-z][a-z0-9_]*?)(?:_(?P<epochs>\d+))?(?:_seed(?P<seed>\d+))?")
UNITS = {
    "acc": "percent",
    "rocauc": "percent",
    "ms": "milliseconds",
    "seconds": "seconds",
    "mj": "millijoule",
    "bytes": "bytes",
    "params": "parameters",
    "macs": "multiply-adds",
}


@dataclass(frozen=True)
class Column:
    """A parsed column name."""

    metric: str
    epochs: int | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        """The name in a table: metric, epochs, seed."""
        epochs = "" if self.epochs is None else f"_{self.epochs}"
        return self.metric + epochs + ("" if self.seed is None else f"_seed{self.seed}")

    @property
    def split(self) -> str | None:
        """`val`, `test`, `train`, or None for what is measured on no split.

        `test` counts wherever it stands in the name: a data set's prefix must not open a way round the guard.
        """
        words = self.metric.split("_")
        if "test" in words:
            return "test"
        return words[0] if words[0] in ("val", "train") else None

    @property
    def unit(self) -> str | None:
        """The unit that the metric's last word names."""
        return UNITS.get(self.metric.rpartition("_")[2])

    @property
    def hardware(self) -> bool:
        """Measured on a device: -1 and NaN mean missing."""
        return self.metric.endswith(("_ms", "_mj", "_latency", "_energy"))


def parse_column(name: str) -> Column:
    """`val_acc_200_seed1` -> Column('val_acc', 200, 1). Errors: UserError for a name of another form."""
    found = _PATTERN.fullmatch(name)
    if found is None:
        raise UserError(name, "a column named <metric>[_<epochs>][_seed<k>] in lower case, such as 'val_acc_200_seed1'")
    epochs, seed = found["epochs"], found["seed"]
    column = Column(found["metric"], int(epochs) if epochs else None, int(seed) if seed else None)
    if column.name != name:  # leading zeros
        raise UserError(name, "epochs and seeds without leading zeros", column.name)
    return column
