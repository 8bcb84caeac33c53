"""What is installed, what works and what is missing: the data behind `nas doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from search_spaces.common.files import home

NAMES = ("search_spaces", "zero_cost", "benchmarks", "predictors", "kernels", "nas")
DISTRIBUTION = "nasforge"
ROOT = Path(__file__).resolve().parents[1]
TRITON_SECONDS = 60  # until a probe that hangs is given up


def examine(*, check_triton: bool = True) -> dict[str, Any]:
    """Everything `nas doctor` reports; plain values that JSON can write.

    Keys: python, packages, extras, names (who provides each of the six packages), home, tables, device, triton and
    warnings. check_triton: also try a kernel, in a process of its own (seconds). What is broken is reported, never
    raised.
    """
    warnings: list[str] = []
    probe = _start_probe() if check_triton and _version("triton") else None
    try:
        report = {
            "python": _python(),
            "packages": _packages(warnings),
            "extras": _extras(),
            "names": _names(warnings),
            "home": _home(warnings),
            "tables": _tables(warnings),
            "device": _device(warnings),
        }
    finally:
        answer = _read_probe(*probe) if probe else {}
    report["triton"] = _triton(answer, warnings)
    return {**report, "warnings": warnings}


def _python() -> dict[str, str]:
    return {
        "version": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "executable": sys.executable,
    }


# -- distributions -------------------------------------------------------------------------------------------------


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except Exception:  # not installed, or a broken installation
        return None


def _requirements() -> list[tuple[str, str, str]]:
    """(distribution, versions, extra) of everything nasforge asks for; extra is "" for the core."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        name, versions = re.fullmatch(r"([\w.-]+)(.*)", requirement.strip()).groups()  # type: ignore[union-attr]
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        system = re.search(r"sys_platform == ['\"](\w+)['\"]", marker)
        if system is None or system[1] == sys.platform:
            found.append((name, versions.strip(" ()"), extra[1] if extra else ""))
    return found


def _packages(warnings: list[str]) -> dict[str, dict[str, str | None]]:
    if _version(DISTRIBUTION) is None:
        warnings.append(f"{DISTRIBUTION} is not installed as a distribution; its packages run from {ROOT}")
    packages: dict[str, dict[str, str | None]] = {DISTRIBUTION: {"version": _version(DISTRIBUTION), "requires": ""}}
    for name, versions, extra in _requirements():
        if extra:
            continue
        version = _version(name)
        packages[name] = {"version": version, "requires": versions}
        minimum = re.search(r">=\s*([\d.]+)", versions)
        if version is None:
            warnings.append(f"{name} is missing; get it with: pip install '{name}{versions}'")
        elif minimum and _numbers(version) < _numbers(minimum[1]):
            warnings.append(f"{name} {version} is older than {minimum[1]}; pip install '{name}{versions}'")
    return packages


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _extras() -> dict[str, dict[str, Any]]:
    extras: dict[str, dict[str, Any]] = {}
    for name, _, extra in _requirements():
        if extra:
            entry = extras.setdefault(
                extra, {"installed": True, "missing": [], "get": f"pip install '{DISTRIBUTION}[{extra}]'"}
            )
            if _version(name) is None:
                entry["missing"].append(name)
                entry["installed"] = False
    return extras


def _names(warnings: list[str]) -> dict[str, dict[str, Any]]:
    """Which distributions provide each of our packages, which file `import` finds and whether it is ours."""
    owners = importlib.metadata.packages_distributions()
    return {name: _owner(name, sorted(set(owners.get(name, ()))), warnings) for name in NAMES}


