"""Tables of measured architectures, memory-mapped, and how official files become tables.

>>> table = open_table("nas-bench-201/cifar10")
>>> table.values(archs, "val_acc", seed="mean")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Added": "benchmarks.adding",
    "add_file": "benchmarks.adding",
    "add_table": "benchmarks.adding",
    "Column": "benchmarks.columns",
    "parse_column": "benchmarks.columns",
    "BENCHMARKS": "benchmarks.registry",
    "Benchmark": "benchmarks.registry",
    "compiled_ids": "benchmarks.registry",
    "is_available": "benchmarks.registry",
    "known_ids": "benchmarks.registry",
    "open_table": "benchmarks.registry",
    "remove_table": "benchmarks.registry",
    "resolve_id": "benchmarks.registry",
    "table_path": "benchmarks.registry",
    "random_split": "benchmarks.split",
    "Table": "benchmarks.table",
    "TestSplitError": "benchmarks.table",
    "TestUse": "benchmarks.table",
    "Problems": "benchmarks.table_file",
    "TableData": "benchmarks.table_file",
    "map_table": "benchmarks.table_file",
    "write_table": "benchmarks.table_file",
}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from benchmarks.adding import Added, add_file, add_table
    from benchmarks.columns import Column, parse_column
    from benchmarks.registry import (
        BENCHMARKS,
        Benchmark,
        compiled_ids,
        is_available,
        known_ids,
        open_table,
        remove_table,
        resolve_id,
        table_path,
    )
    from benchmarks.split import random_split
    from benchmarks.table import Table, TestSplitError, TestUse
    from benchmarks.table_file import Problems, TableData, map_table, write_table


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
