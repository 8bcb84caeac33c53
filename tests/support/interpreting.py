"""How tests run Triton's interpreter, in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses
import warnings

import torch


def prepare(sanitize: bool = False) -> None:
    """Make uninitialised memory NaN, so that an element that no program wrote is found.

    sanitize: also look for integers that overflow, a third of the interpreter's time; the small shapes of quick tests
    have none.
    """
    from triton.runtime.interpreter import interpreter_builder

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, of infinities
    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=sanitize)