def _owner(name: str, owners: list[str], warnings: list[str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"distributions": owners, "file": None, "ours": False, "error": None}
    try:
        specification = importlib.util.find_spec(name)
        if specification and specification.origin:
            entry["file"] = specification.origin
            entry["ours"] = Path(specification.origin).resolve().parents[1] == ROOT
        importlib.import_module(name)
    except Exception as error:
        entry["error"] = f"{type(error).__name__}: {error}"
        warnings.append(f"the package {name} cannot be imported ({entry['error']})")
    others = [owner for owner in owners if owner != DISTRIBUTION]
    if not entry["ours"] and entry["error"] is None:
        whose = " and ".join(others) or "another folder on the path"
        warnings.append(f"`import {name}` finds {entry['file']} of {whose}, not {DISTRIBUTION}'s")
    elif others:
        warnings.append(f"the package {name} is also provided by {' and '.join(others)}; one may overwrite the other")
    return entry


# -- data ----------------------------------------------------------------------------------------------------------


def _home(warnings: list[str]) -> dict[str, Any]:
    folder = home()
    size = 0
    for where, _, files in os.walk(folder):
        for file in files:
            path = Path(where, file)
            size += path.lstat().st_size if os.path.lexists(path) else 0
    writable = _writable(folder)
    if not writable:
        warnings.append(f"{folder} cannot be written; set NASFORGE_HOME to a folder that can")
    return {"folder": str(folder), "exists": folder.is_dir(), "writable": writable, "bytes": size}


def _writable(folder: Path) -> bool:
    existing = next((p for p in (folder, *folder.parents) if p.exists()), folder)
    if existing != folder:  # it will be made when something is written
        return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _tables(warnings: list[str]) -> list[dict[str, Any]]:
    """One entry per table: `state` is compiled, package (compiled at first use), missing or broken."""
    try:
        from benchmarks import registry
        from benchmarks.table import Table

        ids, compiled = registry.known_ids(), set(registry.compiled_ids())
    except Exception as error:
        warnings.append(f"tables cannot be listed ({type(error).__name__}: {error})")
        return []
    tables = []
    for id in ids:
        entry: dict[str, Any] = {"id": id, "state": "missing", "rows": None, "bytes": None, "get": None}
        try:
            if id in compiled:
                path = registry.table_path(id)
                entry |= {"state": "compiled", "bytes": path.stat().st_size}
                entry["rows"] = len(Table.open(path))
            elif registry.is_available(id):
                entry["state"] = "package"
            else:
                entry["get"] = registry.BENCHMARKS[id].how_to_get()
        except Exception as error:
            entry["state"] = "broken"
            warnings.append(f"the table {id} cannot be read ({error})")
        tables.append(entry)
    return tables


# -- hardware ------------------------------------------------------------------------------------------------------


def _device(warnings: list[str]) -> dict[str, Any]:
    device: dict[str, Any] = {
        "cuda": False,
        "cuda_version": None,
        "cores": os.cpu_count(),
        "devices": [],
        "error": None,
    }
    try:
        import torch

        device["cuda_version"] = torch.version.cuda
        device["cuda"] = torch.cuda.is_available()
        for index in range(torch.cuda.device_count() if device["cuda"] else 0):
            properties = torch.cuda.get_device_properties(index)
            device["devices"].append(
                {
                    "name": properties.name,
                    "memory_bytes": properties.total_memory,
                    "capability": f"{properties.major}.{properties.minor}",
                }
            )
    except Exception as error:
        device["error"] = f"{type(error).__name__}: {error}"
        warnings.append(f"torch cannot be used ({device['error']})")
    return device


def _start_probe() -> tuple[subprocess.Popen[str], tempfile.TemporaryDirectory[str]]:
    cache = tempfile.TemporaryDirectory(prefix="nasforge-doctor-")  # its own: a cached kernel would prove nothing
    environment = {**os.environ, "TRITON_CACHE_DIR": cache.name}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-P", str(Path(__file__).with_name("triton_probe.py"))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(command, env=environment, text=True, **pipes), cache  # type: ignore[call-overload]


def _read_probe(process: subprocess.Popen[str], cache: tempfile.TemporaryDirectory[str]) -> dict[str, Any]:
    try:
        output, errors = process.communicate(timeout=TRITON_SECONDS)
        answer = json.loads(output.strip().splitlines()[-1])
        return {"imports": True, "kernel": answer["kernel"], "error": answer["error"]}
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"imports": None, "kernel": None, "error": f"no answer within {TRITON_SECONDS} seconds"}
    except (IndexError, ValueError, KeyError):
        last = errors.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        return {"imports": False, "kernel": None, "error": last[0]}
    finally:
        cache.cleanup()


def _triton(answer: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    """`imports` and `kernel` are null where they were not tried."""
    compiler = next(
        (found for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and (found := shutil.which(c))), ""
    )
    report = {"version": _version("triton"), "imports": None, "kernel": None, "error": None, **answer}
    if report["error"]:
        warnings.append(f"triton does not work ({report['error']})")
    if report["version"] and not compiler:
        warnings.append("no C compiler: triton needs one to launch kernels (install gcc or set CC)")
    return {**report, "compiler": compiler or None}
