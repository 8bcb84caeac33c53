"""Where fused layers run, decided by installation, device and type; importing this imports no Triton."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch
from torch import Tensor

from search_spaces.common.errors import UserError
from search_spaces.common.names import match

BACKENDS = ("auto", "triton", "eager", "compile", "reference")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what kernels read and write; float64 takes torch's path
# Read once: torch.compile may not look these up while it traces a model.
HAVE_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAVE_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def compiler() -> str | None:
    """The C compiler that Triton builds its launchers with: $CC, gcc or clang."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


COMPILER = compiler()
exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # is_exporting is newer than 2.6


def obstacle() -> str:
    """Why no kernel can run in this process, or ""."""
    if not HAVE_TRITON:
        return "Triton is not installed"
    if INTERPRETED:
        return ""
    if not torch.cuda.is_available():
        return "no GPU is here"
    return "" if COMPILER else "no C compiler is here, which Triton needs to launch kernels (install gcc or set CC)"


def resolve(backend: str) -> str:
    """The canonical name of a backend.

    `auto`: Triton where it can run, torch elsewhere. `triton`: the same, but an error where it cannot run at all.
    `eager`: the layers' own code. `compile`: torch.compile. `reference`: the operators by their torch executor, which
    keeps as little for the backward as the kernels do but is slower than eager. Errors: UserError for an unknown name,
    and for `triton` where no kernel can run.
    """
    backend = match(backend, BACKENDS, "a backend")
    if backend == "triton" and (reason := obstacle()):
        raise UserError("triton", f"a process in which Triton kernels can run ({reason})", "auto")
    return backend


def by_kernels(x: Tensor) -> bool:
    """Whether Triton kernels run on `x`: its type, its device and what is installed."""
    if x.is_cuda:
        here = HAVE_TRITON and COMPILER is not None
    else:
        here = INTERPRETED and x.device.type == "cpu"
    return here and x.dtype in FLOATS


def by_operator(x: Tensor, backend: str) -> bool:
    """Whether a fused module calls its operator on `x` or the code it had before it was fused.

    The latter also while a model is exported, so that other runtimes can read it.
    """
    if backend == "reference":
        wanted = x.dtype in FLOATS
    else:
        wanted = backend in ("auto", "triton") and by_kernels(x)
    return wanted and not exporting() and not torch.jit.is_tracing()


def recomputing() -> bool:
    """Whether this forward runs inside a backward, as checkpointing does: running statistics were updated before."""
    if torch.compiler.is_compiling():  # compiled graphs recompute without the updates
        return False
    return torch._C._current_graph_task_id() != -1


def check_dense(x: Tensor) -> None:
    """Errors: UserError for what is not a dense floating-point tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.layout != torch.strided:
        about = f"{x.dtype}, {x.layout}" if isinstance(x, Tensor) else type(x).__name__
        raise UserError(about, "a dense tensor of floating-point numbers", "x.float()")
