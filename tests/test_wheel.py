"""The wheel holds the six packages, whole and alone, and works where the repository is not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIX = {"search_spaces", "zero_cost", "benchmarks", "predictors", "kernels", "nas"}


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the tree, tests and stray files included."""
    pytest.importorskip("build", reason="the package build is missing")
    source = tmp_path_factory.mktemp("source") / "tree"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    for folder in (*SIX, "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist"), cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-compile")
    run(sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(wheel), cwd=target)
    return target


def test_every_module_of_the_six_packages_and_nothing_else(wheel):
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in SIX
        for path in (ROOT / package).rglob("*.py")
        if "benchmarks/speed" not in path.as_posix()
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert {name.split("/")[0] for name in names - metadata} == SIX
    assert {name for name in names - metadata if name.endswith(".py")} == expected
    assert not [name for name in names if name.startswith("tests/") or "/speed/" in name or "__pycache__" in name]


def test_metadata(wheel):
    import nas

    archive = zipfile.ZipFile(wheel)
    (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    assert folder == f"nasforge-{nas.__version__}.dist-info"
    assert "nas = nas.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
    metadata = archive.read(f"{folder}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    licence = archive.read(f"{folder}/licenses/LICENSE").decode()
    assert "Apache License" in licence
    assert "nasforge authors" in licence
    core = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert not [line for line in core if "torchvision" in line or "lightning" in line]


def test_it_works_outside_the_tree(installed, tmp_path):
    code = f"""
import importlib, importlib.metadata, json, sys
sys.path.insert(0, {str(installed)!r})
files = {{name: importlib.import_module(name).__file__ for name in {sorted(SIX)}}}
from search_spaces import load_space
cell = "|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|"
(command,) = [e for e in importlib.metadata.distribution("nasforge").entry_points if e.name == "nas"]
print(json.dumps([files, load_space("nas-bench-201").encode(load_space("nas-bench-201").decode(cell)) == cell,
                  callable(command.load()), sys.modules["nas.cli"].__file__]))
"""
    files, round_trip, command, cli = json.loads(run(sys.executable, "-c", code, cwd=tmp_path))
    assert {Path(file).parents[1] for file in files.values()} == {installed}
    assert round_trip
    assert command
    assert Path(cli).is_relative_to(installed)
