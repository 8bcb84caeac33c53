"""NAS-Bench-Macro's official JSON (Su et al., Prioritized Architecture Sampling with Monte-Carlo Tree Search, 2021)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.table_file import TableData
from search_spaces.common.errors import UserError

RUNS = 3


def read_nas_bench_macro(path: Path, licence: str) -> TableData:
    """`nas-bench-macro_cifar10.json`: test_acc_seed0 to 2, params, macs (the file's `flops`). Errors: UserError."""
    expected = "the official JSON of NAS-Bench-Macro"
    try:
        content = json.loads(path.read_bytes())
        archs = list(content)
        accuracies = np.array([content[arch]["test_acc"] for arch in archs], np.float64)
        sizes = {
            column: np.array([content[arch][name] for arch in archs], np.float64)
            for column, name in (("params", "params"), ("macs", "flops"))
        }
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(str(path), f"{expected} ({error})") from None
    except KeyError as error:
        raise UserError(str(path), f"{expected} (an architecture has no {error})") from None
    if accuracies.ndim != 2 or accuracies.shape[1] != RUNS:
        raise UserError(str(path), f"{expected} with {RUNS} test accuracies each")
    columns = {f"test_acc_seed{k}": accuracies[:, k] for k in range(RUNS)}
    for column, values in sizes.items():
        if not (np.isfinite(values).all() and (values == np.rint(values)).all()):
            raise UserError(str(path), f"{expected} with whole numbers as {column}")
        columns[column] = values.astype(np.int64)
    return TableData(
        "nas-bench-macro",
        archs,
        columns,
        origin=f"{path.name} (NAS-Bench-Macro, CVPR 2021)",
        licence=licence,
        notes=("test accuracy only: there is no validation accuracy",),
    )
