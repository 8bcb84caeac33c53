"""A script in two processes, begun by torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_in_two(script: str, folder: Path) -> None:
    """Run tests/support/`script` with `folder` as its argument in two processes of one thread; an error fails."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*launch, str(ROOT / "tests" / "support" / script), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        for child in _descendants(process.pid):  # processes that wait for each other outlive their launcher
            os.kill(child, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors[-3000:]


def _descendants(pid: int) -> list[int]:
    """A process and all that it began, by /proc."""
    children = [int(k) for p in Path(f"/proc/{pid}/task").glob("*/children") for k in p.read_text().split()]
    return [pid, *(k for child in children for k in _descendants(child))]
