"""The README's commands and programs, executed as they stand there, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def blocks() -> list[tuple[str, str]]:
    return re.findall(r"^```(bash|python)\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_everything_in_the_readme_runs(tmp_path, nas_bench_201, shared_table):
    """`$CIFAR10` is the user's folder of CIFAR-10."""
    environment = {
        "CIFAR10": str(shared_table("cifar10/train.parquet").parent),
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    assert len(blocks()) >= 6
    for language, text in blocks():
        command = ["bash", "-e", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip()
    assert (tmp_path / "runs" / "first" / "report.html").exists()
    assert (tmp_path / "docs" / "compare-cifar10.svg").exists()


def test_pictures_and_pages_that_the_readme_names_are_there():
    text = re.sub(r"```.*?```|`[^`]*`", "", README.read_text(), flags=re.DOTALL)
    names = re.findall(r"\]\(([^)#:]+)\)", text)
    assert len(names) >= 3
    for name in names:
        assert (README.parent / name).exists(), name
