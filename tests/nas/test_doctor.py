"""The doctor names what is broken, foreign or missing, and survives it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.registry import BENCHMARKS, table_path
from benchmarks.table_file import TableData, write_table
from nas import doctor

ROOT = Path(__file__).parents[2]
SIX = {"search_spaces", "zero_cost", "benchmarks", "predictors", "kernels", "nas"}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def examine_with(folder: Path, **modules: str) -> dict:
    """The report of a process in which `modules` (name -> source) hide the installed ones."""
    for name, source in modules.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(source)
    code = "import json; from nas.doctor import examine; print(json.dumps(examine()))"
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "NASFORGE_HOME": str(folder / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_this_installation(home):
    report = doctor.examine(check_triton=False)
    assert json.loads(json.dumps(report)) == report
    assert report["python"]["version"] == platform.python_version()
    assert report["packages"]["numpy"]["version"] == np.__version__
    assert set(report["names"]) == SIX
    for name, entry in report["names"].items():
        assert Path(entry["file"]) == ROOT / name / "__init__.py"
        assert entry["ours"]
        assert entry["error"] is None
    assert report["triton"]["kernel"] is report["triton"]["imports"] is None  # not tried
    assert set(report["extras"]["nni"]) == {"installed", "missing", "get"}
    assert report["extras"]["nni"]["get"] == "pip install 'nasforge[nni]'"


def test_triton_compiles_or_runs_a_kernel(home, importable):
    importable("triton")
    triton = doctor.examine()["triton"]
    assert triton["version"] == importlib.metadata.version("triton")
    assert triton["imports"] is True
    assert triton["error"] is None
    assert triton["kernel"] == "compiled for sm_90" or triton["kernel"].startswith("ran on ")


def test_a_probe_that_hangs_is_given_up(home, monkeypatch, importable):
    importable("triton")
    monkeypatch.setattr(doctor, "TRITON_SECONDS", 0.01)
    report = doctor.examine()
    assert report["triton"]["kernel"] is None
    assert any("triton does not work (no answer" in w for w in report["warnings"])


def test_broken_packages_are_reported_not_raised(tmp_path, importable):
    importable("triton")
    report = examine_with(
        tmp_path,
        kernels="raise RuntimeError('no kernels today')",
        torch="raise ImportError('libtorch is gone')",
        triton="raise ImportError('libtriton is gone')",
    )
    assert report["names"]["kernels"]["error"] == "RuntimeError: no kernels today"
    assert not report["names"]["kernels"]["ours"]
    assert report["device"]["error"] == "ImportError: libtorch is gone"
    assert report["triton"]["imports"] is False
    assert "libtriton is gone" in report["triton"]["error"]
    for word in ("kernels", "torch", "triton"):
        assert any(word in warning for warning in report["warnings"])
    assert report["names"]["predictors"]["ours"]  # the rest is still examined
    assert len(report["tables"]) == len(BENCHMARKS)


def test_a_foreign_package_of_our_name(tmp_path):
    report = examine_with(tmp_path, kernels="", triton="raise ImportError('not needed here')")
    assert Path(report["names"]["kernels"]["file"]) == tmp_path / "kernels" / "__init__.py"
    assert report["names"]["kernels"] | {"file": ""} == report["names"]["kernels"] | {"ours": False, "file": ""}
    assert [w for w in report["warnings"] if w.startswith("`import kernels` finds")]


def test_another_distribution_that_provides_our_name(home, tmp_path, monkeypatch):
    other = tmp_path / "site" / "kernels-0.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.9\n")
    (other / "top_level.txt").write_text("kernels\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    report = doctor.examine(check_triton=False)
    assert "kernels" in report["names"]["kernels"]["distributions"]
    assert report["names"]["kernels"]["ours"]
    assert [w for w in report["warnings"] if "the package kernels is also provided by kernels" in w]


def test_requirements_that_are_missing_or_old(home, monkeypatch):
    lines = ["numpy>=99.1", "no-such-package>=1.5", "other-system; sys_platform == 'none'", "gone>=2; extra == 'more'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    report = doctor.examine(check_triton=False)
    assert report["packages"]["no-such-package"] == {"version": None, "requires": ">=1.5"}
    assert "other-system" not in report["packages"]
    assert report["extras"] == {
        "more": {"installed": False, "missing": ["gone"], "get": "pip install 'nasforge[more]'"}
    }
    assert any("no-such-package is missing" in w for w in report["warnings"])
    assert any("is older than 99.1" in w for w in report["warnings"])


@pytest.mark.parametrize(("version", "minimum"), [("2.13.0+cpu", "2.6"), ("2.10", "2.9.9"), ("4.0.0rc1", "4.0")])
def test_versions_compare_as_numbers(version, minimum):
    assert doctor._numbers(version) >= doctor._numbers(minimum)


def test_home_size_and_whether_it_can_be_written(home, tmp_path, monkeypatch):
    assert doctor.examine(check_triton=False)["home"] == {
        "folder": str(home),
        "exists": False,
        "writable": True,
        "bytes": 0,
    }
    (home / "a").mkdir(parents=True)
    (home / "a" / "file").write_bytes(b"x" * 1234)
    (home / "b").write_bytes(b"y" * 6)
    found = doctor.examine(check_triton=False)["home"]
    assert (found["exists"], found["bytes"]) == (True, 1240)
    for impossible in (home / "b", home / "b" / "below"):  # a file where a folder should be
        monkeypatch.setenv("NASFORGE_HOME", str(impossible))
        report = doctor.examine(check_triton=False)
        assert not report["home"]["writable"]
        assert any("NASFORGE_HOME" in w for w in report["warnings"])


def test_tables_compiled_broken_and_missing(home):
    archs = [f"|{op}~0|+|none~0|none~1|+|none~0|none~1|none~2|" for op in ("none", "skip_connect", "nor_conv_1x1")]
    data = TableData("nas-bench-201", archs, {"val_acc": np.array([1.0, 2.0, 3.0])}, "a test", "none")
    write_table(table_path("nas-bench-201/mine"), "nas-bench-201/mine", data)
    broken = table_path("nas-bench-201/cifar10")
    broken.write_bytes(b"not a table")
    report = doctor.examine(check_triton=False)
    tables = {entry["id"]: entry for entry in report["tables"]}
    size = table_path("nas-bench-201/mine").stat().st_size
    assert tables["nas-bench-201/mine"]["state"] == "compiled"
    assert (tables["nas-bench-201/mine"]["rows"], tables["nas-bench-201/mine"]["bytes"]) == (3, size)
    assert tables["nas-bench-201/cifar10"]["state"] == "broken"
    assert any("nas-bench-201/cifar10" in w for w in report["warnings"])
    missing = tables["nas-bench-101/cifar10"]  # no package ships it
    assert missing["state"] == "missing"
    assert missing["get"] == BENCHMARKS["nas-bench-101/cifar10"].how_to_get()
