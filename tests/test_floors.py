"""An import only ever goes down: every import in the six packages is read and checked."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {  # what each package may import of the others
    "nas": {"predictors", "kernels", "benchmarks", "zero_cost", "search_spaces"},
    "predictors": {"search_spaces", "zero_cost"},
    "kernels": {"search_spaces"},
    "benchmarks": {"search_spaces"},
    "zero_cost": set(),
    "search_spaces": set(),
}
DOTTED = re.compile(rf"({'|'.join(BELOW)})(\.\w+)+(:\w+)?")  # a module named in a string: lazy tables, import_module
# These floors are copied to GPU machines that have nothing else.
GPU_FLOORS = ("kernels", "search_spaces/layers", "search_spaces/primitives")
GPU_MODULES = {"torch", "triton", "numpy", *BELOW, *sys.stdlib_module_names}


def sources(folder: Path) -> list[Path]:
    """The Python files of a package; `benchmarks/speed` holds scripts and is none."""
    files = (path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)
    return sorted(path for path in files if "benchmarks/speed" not in path.as_posix())


def imports(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in a file: at any depth, under TYPE_CHECKING, relative, in a string.

    package: the dotted package that the file belongs to, for relative imports.
    """
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.fullmatch(node.value):
            yield node.lineno, node.value.partition(":")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def crossings(root: Path) -> list[str]:
    """`file:line imports module` for every import that goes up or sideways, or names the speed scripts."""
    found = []
    for package, allowed in BELOW.items():
        for path in sources(root / package):
            relative = path.relative_to(root)
            for line, module in imports(path, ".".join(relative.parts[:-1])):
                top = module.split(".")[0]
                crosses = top in BELOW and top != package and top not in allowed
                if crosses or module.startswith("benchmarks.speed") or top == "tests":
                    found.append(f"{relative}:{line} imports {module}")
    return found


def test_imports_only_go_down():
    assert crossings(ROOT) == []


def test_the_check_reads_the_whole_tree():
    for package in BELOW:
        assert ROOT / package / "__init__.py" in sources(ROOT / package)
    loop = {module.split(".")[0] for _, module in imports(ROOT / "nas" / "loop.py", "nas")}
    assert {"nas", "search_spaces", "numpy"} <= loop


@pytest.mark.parametrize(
    ("package", "source", "refused"),
    [
        ("search_spaces", "import benchmarks.table", True),
        ("search_spaces", "from search_spaces.graph import OpGraph\nimport torch", False),
        ("search_spaces", "from . import graph\nfrom .graph import OpGraph", False),
        ("zero_cost", "import os, search_spaces", True),
        (
            "zero_cost",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from search_spaces import OpGraph",
            True,
        ),
        ("benchmarks", "def later():\n    from predictors import fit", True),
        ("benchmarks", "from search_spaces.space import SearchSpace", False),
        ("kernels", "import zero_cost.probe", True),
        ("kernels", "import importlib\nimportlib.import_module('nas')", True),
        ("predictors", "from zero_cost import score\nfrom search_spaces import OpGraph", False),
        ("predictors", "HOMES = {'search': 'nas.loop'}", True),
        ("predictors", "SPACES = {'a': 'benchmarks.table:Table'}", True),
        ("predictors", "'''nas.loop is a module'''\nx = 'kernels of size 3.5'", False),
        ("nas", "import kernels, predictors, benchmarks.registry, zero_cost, search_spaces", False),
        ("nas", "from benchmarks.speed import speed_loop", True),
        ("nas", "import benchmarks.speed.speed_loop", True),
        ("nas", "from tests.conftest import DATA", True),
        ("nas", "import nasa, benchmarks_of_others", False),
    ],
)
def test_the_check_itself(tmp_path, package, source, refused):
    (tmp_path / package / "inner").mkdir(parents=True)
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / "inner" / "module.py").write_text(source)
    found = crossings(tmp_path)
    assert bool(found) == refused
    assert all(line.startswith(f"{package}/inner/module.py:") for line in found)


def test_the_scripts_of_benchmarks_speed_are_skipped(tmp_path):
    (tmp_path / "benchmarks" / "speed").mkdir(parents=True)
    (tmp_path / "benchmarks" / "speed" / "speed_loop.py").write_text("import nas")
    assert crossings(tmp_path) == []


def test_no_file_is_named_like_one_of_the_packages():
    here = (path for folder in (*BELOW, "tests") for path in (ROOT / folder).rglob("*.py"))
    assert [path for path in here if path.stem in BELOW] == []


def test_speed_scripts_say_so():
    assert [p.name for p in (ROOT / "benchmarks" / "speed").rglob("*.py") if not p.name.startswith("speed_")] == []


def test_only_the_command_line_knows_rich_and_typer():
    users = {
        str(path.relative_to(ROOT))
        for package in BELOW
        for path in sources(ROOT / package)
        for _, module in imports(path, package)
        if module.split(".")[0] in ("rich", "typer")
    }
    assert [user for user in users if not user.startswith("nas/cli/")] == []


def test_nothing_below_the_third_floor_prints():
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in BELOW
        if package != "nas"
        for path in sources(ROOT / package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


def test_what_runs_on_a_gpu_machine_needs_only_torch_triton_and_numpy():
    foreign = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for folder in GPU_FLOORS
        for path in sources(ROOT / folder)
        for line, module in imports(path, folder.replace("/", "."))
        if module.split(".")[0] not in GPU_MODULES
    ]
    assert foreign == []
