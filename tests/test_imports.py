"""Importing is cheap, and every public name is there."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "scipy", "matplotlib", "pyarrow", "networkx", "sklearn", "rich", "typer", "triton", "torch_geometric")


def fresh(code: str) -> str:
    """What `code` prints in a new process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", ["nas", "search_spaces", "benchmarks"])
def test_import_loads_nothing_heavy(package):
    code = f"""
import json, sys, time
begin = time.perf_counter()
import {package}
seconds = time.perf_counter() - begin
dir({package})
print(json.dumps([seconds, sorted(sys.modules)]))
"""
    seconds, modules = json.loads(fresh(code))
    print(f"import {package}: {1000 * seconds:.1f} ms, {len(modules)} modules")
    assert [name for name in HEAVY if name in modules] == []
    assert package in modules


def test_the_check_would_see_a_heavy_module():
    assert "networkx" in json.loads(fresh("import json, sys, networkx; print(json.dumps(list(sys.modules)))"))


@pytest.mark.parametrize("package", ["nas", "search_spaces", "benchmarks"])
def test_every_public_name_resolves(package):
    module = importlib.import_module(package)
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names))
    assert not set(names) - set(dir(module))
    for name in names:
        assert getattr(module, name) is not None
    if names:
        with pytest.raises(AttributeError, match="no_such_name"):
            module.no_such_name  # noqa: B018


@pytest.mark.parametrize("package", ["nas", "search_spaces"])
def test_types_are_imported_from_where_the_names_live(package):
    """What a type checker sees under TYPE_CHECKING is what __getattr__ loads."""
    import ast

    module = importlib.import_module(package)
    with open(module.__file__) as file:
        tree = ast.parse(file.read())
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.name: node.module for block in blocks for node in block.body for alias in node.names}
    assert seen == module._HOMES


def test_the_home_of_nni_is_not_imported_with_its_bridge():
    code = "import sys, nas.interop.nni; print([m for m in ('nni', 'torch', 'scipy') if m in sys.modules])"
    assert fresh(code).strip() == "[]"
